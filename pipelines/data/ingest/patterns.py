"""Sources named by a pattern: what of the name is there literally, and what matches below it."""

import glob
import os
import re
from collections.abc import Iterator

from fsspec.utils import glob_translate

from pipelines.storage.location import Location

_MAGIC = re.compile(r"[*?\[]")


def split_pattern(location: Location) -> tuple[Location, str]:
    """The longest part of `location` that is taken as it is, and the pattern that follows; "" where there is none.

    A directory or prefix that is there under its very name, `runs [2024]` say, is no pattern.

    Raises:
        StorageError: It cannot be looked up.
    """
    if not _MAGIC.search(location.path) or location.exists():
        return location, ""
    uri = location.uri
    begin = len(uri) - len(location.path)
    for part in re.finditer("[^/]+", uri):
        is_bucket = not location.is_local and part.start() <= begin
        if is_bucket or not _MAGIC.search(part[0]):
            continue
        if part.end() == len(uri) or not Location(uri[: part.end()]).exists():
            return Location(uri[: part.start() - 1] or "/"), uri[part.start() :]
    return location, ""


def matching(base: Location, pattern: str) -> dict[str, int]:
    """Path (as `fs` has it) and size in bytes of the files below `base`, in a store, that match.

    Raises:
        StorageError: The base cannot be listed.
    """
    if not _MAGIC.search(base.path) and "//" not in base.path:
        return (base / pattern).glob()
    matches, prefix = re.compile(glob_translate(pattern)).match, base.path.rstrip("/") + "/"
    return {path: size for path, size in base.find().items() if matches(path.removeprefix(prefix))}


def local_matches(base: Location, pattern: str) -> Iterator[str]:
    """Every path below a local `base` that matches, of whatever kind."""
    for name in glob.iglob(pattern, root_dir=base.path, recursive=True, include_hidden=True):  # noqa: PTH207
        yield os.path.join(base.path, name)  # noqa: PTH118  for each of millions


def local_folders(base: Location, pattern: str) -> Iterator[str]:
    """The folders below a local `base`, itself included, that are listed to find what matches."""
    yield base.path
    parts = pattern.split("/")
    for length in range(1, len(parts)):
        yield from (path.rstrip("/") for path in local_matches(base, "/".join([*parts[:length], ""])))
