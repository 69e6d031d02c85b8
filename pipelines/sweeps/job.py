"""The sweep job: checks every variant, trains those that are not finished, and puts the results into one table."""

import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipelines.cli.config import digest, require
from pipelines.cli.console import Interrupted, event, plus_minus, waiting
from pipelines.cli.errors import AlreadyRunningError, SweepError
from pipelines.cluster import connection
from pipelines.outputs.version import code_version
from pipelines.storage.location import Location
from pipelines.sweeps.variants import Sweep, Variant
from pipelines.tracking.spool import SpoolLock
from pipelines.tracking.tracker import Tracker
from pipelines.training.checks import check
from pipelines.training.run_directory import read_result
from pipelines.training.tracked import local_root, spool_of

_CONNECTS_S = 60.0


@dataclass(frozen=True)
class SweepSummary:
    """The table: `rows` are (values of a variant, what became of it), the best first; `failure` where some failed."""

    title: str
    rows: list[tuple[str, str]]
    failure: SweepError | None


def sweep(asked: Sweep, train: Sequence[str]) -> SweepSummary:
    """Train the variants, `parallel` at a time; those that are finished are left alone.

    A training that fails does not end the others. An interruption is passed on to those that run, and waits until each
    has kept its step.

    Args:
        asked: The sweep.
        train: The command that trains, without its options.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: As of a training, for whichever variant, before anything
            is trained; several at a time were asked for without a cluster.
    """
    base = asked.base
    shares = asked.parallel == 1 or connection.is_named(base.cluster.address)
    rule = (
        "needs a cluster, of which the trainings share the CPUs and GPUs; name one (RAY_ADDRESS=HOST:6379), or give 1"
    )
    require(shares, "parallel", asked.parallel, rule)
    try:
        todo = [variant for variant in asked.variants if check(variant.config).result is None]
    finally:
        connection.disconnect()  # the trainings connect for themselves
    event(f"{len(asked.variants)} trainings, {len(asked.variants) - len(todo)} of them finished before")
    root = Location.parse(base.root)
    local = local_root(root)
    key, experiment = f"sweep/{root.uri}/{base.name}", base.tracking.experiment or base.name
    model_name = base.tracking.model_name or base.name
    tracker = Tracker(
        local / "spool" / digest(key)[:16] / "spool.jsonl",
        run_key=key,
        experiment=experiment,
        run_name=base.name,
        root=local,
        tracking_uri=base.tracking.uri,
        notify=event,
    )
    # One registered model, of which each training makes a version: the champion is the best of the sweep.
    shared = ["--tracking.experiment", experiment, "--tracking.model_name", model_name]
    trainings = _Trainings(train, shared)
    status = "FAILED"
    try:
        tags = {"ddpm.job": "sweep", "ddpm.code_version": code_version(), "mlflow.source.name": "jobs/sweep.py"}
        tracker.spool.append("tags", values=tags)
        tracker.spool.append("params", values={field: ", ".join(values) for field, values in asked.varied.items()})
        if todo:
            trainings.parent = _run_id(tracker)
            trainings.run(todo, asked.parallel)
        status = "FAILED" if trainings.failed else "FINISHED"
    except Interrupted as interruption:
        status = "KILLED"
        interruption.kept = (
            f"{trainings.ended} of {len(todo)} trainings have ended, the others keep the steps they have saved; run "
            "the same command to continue"
        )
        raise
    finally:
        table = _table(asked.variants, trainings.failed)
        tracker.spool.append("metrics", step=0, values=_numbers(table))
        tracker.spool.append("note", markdown=_note(asked, table))
        with waiting("sending the last records to MLflow"):
            report = tracker.finish(status)
    failure = None
    if trainings.failed:
        failure = SweepError(
            f"{len(trainings.failed)} of {len(asked.variants)} trainings failed ({'; '.join(trainings.failed)}): their "
            "own lines above say why; the same command tries them again"
        )
    rows = [(row.label, row.told) for row in table]
    rows.append(("MLflow", report.link or "not reached"))
    if report.advice:
        rows.append(("tracking", report.advice))
    return SweepSummary(f"Sweep {base.name}: {len(asked.variants)} trainings", rows, failure)


def _run_id(tracker: Tracker) -> str | None:
    """Of the sweep's MLflow run, to which its trainings are tied; None, with a word, where MLflow does not answer."""
    deadline = time.monotonic() + _CONNECTS_S
    with waiting("connecting to MLflow"):
        while tracker.run_id is None and time.monotonic() < deadline:
            time.sleep(0.05)
    if tracker.run_id is None:
        event("MLflow does not answer: these trainings are not shown below the sweep's run")
    return tracker.run_id


class _Trainings:
    """Trainings as processes, whose lines are printed with the variant's values before them.

    Attributes:
        parent: MLflow run of the sweep.
        failed: Exit codes of the trainings that have failed, by the variants' labels.
        ended: How many have ended well.
    """

    def __init__(self, train: Sequence[str], shared: Sequence[str]) -> None:
        self._train, self._shared = train, shared
        self.parent: str | None = None
        self.failed: dict[str, int] = {}
        self.ended = 0
        self._stopping, self._lock = threading.Event(), threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()

    def run(self, variants: Sequence[Variant], parallel: int) -> None:
        """Train them all, so many at a time."""
        with ThreadPoolExecutor(parallel) as threads:
            futures: list[Future[None]] = [threads.submit(self._run, variant) for variant in variants]
            try:
                wait(futures)
            except Interrupted:
                self._stop()
                with waiting(f"stopping {len(self._running)} training(s)"):
                    wait(futures)
                raise
        for future in futures:
            future.result()

    def _stop(self) -> None:
        with self._lock:
            self._stopping.set()
            for process in self._running:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)

    def _run(self, variant: Variant) -> None:
        code = None
        while not self._stopping.is_set() and (code is None or (code != 0 and self._other_runs(variant))):
            # A process of a killed sweep may go on for a while; one that was still loading takes the run from ours.
            self._wait_for_other(variant)
            code = self._train_once(variant)
        with self._lock:
            if code == 0:
                self.ended += 1
            elif code is not None and not self._stopping.is_set():
                self.failed[variant.label] = code

    def _train_once(self, variant: Variant) -> int | None:
        """The exit code of its training; None: it was not started, as the sweep stops."""
        parent = ["--tracking.parent", self.parent] if self.parent else []
        with self._lock:
            if self._stopping.is_set():
                return None
            # A session of its own: what a terminal sends to all would come twice, once through this process.
            process = subprocess.Popen(
                [*self._train, *variant.options, *self._shared, *parent],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            self._running.add(process)
        assert process.stdout is not None
        for line in process.stdout:
            event(f"{variant.label} | {line.rstrip()}")
        code = process.wait()
        with self._lock:
            self._running.remove(process)
        return code

    def _wait_for_other(self, variant: Variant) -> None:
        """Until no process of this machine trains the variant."""
        told = False
        while not self._stopping.is_set() and (why := self._other_runs(variant)):
            if not told:
                event(f"{variant.label} | waiting: {why}")
            told = True
            self._stopping.wait(1.0)

    def _other_runs(self, variant: Variant) -> str | None:
        """Why the variant cannot be trained now: a process of this machine does; None where none does."""
        try:
            SpoolLock(spool_of(variant.config)).release()
        except AlreadyRunningError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class _Row:
    """Of the table: what became of a variant; `bits` where it is finished and was validated."""

    label: str
    name: str
    told: str
    bits: float | None


def _table(variants: Sequence[Variant], failed: Mapping[str, int]) -> list[_Row]:
    """The lowest bits/dim first, then what has none."""
    rows = [_row(variant, failed.get(variant.label)) for variant in variants]
    return sorted(rows, key=lambda row: (row.bits is None, row.bits or 0.0))


def _row(variant: Variant, code: int | None) -> _Row:
    config = variant.config
    result = read_result(Location.parse(config.root) / "runs" / config.name)
    if code is not None:
        return _Row(variant.label, config.name, f"failed (exit code {code})", None)
    if result is None or result["step"] != config.train.steps:
        return _Row(variant.label, config.name, "not finished", None)
    scores: dict[str, Any] = result["validation"] or {}
    if not scores:
        return _Row(variant.label, config.name, f"{result['step']:,} steps, not validated", None)
    told = f"{plus_minus(scores['total'], scores['standard_error'])} bits/dim after {result['step']:,} steps"
    return _Row(variant.label, config.name, told, float(scores["total"]))


def _numbers(table: Sequence[_Row]) -> dict[str, float]:
    """For MLflow: how many are finished, and the best."""
    bits = [row.bits for row in table if row.bits is not None]
    best = {"sweep/best_bits_per_dim": min(bits)} if bits else {}
    return {"sweep/finished": float(len(bits)), **best}


def _note(asked: Sweep, table: Sequence[_Row]) -> str:
    rows = "\n".join(f"| {row.label} | {row.told} | `{row.name}` |" for row in table)
    fields = "; ".join(f"`{field}`: {', '.join(values)}" for field, values in asked.varied.items())
    return f"**{len(asked.variants)} trainings** over {fields}.\n\n| Variant | Result | Name |\n|---|---|---|\n{rows}"
