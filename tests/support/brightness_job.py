"""A third bulk job, as a room of its own would be: the mean level of every image of a prepared data set.

It is told to nothing else but `pipelines.verify.kinds.KINDS`.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cluster.config import ClusterConfig
from pipelines.data.dataset import PreparedDataset
from pipelines.outputs.attempt import Record
from pipelines.outputs.bulk_job import BulkJob, Finished, Rows
from pipelines.outputs.kind import Findings, Manifest, OutputKind, dense_ids, parquet_ids, size_row
from pipelines.outputs.request import Request
from pipelines.outputs.run_bulk import BulkResult, look, run_bulk
from pipelines.outputs.shards import ShardedOutput, ShardOutput, ShardRecord
from pipelines.storage.location import Location
from pipelines.tracking.config import TrackingConfig


@dataclass(frozen=True)
class BrightnessConfig:
    data: str
    output: str
    root: str
    shard_size: int = 16
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    name: str | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True)
class BrightnessRequest(Request):
    dataset_id: str
    shard_size: int


@dataclass(frozen=True)
class BrightnessShards:
    data: PreparedDataset
    request: BrightnessRequest

    def __call__(self) -> Callable[[int], ShardOutput]:
        return self._compute

    def _compute(self, index: int) -> ShardOutput:
        start = index * self.request.shard_size
        stop = min(start + self.request.shard_size, self.data.num_rows)
        ids, images, _ = self.data.read_images(start, stop)
        levels = images.reshape(len(ids), -1).mean(1)
        sink = io.BytesIO()
        pq.write_table(pa.table({"id": ids, "level": levels}), sink)
        return ShardOutput(sink.getvalue(), len(ids), {"sum": math.fsum(levels)})


def _check(location: Location, request: BrightnessRequest, manifest: Manifest, found: Findings) -> None:
    mean = (location / "mean.json").read_json()
    if mean != manifest["mean"]:
        found.problems.append(f"{location / 'mean.json'}: says {mean}, the manifest {manifest['mean']}")
    found.rows += [size_row(manifest), ("mean level", f"{mean:.3f}")]


BRIGHTNESS = OutputKind(
    format="toy-brightness",
    version=1,
    title="Brightness",
    request=BrightnessRequest,
    ids=lambda request, content: parquet_ids(content),
    order=lambda request, manifest: dense_ids(manifest),
    check=_check,
    factory=lambda location, request, manifest, threads: BrightnessShards(
        PreparedDataset.open(manifest["data"]), request
    ),
)


@dataclass
class Brightness(BulkJob):
    config: BrightnessConfig
    request: BrightnessRequest
    data: PreparedDataset

    kind, job, doing, counted, model = BRIGHTNESS, "brightness", "measuring", "images", None
    usual_experiment = "brightness"

    @property
    def num_images(self) -> int:
        return self.data.num_rows

    @property
    def num_shards(self) -> int:
        return -(-self.data.num_rows // self.request.shard_size)

    def factory(self) -> BrightnessShards:
        return BrightnessShards(self.data, self.request)

    def weights(self, shards: Sequence[int]) -> float:
        return 0.0  # no network

    def tags(self) -> Mapping[str, Any]:
        return {"ddpm.dataset_id": self.request.dataset_id}

    def finish(self, output: ShardedOutput, records: Sequence[ShardRecord]) -> Finished:
        mean = math.fsum(record.extra["sum"] for record in records) / self.num_images
        (output.location / "mean.json").write_json(mean)
        fields = {"mean": mean, "data": self.data.location.uri}
        return Finished(fields, [Record("metrics", {"step": 0, "values": {"brightness/mean": mean}})])

    def rows(self, manifest: Manifest) -> Rows:
        return [("mean level", f"{manifest['mean']:.3f}")]


def measure(config: BrightnessConfig) -> BulkResult:
    """What jobs/brightness.py would call."""
    data = PreparedDataset.open(config.data)
    return run_bulk(look(Brightness(config, BrightnessRequest(data.dataset_id, config.shard_size), data)))
