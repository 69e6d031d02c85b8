"""Where images come from: finding a source's files, recognising its format, cutting it into units of work."""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from ddpm_core.errors import ConfigError, DataError
from pipelines.data.decode import MAX_FILE_BYTES
from pipelines.data.formats import Format, ImageFolder, Item, TarArchives, is_image, require_plain_name
from pipelines.data.formats_arrays import EmbeddedDigits, IdxImages, is_idx_images
from pipelines.data.formats_parquet import HuggingFaceParquet
from pipelines.data.patterns import local_matches, matching, split_pattern
from pipelines.storage import Location

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
_SPLIT = re.compile(r"^(.+)-\d{5}-of-\d{5}")


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


def open_source(uri: str, format: str = "auto") -> tuple[Format, dict[str, int]]:
    """Find a source's files and its format.

    Args:
        uri: A file, a directory, a glob, or one of `EMBEDDED`; local or any URI that fsspec knows.
        format: A key of `FORMATS`, or `auto` to recognise it by the files' names.

    Returns:
        The format, and the size in bytes of each of its files by path below the format's base, sorted.

    Raises:
        ConfigError: Unknown embedded data set.
        DataError: Nothing is there, the format cannot be told, several splits are mixed, or it holds what is no plain
            file: symbolic links, pipes, names with control characters, images of more than 256 MiB.
        StorageError: The source cannot be listed.
    """
    if uri.startswith("embedded://"):
        if uri not in EMBEDDED:
            raise ConfigError(f"source = {uri!r}: unknown embedded data set; choose {' or '.join(EMBEDDED)}")
        return EmbeddedDigits(Location(uri)), {}
    base, files = _list_files(uri, Location.parse(uri))
    if not files:
        raise DataError(f"source = {uri}: nothing is there; check the spelling")
    chosen = _detect(uri, files) if format == "auto" else format
    # The split of a Hugging Face data set is part of the files' names: none must leak into another.
    splits = sorted({match[1] for file in files if (match := _SPLIT.match(PurePosixPath(file).name))})
    if chosen == "parquet" and len(splits) > 1:
        raise DataError(
            f"source = {uri}: holds the splits {', '.join(splits)}; name one by a glob such as "
            f"{base.uri}/{'**/' if any('/' in file for file in files) else ''}{splits[-1]}-*.parquet"
        )
    kept = {file: size for file, size in files.items() if _BELONGS[chosen](file)}
    if not kept:
        raise DataError(f"source = {uri}: no file of format {chosen!r} among {len(files)} files; correct `format`")
    for file, size in kept.items():
        require_plain_name(f"source = {uri}", file)
        if chosen == "folder" and size > MAX_FILE_BYTES:
            allowed = f"an image file at most {MAX_FILE_BYTES:,}"
            raise DataError(f"source = {uri}: {file}: has {size:,} bytes, {allowed}; remove it")
    found: Format = FORMATS[chosen](base)
    return found, kept


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
    if pattern:
        found = matching(base, pattern)
        if location.is_local:
            _require_plain_files(uri, base.path, local_matches(base, pattern))
    else:
        found = location.find()
        if location.is_local:
            _require_plain_files(uri, base.path, _walk(base.path))
        if list(found) == [location.path]:
            base = location.parent
    prefix = base.path.rstrip("/") + "/"
    return base, {path.removeprefix(prefix): found[path] for path in sorted(found)}


def _walk(root: str) -> Iterator[str]:
    """Everything below a directory; links are not followed."""
    for directory, folders, files in os.walk(root):
        yield from (os.path.join(directory, name) for name in (*folders, *files))  # noqa: PTH118  for each of millions


def _require_plain_files(uri: str, base: str, paths: Iterable[str]) -> None:
    """Refuse what a listing leaves out: a link, which may lead anywhere, and what would be waited for when read."""
    for path in paths:
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            continue
        name = os.path.relpath(path, base)
        if any(part.startswith(".") for part in name.split("/")):  # hidden, so no image of the source
            continue
        if stat.S_ISLNK(mode):
            target = os.readlink(path)  # noqa: PTH115
            raise DataError(
                f"source = {uri}: {name!r} is a symbolic link (to {target!r}), which is not followed; put the file "
                "itself there, or name the place that it leads to"
            )
        kind = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device")
        raise DataError(f"source = {uri}: {name!r} is a {kind}, no file; remove it")


def _detect(uri: str, files: dict[str, int]) -> str:
    formats = [name for name, belongs in _BELONGS.items() if any(belongs(file) for file in files)]
    if len(formats) == 1:
        return formats[0]
    if not formats:
        example = next(iter(files))
        raise DataError(
            f"source = {uri}: no images among its {len(files)} file(s), such as {example}; it must hold image "
            "files, Parquet, IDX or tar (unpack compressed archives)"
        )
    raise DataError(f"source = {uri}: holds files of the formats {', '.join(formats)}; choose one with `format`")
