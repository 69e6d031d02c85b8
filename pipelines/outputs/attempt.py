"""One attempt of a bulk job as its user sees it: progress line, MLflow run, closing rows."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.cli.config import digest, today
from pipelines.cli.console import Interrupted, ProgressLine, clock, event, waiting
from pipelines.cli.errors import AlreadyRunningError, StorageError
from pipelines.cluster import connection
from pipelines.models.kept import FoundModel
from pipelines.outputs.progress import Progress
from pipelines.outputs.shards import ShardedOutput
from pipelines.outputs.version import code_version, git_commit
from pipelines.tracking.tracker import Tracker, TrackingReport

_METRICS_INTERVAL_S = 2.0


@dataclass(frozen=True)
class Record:
    """A record for the spool, see `pipelines.tracking.spool`."""

    kind: str
    payload: Mapping[str, Any]


class Attempt:
    """Tracker and progress line of the job `job` ('sample', 'evaluate') on an output.

    Two jobs of one machine may work on one output; the second one helps, and leaves the MLflow run to the first.

    Args:
        job: Names the key, the tags and the metrics.
        output: What is made; its request becomes the run's parameters.
        experiment: Name of the MLflow experiment.
        name: Name of the MLflow run.
        root: See `Tracker`.
        tracking_uri: See `Tracker`.
    """

    def __init__(
        self,
        job: str,
        output: ShardedOutput,
        *,
        experiment: str,
        name: str,
        root: Path,
        tracking_uri: str | None,
    ) -> None:
        self.job, self.output = job, output
        self.started, self.rate = time.monotonic(), 0.0
        self._line: ProgressLine | None = None
        self._reported = -math.inf
        self.tracker: Tracker | None = None
        key = f"{job}/{output.location.uri}"
        try:
            self.tracker = Tracker(
                root / "spool" / digest(key)[:16] / "spool.jsonl",
                run_key=key,
                experiment=experiment,
                run_name=name,
                root=root,
                tracking_uri=tracking_uri,
                notify=event,
                made_from={"ddpm.config_hash": digest(output.request)},
                mirror=None if output.location.is_local else output.location / "tracking" / "spool.jsonl",
            )
        except AlreadyRunningError:
            event(f"another job is making {output.location}: helping it; what it does is in its MLflow run")

    def record(self, kind: str, **payload: Any) -> None:
        """Append to the spool, if this attempt has the run."""
        if self.tracker is not None:
            self.tracker.spool.append(kind, **payload)

    def announce(self, found: FoundModel | None, tags: Mapping[str, Any], reads: Sequence[Record]) -> None:
        """Record parameters, tags and what is read: who makes what with which model and code."""
        of_model = {}
        if found is not None:
            of_model = {
                "ddpm.model_id": found.model_id,
                "ddpm.model": found.uri,
                "ddpm.train_run_id": found.run_id,
            }
        params = dict(today(name, value) for name, value in self.output.request.items())
        self.record("params", values={**params, **({"model": found.reference} if found else {})})
        tags = {
            "ddpm.job": self.job,
            **of_model,
            "ddpm.config_hash": digest(self.output.request),
            "ddpm.code_version": code_version(),
            "ddpm.output": self.output.location.uri,
            "mlflow.source.name": f"jobs/{self.job}.py",
            "mlflow.source.type": "JOB",
            "mlflow.source.git.commit": git_commit(),
            **tags,
        }
        self.record("tags", values={name: value for name, value in tags.items() if value is not None})
        for record in reads:
            self.record(record.kind, **record.payload)

    def show(self, progress: Progress, total: int, label: str, detail: str = "") -> None:
        """Update the progress line and, now and then, the metrics."""
        self._line = self._line or ProgressLine(label, total, "images", first="waiting for the first images")
        self.rate = progress.rate
        done = progress.rows + int(progress.making)
        self._line.update(done, progress.rate, detail)
        now, last = time.monotonic(), progress.rows == total
        if progress.rate and (last or now - self._reported > _METRICS_INTERVAL_S):
            self._reported = now
            values = {
                f"{self.job}/images": done,
                "images_per_second": progress.rate,
                "eta_seconds": (total - done) / progress.rate,
            }
            self.record("metrics", step=done, values=values)

    def leave_ray(self) -> None:
        """Take the progress line away and disconnect."""
        if self._line is not None:
            self._line.close()
        connection.disconnect()

    def run(self, compute: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """Call `compute`, which commits the output and gives its manifest, then end the MLflow run as it ended.

        Returns:
            The manifest, and rows for the summary: MLflow's page, what waits to be sent, time and rate.
        """
        status = "FAILED"
        try:
            try:
                manifest = compute()
            except StorageError:
                # Another job at work on the same request committed first, and removed the work directory.
                committed = self.output.committed()
                if committed is None:
                    raise
                manifest = committed
            status = "FINISHED"
        except Interrupted as interruption:
            status = "KILLED"
            interruption.kept = self.output.kept()
            raise
        finally:
            self.leave_ray()
            with waiting("sending the last records to MLflow"):
                report = self.tracker.finish(status) if self.tracker else None
        return manifest, self._closing_rows(report)

    def _closing_rows(self, report: TrackingReport | None) -> list[tuple[str, str]]:
        rows = []
        if report is not None:
            rows.append(("MLflow", report.link or "not reached"))
            if report.advice:
                rows.append(("tracking", report.advice))
        rate = f", {self.rate:,.1f} images/s while computing" if self.rate else ""
        return [*rows, ("time", clock(time.monotonic() - self.started) + rate)]
