"""The sampling job: what is asked for is settled, then `run_bulk` makes it.

A sample set is a pure function of its request: model id, seed, sampler and the shape of the network's batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.cli.console import event, waiting
from pipelines.data.ingest.decode import decode_image
from pipelines.models.kept import source_of
from pipelines.models.used import UsedModel
from pipelines.outputs.attempt import Record
from pipelines.outputs.bulk_job import BulkJob, Finished, Rows
from pipelines.outputs.kind import Manifest
from pipelines.outputs.pictures import grid_png
from pipelines.outputs.run_bulk import look, run_bulk, settled_precision
from pipelines.outputs.shards import ShardedOutput, ShardRecord, begun_request
from pipelines.sampling.config import SampleConfig
from pipelines.sampling.kind import SAMPLE_SET
from pipelines.sampling.plan import plan, work_of
from pipelines.sampling.request import SampleRequest, request_of
from pipelines.sampling.shard import SUFFIXES, SampleShards, decode_shard
from pipelines.storage.location import Location
from pipelines.storage.ownership import require_apart

_PREVIEW_IMAGES = 64


@dataclass(frozen=True)
class SampleSummary:
    """What became of a request: `rows` are (name, value) pairs for the closing summary."""

    title: str
    rows: Rows


def sample(config: SampleConfig) -> SampleSummary:
    """Generate a sample set, or continue to, or find that it is complete.

    Raises:
        ConfigError: A field does not fit the model; the output overlaps it, or holds other files.
        ModelError: There is no such model.
        RequestMismatchError: The output holds samples of another request.
        StorageError: The output cannot be read or written.
        ClusterError: Ray is out of reach, or gave up.
    """
    config = config.with_date()
    location = Location.parse(config.output)
    begun = begun_request(location)
    config = _with_shard_size(config, begun)
    with waiting("reading the model"):
        model = UsedModel.read(location, config.model, config.tracking.uri, Location.parse(config.root).local_path)
    require_apart(location, source_of(model.found), "the model")
    event(f"model {model.described}")
    config = replace(config, precision=settled_precision(config.precision, begun, config.cluster.gpus_per_worker))
    job = Sampling(config, request_of(config, model.model), model)
    standing = look(job)
    if config.dry_run:
        return SampleSummary(
            "Plan; nothing was written", plan(location, job.request, model, standing.left, config.cluster)
        )
    result = run_bulk(standing)
    return SampleSummary(result.title, result.rows)


def _with_shard_size(config: SampleConfig, begun: Mapping[str, Any]) -> SampleConfig:
    """With a shard size; where none is given, that of the request which the output was begun with, if it was."""
    begun_with = begun.get("shard_size")
    size = begun_with if config.shard_size is None and isinstance(begun_with, int) else config.chosen_shard_size
    return replace(config, shard_size=size)


@dataclass
class Sampling(BulkJob):
    """See `BulkJob`."""

    config: SampleConfig
    request: SampleRequest
    model: UsedModel

    kind, job, doing, counted = SAMPLE_SET, "sample", "sampling", "samples"

    @property
    def experiment(self) -> str:
        """See `BulkJob`."""
        return f"{self.model.found.name}/samples"

    @property
    def num_images(self) -> int:
        """See `BulkJob`."""
        return self.request.num_images

    @property
    def num_shards(self) -> int:
        """See `BulkJob`."""
        return self.request.num_shards

    @property
    def suffix(self) -> str:
        """See `BulkJob`."""
        return SUFFIXES[self.request.format]

    def factory(self) -> SampleShards:
        """See `BulkJob`."""
        return SampleShards(self.location, self.request, self.config.cluster.threads)

    def weights(self, shards: Sequence[int]) -> float:
        """See `BulkJob`."""
        return work_of(self.request, self.model.model, shards).weights

    def tags(self) -> Mapping[str, Any]:
        """The data set that the model was trained on."""
        return {"ddpm.dataset_id": self.model.trained_on.get("id")}

    def finish(self, output: ShardedOutput, records: Sequence[ShardRecord]) -> Finished:
        """The preview, for the output and for MLflow."""
        preview, request, found = output.location / "preview", self.request, self.model.found
        (preview / "grid.png").write_bytes(self._grid(output, records))
        num_images = sum(record.rows for record in records)
        note = (
            f"**{num_images:,} images** ({request.described_sampler}, seed {request.seed}) at "
            f"`{output.location}`, by model `{found.model_id[:12]}` (`{found.uri}`).\n\n"
            "![samples](get-artifact?path=preview/grid.png&run_uuid={run_id})\n\n"
            "From noise to image: x_t above the predicted x_0.\n\n"
            "![trajectory](get-artifact?path=preview/trajectory.png&run_uuid={run_id})"
        )
        pictures = [
            Record("artifact", {"path": (preview / name).uri, "artifact_path": "preview"})
            for name in ("grid.png", "trajectory.png")
        ]
        return Finished({"image_shape": list(self.model.image_shape)}, [*pictures, Record("note", {"markdown": note})])

    def _grid(self, output: ShardedOutput, records: Sequence[ShardRecord]) -> bytes:
        """The first images, from the stored shards."""
        pngs: list[bytes] = []
        for record in records[: -(-_PREVIEW_IMAGES // self.request.shard_size)]:
            content = (output.shards / record.name).read_bytes()
            pngs += [png for _, png in decode_shard(content, self.request.format)]
        return grid_png(np.stack([decode_image(png, None, None) for png in pngs[:_PREVIEW_IMAGES]]))

    def rows(self, manifest: Manifest) -> Rows:
        """See `BulkJob`."""
        size = sum(shard["bytes"] for shard in manifest["shards"])
        height, width, channels = manifest["image_shape"]
        shape = f"{height}x{width}x{channels} (H x W x C)"
        return [
            ("images", f"{manifest['num_rows']:,} of {shape}, seed {self.request.seed}"),
            ("shards", f"{len(manifest['shards']):,} in {self.location / 'data'}, {size / 2**20:,.1f} MiB"),
            ("model", self.model.described),
            ("preview", (self.location / "preview" / "grid.png").uri),
        ]
