"""Files that a source stands for, local or on any `fsspec` file system."""

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.common.command_line import UserError
from data_prep.common.files import describe_path
from data_prep.sources.formats import is_plain_text, is_read_here, suffixes

# Files in the output of data_prep.clean: from the start on, and once it is complete.
CLEANING_CONFIG, CLEANING_REPORT = "config.json", "cleaning.json"
_DOCUMENTATION = re.compile(r"readme([^a-z].*)?|licen[sc]e|copying|changelog|citation", re.IGNORECASE)
_MOST_SUFFIXES = 20  # that are counted apart


def names_files(source: str) -> bool:
    """Whether a source is a path or a pattern rather than the name `OWNER/NAME` of a data set."""
    return (
        "://" in source
        or source.startswith(("/", ".", "~"))
        or is_read_here(source)
        or any(c in source for c in "*?[")
        or source.count("/") != 1
        or Path(source).exists()
    )


def find_files(pattern: str) -> tuple[Any, list[str], int]:
    """Returns the file system, the files of a folder, pattern or name, and the number of hidden files (`UserError` if
    nothing matches).

    Hidden are, as in `datasets`, names that begin with a dot, and what is in folders whose names begin with a dot or
    with two underscores, unless the pattern has such names itself.
    """
    import fsspec

    if "://" not in pattern:
        pattern = str(Path(pattern).expanduser())
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
    except (ImportError, ValueError) as error:  # a protocol that is unknown or not installed
        raise UserError(f"source {pattern!r}: {' '.join(str(error).split())}") from error
    is_local, is_folder = "file" in filesystem.protocol, filesystem.isdir(path)
    if is_folder:
        if is_local and (kind := describe_path(Path(path))):
            raise UserError(f"source {pattern!r} is no folder of documents; it is {kind}")
        if Path(pattern, CLEANING_CONFIG).is_file() and not Path(pattern, CLEANING_REPORT).is_file():
            raise UserError(f"source {pattern!r}: its cleaning has not finished; run the same data_prep.clean again")
    elif filesystem.exists(path):
        return filesystem, [path], 0
    elif not any(c in path for c in "*?["):
        raise UserError(f"source {pattern!r}: no such file or folder")
    if is_local:
        found = list(_local_files(path))
    elif is_folder:
        found = filesystem.find(path)
    else:
        found = [name for name in filesystem.glob(path) if not filesystem.isdir(name)]
    visible = [name for name in found if _hidden_parts(name) <= _hidden_parts(path)]
    return filesystem, sorted(visible), len(found) - len(visible)


def _local_files(pattern: str) -> Iterator[str]:
    """Files of a folder or a pattern. Links to folders are followed, but not those to a folder that contains the link;
    each folder is read once, by the path with the fewest links."""
    from fsspec.utils import glob_translate

    parts = pattern.split("/")
    count = next((n for n in range(len(parts), 1, -1) if os.path.isdir("/".join(parts[:n]))), 1)
    root, rest = "/".join(parts[:count]) or "/", parts[count:]  # what exists is no pattern, whatever is in its name
    matches = re.compile(glob_translate("/".join([glob.escape(root), *rest])) if rest else "").match
    depth = len(rest) if rest and "**" not in rest else None
    folders, seen = [(0, root)], set()
    while folders:
        links, folder = heappop(folders)
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        for entry in _entries(folder):
            if not entry.is_dir():
                if matches(entry.path):
                    yield entry.path
            elif depth is None or entry.path.count("/") - root.count("/") < depth:
                target = os.path.realpath(entry.path)
                if not entry.is_symlink() or os.path.commonpath([target, real]) != target:
                    heappush(folders, (links + entry.is_symlink(), entry.path))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError as error:
        if PurePosixPath(folder).name.startswith("."):
            return []
        raise UserError(f"{folder}: cannot be read ({error.strerror}); name what can be with a pattern") from error


def check_regular(filesystem: Any, paths: Sequence[str]) -> None:
    """Refuses local pipes and devices, which may never end (`UserError`)."""
    for path in paths if "file" in filesystem.protocol else ():
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: not a regular file; name a file, or a folder of files")


def _hidden_parts(path: str) -> int:
    *folders, name = PurePosixPath(path).parts
    return name.startswith(".") + sum(folder.startswith((".", "__")) for folder in folders)


def is_documentation(path: str) -> bool:
    """Whether a text file, by its name, documents the data next to it: README.txt, LICENSE.txt and the like."""
    return is_plain_text(path) and _DOCUMENTATION.fullmatch(PurePosixPath(path).name.split(".")[0]) is not None


def count_by_suffix(paths: Sequence[str], hidden: int) -> dict[str, int]:
    """Counts files by suffix, most frequent first; hidden files and rare suffixes are grouped."""
    counts = Counter(PurePosixPath(p).name if is_documentation(p) else "".join(suffixes(p)) or "others" for p in paths)
    counts.update({"hidden": hidden} if hidden else {})
    # Names may have bytes that are no text.
    shown = {name.encode("utf-8", "replace").decode(): n for name, n in counts.most_common(_MOST_SUFFIXES)}
    rest = counts.total() - sum(shown.values())
    return shown | ({"others": shown.get("others", 0) + rest} if rest else {})
