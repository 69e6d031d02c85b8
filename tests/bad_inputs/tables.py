"""Bad IDX and Parquet files."""

import functools
import gzip
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bad_inputs.files import ingest, source_case
from bad_inputs.harness import Case
from support.image_files import png, write

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(*shape: int, data: bytes | None = None) -> bytes:
    """An IDX file of this shape."""
    size = functools.reduce(lambda a, b: a * b, shape)
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + (bytes(size) if data is None else data)


def bomb(head: bytes, mebibytes: int) -> bytes:
    """A gzip file of `head` and that many MiB of zeros, of which one is packed and the others are copies."""
    packer, zeros, check = zlib.compressobj(9, wbits=31), bytes(2**20), zlib.crc32(head)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(mebibytes):
        check = zlib.crc32(zeros, check)
    end = zlib.compressobj(9, wbits=-15).flush()  # an empty last block
    return start + block * mebibytes + end + struct.pack("<II", check, len(head) + mebibytes * 2**20 & 0xFFFFFFFF)


def _idx(name: str, files: dict[str, bytes] | Callable[[], dict[str, bytes]], *says: str) -> Case:
    """`files` of some size are made when they are needed, not by every process that reads this module."""

    def make(source: Path) -> None:
        write(source, files() if callable(files) else files)

    return source_case("IDX file", name, make, *says)


def _named(name: str, names: str, says: str, *options: str) -> Case:
    """Names for the labels 0..2 of an IDX file."""

    def build(at: Path) -> list[str]:
        write(at / "source", {IMAGES: idx(3, 8, 8), LABELS: idx(3, data=bytes(range(3)))})
        return ingest("source", "--label_names", names, *options)

    return Case("IDX file", name, build, (says,), code=2)


def _good() -> dict[str, list[Any]]:
    return {"image": [{"bytes": png(index), "path": None} for index in range(4)], "label": [0, 1, 0, 1]}


def parquet(**columns: Any) -> bytes:
    """A Parquet file of four images, with other columns or other content."""
    sink = io.BytesIO()
    table = {name: values for name, values in {**_good(), **columns}.items() if values is not None}
    pq.write_table(pa.table(table), sink)
    return sink.getvalue()


def _parquet(name: str, content: bytes | Callable[[], bytes], *says: str, leaves: tuple[str, ...] = ()) -> Case:
    def make(source: Path) -> None:
        write(source, {"a.parquet": content() if callable(content) else content})

    return source_case("Parquet file", name, make, *says, leaves=leaves)


def _damaged_page() -> bytes:
    content = bytearray(parquet())
    content[4:40] = b"\xff" * 36
    return bytes(content)


def _zeros() -> bytes:
    """300 images of 1 MiB, all zeros."""
    values = pa.array([bytes(2**20)] * 300, pa.binary())
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": values}), sink, compression="zstd", use_dictionary=False, write_statistics=False)
    return sink.getvalue()


def _dictionary() -> bytes:
    """256 times one image of 16 MiB, which stands in the file once."""
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), pa.array([bytes(2**24)], pa.binary()))
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"image": values.cast(pa.dictionary(pa.int32(), pa.binary()))}),
        sink,
        compression="zstd",
        write_statistics=False,
        store_schema=False,
        dictionary_pagesize_limit=2**26,
    )
    return sink.getvalue()


def _labels() -> bytes:
    """Labels of 300 MiB, all zeros, written plainly."""
    sink = io.BytesIO()
    columns = {"image": pa.array([png()] * 300), "label": pa.array(["\0" * 2**20] * 300)}
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


def _words_and_numbers(source: Path) -> None:
    write(source, {"a.parquet": parquet(), "b.parquet": parquet(label=["a", "b", "c", "d"])})


def _two_files(source: Path) -> None:
    write(source, {"a.parquet": parquet(), "b.parquet": parquet(image=["a", "b", "c", "d"])})


def _splits(source: Path) -> None:
    write(source, {f"{split}-00000-of-00001.parquet": parquet() for split in ("test", "train")})


_UNREADABLE = "source/a.parquet: not a readable Parquet file ("
_ALL = "none of its first images can be read"

CASES = [
    _idx("zero bytes", {IMAGES: b""}, f"{IMAGES}: not an IDX file of unsigned bytes with 3 dimension(s)"),
    _idx("floating-point values", {IMAGES: b"\0\0\x0d\3" + bytes(12)}, "not an IDX file of unsigned bytes"),
    _idx("two dimensions", {IMAGES: idx(4, 8)}, "not an IDX file of unsigned bytes with 3"),
    _idx("fewer bytes than promised", {IMAGES: idx(4, 8, 8)[:-1]}, "holds 255 bytes of data", "4 x 8 x 8 = 256"),
    _idx("more bytes than promised", {IMAGES: idx(4, 8, 8) + b"\0"}, "holds more bytes of data", "4 x 8 x 8 = 256"),
    _idx(
        "dimensions that overflow 64 bits",
        {IMAGES: idx(2**32 - 1, 2**32 - 1, 2**32 - 1, data=b"")},
        "4294967295 x 4294967295 x 4294967295 = 79,228",
        "replace the file",
    ),
    _idx("images of 0 x 8 pixels", {IMAGES: idx(4, 0, 8)}, "4 x 0 x 8 = 0"),
    _idx("no images", {IMAGES: idx(0, 8, 8)}, "source = source: holds no images"),
    _idx("truncated gzip", {f"{IMAGES}.gz": gzip.compress(idx(4, 8, 8))[:-12]}, "damaged gzip"),
    _idx(
        "damaged gzip", {f"{IMAGES}.gz": gzip.compress(idx(4, 8, 8))[:-8] + bytes(8)}, "damaged gzip (CRC check failed"
    ),
    _idx(
        "gzip bomb behind an honest header (3 GiB)",
        lambda: {f"{IMAGES}.gz": bomb(idx(3 * 2**10, 2**10, 2**10, data=b""), 100)},
        "3072 x 1024 x 1024 = 3,221,225,472",
        "convert it to Parquet",
    ),
    _idx(
        "gzip bomb behind a lying header",
        lambda: {f"{IMAGES}.gz": bomb(idx(4, 8, 8), 2048)},
        "holds more bytes of data, its header promises 4 x 8 x 8 = 256",
    ),
    _idx(
        "gzip bomb of labels",
        lambda: {IMAGES: idx(4, 8, 8), f"{LABELS}.gz": bomb(idx(4), 2048)},
        f"{LABELS}.gz: holds more bytes of data, its header promises 4 = 4",
    ),
    _idx("as many labels as not images", {IMAGES: idx(4, 8, 8), LABELS: idx(3)}, "has 4 images and 3 labels"),
    _named(
        "fewer names than labels", "[cat,dog]", "label_names = cat, dog: names 0..1, the source has a label 2; name"
    ),
    _named(
        "names of labels that are not taken",
        "[cat,dog,cow]",
        "label_names = ('cat', 'dog', 'cow'): label_column = none takes no labels; leave one out",
        *("--label_column", "none"),
    ),
    _idx("two image files", {f"{name}-idx3-ubyte": idx(1, 8, 8) for name in "ab"}, "holds 2 image files", "name one"),
    _parquet("zero bytes", b"", _UNREADABLE),
    _parquet("text", b"no parquet" * 10, _UNREADABLE),
    _parquet("truncated", lambda: parquet()[:-100], _UNREADABLE),
    _parquet("length of the footer that lies", lambda: parquet()[:-8] + b"\xff\xff\xff\x7fPAR1", _UNREADABLE),
    _parquet("damaged footer", lambda: parquet()[:-200] + bytes(100) + parquet()[-100:], _UNREADABLE),
    _parquet("damaged page", _damaged_page, _UNREADABLE),
    _parquet(
        "no image column",
        lambda: parquet(image=None),
        "no column `image` or `img` among label; choose one with image_column",
    ),
    _parquet(
        "images as text", lambda: parquet(image=["a", "b", "c", "d"]), "column image is string; it must be binary"
    ),
    _parquet("images as numbers", lambda: parquet(image=[1, 2, 3, 4]), "column image is int64; it must be binary"),
    _parquet("images as nested lists", lambda: parquet(image=[[[1]]] * 4), "column image is list<", "must be binary"),
    _parquet("struct without bytes", lambda: parquet(image=[{"path": "a.png"}] * 4), "column image is struct<path"),
    _parquet(
        "struct with null bytes",
        lambda: parquet(image=pa.array([{"bytes": None}] * 4, pa.struct({"bytes": pa.binary()}))),
        _ALL,
        "a.parquet#3: empty (zero bytes)",
    ),
    _parquet("paths without bytes", lambda: parquet(image=[{"bytes": b"", "path": "/etc/passwd"}] * 4), _ALL, "empty"),
    _parquet(
        "labels as captions", lambda: parquet(label=["a" * 201, "b", "c", "d"]), "column label holds texts that are no"
    ),
    _parquet(
        "labels that write to the terminal",
        lambda: parquet(label=["a\x1b[2J", "b", "c", "d"]),
        "column label: the name 'a\\x1b[2J' holds control characters",
    ),
    _parquet(
        "labels as fractions",
        lambda: parquet(label=[0, 0.5, 2, 3]),
        "row 1: label = 0.5: labels must be integers or words; choose another with label_column, or none",
    ),
    _parquet(
        "two columns of labels",
        lambda: parquet(label=None, fine_label=[0, 1, 2, 3], coarse_label=[0, 0, 1, 1]),
        "columns fine_label, coarse_label all look like labels; choose one with label_column = fine_label",
    ),
    _parquet("bomb of labels (300 MiB)", _labels, "column label of row group 0 expands from", "replace it"),
    _parquet(
        "labels beyond 64 bits",
        lambda: parquet(label=pa.array([2**64 - 1] * 4, pa.uint64())),
        "row 0: label = 1844",
        "below 2^63",
    ),
    _parquet(
        "no rows", lambda: parquet(image=pa.array([], pa.binary()), label=None), "source = source: holds no images"
    ),
    _parquet("bomb of zeros (300 MiB)", _zeros, "column image of row group 0 expands from", "replace it"),
    _parquet("bomb of one value 256 times (4 GiB)", _dictionary, _ALL, "not an image of a known format"),
    source_case("Parquet file", "second file of another type", _two_files, "source/b.parquet: column image is string"),
    source_case(
        "Parquet file",
        "labels that are words in the second file",
        _words_and_numbers,
        "labels are numbers in a.parquet and words in b.parquet",
    ),
    source_case("Parquet file", "two splits", _splits, "holds the splits test, train; choose one with split = train"),
]
