"""A finished sample set, read as a data set is."""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ddpm_core.denoiser import NO_LABEL
from pipelines.cli.errors import DataError
from pipelines.data.dataset import Int64s, Shard, UInt8s, dataset_id
from pipelines.outputs.manifest import MANIFEST, read_manifest, require_in
from pipelines.sampling.kind import SAMPLE_SET
from pipelines.sampling.request import SampleRequest
from pipelines.sampling.shard import decode_rows
from pipelines.storage.location import Location


@dataclass(frozen=True)
class SampleSet:
    """A committed sample set. Picklable and small: it holds O(shards), no images.

    Attributes:
        location: Where it lies.
        dataset_id: Content hash (hex) over the shards' sha256 and the image shape.
        num_rows: Ids are 0..num_rows-1.
        image_shape: (H, W, C).
        has_labels: Whether images have labels.
        format: Of the shards.
        made_by: How the images were made, for a person.
        evaluations: Of networks, for each image; None where the manifest does not say.
        shards: In the order of ids.
    """

    location: Location
    dataset_id: str
    num_rows: int
    image_shape: tuple[int, int, int]
    has_labels: bool
    format: str
    made_by: str
    evaluations: int | None
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, location: Location) -> "SampleSet":
        """Read the manifest and check that every shard is there with its recorded size.

        Raises:
            DataError: Its fields do not hold together, or a shard is missing or truncated.
            StorageError: It cannot be read.
        """
        path, manifest = location / MANIFEST, read_manifest(location)
        request = SampleRequest.from_json(manifest["request"], path)
        shape: Any = manifest.get("image_shape")
        shaped = isinstance(shape, list) and len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)
        require_in(path, shaped, "image_shape", shape, "must be [H, W, C]")
        evaluations = manifest.get("evaluations_per_image")
        whole = evaluations is None or (type(evaluations) is int and evaluations > 0)
        require_in(path, whole, "evaluations_per_image", evaluations, "must be a whole number > 0")
        shards, first_id = [], 0
        for entry in manifest["shards"]:
            shards.append(Shard(entry["name"], entry["rows"], first_id, entry["bytes"], entry["sha256"]))
            first_id += entry["rows"]
        sizes = (location / SAMPLE_SET.directory).sizes()
        for shard in shards:
            if sizes.get(shard.name) != shard.bytes:
                raise DataError(
                    f"{location / SAMPLE_SET.directory / shard.name}: is missing or cut; run the jobs/sample.py "
                    "command again that made the sample set: it makes it again"
                )
        return cls(
            location=location,
            dataset_id=dataset_id((shape[0], shape[1], shape[2]), shards),
            num_rows=first_id,
            image_shape=(shape[0], shape[1], shape[2]),
            has_labels=request.has_labels,
            format=request.format,
            made_by=", ".join(filter(None, (request.described_sampler, request.described_guidance))),
            evaluations=evaluations,
            shards=tuple(shards),
        )

    def read_labels(self) -> Int64s:
        """Of all images, int64 [num_rows] (-1: none).

        Raises:
            DataError: A shard is damaged.
            StorageError: A shard cannot be read.
        """
        if not self.has_labels:
            return np.full(self.num_rows, NO_LABEL, np.int64)
        found: list[int] = []
        for shard in self.shards:
            path = self.location / SAMPLE_SET.directory / shard.name
            content = path.read_bytes()
            with _refused(path):
                if self.format == "parquet":
                    column = pq.read_table(io.BytesIO(content), columns=["label"])["label"]
                    found += column.fill_null(NO_LABEL).to_pylist()
                else:
                    found += [row.label for row in decode_rows(content, self.format)]
        return np.array(found, np.int64)

    def read_images(self, start: int, stop: int) -> tuple[Int64s, UInt8s, Int64s]:
        """Ids int64 [n], images uint8 [n, H, W, C] and labels int64 [n] (-1: none) of ids start..stop-1.

        Raises:
            IndexError: The range is not within 0..num_rows.
            DataError: A shard is damaged, or holds other images than the manifest says.
            StorageError: A shard cannot be read.
        """
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"ids {start}..{stop} are not within 0..{self.num_rows}")
        images = np.empty((stop - start, *self.image_shape), np.uint8)
        labels, read = np.full(stop - start, NO_LABEL, np.int64), np.zeros(stop - start, bool)
        for shard in self.shards:
            if shard.first_id >= stop or shard.first_id + shard.rows <= start:
                continue
            path = self.location / SAMPLE_SET.directory / shard.name
            content = path.read_bytes()
            with _refused(path):
                for row in decode_rows(content, self.format):
                    if start <= row.id < stop:
                        pixels = np.asarray(Image.open(io.BytesIO(row.png)), np.uint8)
                        images[row.id - start] = pixels.reshape(self.image_shape)
                        labels[row.id - start], read[row.id - start] = row.label, True
        if not read.all():
            missing = start + int(np.flatnonzero(~read)[0])
            raise DataError(f"{self.location}: its shards do not hold the image {missing}; restore them")
        return np.arange(start, stop, dtype=np.int64), images, labels


@contextmanager
def _refused(path: Location) -> Iterator[None]:
    """What reading a damaged shard raises becomes one line."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, pa.ArrowException, tarfile.TarError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read as a shard of samples ({reason}); restore it") from error
