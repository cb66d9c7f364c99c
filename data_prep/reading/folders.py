"""Which files a folder or a pattern stands for."""

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data_prep.common.command_line import UserError
from data_prep.common.files import describe_path
from data_prep.reading.compression import suffixes
from data_prep.reading.files import CLEANING_CONFIG, CLEANING_REPORT
from data_prep.reading.formats import is_plain_text

_DOCUMENTATION = re.compile(r"readme([^a-z].*)?|licen[sc]e|copying|changelog|citation", re.IGNORECASE)
_MOST_SUFFIXES = 20  # that are counted apart


class LinkedFolders(LocalFileSystem):
    """Local files, where a link to a folder is a folder, unless it leads to one that contains the link."""

    def info(self, path: Any, **kwargs: Any) -> Any:
        """As in fsspec."""
        entry = super().info(path, **kwargs)
        if entry["islink"] and os.path.isdir(name := entry["name"]):
            loops = any(os.path.samefile(name, parent) for parent in Path(name).parents)
            entry["type"] = "other" if loops else "directory"
        return entry

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        """As in fsspec, whose `walk` leaves out a folder that raises an `OSError`; a `UserError` for one that is there
        and not hidden."""
        try:
            return super().ls(path, detail, **kwargs)
        except OSError as error:
            if isinstance(error, FileNotFoundError) or PurePosixPath(path).name.startswith("."):
                raise
            raise UserError(f"{path}: cannot be read ({error.strerror}); name what can be with a pattern") from error


def find_files(pattern: str) -> tuple[Any, list[str], int]:
    """The file system, the files of a folder, a pattern or a name, and the number of hidden files beside them
    (`UserError` if there is no such thing).

    Hidden are, as in `datasets`, names that begin with a dot, and what is in folders whose names begin with a dot or
    with two underscores, unless the pattern has such names itself.
    """
    if "://" not in pattern:
        pattern = str(Path(pattern).expanduser())
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
    except (ImportError, ValueError) as error:  # a protocol that is unknown or not installed
        raise UserError(f"source {pattern!r}: {' '.join(str(error).split())}") from error
    is_local = isinstance(filesystem, LocalFileSystem)
    if is_local:
        filesystem = LinkedFolders()
    if filesystem.isdir(path):
        if is_local and (kind := describe_path(Path(path))):
            raise UserError(f"source {pattern!r} is no folder of documents; it is {kind}")
        if Path(pattern, CLEANING_CONFIG).is_file() and not Path(pattern, CLEANING_REPORT).is_file():
            raise UserError(f"source {pattern!r}: its cleaning has not finished; run the same data_prep.clean again")
        found = filesystem.find(path)
    elif filesystem.exists(path):
        return filesystem, [path], 0
    elif any(c in path for c in "*?["):
        found = [p for p in filesystem.glob(_with_literal_folders(filesystem, path)) if not filesystem.isdir(p)]
    else:
        raise UserError(f"source {pattern!r}: no such file or folder")
    if is_local:
        found = _each_once([name for name in found if not os.path.isdir(name)])
    visible = [name for name in found if _hidden_parts(name) <= _hidden_parts(path)]
    return filesystem, sorted(visible), len(found) - len(visible)


def _with_literal_folders(filesystem: Any, pattern: str) -> str:
    """Escapes the leading folders of a pattern that exist under their literal name."""
    parts = pattern.split("/")
    count = 1
    while count < len(parts) and filesystem.isdir("/".join(parts[: count + 1])):
        count += 1
    return "/".join([glob.escape("/".join(parts[:count])), *parts[count:]])


def _each_once(paths: Sequence[str]) -> list[str]:
    """One path for each file in a folder that several links lead to: the one with the fewest links in it."""
    folders = {os.path.dirname(path) for path in paths}
    links = {folder: sum(place.is_symlink() for place in (Path(folder), *Path(folder).parents)) for folder in folders}
    real = {folder: os.path.realpath(folder) for folder in folders}
    found: dict[tuple[str, str], str] = {}
    for path in sorted(paths, key=lambda path: (links[os.path.dirname(path)], path)):
        folder, name = os.path.split(path)
        found.setdefault((real[folder], name), path)
    return list(found.values())


def _hidden_parts(path: str) -> int:
    *folders, name = PurePosixPath(path).parts
    return name.startswith(".") + sum(folder.startswith((".", "__")) for folder in folders)


def is_documentation(path: str) -> bool:
    """Whether a text file is about the data beside it, by its name: README.txt, LICENSE.txt and the like."""
    return is_plain_text(path) and _DOCUMENTATION.fullmatch(PurePosixPath(path).name.split(".")[0]) is not None


def count_by_suffix(paths: Sequence[str], hidden: int) -> dict[str, int]:
    """Number of files by suffix, the most frequent first; of the hidden ones, and of those with rare suffixes."""
    counts = Counter(PurePosixPath(p).name if is_documentation(p) else "".join(suffixes(p)) or "others" for p in paths)
    counts.update({"hidden": hidden} if hidden else {})
    # Names may have bytes that are no text.
    shown = {name.encode("utf-8", "replace").decode(): n for name, n in counts.most_common(_MOST_SUFFIXES)}
    rest = counts.total() - sum(shown.values())
    return shown | ({"others": shown.get("others", 0) + rest} if rest else {})
