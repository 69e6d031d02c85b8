"""The sampling job: what is asked for is settled, then `run_bulk` makes it.

A sample set is a pure function of its request: model id, seed, sampler and the shape of the network's batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.cli.console import event, waiting
from pipelines.data.dataset import PreparedDataset
from pipelines.data.opening import open_dataset
from pipelines.models.kept import source_of
from pipelines.models.used import UsedModel
from pipelines.outputs.attempt import Record
from pipelines.outputs.bulk_job import BulkJob, Finished, Rows
from pipelines.outputs.kind import Manifest
from pipelines.outputs.run_bulk import look, run_bulk, settled_gpus, settled_precision
from pipelines.outputs.shards import ShardedOutput, ShardRecord, begun_request
from pipelines.sampling.config import SampleConfig
from pipelines.sampling.kind import SAMPLE_SET
from pipelines.sampling.labels import SampleLabels, settle
from pipelines.sampling.plan import calls_of, plan, work_of
from pipelines.sampling.preview import preview_png
from pipelines.sampling.request import SampleRequest, request_of
from pipelines.sampling.shard import GUIDANCE_MODEL, SUFFIXES, SampleShards
from pipelines.sampling.tolerance import IMAGES, steps_within
from pipelines.storage.location import Location
from pipelines.storage.ownership import require_apart


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
        DataError: The data set whose labels are asked for does not fit the model.
        RequestMismatchError: The output holds samples of another request.
        StorageError: The output cannot be read or written.
        ClusterError: Ray is out of reach, or gave up.
    """
    config = config.with_date()
    location, root = Location.parse(config.output), Location.parse(config.root)
    begun, weaker = begun_request(location), None
    with waiting("reading the model"):
        model = UsedModel.read(location, config.model, config.tracking.uri, root.local_path)
        if (second := config.guidance.model) is not None:
            where = "guidance.model", GUIDANCE_MODEL
            weaker = UsedModel.read(location, second, config.tracking.uri, root.local_path, *where)
    require_apart(location, source_of(model.found), "the model")
    if weaker is not None:
        require_apart(location, source_of(weaker.found), "the weaker model")
    asked, labels, data = config.asked_labels, None, None
    if asked is not None and asked.dataset is not None:
        data = open_dataset(root, "labels", asked.dataset)
        require_apart(location, data.location, "the data set")
    if asked is not None:
        labels = settle(asked, config.num_images, model.label_names, data)
        config = replace(config, num_images=labels.num_images)
    config = _with_shard_size(config, begun)
    event(f"model {model.described}")
    if weaker is not None and config.guidance.scale == 1.0:
        event(f"guidance.scale = 1: no call uses the weaker model {weaker.described}; above 1, as 2, it guides")
    elif weaker is not None:
        event(f"guided by the weaker model {weaker.described}")
    config = replace(config, cluster=settled_gpus(config.cluster, begun))
    config = replace(config, precision=settled_precision(config.precision, begun, config.cluster.gpus))
    request = request_of(config, model.model, labels, weaker.model if weaker else None)
    job = Sampling(config, request, model, weaker, labels, data)
    if config.sampler.tolerance is not None:
        job.request = _with_fewest_steps(job, begun)
    standing = look(job)
    if config.dry_run:
        rows = plan(location, job.request, model, weaker, standing.left, config.cluster)
        return SampleSummary("Plan; nothing was written", rows)
    result = run_bulk(standing)
    return SampleSummary(result.title, result.rows)


def _with_shard_size(config: SampleConfig, begun: Mapping[str, Any]) -> SampleConfig:
    """With a shard size; where none is given, that of the request which the output was begun with, if it was."""
    begun_with = begun.get("shard_size")
    size = begun_with if config.shard_size is None and isinstance(begun_with, int) else config.chosen_shard_size
    return replace(config, shard_size=size)


def _with_fewest_steps(job: "Sampling", begun: Mapping[str, Any]) -> SampleRequest:
    """The job's request with the number of steps that keeps its tolerance. An output that was begun, with which it will
    be compared, has found it already."""
    begun_steps, request = begun.get("steps"), job.request
    if begun:
        return request.with_steps(begun_steps) if isinstance(begun_steps, int) else request
    look(job)  # what is refused is refused before the search
    tolerance = job.config.sampler.tolerance
    assert tolerance is not None
    with waiting("finding the number of steps"):
        found = steps_within(tolerance, request, job.model, job.weaker, job.labels, job.config.cluster)
    event(
        f"sampler.tolerance = {tolerance:g}: {found.steps:,} steps; half of them move the first {IMAGES} images by "
        f"{found.distance:.3g}"
    )
    return request.with_steps(found.steps)


@dataclass
class Sampling(BulkJob):
    """See `BulkJob`; the images are guided by `weaker`, and have `labels`, which `data` may have given."""

    config: SampleConfig
    request: SampleRequest
    model: UsedModel
    weaker: UsedModel | None = None
    labels: SampleLabels | None = None
    data: PreparedDataset | None = None

    kind, job, doing, counted = SAMPLE_SET, "sample", "sampling", "samples"

    @property
    def run_name(self) -> str:
        """See `BulkJob`; runs of a sweep over w are told apart by it."""
        scale = self.request.guidance_scale
        return super().run_name if scale is None else f"{super().run_name}, w = {scale:g}"

    @property
    def usual_experiment(self) -> str:
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
        return SampleShards(self.location, self.request, self.config.cluster.threads, self.data)

    def weights(self, shards: Sequence[int]) -> float:
        """See `BulkJob`."""
        return work_of(self.request, self.model, self.weaker, shards).weights

    def further_models(self) -> Mapping[str, UsedModel]:
        """The weaker one."""
        return {GUIDANCE_MODEL: self.weaker} if self.weaker else {}

    def tags(self) -> Mapping[str, Any]:
        """The data set that the model was trained on, and the weaker model."""
        weaker = self.weaker.found if self.weaker else None
        return {
            "ddpm.dataset_id": self.model.trained_on.get("id"),
            "ddpm.guidance_model_id": weaker.model_id if weaker else None,
            "ddpm.guidance_model": weaker.uri if weaker else None,
        }

    def reads(self) -> Sequence[Record]:
        """What was asked of labels and of which weaker model, in its user's words, and the data set of the labels."""
        params = {"labels": self.config.labels, "guidance_model": self.config.guidance.model}
        given = {name: value for name, value in params.items() if value is not None}
        records = [Record("params", {"values": given})] if given else []
        if self.data is not None:
            uri = self.data.location.uri
            records.append(
                Record("dataset", {"name": uri, "digest": self.data.dataset_id, "uri": uri, "context": "labels"})
            )
        return records

    def finish(self, output: ShardedOutput, records: Sequence[ShardRecord]) -> Finished:
        """The preview, for the output and for MLflow."""
        preview, found = output.location / "preview", self.model.found
        classes = self.model.label_names
        (preview / "grid.png").write_bytes(preview_png(output.shards, records, self.request, self.labels, classes))
        num_images = sum(record.rows for record in records)
        note = (
            f"**{num_images:,} images** ({self._described}) at "
            f"`{output.location}`, by model `{found.model_id[:12]}` (`{found.uri}`).\n\n"
            "![samples](get-artifact?path=preview/grid.png&run_uuid={run_id})\n\n"
            "From noise to image: x_t above the predicted x_0.\n\n"
            "![trajectory](get-artifact?path=preview/trajectory.png&run_uuid={run_id})"
        )
        names = ["grid.png", "trajectory.png"]
        if self.request.interpolate is not None:
            first, second = self.request.interpolate
            names.append("interpolation.png")
            note += (
                f"\n\nFrom image {first} to image {second}, by the angle between their noise.\n\n"
                "![interpolation](get-artifact?path=preview/interpolation.png&run_uuid={run_id})"
            )
        pictures = [Record("artifact", {"path": (preview / name).uri, "artifact_path": "preview"}) for name in names]
        evaluations = sum(calls_of(self.request, self.model, self.weaker))
        fields: dict[str, Any] = {
            "image_shape": list(self.model.image_shape),
            "evaluations_per_image": evaluations,
        }
        if self.data is not None:
            fields["label_data"] = self.data.location.uri
        if self.weaker is not None:
            fields["guidance_model"] = {**self.weaker.found.origin, "lineage": self.weaker.lineage}
        return Finished(fields, [*pictures, Record("note", {"markdown": note})])

    @property
    def _described(self) -> str:
        """How the images are made."""
        parts = [self.request.described_sampler]
        if self.labels is not None:
            parts.append(f"labels {self.config.labels}")
        if self.request.described_guidance:
            weaker = f" (`{self.weaker.found.uri}`)" if self.weaker else ""
            parts.append(f"{self.request.described_guidance}{weaker}")
        return f"{', '.join(parts)}, seed {self.request.seed}"

    def rows(self, manifest: Manifest) -> Rows:
        """See `BulkJob`."""
        size = sum(shard["bytes"] for shard in manifest["shards"])
        height, width, channels = manifest["image_shape"]
        shape = f"{height}x{width}x{channels} (H x W x C)"
        return [
            ("images", f"{manifest['num_rows']:,} of {shape}, seed {self.request.seed}"),
            ("sampler", self.request.described_sampler),
            *([("labels", self.config.labels)] if self.config.labels is not None else []),
            *([("guidance", self.request.described_guidance)] if self.request.described_guidance else []),
            ("shards", f"{len(manifest['shards']):,} in {self.location / 'data'}, {size / 2**20:,.1f} MiB"),
            ("model", self.model.described),
            *([("weaker model", self.weaker.described)] if self.weaker else []),
            ("preview", (self.location / "preview" / "grid.png").uri),
        ]
