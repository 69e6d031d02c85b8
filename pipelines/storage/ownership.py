"""Whose files lie where: places that overlap, places that are taken, and the removal of named files only.

Nothing here, and nothing that writes outputs or runs, removes a directory with what is in it: what is removed is always
a list of names that the caller's own records give, so that a file of somebody else's outlives everything.
"""

import getpass
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath

from pipelines.cli.errors import ConfigError, StorageError
from pipelines.storage.errors import clear_errors
from pipelines.storage.location import S3_PROTOCOLS, Location, json_bytes, temporary_target

_DELETERS = 16
# So many keys are looked at: a directory marker or two may come before the first object.
_KEYS = 100
OWNER = "owner.json"
_ALIASES = {"s3a": "s3", "gcs": "gs", "abfs": "az"}


def user() -> str:
    """Who runs this process: the user of MLflow's server that the environment names, by which teams on one cluster are
    told apart, else the system's."""
    named = os.environ.get("MLFLOW_TRACKING_USERNAME")
    try:
        return named or getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())


def claim(directory: Location) -> None:
    """Record there who began, unless somebody has.

    Raises:
        StorageError: It cannot be written.
    """
    (directory / OWNER).create(json_bytes({"owner": user()}))


def owner_of(directory: Location) -> str | None:
    """Who claimed it; None where that is not known, as of what earlier versions began."""
    try:
        stored = (directory / OWNER).read_json()
    except StorageError:
        return None
    owner = stored.get("owner") if isinstance(stored, dict) else None
    return owner if isinstance(owner, str) else None


def begun_by(owner: object) -> str:
    """Who began it, as the end of a clause; empty where that was this user, or is not known."""
    return f", begun by {owner}" if isinstance(owner, str) and owner != user() else ""


def first_file(location: Location, first_own: str = "") -> str | None:
    """The path, below `location`, of some file that lies there at any depth; None where there is none.

    Empty directories and markers of directories do not count; a symbolic link does. It costs one bounded listing, not
    a walk through everything.

    Args:
        location: A directory or prefix.
        first_own: Path below it of the file that its owner writes first: what a killed writer of that file left
            unfinished does not count either.

    Raises:
        StorageError: The location cannot be listed.
    """
    with clear_errors("list", location.uri):
        if location.is_local:
            return next(_walk(Path(location.path), Path(first_own)), None)
        if location.protocol in S3_PROTOCOLS:
            found = location.fs.first_keys(location.path, _KEYS)
        else:  # a store without empty directories: the first level tells
            found = []
            with suppress(FileNotFoundError, NotADirectoryError):
                found = [entry["name"] for entry in location.fs.ls(location.path, detail=True)]
        prefix = location.path.rstrip("/") + "/"
        names = (name.removeprefix(prefix) for name in found if name.startswith(prefix) and not name.endswith("/"))
        return next((name for name in names if name), None)


def _walk(root: Path, first_own: Path) -> Iterator[str]:
    for directory, folders, files in os.walk(root):
        links = [name for name in folders if Path(directory, name).is_symlink()]
        for name in sorted([*files, *links]):
            path = Path(directory, name).relative_to(root)
            if path.with_name(temporary_target(name) or name) != first_own or name == first_own.name:
                yield path.as_posix()


def delete_files(location: Location, names: Iterable[str]) -> None:
    """Remove the files of these names below `location`, and local directories that are left empty, itself included.

    Names are paths, not patterns. Nothing happens where one is missing.

    Raises:
        StorageError: One cannot be removed.
    """
    paths = [f"{location.path.rstrip('/')}/{name}" for name in names]
    with clear_errors("delete", location.uri):
        if location.is_local:
            for path in paths:
                Path(path).unlink(missing_ok=True)
            _remove_empty_directories(location, _directories(location, paths))
        elif location.protocol in S3_PROTOCOLS:
            location.fs.delete_keys(paths)
        else:
            with ThreadPoolExecutor(_DELETERS) as deleters:
                list(deleters.map(lambda path: Location(f"{location.protocol}://{path}").delete(), paths))


def _directories(location: Location, paths: Iterable[str]) -> set[Path]:
    """`location` and every directory between it and one of the paths below it."""
    root, found = Path(location.path), {Path(location.path)}
    for path in paths:
        found.update(parent for parent in Path(path).parents if parent.is_relative_to(root))
    return found


def _remove_empty_directories(location: Location, directories: Iterable[Path]) -> None:
    for directory in sorted(directories, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):  # not empty, or not there
            directory.rmdir()


def discard_temporaries(directory: Location, ours: str) -> None:
    """Remove what a killed writer left unfinished directly in this (local) directory.

    Args:
        directory: Where to look.
        ours: Regular expression of the names of whole files whose unfinished ones are to go.

    Raises:
        StorageError: One cannot be removed.
    """
    if not directory.is_local:
        return
    with clear_errors("delete", directory.uri), suppress(FileNotFoundError, NotADirectoryError):
        for path in Path(directory.path).iterdir():
            target = temporary_target(path.name)
            if target is not None and re.fullmatch(ours, target) and path.is_file():
                path.unlink(missing_ok=True)


def overlap(place: Location, other: Location) -> str | None:
    """How `place` overlaps `other`, whatever they are called: "is", "lies in", "holds", or None where they are apart.

    Local paths are compared by what they lead to: `..`, links, mounts of the same directory, and letter case where the
    file system ignores it make no difference. Keys of stores are compared without doubled slashes, `.` and `..`.
    """
    if place.is_local != other.is_local:
        return None
    ours, theirs = _identity(place), _identity(other)
    if ours[-1] & theirs[-1]:
        return "is"
    if any(theirs[-1] & ancestor for ancestor in ours[:-1]):
        return "lies in"
    return "holds" if any(ours[-1] & ancestor for ancestor in theirs[:-1]) else None


def _identity(location: Location) -> list[set[object]]:
    """What the location and each of the directories above it are known by, from the root down."""
    if location.is_local:
        path = Path(os.path.realpath(location.path))
        return [_local_identity(each) for each in (*reversed(path.parents), path)]
    protocol = _ALIASES.get(location.protocol, location.protocol)
    parts: list[str] = []
    for part in PurePosixPath(f"/{location.path}").parts[1:]:
        if part == "..":
            parts = parts[:-1]
        else:
            parts.append(part)
    return [{(protocol, *parts[:length])} for length in range(len(parts) + 1)]


def _local_identity(path: Path) -> set[object]:
    known: set[object] = {str(path)}
    with suppress(OSError):  # it need not be there
        status = path.stat()
        known.add((status.st_dev, status.st_ino))
    return known


def require_apart(output: Location, source: Location | None, what: str) -> None:
    """Refuse an output that is, lies in or holds what it is made from; `what` names that, as "the source".

    None stands for what lies nowhere that an output could be.

    Raises:
        ConfigError: They overlap.
    """
    how = source and overlap(output, source)
    if how:
        raise ConfigError(f"output = {output}: {how} {what} {source}; choose a place beside it")
