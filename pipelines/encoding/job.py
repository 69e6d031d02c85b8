"""The encoding job: what is asked for is settled, then `run_bulk` computes and reports it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddpm_core.networks.unet import pixel_weights
from pipelines.cli.console import event, waiting
from pipelines.data.dataset import PreparedDataset
from pipelines.data.opening import open_dataset
from pipelines.encoding.config import EncodeConfig
from pipelines.encoding.kind import ENCODING, in_words, round_trip
from pipelines.encoding.request import EncodeRequest, request_of
from pipelines.encoding.shard import PREVIEW, EncodeShards
from pipelines.models.kept import source_of
from pipelines.models.used import UsedModel
from pipelines.outputs.attempt import Record
from pipelines.outputs.bulk_job import BulkJob, Finished, Rows
from pipelines.outputs.kind import Manifest
from pipelines.outputs.run_bulk import BulkResult, look, run_bulk, settled_gpus, settled_precision
from pipelines.outputs.shards import ShardedOutput, ShardRecord, begun_request
from pipelines.storage.location import Location
from pipelines.storage.ownership import require_apart


def encode(config: EncodeConfig) -> BulkResult:
    """Encode, or continue to, or find that it is done.

    Raises:
        ConfigError: A field does not fit the model or the data; the output overlaps one of them, or holds other files.
        DataError: The data set is missing, empty, of another shape, range of values or labels than the model's.
        ModelError: There is no such model.
        RequestMismatchError: The output holds an encoding of another request.
        StorageError: The output cannot be read or written.
        ClusterError: Ray is out of reach, or gave up.
    """
    root, location = Location.parse(config.root), Location.parse(config.output)
    with waiting("reading model and data"):
        model = UsedModel.read(location, config.model, config.tracking.uri, root.local_path)
        data = open_dataset(root, "data", config.data)
    require_apart(location, source_of(model.found), "the model")
    require_apart(location, data.location, "the data set")
    event(f"model {model.described}")
    begun = begun_request(location)
    config = replace(config, cluster=settled_gpus(config.cluster, begun))
    config = replace(config, precision=settled_precision(config.precision, begun, config.cluster.gpus))
    request = request_of(config, model.model, data)
    return run_bulk(look(Encoding(config, request, model, data)))


@dataclass
class Encoding(BulkJob):
    """See `BulkJob`; `data` has the images."""

    config: EncodeConfig
    request: EncodeRequest
    model: UsedModel
    data: PreparedDataset

    kind, job, doing, counted = ENCODING, "encode", "encoding", "images"

    @property
    def usual_experiment(self) -> str:
        """See `BulkJob`."""
        return f"{self.model.found.name}/encodings"

    @property
    def num_images(self) -> int:
        """See `BulkJob`."""
        return self.request.num_images

    @property
    def num_shards(self) -> int:
        """See `BulkJob`."""
        return self.request.num_shards

    def factory(self) -> EncodeShards:
        """See `BulkJob`."""
        return EncodeShards(self.location, self.request, self.data, self.config.cluster.threads)

    def weights(self, shards: Sequence[int]) -> float:
        """See `BulkJob`; there and back."""
        request, denoiser = self.request, self.model.model.denoiser
        num_images = min(len(shards) * request.shard_size, request.num_images)
        calls = 2 * len(request.sampler.calls(denoiser.process))
        return float(num_images * calls) * pixel_weights(denoiser.network)

    def tags(self) -> Mapping[str, Any]:
        """The images and the model's training step."""
        return {"ddpm.dataset_id": self.request.dataset_id, "ddpm.step": self.model.step}

    def reads(self) -> Sequence[Record]:
        """The data set."""
        uri = self.data.location.uri
        return [Record("dataset", {"name": uri, "digest": self.data.dataset_id, "uri": uri, "context": "encoding"})]

    def finish(self, output: ShardedOutput, records: Sequence[ShardRecord]) -> Finished:
        """The round trip, and the picture of it for MLflow."""
        found = round_trip(output.shards, [record.name for record in records])
        channels, height, width = self.model.model.denoiser.image_shape
        fields = {"noise_shape": [channels, height, width], "data": self.data.location.uri, "round_trip": found}
        note = (
            f"**{self.num_images:,} images** of `{self.data.location}` as noise ({self.request.described_sampler}) at "
            f"`{output.location}`, by model `{self.model.found.model_id[:12]}` (`{self.model.found.uri}`).\n\n"
            f"Decoded again: {in_words(found)}.\n\n"
            f"![round trip](get-artifact?path=preview/{PREVIEW}&run_uuid={{run_id}})"
        )
        metrics = {f"round_trip/{name}": found[name] for name in ("mean_rms", "median_rms", "worst_rms")}
        return Finished(
            fields,
            [
                Record("metrics", {"step": 0, "values": metrics}),
                Record("artifact", {"path": (output.location / "preview" / PREVIEW).uri, "artifact_path": "preview"}),
                Record("note", {"markdown": note}),
            ],
        )

    def rows(self, manifest: Manifest) -> Rows:
        """See `BulkJob`."""
        size = sum(shard["bytes"] for shard in manifest["shards"])
        told = {"given": ", told their labels", "null": ", told no label", None: ""}[self.request.labels]
        return [
            ("images", f"{manifest['num_rows']:,} of {self.data.location}{told}"),
            ("sampler", self.request.described_sampler),
            ("round trip", in_words(manifest["round_trip"])),
            ("shards", f"{len(manifest['shards']):,} in {self.location / 'data'}, {size / 2**20:,.1f} MiB"),
            ("model", self.model.described),
            ("preview", (self.location / "preview" / PREVIEW).uri),
        ]
