"""Turn documents into a data folder: token shards, `manifest.json` and `tokenizer/`.

python -m data_prep.prepare data/shakespeare --source shakespeare.txt
python -m data_prep.prepare data/fineweb-edu --source HuggingFaceFW/fineweb-edu --name sample-10BT
python -m data_prep.prepare data_prep/configs/gpt3_mixture.yaml

Killed at any moment, the same command goes on from the last finished shard and writes the same bytes.
"""

import os
import shlex
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field

from data_prep.common.command_line import ArgumentParser, UserError, option, raise_all, run
from data_prep.common.files import partial_name
from data_prep.common.locks import LOCK_NAME, locked
from data_prep.common.schema import STRICT, Positive, read_yaml, validate
from data_prep.sharding.manifest import FILE_NAME, Manifest
from data_prep.sharding.shards import Dtype, Format, smallest_dtype
from data_prep.sharding.writer import SHARDS_OF_A_SMALL_CORPUS, Writer, remove_files
from data_prep.sources.corpus import Corpus, files_read
from data_prep.sources.opening import open_source
from data_prep.sources.source import Position, Source
from data_prep.tokenization.gigatoken import Engine, with_engine
from data_prep.tokenization.tokenizer import (
    Encoder,
    TokenIds,
    Tokenizer,
    describe_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

SHARD_TOKENS = 100_000_000
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the contents of a data folder, and its share of a mixture."""

    __pydantic_config__ = STRICT

    source: Source
    tokenizer: str = option(
        "gpt2", "'gpt2'; 'bpe' for one trained on the text; or a folder or name that AutoTokenizer loads"
    )
    vocab_size: Positive = option(4096, "tokens of a trained tokenizer, end of text included", type=int)
    shard_tokens: Positive | None = option(
        None, "tokens in a shard; 100M by default, or a twentieth of a smaller local corpus", type=int
    )
    val_shards: Positive = option(1, "number of validation shards, which are the first ones", type=int)
    dtype: Dtype | None = option(
        None, "by default the smaller one that holds the vocabulary", choices=("uint16", "uint32")
    )
    format: Format = option("npy", "of the shards; bin is llm.c's", choices=("npy", "bin"))
    on_bad_file: Literal["stop", "skip"] = option(
        "stop", "skip: leave out and list a file that cannot be read, from there on", choices=("stop", "skip")
    )
    weight: Annotated[float, Field(gt=0)] | None = None

    def open_source(self, commit: str | None = None) -> Corpus:
        """As `open_source`, with this recipe's rule for files that cannot be read."""
        return open_source(self.source, commit, skip_bad_files=self.on_bad_file == "skip")


def prepare(recipe: Recipe, folder: Path, workers: int | None = None, engine: Engine = "auto") -> Manifest:
    """Creates or completes a data folder. A complete folder with the same recipe is returned as it is.

    Args:
        workers: tokenizing threads, by default one a core. The result does not depend on them.
        engine: that runs byte-level BPE. The result does not depend on it.

    Raises:
        UserError: for any error that the user can fix. Finished shards are kept; without any, nothing is left.
    """
    try:
        has_manifest = (folder / FILE_NAME).exists()
        if not has_manifest and folder.exists() and not _is_ours(set(os.listdir(folder))):
            raise UserError(f"{folder} exists and is not a data folder (no {FILE_NAME}); choose another name")
        if has_manifest and (manifest := Manifest.load(folder)).unfinished is None:
            _check_same(recipe, folder, manifest)
            if not manifest.source.commit:  # a commit cannot change, and needs no network
                _reopen(recipe, folder, manifest)
            return Manifest.read(folder)
        with locked(folder):
            return _prepare(recipe, folder, workers or _cores(), engine)
    except OSError as error:
        raise UserError(f"{folder}: {error}") from error
    finally:
        with suppress(OSError):  # not empty, unless preparation could not begin
            folder.rmdir()


def _is_ours(names: set[str]) -> bool:
    """Whether a folder without a manifest is empty, or contains only what a killed preparation leaves."""
    files = {LOCK_NAME, partial_name(FILE_NAME)}
    return names <= (files | {"tokenizer"} if LOCK_NAME in names else files)


def _prepare(recipe: Recipe, folder: Path, workers: int, engine: Engine) -> Manifest:
    manifest = Manifest.load(folder) if (folder / FILE_NAME).exists() else None
    if manifest is not None and manifest.shards:
        _check_same(recipe, folder, manifest)
        corpus = _reopen(recipe, folder, manifest)
        if problems := manifest.problems(folder):
            raise UserError(f"{problems[0]}; {manifest.remedy}")
        tokenizer = load_tokenizer(folder / "tokenizer")
        return Writer(folder, manifest).write(corpus, _encoder(recipe, tokenizer, engine), workers)
    remove_files(folder)  # of a preparation that was killed in its first shard
    writer = None
    try:
        corpus = recipe.open_source()
        tokenizer, manifest = _begin(recipe, corpus, folder)
        writer = Writer(folder, manifest)
        return writer.write(corpus, _encoder(recipe, tokenizer, engine), workers)
    except BaseException:
        if writer is None or not writer.manifest.shards:
            remove_files(folder)
        raise


def _encoder(recipe: Recipe, tokenizer: Tokenizer, engine: Engine) -> Encoder:
    return with_engine(tokenizer, engine) if recipe.source.tokens_column is None else TokenIds(tokenizer)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_same(recipe: Recipe, folder: Path, manifest: Manifest) -> None:
    """Refuses a folder made with a different recipe (`UserError`)."""
    names = {"gpt2": "gpt2", "bpe": f"bpe-{recipe.vocab_size}"}
    wanted = {
        **recipe.source.describe(),
        "tokenizer": names.get(recipe.tokenizer, recipe.tokenizer),
        "shard_tokens": manifest.shard_tokens if recipe.shard_tokens is None else recipe.shard_tokens,
        "val_shards": recipe.val_shards,
        "dtype": recipe.dtype or manifest.dtype,
        "format": recipe.format,
    }
    found = asdict(manifest) | asdict(manifest.source) | {"tokenizer": manifest.tokenizer.name}
    _refuse_difference(folder, wanted, found)


def _reopen(recipe: Recipe, folder: Path, manifest: Manifest) -> Corpus:
    """Opens the corpus recorded in the manifest (`UserError` if its files have changed)."""
    corpus = recipe.open_source(manifest.source.commit)
    _refuse_difference(folder, asdict(corpus.describe()), asdict(manifest.source))
    return corpus


def _refuse_difference(folder: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    if different := [key for key in wanted if wanted[key] != found.get(key)]:
        details = ", ".join(f"{key}={found.get(key)!r} (now: {wanted[key]!r})" for key in different)
        raise UserError(f"{folder} was made with {details}; choose another folder, or remove this one")


def _default_shard_tokens(corpus: Corpus) -> int:
    if not corpus.is_local or not corpus.bytes:
        return SHARD_TOKENS
    return min(SHARD_TOKENS, max(1, corpus.bytes // (_BYTES_PER_TOKEN * SHARDS_OF_A_SMALL_CORPUS)))


def _begin(recipe: Recipe, corpus: Corpus, folder: Path) -> tuple[Tokenizer, Manifest]:
    """Makes the tokenizer and writes a manifest without shards."""
    trains = recipe.tokenizer == "bpe"
    if trains and not corpus.is_local:
        raise UserError("a tokenizer is trained on local text only, not on a stream; use --tokenizer gpt2")
    if trains and recipe.source.tokens_column is not None:
        raise UserError("a tokenizer is trained on text, not on token ids; name the --tokenizer that made the ids")
    tokenizer = train_tokenizer(corpus.documents(), recipe.vocab_size) if trains else load_tokenizer(recipe.tokenizer)
    dtype = recipe.dtype or smallest_dtype(tokenizer.vocab_size)
    if tokenizer.vocab_size > (limit := np.iinfo(dtype).max + 1):
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, {dtype} holds {limit}; use dtype uint32")
    manifest = Manifest(
        source=corpus.describe(),
        tokenizer=describe_tokenizer(tokenizer, tokenizer.save(folder / "tokenizer")),
        format=recipe.format,
        dtype=dtype,
        shard_tokens=recipe.shard_tokens or _default_shard_tokens(corpus),
        val_shards=recipe.val_shards,
        files_not_read=corpus.not_read,
        cleaning=corpus.cleaning(),
        unfinished=Position(),
    )
    manifest.write(folder)
    return tokenizer, manifest


def preparing_command(folder: str, manifest: Manifest) -> list[str]:
    """Words of the command that prepares such a folder, without `python -m`; empty for registered shards."""
    if manifest.is_registered:
        return []
    source, name = manifest.source, manifest.tokenizer.name
    tokenizer = ["bpe", "--vocab_size", str(manifest.tokenizer.vocab_size)] if name.startswith("bpe-") else [name]
    words = ["data_prep.prepare", folder, "--source", source.source, "--tokenizer", *tokenizer]
    given = asdict(source) | {"revision": source.commit or source.revision}
    for key in ("name", "revision", "split", "text_column", "tokens_column"):
        words += [f"--{key}", given[key]] if given[key] != getattr(Source, key) else []
    words += [word for condition in source.where for word in ("--where", condition)]
    words += ["--on_bad_file", "skip"] if manifest.bad_files else []
    words += ["--shard_tokens", str(manifest.shard_tokens), "--val_shards", str(manifest.val_shards)]
    return [*words, "--dtype", manifest.dtype, "--format", manifest.format]


@dataclass(frozen=True)
class _RecipeFile:
    __pydantic_config__ = STRICT

    folders: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


def read_recipes(path: Path) -> dict[Path, Recipe]:
    """Reads a YAML file with a recipe per folder; settings are the options of `python -m data_prep.prepare`, plus
    `weight` (`UserError` for an invalid file)."""
    folders = validate(read_yaml(path), _RecipeFile, str(path)).folders
    recipes = {}
    for name, settings in folders.items():
        source = {field.name: settings.pop(field.name) for field in fields(Source) if field.name in settings}
        recipes[Path(name)] = validate(settings | {"source": source}, Recipe, f"{path}: {name}")
    missing = [name for name, recipe in recipes.items() if recipe.weight is None]
    if missing and len(missing) < len(recipes):
        raise UserError(f"{path}: {missing[0]} has no weight, others have; give all folders one, or none")
    return recipes


def check_sources(recipes: dict[Path, Recipe]) -> None:
    """Opens every source now, since the last folder may start days after the first (`UserError` with all problems)."""
    problems = []
    for folder, recipe in recipes.items():
        try:
            recipe.open_source()
        except UserError as error:
            problems.append(f"{folder}: {error}")
    raise_all(problems, "folders cannot be prepared")


def training_flags(recipes: dict[Path, Recipe]) -> str:
    """Trainer options that select these folders."""
    weights = [f"{recipe.weight:g}" for recipe in recipes.values() if recipe.weight is not None]
    return f"--data {shlex.join(map(str, recipes))}" + (f" --data_weights {' '.join(weights)}" if weights else "")


def main() -> None:
    parser = ArgumentParser("python -m data_prep.prepare", __doc__)
    parser.add_argument("folder", type=Path, help="data folder to make, or to go on with; or a recipe file of folders")
    parser.add_fields(Source, required=False)
    parser.add_fields(Recipe)
    workers = "tokenizing threads, by default one for each core; what tiktoken cannot run takes all cores anyway"
    parser.add_option("workers", type=int, help=workers)
    engines = "what runs byte-level BPE; auto: gigatoken where it is installed; the result is the same"
    parser.add_option("engine", default="auto", choices=get_args(Engine), help=engines)
    options = vars(parser.parse_args())
    folder, workers, engine = options.pop("folder"), options.pop("workers"), options.pop("engine")
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    if folder.suffix in (".yaml", ".yml"):
        if given := [name for name, value in options.items() if value != parser.get_default(name)]:
            raise UserError(f"{folder}: {given[0]} is a setting in the recipe file; give --workers and --engine only")
        recipes = read_recipes(folder)
        check_sources(recipes)
        for name, recipe in recipes.items():
            _report(name, prepare(recipe, name, workers, engine))
        print(f"for the trainer: {training_flags(recipes)}")
        return
    if options["source"] is None:
        raise UserError("no --source is given, and no recipe file: builtin, a file, a folder or a data set of the Hub")
    source = {field.name: options.pop(field.name) for field in fields(Source)}
    recipe = validate({"source": source, **options}, Recipe, "settings")
    _report(folder, prepare(recipe, folder, workers, engine))


def _report(folder: Path, manifest: Manifest) -> None:
    if manifest.source.files:
        print(files_read(manifest.source.files, manifest.files_not_read, manifest.bad_files))
    if dropped := manifest.dropped_tokens:
        reason = "the rest of the document that validation ends in, which training must not see"
        print(f"dropped {dropped:,} tokens: {reason}")
    if manifest.split_document:
        print("validation ends within a document, and training begins with its rest, as there is no other")
    print(
        f"{folder}: {manifest.tokens('train'):,} training and {manifest.tokens('val'):,} validation tokens in "
        f"{len(manifest.shards)} shards, tokenizer {manifest.tokenizer.name}"
    )


if __name__ == "__main__":
    run(main)
