"""Features of an image set: what is stored of each image once, and used by every comparison of the set.

FEATURES/data/part-00042.parquet   id int64, feature list<float>[d], digest binary[32], label int64
FEATURES/extractor/                the network that made them, where it is a file or a model

`digest` is the sha256 of the image's pixels.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cli.errors import DataError, DDPMError
from pipelines.data.dataset import Int64s, UInt8s
from pipelines.outputs.kind import Findings, Manifest, OutputKind, dense_ids, parquet_ids, size_row
from pipelines.outputs.manifest import read_manifest
from pipelines.outputs.progress import made
from pipelines.outputs.request import Request
from pipelines.outputs.shards import ShardOutput
from pipelines.quality.extractors.load import load_extractor
from pipelines.quality.extractors.request import ExtractorRequest, Float32s
from pipelines.quality.image_set import ImageSet, reopen
from pipelines.quality.resize import resize
from pipelines.storage.errors import clear_errors
from pipelines.storage.location import Location

EXTRACTOR = "extractor"


@dataclass(frozen=True)
class FeatureRequest(Request):
    """The values that determine every byte of a set's features.

    Attributes:
        dataset_id: Content hash of the images.
        num_images: Ids are 0..num_images-1.
        extractor: What is computed; its `image_shape` is what the images are resized to, where theirs is another.
        batch_size: Images in one call.
        shard_size: Images in one object.
        device: What computes.
        resize: Kernel by which images are brought to the extractor's shape; None where no set is resized.
    """

    dataset_id: str
    num_images: int
    extractor: ExtractorRequest
    batch_size: int
    shard_size: int
    device: Literal["cpu", "cuda"]
    resize: str | None = None

    @property
    def on_gpu(self) -> bool:
        """See `Request`."""
        return self.device == "cuda"

    @property
    def num_shards(self) -> int:
        """All are of `shard_size` images but the last."""
        return -(-self.num_images // self.shard_size)


def described(extractor: ExtractorRequest) -> str:
    """For a person: what computes features, of what."""
    of = "" if extractor.sha256 is None else f"sha256 {extractor.sha256[:12]}, "
    height, width, channels = extractor.image_shape
    size = f"{extractor.num_features} numbers of {height}x{width}x{channels}"
    return f"{extractor.name} ({of}{size}; {extractor.preprocessing})"


@dataclass(frozen=True)
class FeatureShards:
    """Computes shard `index`: the features of images index*shard_size ... of the set.

    Attributes:
        location: The output; its extractor/ is the network.
        request: Of the features.
        images: The set.
        threads: CPU threads of the network.
    """

    location: Location
    request: FeatureRequest
    images: ImageSet
    threads: int

    def __call__(self) -> Callable[[int], ShardOutput]:
        """Load the network: the engine calls this once per actor."""
        request = self.request
        extract = load_extractor(request.extractor, self.location / EXTRACTOR, self.threads, request.device)
        return lambda index: self.compute(extract, index)

    def compute(self, extract: Callable[[UInt8s], Float32s], index: int) -> ShardOutput:
        """Read, resize, extract."""
        request, start = self.request, index * self.request.shard_size
        stop = min(start + request.shard_size, request.num_images)
        ids, images, labels = self.images.read_images(start, stop)
        height, width = request.extractor.image_shape[:2]
        found = np.empty((len(ids), request.extractor.num_features), np.float32)
        for first in range(0, len(ids), request.batch_size):
            batch = images[first : first + request.batch_size]
            kept = len(batch)
            if kept < request.batch_size:  # batches of one shape: filled up with the last image
                batch = np.concatenate([batch, np.repeat(batch[-1:], request.batch_size - kept, axis=0)])
            found[first : first + kept] = extract(resize(batch, (height, width)))[:kept]
            made(first + kept)
        if len(bad := ids[~np.isfinite(found).all(1)]):
            raise DataError(
                f"features: {request.extractor.name} gives NaN or infinite numbers for {len(bad)} of {len(ids)} images "
                f"(first ids {', '.join(map(str, bad[:3].tolist()))}); take another extractor"
            )
        return ShardOutput(encode_features(ids, found, images, labels), len(ids), {"first_id": start})


def encode_features(ids: Int64s, features: Float32s, images: UInt8s, labels: Int64s) -> bytes:
    """The Parquet content of a shard; equal input gives equal bytes."""
    digests = [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images]
    values = pa.array(np.ascontiguousarray(features).reshape(-1))
    columns = {
        "id": pa.array(ids),
        "feature": pa.FixedSizeListArray.from_arrays(values, features.shape[1]),
        "digest": pa.array(digests, pa.binary(32)),
        "label": pa.array(labels, pa.int64(), mask=labels < 0),
    }
    sink = io.BytesIO()
    compression = {"id": "zstd", "feature.list.element": "none", "digest": "none", "label": "zstd"}
    pq.write_table(pa.table(columns), sink, compression=compression, use_dictionary=False)
    return sink.getvalue()


class FeatureRows(NamedTuple):
    """Rows of a shard: ids int64 [n], features float32 [n, d]."""

    ids: Int64s
    features: Float32s


@dataclass(frozen=True)
class FeatureSet:
    """The finished features of a set. Picklable and small: it holds O(shards).

    Attributes:
        location: Where they lie.
        num_rows: Of all shards.
        shards: (name, first id, rows) of each, in the order of ids.
    """

    location: Location
    num_rows: int
    shards: tuple[tuple[str, int, int], ...]

    @classmethod
    def open(cls, location: Location) -> "FeatureSet":
        """Read the manifest.

        Raises:
            StorageError: There is none.
        """
        shards, first = [], 0
        for entry in read_manifest(location)["shards"]:
            shards.append((entry["name"], first, entry["rows"]))
            first += entry["rows"]
        return cls(location, first, tuple(shards))

    @cached_property
    def labels(self) -> Int64s:
        """Of all rows, int64 [num_rows] (-1: none); no feature is read."""
        tables = [self._read(name, ["label"])["label"].fill_null(-1).to_numpy() for name, _, _ in self.shards]
        return np.concatenate([np.empty(0, np.int64), *tables])

    def read_digests(self) -> npt.NDArray[np.void]:
        """Of all rows' pixels, 32 bytes each, [num_rows]; no feature is read."""
        columns = [self._read(name, ["digest"])["digest"].combine_chunks() for name, _, _ in self.shards]
        return np.concatenate(
            [np.frombuffer(each.buffers()[1], "V32", len(each), each.offset * 32) for each in columns]
        )

    def read(self, rows: Int64s | None = None) -> Iterator[FeatureRows]:
        """Shard by shard the rows with these ids int64 [n], ascending, None: all; shards without one are not read."""
        for name, first, size in self.shards:
            chosen = None
            if rows is not None:
                chosen = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + size)]
                if not len(chosen):
                    continue
            column = self._read(name, ["feature"])["feature"].combine_chunks()
            features = column.flatten().to_numpy().reshape(size, -1)
            if chosen is None:
                yield FeatureRows(np.arange(first, first + size), features)
            else:
                yield FeatureRows(chosen, features[chosen - first])

    def _read(self, name: str, columns: list[str]) -> pa.Table:
        path = self.location / FEATURES.directory / name
        with clear_errors("read", path.uri), path.open("rb") as file:
            return pq.read_table(file, columns=columns, use_threads=False)


def _check(location: Location, request: FeatureRequest, manifest: Manifest, found: Findings) -> None:
    try:
        load_extractor(request.extractor, location / EXTRACTOR, 1, "cpu")
    except DDPMError as error:
        found.problems.append(str(error))
    found.rows += [
        size_row(manifest),
        ("features", described(request.extractor)),
        ("of", f"{request.dataset_id} ({manifest['images']})"),
        ("code", manifest["code_version"]),
    ]


def _factory(location: Location, request: FeatureRequest, manifest: Manifest, threads: int) -> FeatureShards:
    return FeatureShards(location, request, reopen(manifest["images"], request.dataset_id), threads)


FEATURES = OutputKind(
    format="ddpm-features",
    version=1,
    title="Features",
    request=FeatureRequest,
    ids=lambda request, content: parquet_ids(content),
    order=lambda request, manifest: dense_ids(manifest),
    check=_check,
    factory=_factory,
)
