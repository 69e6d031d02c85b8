"""The prepared data set: uint8 images in Parquet shards, in row groups that can be read at random.

    manifest.json              what is there; written last, so a directory without one is no data set
    data/part-00000.parquet    id int64, image fixed-size binary (H*W*C uint8, HWC), label int64, source string
    rejected.parquet           source, reason of every image that could not be used

Ids are dense and ascending over the shards. Images are stored PLAIN and uncompressed: decoding is a copy.
"""

import hashlib
import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cli.errors import DataError, StorageError
from pipelines.outputs.manifest import MANIFEST, checked_manifest, require_in
from pipelines.outputs.shards import ShardRecord
from pipelines.storage.location import Location

FORMAT = "ddpm-prepared-data-set"
FORMAT_VERSION = 1
_GROUP_BYTES = 2**20
_MAX_GROUP_ROWS = 4096
# Open shards per process: each costs a memory map or a connection and its parsed footer.
_OPEN_SHARDS = 64

UInt8s = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """One Parquet object: ids first_id .. first_id + rows - 1."""

    name: str
    rows: int
    first_id: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PreparedDataset:
    """A committed prepared data set. Picklable and small: it holds O(shards), no rows.

    Attributes:
        location: Where it lies.
        dataset_id: Content hash (hex) over the shards' sha256 and the image shape.
        num_rows: Ids are 0..num_rows-1.
        image_shape: (H, W, C).
        label_names: Name of each label value; None when the source had no names.
        rows_per_group: Rows of every row group but the last of a shard.
        rejected: Number of source images that could not be used.
        shards: The Parquet objects, in id order.
    """

    location: Location
    dataset_id: str
    num_rows: int
    image_shape: tuple[int, int, int]
    label_names: tuple[str, ...] | None
    rows_per_group: int
    rejected: int
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, uri: str | Location) -> "PreparedDataset":
        """Read the manifest and check that every shard is there with its recorded size.

        Raises:
            DataError: Not a prepared data set, an unknown version, a manifest whose fields do not hold together, or a
            shard is missing or truncated.
            StorageError: The location cannot be read.
        """
        location = Location.parse(uri)
        path = location / MANIFEST
        if not path.exists():
            raise DataError(
                f"{location}: not a prepared data set (no {MANIFEST}); ingest one with "
                f"`jobs/ingest.py --source SOURCE --output {location}`"
            )
        dataset = cls._from_manifest(location)
        sizes = (location / "data").sizes()
        for shard in dataset.shards:
            size = sizes.get(shard.name)
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise DataError(
                    f"{location / 'data' / shard.name}: {found}, the manifest records {shard.bytes:,}; "
                    "restore it, or run the jobs/ingest.py command again that made the data set: it makes it again"
                )
        return dataset

    @classmethod
    def reopen(cls, uri: str, dataset_id: str, used: str) -> "PreparedDataset":
        """The data set at `uri` that an output was made from; `used` says how, as "that was encoded".

        Raises:
            DataError: It is another one than `dataset_id`, or see `open`.
            StorageError: The location cannot be read.
        """
        dataset = cls.open(uri)
        if dataset.dataset_id != dataset_id:
            raise DataError(f"{uri}: is not the data set {dataset_id[:12]} {used}; restore it")
        return dataset

    @classmethod
    def _from_manifest(cls, location: Location) -> "PreparedDataset":
        path = location / MANIFEST
        content = path.read_json()
        kind, version = (content.get(key) if isinstance(content, dict) else None for key in ("format", "version"))
        if kind != FORMAT or version != FORMAT_VERSION:
            raise DataError(
                f"{path}: format {kind!r} version {version!r}, this software reads {FORMAT!r} "
                f"version {FORMAT_VERSION}; name a prepared data set, or ingest again"
            )
        manifest = checked_manifest(path, content)
        shards, first_id = [], 0
        for entry in manifest["shards"]:
            shards.append(Shard(entry["name"], entry["rows"], first_id, entry["bytes"], entry["sha256"]))
            first_id += entry["rows"]

        def check(holds: bool, field: str, rule: str) -> None:
            require_in(path, holds, field, manifest.get(field), rule)

        def whole(value: Any, low: int, high: int) -> bool:
            return type(value) is int and low <= value <= high

        shape: Any = manifest.get("image_shape")
        names: Any = manifest.get("label_names")
        shaped = isinstance(shape, list) and len(shape) == 3
        shaped = shaped and all(whole(side, 1, 2**16) for side in shape[:2]) and whole(shape[2], 1, 4)
        check(shaped, "image_shape", "must be [H, W, C], sides of 1 to 65536 pixels, 1 to 4 channels")
        check(whole(manifest.get("num_rows"), first_id, first_id), "num_rows", f"must be the shards' sum, {first_id}")
        check(whole(manifest.get("rows_per_group"), 1, 2**20), "rows_per_group", "must be in 1..1048576")
        check(whole(manifest.get("rejected"), 0, 2**63), "rejected", "must be a whole number >= 0")
        named = names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))
        check(named, "label_names", "must be null or a list of texts")
        known = manifest.get("dataset_id") == dataset_id(tuple(shape), shards)
        check(known, "dataset_id", "must be the digest of image_shape and the shards' sha256")
        return cls(
            location=location,
            dataset_id=manifest["dataset_id"],
            num_rows=first_id,
            image_shape=tuple(shape),
            label_names=None if names is None else tuple(names),
            rows_per_group=manifest["rows_per_group"],
            rejected=manifest["rejected"],
            shards=tuple(shards),
        )

    @property
    def num_groups(self) -> int:
        """Number of row groups over all shards."""
        return len(self.group_starts) - 1

    @cached_property
    def group_starts(self) -> Int64s:
        """First id of each row group, and num_rows at the end: int64 [num_groups + 1]."""
        starts = [np.arange(s.first_id, s.first_id + s.rows, self.rows_per_group) for s in self.shards]
        return np.concatenate([*starts, [self.num_rows]]).astype(np.int64)

    @cached_property
    def _first_groups(self) -> Int64s:
        """Index of each shard's first row group: int64 [num_shards + 1]."""
        counts = [-(-shard.rows // self.rows_per_group) for shard in self.shards]
        return np.cumsum([0, *counts], dtype=np.int64)

    def read_groups(self, groups: Sequence[int]) -> tuple[Int64s, UInt8s]:
        """Ids int64 [n] and images uint8 [n, H, W, C] of whole row groups, in the order given.

        Groups of one shard that follow each other in `groups` are read in one go. The images are Arrow's own
        memory where that needs no copy.

        Raises:
            IndexError: A group is not in 0..num_groups-1.
            StorageError: A shard cannot be read.
        """
        tables = [self._read(shard, local, ["image"]) for shard, local in self._runs(groups)]
        ids = [np.arange(self.group_starts[group], self.group_starts[group + 1]) for group in groups]
        chunks = [chunk for table in tables for chunk in table["image"].chunks]
        images = [image_view(chunk, self.image_shape) for chunk in chunks]
        if not images:
            return np.empty(0, np.int64), np.empty((0, *self.image_shape), np.uint8)
        return np.concatenate(ids), images[0] if len(images) == 1 else np.concatenate(images)

    def read_labels(self, groups: Sequence[int] | None = None) -> Int64s:
        """Labels int64 [n] (-1: none) of whole row groups in the order given, None: of all rows; no image is read.

        Raises:
            IndexError: A group is not in 0..num_groups-1.
            StorageError: A shard cannot be read.
        """
        runs = self._runs(range(self.num_groups) if groups is None else groups)
        return np.concatenate([np.empty(0, np.int64), *(_labels(self._read(*run, ["label"])) for run in runs)])

    def read_images(self, start: int, stop: int) -> tuple[Int64s, UInt8s, Int64s]:
        """Ids int64 [n], images uint8 [n, H, W, C] and labels int64 [n] (-1: none) of ids start..stop-1.

        Raises:
            IndexError: The range is not within 0..num_rows.
            StorageError: A shard cannot be read.
        """
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"ids {start}..{stop} are not within 0..{self.num_rows}")
        first = int(np.searchsorted(self.group_starts, start, side="right")) - 1
        last = int(np.searchsorted(self.group_starts, stop, side="left"))
        groups = range(first, last) if start < stop else range(0)
        images = [np.empty((0, *self.image_shape), np.uint8)]
        labels = [np.empty(0, np.int64)]
        for shard, local in self._runs(groups):
            table = self._read(shard, local, ["image", "label"])
            images += [image_view(chunk, self.image_shape) for chunk in table["image"].chunks]
            labels.append(_labels(table))
        skip = start - int(self.group_starts[first]) if start < stop else 0
        kept = slice(skip, skip + stop - start)
        return np.arange(start, stop, dtype=np.int64), np.concatenate(images)[kept], np.concatenate(labels)[kept]

    def read_rows(self, ids: Int64s) -> tuple[UInt8s, Int64s]:
        """Images uint8 [n, H, W, C] and labels int64 [n] (-1: none) of any ids int64 [n], in their order.

        Raises:
            IndexError: An id is not in 0..num_rows-1.
            StorageError: A shard cannot be read.
        """
        images, labels = np.empty((len(ids), *self.image_shape), np.uint8), np.empty(len(ids), np.int64)
        group_of = np.searchsorted(self.group_starts, ids, side="right") - 1
        for group in np.unique(group_of):
            if not 0 <= group < self.num_groups:
                raise IndexError(f"ids {ids[group_of == group].tolist()} are not within 0..{self.num_rows}")
            first, wanted = int(self.group_starts[group]), group_of == group
            _, read, read_labels = self.read_images(first, int(self.group_starts[group + 1]))
            images[wanted], labels[wanted] = read[ids[wanted] - first], read_labels[ids[wanted] - first]
        return images, labels

    def _runs(self, groups: Sequence[int]) -> Iterator[tuple[Shard, list[int]]]:
        """The groups as (shard, groups within it), neighbours in the same shard together."""
        run: tuple[Shard, list[int]] | None = None
        for group in groups:
            if not 0 <= group < self.num_groups:
                raise IndexError(f"group {group} is not within 0..{self.num_groups - 1}")
            index = int(np.searchsorted(self._first_groups, group, side="right")) - 1
            shard, local = self.shards[index], int(group - self._first_groups[index])
            if run is not None and run[0] is shard:
                run[1].append(local)
                continue
            if run is not None:
                yield run
            run = (shard, [local])
        if run is not None:
            yield run

    def _read(self, shard: Shard, groups: list[int], columns: list[str]) -> pa.Table:
        location = self.location / "data" / shard.name
        try:
            opened = _open_shard(location, shard.sha256, threading.get_ident())
            self._check_footer(location, shard, opened)
            table = opened.read_row_groups(groups, columns=columns, use_threads=False)
            if "image" in columns and (nulls := table["image"].null_count):
                raise DataError(f"{location}: {nulls} of {table.num_rows} images are null; restore the file")
            return table
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise StorageError(f"{location}: cannot read row groups {groups} ({reason}); restore the file") from error

    def _check_footer(self, location: Location, shard: Shard, opened: pq.ParquetFile) -> None:
        """Refuse a shard of other types or sizes, whose memory would be taken for images."""
        wanted = {"id": pa.int64(), "image": pa.binary(int(np.prod(self.image_shape))), "label": pa.int64()}
        schema, metadata = opened.schema_arrow, opened.metadata
        for name, kind in wanted.items():
            found = schema.field(name).type if name in schema.names else None
            if found != kind:
                raise DataError(f"{location}: column {name} is {found}, not {kind}; restore the file")
        groups = -(-shard.rows // self.rows_per_group)
        if (metadata.num_rows, metadata.num_row_groups) != (shard.rows, groups):
            raise DataError(
                f"{location}: {metadata.num_rows:,} rows in {metadata.num_row_groups} groups, the manifest says "
                f"{shard.rows:,} in {groups}; restore the file"
            )


@lru_cache(_OPEN_SHARDS)
def _open_shard(location: Location, sha256: str, thread: int) -> pq.ParquetFile:
    """An open shard with its footer.

    `sha256` keeps the cache from mixing up data sets that replace each other, `thread` from sharing a reader
    between threads, which Arrow does not promise to support.
    """
    if location.is_local:
        return pq.ParquetFile(location.path, memory_map=True)
    # The ranges are planned by Arrow (pre_buffer): a read-ahead cache below it would only fetch them twice.
    return pq.ParquetFile(location.open("rb", cache_type="none"), pre_buffer=True)


def _labels(table: pa.Table) -> Int64s:
    """Its labels, -1 where there is none: those below 0 are none either."""
    return np.maximum(np.asarray(table["label"].fill_null(-1).to_numpy(), np.int64), -1)


def image_view(column: pa.FixedSizeBinaryArray, shape: tuple[int, int, int]) -> UInt8s:
    """A column without nulls as uint8 [n, H, W, C], sharing its memory."""
    row_bytes = shape[0] * shape[1] * shape[2]
    count, offset = len(column) * row_bytes, column.offset * row_bytes
    return np.frombuffer(column.buffers()[1], np.uint8, count, offset).reshape(len(column), *shape)


def image_column(images: UInt8s) -> pa.FixedSizeBinaryArray:
    """uint8 [n, H, W, C] as a column of n fixed-size binaries, sharing its memory where contiguous."""
    kind = pa.binary(int(np.prod(images.shape[1:])))
    buffer = pa.py_buffer(np.ascontiguousarray(images).data)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(images), [None, buffer])


def rows_per_group(image_shape: tuple[int, int, int]) -> int:
    """Rows of about 1 MiB of image bytes: a power of two in [1, 4096]."""
    rows = max(1, _GROUP_BYTES // int(np.prod(image_shape)))
    return int(min(_MAX_GROUP_ROWS, 2 ** (rows.bit_length() - 1)))


def encode_shard(first_id: int, images: UInt8s, labels: pa.Array, sources: pa.Array) -> bytes:
    """The Parquet content of one shard; equal input gives equal bytes.

    Args:
        first_id: Id of the first row; the others follow.
        images: uint8 [n, H, W, C].
        labels: int64 [n], null where there is none.
        sources: string [n], where each row came from.
    """
    row_bytes = int(np.prod(images.shape[1:]))
    schema = pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("image", pa.binary(row_bytes), nullable=False),
            pa.field("label", pa.int64()),
            pa.field("source", pa.string(), nullable=False),
        ]
    )
    ids = pa.array(np.arange(first_id, first_id + len(images), dtype=np.int64))
    table = pa.Table.from_arrays([ids, image_column(images), labels, sources], schema=schema)
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=rows_per_group(images.shape[1:]),
        use_dictionary=False,
        compression={"id": "none", "image": "none", "label": "none", "source": "zstd"},
        write_statistics=["id", "label"],
        # One page per row group: Arrow then hands a group's images over as one buffer.
        data_page_size=4 * _GROUP_BYTES,
    )
    return sink.getvalue()


def dataset_id(image_shape: tuple[int, int, int], shards: Sequence[ShardRecord | Shard]) -> str:
    """sha256 (hex) over the image shape and the shards' sha256: equal content has an equal id."""
    content = [str(tuple(image_shape)), *(shard.sha256 for shard in shards)]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()
