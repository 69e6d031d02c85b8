"""The training job's driver: check everything that can be checked, run Ray Train, register the model."""

import importlib
import math
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.cli.config import as_dict, differences, digest
from pipelines.cli.console import Interrupted, clock, event, interrupted_again, plus_minus, waiting
from pipelines.cli.errors import CheckpointError, ClusterError, ConfigError, DDPMError, error_of
from pipelines.cluster import connection, demand
from pipelines.data.dataset import PreparedDataset
from pipelines.data.opening import open_dataset
from pipelines.models.checkpoints import Checkpoint, CheckpointStore
from pipelines.outputs.version import code_version, git_commit
from pipelines.storage.location import Location
from pipelines.tracking.spool import Record
from pipelines.tracking.tracker import Tracker, TrackingReport
from pipelines.training.complete import complete, made_from
from pipelines.training.config import HELD_OUT, TrainConfig, TrainJob
from pipelines.training.display import Display
from pipelines.training.ray_train import TrainLoop, first_line, own_error, run_workers
from pipelines.training.run_directory import read_result, require_own
from pipelines.training.stop import RayBoard, ask_to_stop

_RESTORE = "give the run another `name`, or restore what it was started with"


@dataclass(frozen=True)
class TrainSummary:
    """What a finished training left: `rows` are (name, value) pairs for the closing summary."""

    title: str
    rows: list[tuple[str, str]]


def train(config: TrainConfig, loop: TrainLoop | None = None) -> TrainSummary:
    """Train from scratch or from the newest checkpoint of the run of that name; a finished run is left alone.

    Raises:
        ConfigError: The network cannot take the images, the run is longer than `train.steps`, or its directory holds
            files of something else.
        DataError: A data set is missing, damaged, or has another shape than the other.
        CheckpointError: The run's checkpoints are corrupt, or made from another data set or under another config.
        ClusterError: Ray is out of reach, or workers were lost more than `cluster.max_failures` times.
        NonFiniteLossError: The loss became NaN or infinite.
        StorageError: `root` cannot be read or written.
    """
    root = Location.parse(config.root)
    run = root / "runs" / config.name
    require_own(run)
    with waiting("reading data set and checkpoints"):
        train_set = open_dataset(root, "data.train", config.data.train)
        newest = CheckpointStore.open(run.uri).newest()
    if newest is not None:
        _check_same_data(newest, config, train_set)
    config, told = complete(config, train_set, newest)
    validation_set = _validation_set(config, root, train_set)
    if validation_set is not None and validation_set.image_shape != train_set.image_shape:
        raise ConfigError(
            f"data.validation = {config.data.validation}: its images are {validation_set.image_shape}, "
            f"those of data.train are {train_set.image_shape}; ingest both with the same size and channels"
        )
    if newest is not None:
        _check_resumable(newest, config)
    config.network.unet_config(train_set.image_shape)  # refuses images that the network cannot take
    result = read_result(run)
    finished = result is not None and result["step"] == config.train.steps
    if not finished:
        scaling = config.cluster
        gpus = {"GPU": ("cluster.use_gpu", scaling.use_gpu)}
        demand.check(scaling.worker_range[0], scaling.needs, gpus, scaling.address)
    job = TrainJob(
        config,
        run.uri,
        train_set.location.uri,
        validation_set.location.uri if validation_set else None,
        code_version(),
    )
    driver = _Driver(job, root, run, made_from(config, train_set, newest))
    status = "FAILED"
    try:
        driver.announce(train_set, validation_set)
        if not finished:
            for line in told:
                event(line)
            (run / "config.json").write_json(as_dict(config))
            driver.fit(loop)
            result = read_result(run)
        assert result is not None
        driver.register(result)
        status = "FINISHED"
    except Interrupted as interruption:
        status = "KILLED"
        driver.stop()
        interruption.kept = CheckpointStore.open(run.uri).kept()
        raise
    finally:
        report = driver.close(status)
    return _summary(config, run, result, driver, report)


def _validation_set(config: TrainConfig, root: Location, train_set: PreparedDataset) -> PreparedDataset | None:
    if config.data.validation == HELD_OUT:
        return train_set
    return open_dataset(root, "data.validation", config.data.validation) if config.data.validation else None


def _check_same_data(newest: Checkpoint, config: TrainConfig, dataset: PreparedDataset) -> None:
    """Refuse to continue a run with other data."""
    stored = newest.state["dataset"]["id"]
    if stored != dataset.dataset_id:
        raise CheckpointError(
            f"data.train = {config.data.train}: the data set has changed since the run's checkpoint of step "
            f"{newest.step} (id {stored[:12]} -> {dataset.dataset_id[:12]}); {_RESTORE}"
        )


def _check_resumable(newest: Checkpoint, config: TrainConfig) -> None:
    """Refuse to continue a run under another config, or to fewer steps than it has."""
    changed = differences(newest.state["config"], config.semantic())
    if changed:
        raise CheckpointError(
            f"name = {config.name!r}: the run's checkpoint of step {newest.step} was made with another config "
            f"({'; '.join(changed)}); {_RESTORE}"
        )
    if newest.step > config.train.steps:
        raise ConfigError(f"train.steps = {config.train.steps}: the run has {newest.step} steps already; {_RESTORE}")


class _Driver:
    """The driver's side of a running training: its tracker, its progress line, Ray Train."""

    def __init__(self, job: TrainJob, root: Location, run: Location, made_from: dict[str, str]) -> None:
        self.made_from = made_from
        self.job, self.config, self.run = job, job.config, run
        self.started = time.monotonic()
        self.fatal: DDPMError | None = None
        self.display: Display | None = None
        self.board: RayBoard | None = None  # once Ray is connected
        # Not Thread.is_alive: Python 3.11 takes a thread for dead when a signal interrupts waiting for it.
        self.idle = threading.Event()  # Ray Train does not run
        self.idle.set()
        local_root = Path(root.path) if root.is_local else Path.home() / "ddpm"
        key = f"train/{run.uri}"
        spool_directory = Path(run.path) / "tracking" if run.is_local else local_root / "spool" / digest(key)[:16]
        self.tracker = Tracker(
            spool_directory / "spool.jsonl",
            run_key=key,
            experiment=self.config.name,
            run_name=self.config.name,
            root=local_root,
            tracking_uri=self.config.tracking.uri,
            notify=event,
            listener=self._hear,
            mirror=None if run.is_local else run / "tracking" / "spool.jsonl",
            made_from=self.made_from,
        )

    def announce(self, train_set: PreparedDataset, validation_set: PreparedDataset | None) -> None:
        """Record what this run is: parameters, data sets, lineage tags."""
        spool, config = self.tracker.spool, self.config
        spool.append("params", values=_flat(as_dict(config)))
        for context, dataset in (("training", train_set), ("validation", validation_set)):
            if dataset is not None:
                uri = dataset.location.uri
                part = context == "validation" and config.data.validation == HELD_OUT
                name = f"{uri} (held-out rows)" if part else uri
                spool.append("dataset", name=name, digest=dataset.dataset_id, uri=uri, context=context)
        tags = {
            "ddpm.job": "train",
            **self.made_from,
            "ddpm.code_version": self.job.code_version,
            "ddpm.run": self.run.uri,
            "mlflow.source.name": "jobs/train.py",
            "mlflow.source.type": "JOB",
        }
        if commit := git_commit():
            tags["mlflow.source.git.commit"] = commit
        spool.append("tags", values=tags)

    def fit(self, loop: TrainLoop | None) -> None:
        """Run Ray Train to the end in the background, while signals and fatal errors are watched for."""
        config = self.config
        low, high = config.cluster.worker_range
        private_cpus = max(os.cpu_count() or 1, math.ceil(high * config.cluster.cpus_per_worker))
        # Ray's processes start meanwhile. Not before: a finished training needs neither, nor does a refused one.
        threading.Thread(target=lambda: importlib.import_module("torch"), name="loading", daemon=True).start()
        with waiting("loading Ray"):
            connected = connection.connect(config.cluster.address, private_cpus)
        import ray

        self.board = RayBoard()
        self.tracker.spool.append("tags", values={"ray.job_id": ray.get_runtime_context().get_job_id()})
        event(f"training {config.name} on {connected} with {_workers(low, high)}; run directory {self.run.uri}")
        self.display = Display(config, f"starting {_workers(low, high)}")
        failure: list[BaseException] = []
        self.idle.clear()
        threading.Thread(target=self._fit, args=(loop, failure), name="ray-train", daemon=True).start()
        with demand.told(low, config.cluster.needs):
            while not self.idle.wait(0.2) and self.fatal is None:
                pass  # a signal's handler runs between two waits
        if self.fatal is None and failure:
            self.fatal = own_error(failure[0]) or ClusterError(
                f"cluster.max_failures = {config.cluster.max_failures}: gave up ({first_line(failure[0])}); "
                "run the same command to continue from the last checkpoint"
            )
        if self.fatal is not None:
            raise self.fatal

    def stop(self) -> None:
        """Have the workers save the step they are at and end; a second signal ends the waiting for them."""
        if self.board is None or self.idle.is_set():
            return
        # Whoever sent the signal may have no patience: MLflow is told now, in the background, and again at the end.
        self.tracker.spool.append("finish", status="KILLED")
        with suppress(Exception):  # Ray may be what has ended: then nobody is there to save
            ask_to_stop(
                self.board,
                lambda seconds: self.idle.wait(seconds) or self.fatal is not None or interrupted_again(),
                event,
            )

    def _fit(self, loop: TrainLoop | None, failure: list[BaseException]) -> None:
        try:
            run_workers(self.job, self.tracker.spool, loop)
        except BaseException as error:  # noqa: BLE001  # handed to the main thread
            failure.append(error)
        try:
            self.tracker.catch_up()  # the controller's last words may still be on their way
        finally:
            self.idle.set()

    def _hear(self, record: Record) -> None:
        """Show a record that has just been spooled (called from the tracker's thread)."""
        if record.kind == "event":
            event(record.payload["message"])
        elif record.kind == "fatal":
            self.fatal = error_of(record.payload["error"], record.payload["message"])
        elif record.kind == "metrics" and not self.idle.is_set() and self.display is not None:
            self.display.hear(record)

    def register(self, result: dict[str, Any]) -> None:
        """Put the final model, grid and headline into MLflow."""
        spool, scores = self.tracker.spool, result["validation"]
        # What a full disk refused to Ray Train's controller at the end went with its process; MLflow keeps one of each.
        for record in CheckpointStore.open(self.run.uri).load(result["step"]).state["records"]:
            spool.append(**record)
        metrics = {}
        headline = f"**{result['step']:,} steps**"
        if scores:
            metrics = {f"validation/{scores['sigma2']}/bits_per_dim": scores["total"]}
            headline = (
                f"**{plus_minus(scores['total'], scores['standard_error'])} bits/dim** (σ² = {scores['sigma2']}, "
                f"{scores['num_images']} validation images, standard error over images) after {headline}"
            )
            if baselines := scores.get("baselines"):
                headline += f"; without a model the same images take: {_baselines(baselines)}"
                values = {f"without_model/{name}": value for name, value in baselines.items()}
                spool.append("metrics", step=result["step"], values=values)
        spool.append("tags", values={"ddpm.step": result["step"]})
        spool.append("artifact", path=result["grid"], artifact_path="grids")
        spool.append(
            "model",
            uri=result["model"],
            name=self.config.tracking.model_name or self.config.name,
            model_id=result["model_id"],
            step=result["step"],
            metrics=metrics,
            validation=scores,
            dataset={"name": self.job.train, "digest": result["dataset_id"]},
        )
        spool.append(
            "note",
            markdown=f"{headline}\n\nModel `{result['model_id'][:12]}` at `{result['model']}`, "
            f"{result['parameters']:,} parameters, trained on `{self.job.train}`.\n\n"
            f"![samples](get-artifact?path=grids/{Location.parse(result['grid']).name}&run_uuid={{run_id}})",
        )

    def close(self, status: str) -> TrackingReport:
        """Leave Ray and finish tracking."""
        if self.display is not None:
            self.display.close()
        # Ray ends a process at once in which one thread leaves while another still waits for an answer. A
        # training that is given up is therefore left to end with this process, as after a kill.
        if self.idle.is_set():
            if self.board is not None:
                with suppress(Exception):  # the entries of a Ray that has ended are gone with it
                    self.board.clear()
            connection.disconnect()
        with waiting("sending the last records to MLflow"):
            return self.tracker.finish(status, timeout_s=60.0)


def _workers(low: int, high: int) -> str:
    return f"{low} worker(s)" if low == high else f"{low} to {high} workers"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _baselines(found: dict[str, float]) -> str:
    names = {"png": "PNG", "independent_pixels": "independent pixels"}
    return ", ".join(f"{label} {found[name]:.4f}" for name, label in names.items() if name in found)


def _summary(
    config: TrainConfig, run: Location, result: dict[str, Any], driver: _Driver, report: TrackingReport
) -> TrainSummary:
    rows = []
    if scores := result["validation"]:
        rows.append(
            (
                "bits/dim",
                f"{plus_minus(scores['total'], scores['standard_error'])} (standard error; σ² = {scores['sigma2']}, "
                f"ELBO of {scores['num_images']} validation images)",
            )
        )
        if baselines := scores.get("baselines"):
            rows.append(("baselines", f"{_baselines(baselines)} (the same images without a model)"))
        rows.append(("terms", f"L_T {scores['prior']:.5f} + ΣL_t {scores['kl_sum']:.4f} + L_0 {scores['decoder']:.4f}"))
    rows += [
        ("model", f"{result['model']} ({result['parameters']:,} parameters, id {result['model_id'][:12]})"),
        ("samples", result["grid"]),
        ("MLflow", report.link or "not reached"),
    ]
    if report.champion:
        name = config.tracking.model_name or config.name
        rows.append(("champion", f"{report.champion} (models:/{name}@champion)"))
    if report.advice:
        rows.append(("tracking", report.advice))
    if driver.display is None:
        rows.append(("note", f"was finished already; train on with a larger --train.steps than {result['step']:,}"))
        return TrainSummary(f"{config.name}: nothing to do", rows)
    rate = driver.display.overall_rate
    training = f", {rate:,.0f} images/s while training" if rate else ""
    rows.append(("time", f"{clock(time.monotonic() - driver.started)} in this attempt{training}"))
    return TrainSummary(f"{config.name}: trained {result['step']:,} steps", rows)
