"""What a source of images is, and the two formats made of image files: folders and tar archives.

Every format scans into items and reads items. To add one, write a class with `scan` and `read` and name it in
`sources.FORMATS`.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ddpm_core.errors import DataError
from pipelines.data.decode import MAX_FILE_BYTES
from pipelines.storage import Location

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Concurrent requests of one reader or scanner: object stores answer many at once, each slowly.
PARALLEL_REQUESTS = 8
# Encoded images in memory at once per reader.
READ_AHEAD = 64
_LABEL_SUFFIXES = (".cls", ".json")
_MAX_LABEL_BYTES = 2**24
# Control characters, line separators, those that turn the direction of text, and bytes that are not UTF-8.
_NOT_PLAIN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

UInt8s = npt.NDArray[np.uint8]


class Item(NamedTuple):
    """A part of a source: rows start..stop-1 of `file`. One image has rows 0..0; `offset`, `size` are bytes."""

    file: str
    start: int
    stop: int
    label: int | None = None
    name: str = ""
    offset: int = 0
    size: int = 0


class RawImage(NamedTuple):
    """An image as its source holds it: file content, or pixels uint8 [H, W]; label; where it came from."""

    payload: bytes | UInt8s
    label: int | None
    source: str


class Scan(NamedTuple):
    """What a source holds, in source order, and the names of its label values where it has them."""

    items: list[Item]
    label_names: tuple[str, ...] | None


class Format(Protocol):
    """A way to read images below `base`; picklable. `is_encoded` tells files to decode from plain pixels."""

    is_encoded: ClassVar[bool]

    @property
    def base(self) -> Location:
        """What the items' files are relative to."""

    def scan(self, files: Sequence[str]) -> Scan:
        """List the content of `files` (paths below the base, sorted) without reading pixels.

        Raises:
            DataError: A file is not of this format.
        """

    def read(self, items: Sequence[Item]) -> Iterator[RawImage]:
        """The images of the items, in order. A broken image is passed on as it is."""


@dataclass(frozen=True)
class ImageFolder:
    """Image files at any depth; the class is the first folder level, files beside the folders have none."""

    base: Location
    is_encoded: ClassVar[bool] = True

    def scan(self, files: Sequence[str]) -> Scan:
        """See `Format.scan`."""
        images = [file for file in files if is_image(file)]
        classes = sorted({file.split("/", 1)[0] for file in images if "/" in file})
        numbers = {name: number for number, name in enumerate(classes)}
        items = [Item(file, 0, 1, numbers.get(file.split("/", 1)[0]) if "/" in file else None) for file in images]
        return Scan(items, tuple(classes) or None)

    def read(self, items: Sequence[Item]) -> Iterator[RawImage]:
        """See `Format.read`."""
        for start in range(0, len(items), READ_AHEAD):
            batch = items[start : start + READ_AHEAD]
            # One request per file: on an object store they must overlap.
            with ThreadPoolExecutor(PARALLEL_REQUESTS) as readers:
                contents = list(readers.map(lambda item: (self.base / item.file).read_bytes(), batch))
            for item, content in zip(batch, contents, strict=True):
                yield RawImage(content, item.label, item.file)


@dataclass(frozen=True)
class TarArchives:
    """Uncompressed tar files, WebDataset style: `key.jpg` with its label in `key.cls` or `key.json`."""

    base: Location
    is_encoded: ClassVar[bool] = True

    def scan(self, files: Sequence[str]) -> Scan:
        """See `Format.scan`."""
        archives = [file for file in files if file.endswith(".tar")]
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as scanners:
            found = list(scanners.map(self._scan_archive, archives))
        return Scan([item for items in found for item in items], None)

    def read(self, items: Sequence[Item]) -> Iterator[RawImage]:
        """See `Format.read`."""
        opened, file = "", None
        for item in items:
            if file is None or item.file != opened:
                if file is not None:
                    file.close()
                opened, file = item.file, (self.base / item.file).open("rb")
            file.seek(item.offset)
            yield RawImage(file.read(item.size), item.label, f"{item.file}/{item.name}")
        if file is not None:
            file.close()

    def _scan_archive(self, file: str) -> list[Item]:
        location, items = self.base / file, []
        group: list[tarfile.TarInfo] = []
        names: set[str] = set()
        keys: dict[bool, set[str]] = {True: set(), False: set()}  # of samples with images, and of labels alone

        def add_group() -> list[Item]:
            images = self._images(file, archive, group)
            if group:
                keys[bool(images)].add(_key(group[0].name))
            return images

        try:
            # Small blocks: a scan jumps from header to header.
            with location.open("rb", block_size=2**16) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    if not _is_part_of_sample(member):
                        continue
                    _require_plain_member(location, member)
                    if member.name in names:
                        raise DataError(f"{location}: holds {member.name!r} twice; repack it with different names")
                    names.add(member.name)
                    if group and _key(member.name) != _key(group[0].name):
                        items += add_group()
                        group = []
                    group.append(member)
                items += add_group()
                stream.seek(archive.offset)
                if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for it
                    raise tarfile.ReadError(f"no end mark, or a damaged header, at byte {archive.offset:,}")
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise DataError(f"{location}: not a readable uncompressed tar ({error}); repack or replace it") from error
        if apart := sorted(keys[True] & keys[False]):
            raise DataError(f"{location}: the label of {apart[0]!r} does not lie beside its image; repack it in order")
        return [item._replace(start=row, stop=row + 1) for row, item in enumerate(items)]

    def _images(self, file: str, archive: tarfile.TarFile, group: list[tarfile.TarInfo]) -> list[Item]:
        """The images of one key. Where `key.png` and `key.mask.png` are both there, the latter is no sample."""
        images = [member for member in group if is_image(member.name)]
        plain = [member for member in images if PurePosixPath(member.name).name.count(".") == 1]
        label = self._label(file, archive, group) if images else None
        return [Item(file, 0, 1, label, m.name, m.offset_data, m.size) for m in plain or images]

    def _label(self, file: str, archive: tarfile.TarFile, group: list[tarfile.TarInfo]) -> int | None:
        for member in group:
            if not member.name.endswith(_LABEL_SUFFIXES):
                continue
            content = archive.extractfile(member)
            text = content.read().decode("utf-8", "replace") if content else ""
            try:
                label = text if member.name.endswith(".cls") else json.loads(text).get("label")
                if label is None:
                    return None
                number = int(str(label))  # by way of text: int(3.7) is 3
                if abs(number) < 2**63:
                    return number
                raise ValueError
            except (ValueError, AttributeError, RecursionError):
                raise DataError(
                    f"{self.base / file}/{member.name}: {text[:40]!r} gives no integer label; correct it"
                ) from None
        return None


def is_image(file: str) -> bool:
    """Whether the name has an image's suffix and no part of it is hidden."""
    path = PurePosixPath(file)
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def require_plain_name(where: str, name: str) -> None:
    """Refuse a name that could write to a terminal more than itself; a DataError that begins with `where`."""
    if _NOT_PLAIN.search(name):
        raise DataError(f"{where}: the name {name!r} holds control characters, or is not UTF-8; rename it")


def _is_part_of_sample(member: tarfile.TarInfo) -> bool:
    suffix = PurePosixPath(member.name).suffix.lower()
    return not member.isdir() and (suffix in IMAGE_SUFFIXES or suffix in _LABEL_SUFFIXES)


def _require_plain_member(location: Location, member: tarfile.TarInfo) -> None:
    """Refuse what would lead an unpacking tool astray, although nothing is unpacked here, and what is too large."""
    require_plain_name(str(location), member.name)
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{location}: member {member.name!r} leads out of the archive; repack it with relative names")
    if not member.isreg() or member.issparse():
        raise DataError(
            f"{location}: member {member.name!r} is a link or no plain file; repack it with the file itself"
        )
    limit = _MAX_LABEL_BYTES if path.suffix in _LABEL_SUFFIXES else MAX_FILE_BYTES
    if member.size > limit:
        raise DataError(f"{location}: member {member.name!r} has {member.size:,} bytes, more than {limit:,}; remove it")


def _key(name: str) -> str:
    """WebDataset's key: the path up to the first dot of its last part."""
    path = PurePosixPath(name)
    return str(path.parent / path.name.split(".", 1)[0])
