"""Opens a source: finds the files that it stands for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError, first_line
from data_prep.common.hub import Retries, is_transient, limit_waiting
from data_prep.sources.builtin import BuiltinCorpus
from data_prep.sources.corpus import Corpus, files_read
from data_prep.sources.fields import Fields
from data_prep.sources.files import check_regular, count_by_suffix, find_files, is_documentation, names_files
from data_prep.sources.formats import FORMATS, STREAMED, datasets_format, is_read_here, make_builder
from data_prep.sources.source import BUILTIN, Source

RESOLVE_DELAYS = (1, 2, 4)  # seconds before each new attempt if the network fails


def open_source(source: Source, commit: str | None = None, skip_bad_files: bool = False) -> Corpus:
    """Finds the files of a source (`UserError` if it cannot be read).

    Args:
        commit: of a data set on the Hub, from an earlier call.
        skip_bad_files: skip and list a file that cannot be read, from there on.
    """
    Fields(source)  # refuses wrong conditions
    retries = Retries(RESOLVE_DELAYS, "run the same command again")
    while True:
        try:
            return replace(_find(source, commit, skip_bad_files), bad_files={} if skip_bad_files else None)
        except UserError:
            raise
        except Exception as error:
            retries.wait(f"source {source.source!r}", error)


def _find(source: Source, commit: str | None, skip_bad_files: bool) -> Corpus:
    if source.source == BUILTIN:
        if source != Source(BUILTIN):
            options = "--name, --split, --text_column, --tokens_column and --where"
            raise UserError(f"source {BUILTIN!r} is plain text; {options} do not apply")
        return BuiltinCorpus.find(source)
    if not names_files(source.source):
        return _on_the_hub(source, commit)
    return _of_files(source, skip_bad_files)


def _of_files(source: Source, skip_bad_files: bool) -> Corpus:
    """Chooses among the files found: those read here, else those of one format that `datasets` reads; documentation
    only if there is nothing else."""
    filesystem, found, hidden = find_files(_saved_files(source) or source.source)
    here = [path for path in found if is_read_here(path)]
    paths = [path for path in here if not is_documentation(path)]
    others = [] if paths else [path for path in found if datasets_format(path)]
    chosen = paths or others or here
    not_read = count_by_suffix(sorted({*found} - {*chosen}), hidden)
    if not chosen:
        formats, counts = ", ".join([*FORMATS, *STREAMED]), files_read(0, not_read, {})
        raise UserError(f"source {source.source!r}: no file in it is in a format that is read: {formats}; {counts}")
    if different := [path for path in others if datasets_format(path) != datasets_format(others[0])]:
        several = f"files of several formats, {others[0]} and {different[0]}"
        raise UserError(f"source {source.source!r}: {several}; name one of them with a pattern")
    if not skip_bad_files:
        check_regular(filesystem, chosen)
    sizes = [0 if skip_bad_files and not filesystem.exists(path) else filesystem.size(path) for path in chosen]
    builder = make_builder(source, filesystem, others[0]) if others else None
    return Corpus(source, None, chosen, sizes, filesystem, builder, not_read)


def _saved_files(source: Source) -> str | None:
    """Pattern for the files that `save_to_disk` wrote into a folder (`UserError` if it lacks the split); None for other
    sources."""
    folder = Path(source.source).expanduser()
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if source.split not in splits:
            raise UserError(f"source {source.source!r} has no split {source.split!r}; it has: {', '.join(splits)}")
        folder = folder / source.split
    return f"{folder}/*.arrow" if (folder / "state.json").is_file() else None


def _on_the_hub(source: Source, commit: str | None) -> Corpus:
    import datasets
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    limit_waiting()
    try:
        commit = commit or HfApi().dataset_info(source.source, revision=source.revision).sha
        builder = datasets.load_dataset_builder(source.source, source.name, revision=commit)
    except (HfHubHTTPError, OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        if is_transient(error):
            raise
        text = f"source {source.source!r} is no local file, and the Hub's data set of that name cannot be read"
        raise UserError(f"{text}: {first_line(error)}") from error
    files = {str(split): paths for split, paths in (builder.config.data_files or {}).items()}
    if source.split not in files:
        known = ", ".join(files) or "no data files"
        raise UserError(f"source {source.source!r} has no split {source.split!r}; it has: {known}")
    filesystem: Any = HfFileSystem()
    paths = [filesystem._strip_protocol(path) for path in files[source.split]]
    folders = dict.fromkeys(path.rpartition("/")[0] for path in paths)  # one request for each folder
    all_sizes = {entry["name"]: entry["size"] for folder in folders for entry in filesystem.ls(folder, detail=True)}
    sizes = [all_sizes[path] for path in paths]
    return Corpus(source, commit, paths, sizes, filesystem, None if all(map(is_read_here, paths)) else builder)
