"""The evaluation job: what is asked for is settled, then `run_bulk` computes and reports it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ddpm_core.likelihood.bounds import Bound
from ddpm_core.networks.unet import pixel_weights
from ddpm_core.process.discrete import DiscreteProcess
from pipelines.cli.console import event, waiting
from pipelines.cli.errors import TrackingError
from pipelines.data.opening import open_dataset
from pipelines.evaluation import first_pass
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.enough import Enough
from pipelines.evaluation.inputs import Inputs, fitting_inputs, request_of
from pipelines.evaluation.kind import EVALUATION
from pipelines.evaluation.publish import calibration_notes, provenance, records_of, summary_rows
from pipelines.evaluation.report import make_report
from pipelines.evaluation.request import EvaluateRequest
from pipelines.evaluation.results import results
from pipelines.evaluation.shard import TermShards
from pipelines.evaluation.terms import bound_for
from pipelines.models.kept import source_of
from pipelines.models.used import UsedModel
from pipelines.outputs.attempt import Record
from pipelines.outputs.bulk_job import BulkJob, Finished, Pass, Rows
from pipelines.outputs.kind import Manifest
from pipelines.outputs.run_bulk import look, run_bulk, settled_gpus, settled_precision
from pipelines.outputs.shards import ShardedOutput, ShardRecord, begun_request
from pipelines.storage.location import Location
from pipelines.storage.ownership import require_apart
from pipelines.tracking.champion import check_promotable, promote_if_better
from pipelines.tracking.tracker import resolve_tracking_uri


@dataclass(frozen=True)
class EvaluateSummary:
    """What became of a request: `rows` are (name, value) pairs for the closing summary.

    `failure` is why the model could not be compared with the champion, though the evaluation is whole.
    """

    title: str
    rows: Rows
    failure: TrackingError | None = None


def evaluate(config: EvaluateConfig) -> EvaluateSummary:
    """Evaluate, or continue to, or find that it is done.

    Raises:
        ConfigError: A field does not fit the model or the data; the output overlaps one of them, or holds other files.
        DataError: The data set is missing, empty, of another shape or range of values than the model's.
        ModelError: There is no such model.
        RequestMismatchError: The output holds an evaluation of another request.
        StorageError: The output cannot be read or written.
        TrackingError: `promote` will not be able to compare with the champion; nothing is computed.
        ClusterError: Ray is out of reach, or gave up.
    """
    root, location = Location.parse(config.root).local_path, Location.parse(config.output)
    with waiting("reading model and data"):
        model = UsedModel.read(location, config.model, config.tracking.uri, root)
        data = open_dataset(Location.parse(root), "data", config.data)
    inputs = fitting_inputs(config, model, data, root)
    require_apart(location, source_of(model.found), "the model")
    require_apart(location, data.location, "the data set")
    if inputs.train is not None:
        require_apart(location, inputs.train.location, "the training data")
    event(f"model {model.described}")
    begun = begun_request(location)
    config = replace(config, cluster=settled_gpus(config.cluster, begun))
    config = replace(config, precision=settled_precision(config.precision, begun, config.cluster.gpus))
    job = Evaluation(config, request_of(config, inputs), model, inputs)
    standing = look(job)
    if standing.manifest is None and config.promote:
        _check_promotable(job, root)
    result = run_bulk(standing)
    if not config.promote:
        return EvaluateSummary(result.title, result.rows)
    try:
        champion = _promote(job, result.manifest, root)
    except TrackingError as error:  # the result stands, whatever becomes of the promotion
        return EvaluateSummary(result.title, result.rows, failure=error)
    return EvaluateSummary(result.title, [*result.rows, ("champion", champion)])


@dataclass
class Evaluation(BulkJob):
    """See `BulkJob`; `inputs` is what it reads, `bound` what it estimates."""

    config: EvaluateConfig
    request: EvaluateRequest
    model: UsedModel
    inputs: Inputs
    bound: Bound = field(init=False)
    _enough: Enough = field(init=False)

    kind, job, doing, counted = EVALUATION, "evaluate", "evaluating", "images"

    def __post_init__(self) -> None:
        self.bound = bound_for(self.request, self.model.model)
        self._enough = Enough(self.request.target_halfwidth, self.inputs.num_rows)

    @property
    def usual_experiment(self) -> str:
        """See `BulkJob`."""
        return f"{self.model.found.name}/eval"

    @property
    def num_images(self) -> int:
        """See `BulkJob`."""
        asked = self.request.num_images
        return self.inputs.num_rows if asked is None else asked

    @property
    def num_shards(self) -> int:
        """See `BulkJob`."""
        return math.ceil(self.num_images / self.request.shard_size)

    def factory(self) -> TermShards:
        """See `BulkJob`."""
        return TermShards(self.location, self.request, self.inputs.data, self.config.cluster.threads)

    def weights(self, shards: Sequence[int]) -> float:
        """See `BulkJob`; of the ODE and the first pass at most."""
        request, ode, denoiser = self.request, self.request.ode, self.model.model.denoiser
        num_images = min(len(shards) * request.shard_size, self.num_images)
        process = self.bound.denoiser.process
        each = request.evaluations_per_image(process.num_timesteps if isinstance(process, DiscreteProcess) else None)
        each += request.classifier.evaluations_per_image if request.classifier else 0
        of_ode = 3 * ode.steps * (1 + 2 * ode.probes) * min(ode.num_images, num_images)
        of_first_pass = first_pass.PILOT_EVALUATIONS if request.estimator == "importance" else 0
        return float(num_images * each + of_ode + of_first_pass) * pixel_weights(denoiser.network)

    def tags(self) -> Mapping[str, Any]:
        """The images and the model's training step."""
        return {"ddpm.dataset_id": self.request.measured_on, "ddpm.step": self.model.step}

    def reads(self) -> Sequence[Record]:
        """The data set."""
        uri = self.inputs.data.location.uri
        name = f"{uri} (held-out rows)" if self.inputs.hold_out else uri
        payload = {"name": name, "digest": self.inputs.data.dataset_id, "uri": uri, "context": "evaluation"}
        return [Record("dataset", payload)]

    def passes(self) -> Sequence[Pass]:
        """The histogram baseline's counts and the importance of the time steps."""
        first = first_pass.FirstPass(
            self.location, self.request, self.inputs.data, self.inputs.train, self.config.cluster.threads
        )
        return [
            Pass(
                first_pass.DIRECTORY,
                first_pass.SUFFIX,
                first,
                first.num_parts,
                first.is_small,
                waiting="counting the levels of training images",
            )
        ]

    def enough(self, records: Sequence[ShardRecord]) -> bool:
        """Whether the data set's mean is known to the target."""
        return self._enough(records)

    @property
    def detail(self) -> str:
        """How well the mean is known so far."""
        return self._enough.detail

    def finish(self, output: ShardedOutput, records: Sequence[ShardRecord]) -> Finished:
        """The report, for the output and for MLflow."""
        request, inputs, data = self.request, self.inputs, self.inputs.data
        with waiting("making the report"):
            names, own = [record.name for record in records], self.model.model.denoiser.process
            evaluation = results(output.location, request, names, self.bound, inputs.num_rows)
            if request.by_label or request.classifier is not None:
                evaluation.summary["label_names"] = list(self._label_names)
            notes = calibration_notes(request, evaluation.summary, own)
            made_with = provenance(self.model, data, inputs.train)
            title = f"{self.model.found.name}: {output.location.name}"
            for name, content in make_report(evaluation, request, data, own, notes, made_with, title).files.items():
                (output.location / "report" / name).write_bytes(content)
        fields = {"results": evaluation.summary, "data": data.location.uri}
        return Finished(fields, records_of(output.location, request, evaluation, data, self.model))

    @property
    def _label_names(self) -> Sequence[str]:
        """Of the data's labels: the model's, where they have been compared with them."""
        if self.request.told_labels or self.request.classifier is not None:
            return self.model.label_names
        return self.inputs.data.label_names or ()

    def rows(self, manifest: Manifest) -> Rows:
        """See `BulkJob`."""
        return summary_rows(self.location, self.model.described, manifest)


def _check_promotable(job: Evaluation, root: Path) -> None:
    config, found = job.config, job.model.found
    uri = resolve_tracking_uri(config.tracking.uri, root)
    num_images = None if config.target_halfwidth else job.num_images
    draws_known = config.estimator != "all" or config.draws >= 2
    what = job.request.measured_on, num_images, job.bound.name
    check_promotable(uri, found.name, job.experiment, found.model_id, *what, draws_known=draws_known)


def _promote(job: Evaluation, manifest: Manifest, root: Path) -> str:
    found, summary = job.model.found, manifest["results"]
    uri, intervals = resolve_tracking_uri(job.config.tracking.uri, root), summary["means"][summary["headline"]]
    what = job.request.measured_on, summary["num_images"], job.bound.name
    return promote_if_better(uri, found.name, job.experiment, found.model_id, *what, intervals)
