"""What a source of images is, and the two formats made of image files: folders and tar archives.

Every format scans into items and reads items. To add one, write a class with `scan` and `read` and name it in
`sources.FORMATS`.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ddpm_core.errors import DataError
from pipelines.storage import Location

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Concurrent requests of one reader or scanner: object stores answer many at once, each slowly.
PARALLEL_REQUESTS = 8
# Encoded images in memory at once per reader.
READ_AHEAD = 64

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
        try:
            # Small blocks: a scan jumps from header to header.
            with location.open("rb", block_size=2**16) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    if not member.isreg():
                        continue
                    if group and _key(member.name) != _key(group[0].name):
                        items += self._images(file, archive, group)
                        group = []
                    group.append(member)
                items += self._images(file, archive, group)
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{location}: not a readable uncompressed tar ({error}); repack or replace it") from error
        return [item._replace(start=row, stop=row + 1) for row, item in enumerate(items)]

    def _images(self, file: str, archive: tarfile.TarFile, group: list[tarfile.TarInfo]) -> list[Item]:
        """The images of one key. Where `key.png` and `key.mask.png` are both there, the latter is no sample."""
        images = [member for member in group if is_image(member.name)]
        plain = [member for member in images if PurePosixPath(member.name).name.count(".") == 1]
        label = self._label(file, archive, group) if images else None
        return [Item(file, 0, 1, label, m.name, m.offset_data, m.size) for m in plain or images]

    def _label(self, file: str, archive: tarfile.TarFile, group: list[tarfile.TarInfo]) -> int | None:
        for member in group:
            if not member.name.endswith((".cls", ".json")):
                continue
            content = archive.extractfile(member)
            text = content.read().decode("utf-8", "replace") if content else ""
            try:
                label = int(text) if member.name.endswith(".cls") else json.loads(text).get("label")
                return None if label is None else int(label)
            except (ValueError, TypeError, AttributeError):
                raise DataError(
                    f"{self.base / file}/{member.name}: {text[:40]!r} gives no integer label; correct it"
                ) from None
        return None


def is_image(file: str) -> bool:
    """Whether the name has an image's suffix and no part of it is hidden."""
    path = PurePosixPath(file)
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _key(name: str) -> str:
    """WebDataset's key: the path up to the first dot of its last part."""
    path = PurePosixPath(name)
    return str(path.parent / path.name.split(".", 1)[0])
