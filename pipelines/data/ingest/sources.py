"""Where images come from: finding a source's files, recognising its format, cutting it into units of work."""

import dataclasses
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pipelines.cli.config import require
from pipelines.cli.errors import ConfigError, DataError
from pipelines.data.ingest.decode import MAX_FILE_BYTES
from pipelines.data.ingest.formats import NO_OPTIONS, PARALLEL_REQUESTS, Format, ImageFolder, Item, Options
from pipelines.data.ingest.formats_arrays import EmbeddedDigits, IdxImages, is_idx_images
from pipelines.data.ingest.formats_parquet import HuggingFaceParquet
from pipelines.data.ingest.formats_tar import TarArchives
from pipelines.data.ingest.hub_cache import blob_size, without_internals
from pipelines.data.ingest.patterns import local_folders, local_matches, matching, split_pattern
from pipelines.data.ingest.recognise import (
    HEAD_BYTES,
    LeftOut,
    is_image,
    no_image,
    no_image_bytes,
    require_plain_name,
    unwanted,
)
from pipelines.data.ingest.splits import choose_split
from pipelines.storage.location import Location

FORMATS: dict[str, Any] = {
    "folder": ImageFolder,
    "parquet": HuggingFaceParquet,
    "idx": IdxImages,
    "tar": TarArchives,
}
EMBEDDED = ("embedded://digits/train", "embedded://digits/test")
_BELONGS = {
    "parquet": lambda file: file.endswith(".parquet"),
    "tar": lambda file: file.endswith(".tar"),
    "idx": is_idx_images,
    "folder": is_image,
}


class Source(NamedTuple):
    """A source's format, the size in bytes of each of its files by path below the format's base, sorted; the rest.

    `label_file` is the name and size of a file beside them that is read for labels alone.
    """

    format: Format
    files: dict[str, int]
    left_out: LeftOut
    label_file: tuple[str, int] | None = None


def canonical_source(uri: str) -> str:
    """The source's URI as it is recorded: `embedded://...` as it is, all else as `Location.parse` has it."""
    return uri if uri.startswith("embedded://") else Location.parse(uri).uri


def source_place(uri: str) -> Location | None:
    """Where a source's files lie: the file or directory, or of a glob that reaches into directories the one above its
    first pattern; None where no output can get in the way: of embedded data, and of a glob among one directory's files.
    """
    if uri.startswith("embedded://"):
        return None
    location = Location.parse(uri)
    base, pattern = split_pattern(location)
    return base if not pattern or "/" in pattern or "**" in pattern else None


def open_source(uri: str, format: str = "auto", split: str | None = None, options: Options = NO_OPTIONS) -> Source:
    """Find a source's files and its format.

    Args:
        uri: A file, a directory, a glob, or one of `EMBEDDED`; local or any URI that fsspec knows.
        format: A key of `FORMATS`, or `auto` to recognise it by the files' names and, of those whose names say
            nothing, their first bytes.
        split: Which of several splits (`train`, ...) to take, or `splits.ALL`.
        options: For the format.

    Raises:
        ConfigError: Unknown embedded data set; an option that the format does not have.
        DataError: Nothing is there, the format cannot be told, several splits are mixed, or it holds what is no plain
            file: symbolic links (but those of a Hugging Face cache), pipes, names with control characters, images of
            more than 256 MiB.
        StorageError: The source cannot be listed.
    """
    if uri.startswith("embedded://"):
        if uri not in EMBEDDED:
            raise ConfigError(f"source = {uri!r}: unknown embedded data set; choose {' or '.join(EMBEDDED)}")
        _require_none(uri, {"split": split, "image_column": options.image_column, "label_column": options.label_column})
        return Source(EmbeddedDigits(Location(uri)), {}, LeftOut())
    where, left_out = f"source = {uri}", LeftOut()
    base, files = _list_files(uri, Location.parse(uri))
    if not files:
        raise DataError(f"{where}: nothing is there; check the spelling")
    candidates = _without_unwanted(files, left_out)
    candidates = without_internals(where, base.path, candidates, left_out)
    chosen = _detect(where, candidates) if format == "auto" else format
    kept: list[str] = []
    rest: list[str] = []
    for file in candidates:
        (kept if _BELONGS[chosen](file) else rest).append(file)
    if chosen == "folder":
        images = _recognise(base, rest, left_out)
        kept, rest = sorted(kept + images), []
    if not kept:
        wanted = "images" if format == "auto" else f"file of format {format!r}"
        told = str(left_out) or f"such as {next(iter(files))}"
        raise DataError(
            f"{where}: no {wanted} among its {len(files)} file(s) ({told}); it must hold image files, Parquet, IDX or "
            "tar (unpack compressed archives)"
        )
    for file in kept:
        require_plain_name(where, file)
    kept, split_folder = choose_split(where, kept, chosen, split, left_out)
    for file in kept:
        if chosen == "folder" and files[file] > MAX_FILE_BYTES:
            allowed = f"an image file at most {MAX_FILE_BYTES:,}"
            raise DataError(f"{where}: {file}: has {files[file]:,} bytes, {allowed}; remove it")
    if chosen in ("folder", "idx"):
        labels = None if options.no_labels else options.label_column
        _require_none(f"a source of format {chosen}", {"image_column": options.image_column, "label_column": labels})
    found: Format = FORMATS[chosen](base, dataclasses.replace(options, split_folder=split_folder))
    labels_of = found.label_file(base / kept[0]) if isinstance(found, IdxImages) else None
    for file in rest:
        if labels_of is None or labels_of != base / file:
            left_out.add(f"of another format than {chosen}", file)
    label_file = None if labels_of is None else (labels_of.name, labels_of.size())
    return Source(found, {file: files[file] for file in kept}, left_out, label_file)


def split_units(items: Iterable[Item], rows_per_unit: int) -> Iterator[list[Item]]:
    """Cut items into lists of `rows_per_unit` rows (the last has fewer), dividing items where needed."""
    unit: list[Item] = []
    room = rows_per_unit
    for item in items:
        start = item.start
        while start < item.stop:
            stop = min(item.stop, start + room)
            unit.append(item._replace(start=start, stop=stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield unit
                unit, room = [], rows_per_unit
    if unit:
        yield unit


def _list_files(uri: str, location: Location) -> tuple[Location, dict[str, int]]:
    """A base location, and path below it and size of every file that the URI names."""
    base, pattern = split_pattern(location)
    if not location.is_local:
        found = matching(base, pattern) if pattern else location.find()
    elif pattern:
        folders = list(local_folders(base, pattern))
        _require_readable(uri, folders)
        for folder in folders[1:]:  # the base itself is what the user has named
            if os.path.islink(folder) and not _is_hidden(os.path.relpath(folder, base.path)):  # noqa: PTH114
                _refuse_link(uri, base.path, folder)
        found = _plain_files(uri, base.path, local_matches(base, pattern))
    elif Path(base.path).is_file():
        found = {base.path: base.size()}
    else:
        found = _plain_files(uri, base.path, _walk(uri, base.path))
    if not pattern and list(found) == [location.path]:
        base = location.parent
    prefix = base.path.rstrip("/") + "/"
    return base, {path.removeprefix(prefix): found[path] for path in sorted(found)}


def _walk(uri: str, root: str) -> Iterator[str]:
    """Everything below a directory; links are not followed."""

    def refuse(error: OSError) -> None:
        _require_readable(uri, [error.filename])

    for directory, folders, files in os.walk(root, onerror=refuse):
        yield from (os.path.join(directory, name) for name in (*folders, *files))  # noqa: PTH118  for each of millions


def _require_readable(uri: str, folders: Iterable[str]) -> None:
    """Refuse folders that this user may not list or enter: a class must not be lost without a word."""
    effectively = os.access in os.supports_effective_ids
    for folder in folders:
        if os.access(folder, os.R_OK | os.X_OK, effective_ids=effectively) or not os.path.exists(folder):  # noqa: PTH110
            continue
        name = os.path.basename(folder)  # noqa: PTH119
        if not name.startswith(".") and name != "lost+found":  # a mounted disk has such that are root's alone
            raise DataError(f"source = {uri}: {folder}: may not be read by this user; permit it, or move it elsewhere")


def _plain_files(uri: str, base: str, paths: Iterable[str]) -> dict[str, int]:
    """Path and size of the files among `paths`, and of what links of the Hugging Face cache lead to.

    All else is refused: a link, which may lead anywhere, and what would be waited for when read.
    """
    found = {}
    for path in paths:
        try:
            status = os.lstat(path)
        except PermissionError:  # its folder may be listed, not entered
            _require_readable(uri, [os.path.dirname(path)])  # noqa: PTH120
            continue
        mode = status.st_mode
        if stat.S_ISREG(mode):
            found[path] = status.st_size
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            continue
        name = os.path.relpath(path, base)
        if _is_hidden(name):
            continue
        if stat.S_ISLNK(mode):
            if (size := blob_size(path)) is not None:
                found[path] = size
                continue
            _refuse_link(uri, base, path)
        kind = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device")
        raise DataError(f"source = {uri}: {name!r} is a {kind}, no file; remove it")
    return found


def _is_hidden(name: str) -> bool:
    """Whether a path below the source is hidden, so no image of it."""
    return any(part.startswith(".") for part in name.split("/"))


def _refuse_link(uri: str, base: str, path: str) -> NoReturn:
    name, target = os.path.relpath(path, base), os.readlink(path)  # noqa: PTH115
    raise DataError(
        f"source = {uri}: {name!r} is a symbolic link (to {target!r}), which is not followed; put the file itself "
        "there, or name the place that it leads to"
    )


def _detect(where: str, files: Sequence[str]) -> str:
    """The format by the files' names; image files where no name tells."""
    formats = [name for name, belongs in _BELONGS.items() if any(belongs(file) for file in files)]
    if len(formats) > 1:
        raise DataError(f"{where}: holds files of the formats {', '.join(formats)}; choose one with `format`")
    return formats[0] if formats else "folder"


def _without_unwanted(files: Iterable[str], left_out: LeftOut) -> list[str]:
    kept = []
    for file in files:
        if (reason := unwanted(file)) is None:
            kept.append(file)
        else:
            left_out.add(reason, file)
    return kept


def _recognise(base: Location, files: Sequence[str], left_out: LeftOut) -> list[str]:
    """Which of the files, whose names are not those of images, are some by their first bytes."""
    unknown = [file for file in files if no_image(file) is None]

    def head(file: str) -> bytes:
        with (base / file).open("rb") as stream:
            return bytes(stream.read(HEAD_BYTES))

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as readers:
        heads = dict(zip(unknown, readers.map(head, unknown), strict=True))
    images = []
    for file in files:
        reason = no_image_bytes(file, heads[file]) if file in heads else no_image(file)
        if reason is None:
            images.append(file)
        else:
            left_out.add(reason, file)
    return images


def _require_none(what: str, options: Mapping[str, str | None]) -> None:
    for name, value in options.items():
        require(value is None, name, value, f"{what} has no such choice; leave it out")
