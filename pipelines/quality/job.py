"""The quality job: what is asked for is settled, features are made or found, then `run_bulk` compares and reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.cli.console import event, waiting
from pipelines.cli.errors import ConfigError, TrackingError
from pipelines.cluster import connection
from pipelines.cluster.actor_pool import ActorPool
from pipelines.cluster.config import GpuClusterConfig
from pipelines.outputs.attempt import Record
from pipelines.outputs.bulk_job import BulkJob, Finished, Pass, Rows
from pipelines.outputs.kind import Manifest
from pipelines.outputs.run_bulk import look, run_bulk, settled_gpus
from pipelines.outputs.shards import ShardedOutput, ShardRecord, begun_request
from pipelines.quality.compare import check_comparable, comparison_rows
from pipelines.quality.config import QualityConfig
from pipelines.quality.feature_job import ensure_features, features_at
from pipelines.quality.features import FeatureSet, described
from pipelines.quality.inputs import Inputs, read_inputs, request_of
from pipelines.quality.kind import QUALITY, feature_key
from pipelines.quality.plan import plan
from pipelines.quality.publish import promote, records_of, summary_rows
from pipelines.quality.report import make_report
from pipelines.quality.request import QualityRequest, Role, Space
from pipelines.quality.results import results
from pipelines.quality.searches import NEIGHBOURS, OWN, NeighbourShards, Sides, Stage, parts
from pipelines.storage.location import Location
from pipelines.storage.ownership import overlap, require_apart

REPORT = "report"


@dataclass(frozen=True)
class QualitySummary:
    """What became of a request: `rows` are (name, value) pairs for the closing summary.

    `failure` is why the model could not be compared with the champion, though the comparison is whole.
    """

    title: str
    rows: Rows
    failure: TrackingError | None = None


def quality(config: QualityConfig) -> QualitySummary:
    """Compare, or continue to, or find that it is done.

    Raises:
        ConfigError: A field does not fit the images; the output overlaps what is read, or holds other files.
        DataError: There are no such images, too few of them, or the sides do not fit each other; `compare_with` was
            measured in another way.
        ModelError: The extractor, or the model that made the samples, cannot be used.
        RequestMismatchError: The output holds a comparison of another request.
        StorageError: The output cannot be read or written.
        TrackingError: `promote` will not be able to compare with the champion; nothing is computed.
        ClusterError: Ray is out of reach, or gave up.
    """
    location = Location.parse(config.output)
    store = Location.parse(config.store) if config.store else location.parent / "features"
    require_apart(location, store, "the features")
    with waiting("reading the images"):
        inputs = read_inputs(config, None if config.dry_run else store)
    for role, images in inputs.sets.items():
        require_apart(location, images.location, f"the images of {role}")
        if overlap(store, images.location) in ("is", "lies in"):
            raise ConfigError(f"store = {store}: {overlap(store, images.location)} the images of {role}; give another")
    unusable = inputs.extractors["features"].without_gpu
    config = replace(config, cluster=settled_gpus(config.cluster, begun_request(location), unusable))
    request = request_of(config, inputs)
    # No search uses GPUs: they would only limit how many actors there are.
    searching = replace(config, cluster=replace(config.cluster, gpus_per_worker=0.0))
    job = Comparison(searching, request, inputs, store, config.cluster)
    if config.compare_with is not None:
        check_comparable(config.compare_with, request)
    standing = look(job)
    if standing.left:
        ActorPool.of(config.cluster).check()
    if config.dry_run:
        return QualitySummary("Plan; nothing was written", plan(store, request, inputs, standing.left, config.cluster))
    if config.promote and standing.manifest is None:
        promote(inputs.model, config, job.experiment, request, None)
    lost = [] if standing.manifest is None else job.lost_own(standing.manifest)
    try:
        job.make_features()  # those that are there are looked at only
        if standing.manifest is not None and lost:
            job.restore_own(lost, standing.manifest)
    except BaseException:
        connection.disconnect()
        raise
    result = run_bulk(standing)
    rows, measured = list(result.rows), result.manifest["results"]
    if standing.manifest is not None and not (location / REPORT / "index.html").exists():
        event(f"{location / REPORT}: is lost; making it again")
        job.write_report(measured)
    if config.compare_with is not None:
        rows += comparison_rows(config.compare_with, request, measured)
    if not config.promote:
        return QualitySummary(result.title, rows)
    try:
        champion = promote(inputs.model, config, job.experiment, request, measured)
    except TrackingError as error:  # the result stands, whatever becomes of the promotion
        return QualitySummary(result.title, rows, failure=error)
    return QualitySummary(result.title, [*rows, ("champion", champion)])


@dataclass
class Comparison(BulkJob):
    """See `BulkJob`; `inputs` is what it reads, `store` takes the features, which are made on `extracting`."""

    config: QualityConfig
    request: QualityRequest
    inputs: Inputs
    store: Location
    extracting: GpuClusterConfig

    kind, job, doing, counted = QUALITY, "quality", "searching neighbours of", "neighbours"
    model = None

    @property
    def usual_experiment(self) -> str:
        """See `BulkJob`."""
        model = self.inputs.model
        return f"{model.found.name if model else self.inputs.sets['samples'].location.name}/quality"

    @property
    def num_images(self) -> int:
        """Queries of all searches."""
        return sum(part.stop - part.start for part in parts(self.request, NEIGHBOURS))

    @property
    def num_shards(self) -> int:
        """See `BulkJob`."""
        return len(parts(self.request, NEIGHBOURS))

    def features_at(self, role: Role, space: Space) -> Location:
        """Where the features of a role lie."""
        return features_at(self.store, self.request.features(role, space))

    def make_features(self) -> None:
        """Make the features of all sides, as far as they are not there."""
        done = set()
        for role, space in self.request.feature_sets:
            wanted = self.request.features(role, space)
            if wanted not in done:
                images, extractor = self.inputs.sets[role], self.inputs.extractors[space]
                ensure_features(self.store, wanted, images, extractor, self.extracting, role)
                done.add(wanted)

    @property
    def sides(self) -> Sides:
        """The features, when they are there."""
        sets = {each: FeatureSet.open(self.features_at(*each)) for each in self.request.feature_sets}
        return Sides(self.request, sets)

    def factory(self) -> NeighbourShards:
        """See `BulkJob`."""
        return self._shards(NEIGHBOURS)

    def _shards(self, stage: Stage) -> NeighbourShards:
        return NeighbourShards(self.location, self.request, self.sides.sets, stage, self.config.cluster.threads)

    def weights(self, shards: Sequence[int]) -> float:
        """See `BulkJob`: multiplications of the distances, of the own neighbours as well where all are left."""
        found = parts(self.request, NEIGHBOURS)
        chosen = [found[index] for index in shards]
        own = parts(self.request, OWN) if len(chosen) == len(found) else ()
        return sum(part.multiplications for part in (*own, *chosen))

    def tags(self) -> Mapping[str, Any]:
        """What is compared, how, and whose samples they are."""
        model = self.inputs.model
        of_model = (
            {
                "ddpm.model_id": model.found.model_id,
                "ddpm.model": model.found.uri,
                "ddpm.train_run_id": model.found.run_id,
                "ddpm.step": model.step,
            }
            if model
            else {}
        )
        return {
            **of_model,
            "ddpm.dataset_id": self.request.reference.dataset_id,
            "ddpm.extractor": described(self.request.extractor),
            "ddpm.protocol": self.request.stamp,
        }

    def reads(self) -> Sequence[Record]:
        """How the samples were made, and the sets of images."""
        found = {images.location.uri: (role, images) for role, images in reversed(self.inputs.sets.items())}
        records = [Record("params", {"values": {"sampler": self.inputs.sampler}})] if self.inputs.sampler else []
        return records + [
            Record("dataset", {"name": uri, "digest": images.dataset_id, "uri": uri, "context": role})
            for uri, (role, images) in found.items()
        ]

    def passes(self) -> Sequence[Pass]:
        """Each side's neighbours within itself, on which the radii of the balls stand."""
        own = parts(self.request, OWN)
        waiting_for = "searching each side's own neighbours"
        return [Pass(OWN, ".parquet", self._shards(OWN), len(own), is_small=False, waiting=waiting_for)]

    @property
    def _own(self) -> ShardedOutput:
        """The parts of the pass as an output of shards."""
        return ShardedOutput(self.location, self.request.to_json(), OWN)

    def lost_own(self, manifest: Manifest) -> list[int]:
        """Indices of the parts of the own neighbours that a complete comparison has lost."""
        return self._own.lost({"shards": manifest[OWN]})

    def restore_own(self, lost: Sequence[int], manifest: Manifest) -> None:
        """Make them again: radii, and the numbers, are computed from them."""
        event(f"{self._own.shards}: {len(lost)} of {len(manifest[OWN])} parts are lost; making them again")
        found = parts(self.request, OWN)
        weight = sum(found[index].multiplications for index in lost)
        pool = ActorPool.of(self.config.cluster).unless_small(lambda: (len(lost), weight))
        try:
            self._own.restore(self._shards(OWN), lost, {**manifest, "shards": manifest[OWN]}, pool)
        finally:
            connection.disconnect()

    def finish(self, output: ShardedOutput, records: Sequence[ShardRecord]) -> Finished:
        """The numbers and the report, for the output and for MLflow."""
        with waiting("computing the numbers"):
            measured = results(output.location, self.request, self.sides)
        files = self.write_report(measured)
        fields = {
            "results": measured,
            "label_names": list(self.inputs.label_names),
            "sets": {role: images.location.uri for role, images in self.inputs.sets.items()},
            "features": {feature_key(*each): self.features_at(*each).uri for each in self.request.feature_sets},
            "protocol": {**self.request.protocol, "stamp": self.request.stamp},
        }
        return Finished(fields, records_of(output.location, self.request, self.inputs, measured, files))

    def write_report(self, measured: Mapping[str, Any]) -> list[str]:
        """Write OUTPUT/report/; returns the names of its files."""
        title = f"{self.experiment}: {self.run_name}"
        with waiting("making the report"):
            files = make_report(self.location, self.request, self.inputs, measured, title)
            for name, content in files.items():
                (self.location / REPORT / name).write_bytes(content)
        return sorted(files)

    def rows(self, manifest: Manifest) -> Rows:
        """See `BulkJob`."""
        return summary_rows(self.location, self.request, manifest["results"])
