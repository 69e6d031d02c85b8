"""Images stored as arrays of bytes: MNIST's IDX files, and the digits that come with scikit-learn."""

import gzip
import importlib.metadata
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pipelines.cli.errors import DataError
from pipelines.data.ingest.formats import NO_OPTIONS, NOT_WANTED, Item, Options, RawImage, Scan, UInt8s
from pipelines.storage.location import Location

# An IDX file is held in memory as a whole.
_MAX_BYTES = 2**31
# What deflate can make of one byte.
_MAX_RATIO = 1032
# Code of the type, dimensions, type, and what it is called.
_KINDS: dict[str, tuple[int, int, np.dtype[Any], str]] = {
    "idx3-ubyte": (8, 3, np.dtype(np.uint8), "unsigned bytes"),
    "idx1-ubyte": (8, 1, np.dtype(np.uint8), "unsigned bytes"),
    "idx2-int": (12, 2, np.dtype(">i4"), "integers"),
}

Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class IdxImages:
    """MNIST's IDX files of unsigned bytes, also gzipped; the labels lie beside, by MNIST's naming.

    Beside means in the same folder, or in a folder `labels` next to it (or named as the images' with `labels` for
    `images`). QMNIST's table of labels (idx2-int) is read for its first column, the digit.
    """

    base: Location
    options: Options = NO_OPTIONS
    is_encoded: ClassVar[bool] = False

    def scan(self, files: Sequence[str]) -> Scan:
        """See `Format.scan`."""
        if len(files) > 1:
            raise DataError(f"source = {self.base}: holds {len(files)} image files ({', '.join(files)}); name one")
        images, known = self._images(self.base / files[0])
        items = [Item(files[0], 0, len(images))]
        labels = self.label_file(self.base / files[0])
        if labels is None or known is None:
            wanted = _label_names(files[0].rsplit("/", 1)[-1])[0]
            found = NOT_WANTED if self.options.no_labels else f"none: there is no {wanted} beside the images"
            return Scan(items, None, found)
        largest = int(known.max()) if len(known) else -1
        return Scan(items, None, f"the file {labels.name}", label_files=1, largest_label=largest)

    def read(self, items: Sequence[Item]) -> Iterator[RawImage]:
        """See `Format.read`."""
        for item in items:
            images, labels = self._images(self.base / item.file)
            for row in range(item.start, item.stop):
                label = None if labels is None else int(labels[row])
                yield RawImage(images[row], label, f"{item.file}#{row}")

    def _images(self, location: Location) -> tuple[UInt8s, Integers | None]:
        """Images [n, H, W], and labels [n] where there are any."""
        images, file = _read_idx(location, "idx3-ubyte"), self.label_file(location)
        if file is None:
            return images.view(np.uint8), None
        table = _read_idx(file, _kind_of_labels(file.name))
        labels = table if table.ndim == 1 else table[:, 0]
        if len(labels) != len(images):
            raise DataError(f"{location}: has {len(images)} images and {len(labels)} labels; replace the files")
        return images.view(np.uint8), labels

    def label_file(self, images: Location) -> Location | None:
        """The file of the labels for a file of images, None where there is none or it is not wanted."""
        if self.options.no_labels:
            return None
        folder = images.parent
        folders = [folder, folder.parent / folder.name.replace("images", "labels"), folder.parent / "labels"]
        places = [place / name for place in dict.fromkeys(folders) for name in _label_names(images.name)]
        return next((place for place in places if place.exists()), None)


@dataclass(frozen=True)
class EmbeddedDigits:
    """scikit-learn's 1,797 scanned digits, 8x8 with values 0..16 scaled to 0..255; every 6th is in `test`."""

    base: Location
    is_encoded: ClassVar[bool] = False

    def scan(self, files: Sequence[str]) -> Scan:
        """See `Format.scan`."""
        rows = len(self._rows())
        return Scan([Item(self.base.uri, 0, rows)], tuple(str(digit) for digit in range(10)), "the package's table")

    def read(self, items: Sequence[Item]) -> Iterator[RawImage]:
        """See `Format.read`."""
        digits, rows = _digits(), self._rows()
        for item in items:
            for row in rows[item.start : item.stop]:
                pixels = np.round(digits[row, :64].reshape(8, 8) * 255 / 16).astype(np.uint8)
                yield RawImage(pixels, int(digits[row, 64]), f"{self.base.uri}#{row}")

    def _rows(self) -> npt.NDArray[np.int64]:
        held_out = np.arange(len(_digits())) % 6 == 5
        return np.flatnonzero(held_out == self.base.uri.endswith("/test"))


def is_idx_images(file: str) -> bool:
    """Whether the name is an IDX file of images (idx3), as `train-images-idx3-ubyte.gz`."""
    return PurePosixPath(file).name.removesuffix(".gz").endswith(("idx3-ubyte", ".idx3"))


def _label_names(images: str) -> list[str]:
    """How the file of labels for a file of images may be called, MNIST's own way first."""
    plain = images.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    names = [plain, plain.replace("idx1-ubyte", "idx2-int")]
    return [name + suffix for name in dict.fromkeys(names) for suffix in ("", ".gz")]


def _kind_of_labels(name: str) -> str:
    return "idx2-int" if name.removesuffix(".gz").endswith("idx2-int") else "idx1-ubyte"


def _read_idx(location: Location, kind: str) -> Integers:
    """The array of an IDX file of one of `_KINDS`.

    Cached, because every unit of a gzipped file has to unpack it from the start.
    """
    return _unpack_idx(location, kind, location.version())


@lru_cache(4)
def _unpack_idx(location: Location, kind: str, version: str) -> Integers:
    code, ndim, dtype, what = _KINDS[kind]
    size = location.size()
    if size > _MAX_BYTES:
        raise DataError(f"{location}: has {size:,} bytes, an IDX file at most {_MAX_BYTES:,}; convert it to Parquet")
    content = location.read_bytes()
    packed, header = content[:2] == b"\x1f\x8b", 4 + 4 * ndim
    # Never more is unpacked than the header promises, nor is an absurd promise believed.
    stream = gzip.GzipFile(fileobj=io.BytesIO(content)) if packed else io.BytesIO(content)
    try:
        start = stream.read(header)
        if start[:4] != bytes([0, 0, code, ndim]) or len(start) < header:
            raise DataError(f"{location}: not an IDX file of {what} with {ndim} dimension(s); replace the file")
        shape = tuple(int(length) for length in np.frombuffer(start, ">u4", ndim, 4))
        promised = math.prod(shape) * dtype.itemsize
        told = f"its header promises {' x '.join(map(str, shape))} = {math.prod(shape):,}"
        told += f" of {dtype.itemsize} bytes" if dtype.itemsize > 1 else ""
        if min(shape[1:], default=1) < 1 or promised > min(_MAX_BYTES, len(content) * _MAX_RATIO):
            raise DataError(f"{location}: {len(content):,} bytes, {told}; replace the file, or convert it to Parquet")
        pixels = stream.read(promised + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{location}: damaged gzip ({error}); replace the file") from error
    if len(pixels) != promised:
        held = f"{len(pixels):,}" if len(pixels) < promised else "more"
        raise DataError(f"{location}: holds {held} bytes of data, {told}; replace the file")
    array: Integers = np.frombuffer(pixels, dtype).reshape(shape)
    return array


@lru_cache(1)
def _digits() -> npt.NDArray[np.float64]:
    """[1797, 65]: 64 pixels and the label. Read from the package's file: importing sklearn takes seconds."""
    package = importlib.metadata.distribution("scikit-learn")
    path = str(package.locate_file("sklearn/datasets/data/digits.csv.gz"))
    digits: npt.NDArray[np.float64] = np.loadtxt(path, delimiter=",")
    return digits
