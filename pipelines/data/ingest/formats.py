"""What a source of images is, and the simplest of its formats: folders of image files.

Every format scans into items and reads items. To add one, write a class with `scan` and `read` and name it in
`sources.FORMATS`.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.data.ingest.recognise import LeftOut
from pipelines.data.ingest.splits import without_split
from pipelines.storage.location import Location

# Concurrent requests of one reader or scanner: object stores answer many at once, each slowly.
PARALLEL_REQUESTS = 8
# Encoded images in memory at once per reader.
READ_AHEAD = 64
# Values of the options below.
NO_LABELS, ALL_IMAGES = "none", "all"
NOT_WANTED = f"none, as label_column = {NO_LABELS}"

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
    """An image as its source holds it: file content, or pixels uint8 [H, W]; label; where it came from.

    A label that is a word is one of the scan's `label_names`.
    """

    payload: bytes | UInt8s
    label: int | str | None
    source: str


@dataclass(frozen=True)
class Options:
    """What the user chose where a source leaves it open.

    Attributes:
        image_column: A table's column of images; of tar members that share a key, the suffix, or `ALL_IMAGES`.
        label_column: A table's column of labels, or the field of JSON beside an image; `NO_LABELS` for none.
        split_folder: Whether a folder named as a split is no class.
    """

    image_column: str | None = None
    label_column: str | None = None
    split_folder: bool = False

    @property
    def no_labels(self) -> bool:
        """Whether labels are not wanted."""
        return self.label_column == NO_LABELS


NO_OPTIONS = Options()


@dataclass(frozen=True)
class Scan:
    """What a source holds.

    Attributes:
        items: Its images, in source order.
        label_names: The names of its label values where it has them.
        labels_from: What the labels were read from, or why there are none; a phrase.
        label_files: Number of files and members that were read for labels alone.
        left_out: What is in the files and no image.
        largest_label: Of labels without names that no item has, where the scan sees them all; None where it does not.
    """

    items: list[Item]
    label_names: tuple[str, ...] | None
    labels_from: str
    label_files: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    largest_label: int | None = None


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
    options: Options = NO_OPTIONS
    is_encoded: ClassVar[bool] = True

    def scan(self, files: Sequence[str]) -> Scan:
        """See `Format.scan`."""
        if self.options.no_labels:
            return Scan([Item(file, 0, 1) for file in files], None, NOT_WANTED)
        class_of = [self._class(file) for file in files]
        classes = sorted({name for name in class_of if name is not None})
        numbers = {name: number for number, name in enumerate(classes)}
        labels = [None if name is None else numbers[name] for name in class_of]
        items = [Item(file, 0, 1, label) for file, label in zip(files, labels, strict=True)]
        levels = "the first folder level" + (" below the split's" if self.options.split_folder else "")
        return Scan(items, tuple(classes) or None, levels if classes else "none: the images lie in no folders")

    def read(self, items: Sequence[Item]) -> Iterator[RawImage]:
        """See `Format.read`."""
        for start in range(0, len(items), READ_AHEAD):
            batch = items[start : start + READ_AHEAD]
            # One request per file: on an object store they must overlap.
            with ThreadPoolExecutor(PARALLEL_REQUESTS) as readers:
                contents = list(readers.map(lambda item: (self.base / item.file).read_bytes(), batch))
            for item, content in zip(batch, contents, strict=True):
                yield RawImage(content, item.label, item.file)

    def _class(self, file: str) -> str | None:
        if self.options.split_folder:
            return next(iter(without_split(file)), None)
        return file.split("/", 1)[0] if "/" in file else None
