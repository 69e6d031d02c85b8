"""The evaluation job's driver: settle what is asked for, let the shard engine do it, report it, commit it."""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ddpm_core.errors import ConfigError, DataError, DDPMError, TrackingError
from ddpm_core.likelihood.intervals import MeanStatistics
from ddpm_core.model import Model, model_from_bytes
from ddpm_core.networks.unet import pixel_weights
from ddpm_core.process.discrete import discrete
from pipelines.cli.config import require
from pipelines.cli.console import event, waiting
from pipelines.cluster import connection
from pipelines.data.dataset import PreparedDataset
from pipelines.data.hold_out import HoldOut
from pipelines.data.opening import open_dataset
from pipelines.evaluation import first_pass
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.kind import EVALUATION
from pipelines.evaluation.publish import calibration_notes, provenance, record_results, summary_rows
from pipelines.evaluation.report import make_report
from pipelines.evaluation.request import EvaluateRequest
from pipelines.evaluation.results import half_width, results
from pipelines.evaluation.shard import TermShards
from pipelines.models.find import model_for
from pipelines.models.kept import FoundModel, source_of
from pipelines.outputs.bulk_run import BulkRun, settled_dtype
from pipelines.outputs.shards import ShardedOutput, ShardRecord, begun_request
from pipelines.outputs.version import code_version
from pipelines.storage.location import Location
from pipelines.storage.ownership import require_apart
from pipelines.tracking.champion import check_promotable, promote_if_better
from pipelines.tracking.tracker import resolve_tracking_uri

# `target_halfwidth` is asked at numbers of shards that grow by a tenth, so that few looks lead to few false stops.
_LOOK_GROWTH = 1.1
_MIN_IMAGES = 256


@dataclass(frozen=True)
class EvaluateSummary:
    """What became of a request: `rows` are (name, value) pairs for the closing summary.

    `failure` is why the model could not be compared with the champion, though the evaluation is whole.
    """

    title: str
    rows: list[tuple[str, str]]
    failure: TrackingError | None = None


@dataclass(frozen=True)
class Inputs:
    """What an evaluation reads: the model, the data set, the training data of the histogram baseline, if known, and
    which rows the model's training held out, if only they are asked for."""

    found: FoundModel
    model: Model
    data: PreparedDataset
    train: PreparedDataset | None
    hold_out: HoldOut | None = None

    @property
    def num_rows(self) -> int:
        """Of the data set, or of the part of it that is asked for."""
        return len(self.hold_out.ids) if self.hold_out else self.data.num_rows

    @property
    def step(self) -> int | None:
        """The training step that the model is of, where it says so."""
        step: int | None = self.model.extra.get("step")
        return step


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
        found = model_for(location / "model", config.model, config.tracking_uri, root)
        model = model_from_bytes(found.files, where=found.uri)
        data = open_dataset(Location.parse(root), "data", config.data)
    hold_out = hold_out_of(config, model, data)
    check_fit(config, model, data, len(hold_out.ids) if hold_out else data.num_rows)
    inputs = Inputs(found, model, data, _training_data(config, model, root), hold_out)
    require_apart(location, source_of(found), "the model")
    require_apart(location, data.location, "the data set")
    if inputs.train is not None:
        require_apart(location, inputs.train.location, "the training data")
    event(f"model {found.described(inputs.step)}")
    config = replace(config, dtype=settled_dtype(config.dtype, begun_request(location), config.gpus_per_worker))
    request = request_of(config, inputs)
    output = EVALUATION.output(location, request)
    manifest = output.committed()
    if manifest is None:
        config.pool.check()
        if config.promote:
            _check_promotable(config, request, found, data, root)
        manifest, closing = _evaluate(config, request, output, inputs)
        title = "Evaluation"
    else:
        title, closing = "Evaluation, complete before", []
        lost = output.lost(manifest)
        if lost:
            config.pool.check()
            event(f"{location}: {len(lost)} of {len(manifest['shards'])} shards are lost; making them again")
            try:
                factory = TermShards(location, request, data, config.cpus_per_worker)
                images = len(lost) * config.shard_size
                pool = config.pool.unless_small(lambda: _work(request, model, images))
                output.restore(factory, lost, manifest, pool)
            finally:
                connection.disconnect()
            title = f"Evaluation, {len(lost)} lost shard(s) made again"
        else:
            event(f"{location} is already complete: nothing to do")
    rows, failure = summary_rows(location, found.described(inputs.step), manifest) + closing, None
    if config.promote:
        try:
            rows.append(("champion", _promote(config, request, found, manifest, root)))
        except TrackingError as error:  # the result stands, whatever becomes of the promotion
            failure = error
    return EvaluateSummary(title, rows, failure)


def request_of(config: EvaluateConfig, inputs: Inputs) -> EvaluateRequest:
    """The request that a job's fields make of what they name; every `auto` has been settled."""
    by_all = config.estimator == "all"
    assert config.dtype != "auto"
    return EvaluateRequest(
        model_id=inputs.found.model_id,
        dataset_id=inputs.data.dataset_id,
        estimator=config.estimator,
        timesteps_per_image=None if by_all else config.timesteps_per_image,
        draws=config.draws if by_all else None,
        sigma2=config.sigma2,
        num_images=config.num_images,
        target_halfwidth=config.target_halfwidth,
        seed=config.seed,
        dtype=config.dtype,
        device="cuda" if config.gpus_per_worker else "cpu",
        by_label=config.by_label,
        train_dataset_id=inputs.train.dataset_id if inputs.train else None,
        ode=config.ode,
        batch_size=config.batch_size,
        shard_size=config.shard_size,
        hold_out=inputs.hold_out,
    )


def hold_out_of(config: EvaluateConfig, model: Model, data: PreparedDataset) -> HoldOut | None:
    """The rows that are asked for by `held_out`; says so if others are that the model has been trained on."""
    extra = model.extra
    trained_on, section = extra.get("dataset") or {}, extra.get("config")
    for name in ("data", "hold_out"):
        section = section.get(name) if isinstance(section, dict) else None
    every = section if type(section) is int else 0
    same = trained_on.get("id") == data.dataset_id
    if config.held_out:
        require(same, "held_out", True, f"needs the data set that the model was trained on, {trained_on.get('uri')}")
        require(every > 0, "held_out", True, "the model's training held out no rows; leave it out")
        return HoldOut(data.num_rows, every)
    if same:
        rest = "; --held_out evaluates the rows that it was not trained on" if every else ""
        event(f"data = {config.data}: the model was trained on these images, which flatters it{rest}")
    return None


def image_shape_of(model: Model) -> tuple[int, int, int]:
    """(H, W, C), as data sets have it."""
    channels, height, width = model.denoiser.image_shape
    return height, width, channels


def check_fit(config: EvaluateConfig, model: Model, data: PreparedDataset, num_rows: int) -> None:
    """Refuse what the model cannot be evaluated on, before anything is started; `num_rows` of `data` are asked for."""
    expected = image_shape_of(model)
    if data.image_shape != expected:
        raise DataError(
            f"data = {config.data}: images are {'x'.join(map(str, data.image_shape))} (H x W x C), the model's are "
            f"{'x'.join(map(str, expected))}; ingest the source again in that size and mode"
        )
    part = ", held-out rows" if config.held_out else ""
    if num_rows < 2:
        raise DataError(f"data = {config.data}{part}: holds {num_rows} image(s); an interval needs at least 2")
    if config.num_images is not None and config.num_images > num_rows:
        raise ConfigError(f"num_images = {config.num_images}: {config.data}{part} holds {num_rows:,}; ask for fewer")
    num_kl_terms = discrete(model.denoiser.process).num_timesteps - 1
    if config.estimator != "all" and config.timesteps_per_image > num_kl_terms:
        raise ConfigError(
            f"timesteps_per_image = {config.timesteps_per_image}: the model has T - 1 = {num_kl_terms} KL terms; "
            "take at most as many, or --estimator all"
        )
    if config.ode.num_images and config.ode.steps > num_kl_terms:
        raise ConfigError(f"ode.steps = {config.ode.steps}: the model has T - 1 = {num_kl_terms}; take at most as many")
    _, images = data.read_groups([0])
    if images.max() == 1:
        raise DataError(
            f"data = {config.data}: levels are 0..1, the model's are 0..255; were images in [0, 1] cast to integers? "
            "Multiply by 255 and ingest again"
        )
    if config.by_label and (data.read_images(0, 1)[2] < 0).any():
        raise DataError(
            f"data = {config.data}: has no labels, which by_label needs; leave it out, or ingest with labels"
        )


def _training_data(config: EvaluateConfig, model: Model, root: Path) -> PreparedDataset | None:
    """What the histogram baseline is fitted on; None, with a word, if the model's own cannot be read from here."""
    if config.train_data is not None:
        given = open_dataset(Location.parse(root), "train_data", config.train_data)
        if given.image_shape != image_shape_of(model):
            raise DataError(f"train_data = {config.train_data}: images are {given.image_shape}, not the model's shape")
        return given
    known = model.extra.get("dataset") or {}
    try:
        trained_on = open_dataset(Location.parse(root), "train_data", known.get("uri") or "")
        if trained_on.dataset_id == known.get("id"):
            return trained_on
    except DDPMError:
        pass  # it was trained elsewhere, or its data are gone
    event("no histogram baseline: the model's training data are not where it says; name them with --train_data")
    return None


def _evaluate(
    config: EvaluateConfig, request: EvaluateRequest, output: ShardedOutput, inputs: Inputs
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    output.begin()
    inputs.found.keep(output.location / "model")
    run = BulkRun(
        "evaluate",
        output,
        inputs.found,
        experiment=f"{inputs.found.name}/eval",
        name=config.name,
        root=Location.parse(config.root).local_path,
        tracking_uri=config.tracking_uri,
    )
    return run.attempt(lambda: _compute(config, request, run, inputs))


def _compute(config: EvaluateConfig, request: EvaluateRequest, run: BulkRun, inputs: Inputs) -> dict[str, Any]:
    """Compute what is missing, report, commit; returns the manifest."""
    output, data = run.output, inputs.data
    run.announce({"ddpm.dataset_id": request.measured_on, "ddpm.step": inputs.step})
    name = f"{data.location.uri} (held-out rows)" if inputs.hold_out else data.location.uri
    run.record("dataset", name=name, digest=data.dataset_id, uri=data.location.uri, context="evaluation")
    num_images = len(request.order(data.num_rows))
    with waiting("preparing the output"):
        pool = config.pool.unless_small(lambda: _work(request, inputs.model, num_images))
        where = f"on {connection.connect()}" if pool else "in this process"
    event(f"evaluating {num_images:,} images {where} into {output.location}")
    first = first_pass.FirstPass(output.location, request, data, inputs.train, config.cpus_per_worker)
    with waiting("counting the levels of training images"):
        fitted = output.compute(
            first,
            first.num_parts,
            into=first_pass.DIRECTORY,
            suffix=first_pass.SUFFIX,
            pool=None if first.is_small else pool,
        )
    enough = _Enough(config.target_halfwidth, inputs.num_rows)
    records = output.compute(
        TermShards(output.location, request, data, config.cpus_per_worker),
        math.ceil(num_images / config.shard_size),
        pool=pool,
        on_progress=lambda progress: run.show(progress, num_images, "images", enough.detail),
        enough=enough,
    )
    run.leave_ray()
    with waiting("making the report"):
        names, process = [record.name for record in records], discrete(inputs.model.denoiser.process)
        evaluation = results(output.location, request, names, process, inputs.num_rows)
        notes = calibration_notes(request, evaluation.summary, config.target_halfwidth)
        made_with = provenance(inputs.found, inputs.model, data, inputs.train)
        title = f"{inputs.found.name}: {output.location.name}"
        for name, content in make_report(evaluation, request, data, notes, made_with, title).files.items():
            (output.location / "report" / name).write_bytes(content)
    fields = {
        "format": EVALUATION.format,
        "version": EVALUATION.version,
        "num_rows": evaluation.summary["num_images"],
        "results": evaluation.summary,
        "first_pass": [asdict(record) for record in fitted],
        "model": inputs.found.origin,
        "data": data.location.uri,
        "lineage": {name: inputs.model.extra.get(name) for name in ("step", "dataset", "code_version")},
        "code_version": code_version(),
        "made_with": {name: importlib.metadata.version(name) for name in ("torch", "pillow", "pyarrow")},
    }
    manifest = output.commit(fields, records)
    record_results(run, request, evaluation, data, inputs.step)
    return manifest


def _work(request: EvaluateRequest, model: Model, num_images: int) -> tuple[int, float]:
    """What so many images take, see `ActorPool.unless_small`; of the ODE and the first pass at most."""
    ode = request.ode
    num_timesteps = discrete(model.denoiser.process).num_timesteps
    each = request.evaluations_per_image(num_timesteps)
    of_ode = 3 * ode.steps * (1 + 2 * ode.probes) * min(ode.num_images, num_images)
    of_first_pass = first_pass.PILOT_EVALUATIONS if request.estimator == "importance" else 0
    evaluations = num_images * each + of_ode + of_first_pass
    return math.ceil(num_images / request.shard_size), float(evaluations) * pixel_weights(model.denoiser.network)


class _Enough:
    """Whether the data set's mean is known to the target: asked of more and more shards."""

    def __init__(self, target: float | None, num_rows: int) -> None:
        self._target, self._num_rows = target, num_rows
        self._statistics: MeanStatistics | None = None
        self._look_at = 1

    @property
    def detail(self) -> str:
        """How well the mean is known so far."""
        if self._statistics is None:
            return ""
        half = half_width(self._statistics.data_set(self._num_rows))
        return f"{self._statistics.mean:.3f}" + ("" if half is None else f"±{half:.3f}")

    def __call__(self, records: Sequence[ShardRecord]) -> bool:
        found = MeanStatistics(**records[-1].extra["bits_per_dim"])
        self._statistics = self._statistics.merge(found) if self._statistics and len(records) > 1 else found
        if self._target is None or len(records) < self._look_at or self._statistics.num_images < _MIN_IMAGES:
            return False
        self._look_at = math.ceil(len(records) * _LOOK_GROWTH + 1e-9)
        half = half_width(self._statistics.data_set(self._num_rows))
        return half is not None and half <= self._target


def _check_promotable(
    config: EvaluateConfig, request: EvaluateRequest, found: FoundModel, data: PreparedDataset, root: Path
) -> None:
    uri = resolve_tracking_uri(config.tracking_uri, root)
    num_images = None if config.target_halfwidth else len(request.order(data.num_rows))
    draws_known = config.estimator != "all" or config.draws >= 2
    what = request.measured_on, num_images, config.sigma2
    check_promotable(uri, found.name, found.model_id, *what, draws_known=draws_known)


def _promote(
    config: EvaluateConfig, request: EvaluateRequest, found: FoundModel, manifest: Mapping[str, Any], root: Path
) -> str:
    summary = manifest["results"]
    uri, intervals = resolve_tracking_uri(config.tracking_uri, root), summary["means"][summary["headline"]]
    what = request.measured_on, summary["num_images"], request.sigma2
    return promote_if_better(uri, found.name, found.model_id, *what, intervals)
