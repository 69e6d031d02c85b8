"""The MLflow run of a spool: found again or created, then fed in order, whatever MLflow does meanwhile."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines.cli.errors import TrackingError
from pipelines.storage.ownership import user
from pipelines.tracking.client import database_lock, mlflow_client, reason
from pipelines.tracking.experiment_page import write_page
from pipelines.tracking.mlflow_records import ATTEMPT_TAG, RecordWriter
from pipelines.tracking.spool import Record, SpoolState, iter_records, read_records

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_KEY_TAG = "ddpm.run_key"
ABANDONED_TAG = "ddpm.abandoned"
# Answers that stay the same however often the request is repeated.
_FINAL = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
# Records that need a second store (artifacts, registry): when only that store fails, the others go on.
_STORED_ELSEWHERE = {"image", "artifact", "model"}


class MlflowRun:
    """The MLflow run of a spool, or, where attempts were made from different things, the run of each.

    A run has the tags of its `made_from`. An attempt that was made from something else is another run; the one
    before it is marked as abandoned unless it is finished.

    Args:
        spool: Path of the spool file.
        identity: Payload of the spool's last `start` record (run_key, experiment, run_name, artifact_root).
        tracking_uri: Of the MLflow server or database, with its credentials if it has any.
        state: What has been acknowledged so far; updated and stored after every success.
        notify: Called with one line about something a person should know.
    """

    def __init__(
        self,
        spool: Path,
        identity: dict[str, Any],
        tracking_uri: str,
        state: SpoolState,
        notify: Callable[[str], None],
    ) -> None:
        self.state, self.refused = state, 0
        self._spool, self._identity, self._uri, self._notify = spool, identity, tracking_uri, notify
        self._client: MlflowClient | None = None
        self._warned: set[str] = set()
        self._replays = False  # whether earlier attempts of the spool were sent before, and are sent again
        self._entered: set[str] = set()  # runs that have been written to since

    def connect(self) -> None:
        """Find or create the run; raises whatever MLflow raises when it cannot be reached."""
        if self._client is None:
            client = mlflow_client(self._uri)
            with database_lock(self._uri):
                # The first use of a database creates its tables.
                client.get_experiment_by_name(self._identity["experiment"])
            self._client, self._writer = client, RecordWriter(client, self.state, self._notify)
        state = self.state
        if state.run_id is not None and not self._exists(state.run_id):
            self._notify(f"tracking: MLflow run {state.run_id} was deleted; a new one gets the whole history")
            state.run_id, state.offset, state.attempts, state.last_step, state.deferred = None, 0, 0, {}, []
        if state.run_id is None:
            self._replays = True
            state.experiment_id = self._experiment_id()
            starts = (record.payload for record in iter_records(self._spool) if record.kind == "start")
            self._enter(next(starts, {}).get("made_from", {}), 0)

    @property
    def _mlflow(self) -> "MlflowClient":
        assert self._client is not None, "connect() comes first"
        return self._client

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._mlflow.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._identity["experiment"]
        location = None  # an HTTP server decides itself where artifacts go
        if urlsplit(self._uri).scheme not in ("http", "https"):
            location = (Path(self._identity["artifact_root"]) / name.replace("/", "_")).as_uri()
        experiment = self._mlflow.get_experiment_by_name(name)
        if experiment is None:
            try:
                self._mlflow.create_experiment(name, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another job was faster
                    raise
            experiment = self._mlflow.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage != "active":
            raise TrackingError(f"experiment {name!r} is deleted: restore it in MLflow or choose another name")
        try:
            write_page(self._mlflow, experiment, self._identity["run_key"].partition("/")[0])
        except MlflowException as error:
            if error.error_code not in (*_FINAL, "PERMISSION_DENIED"):
                raise
            # A user may be allowed to write runs and not to describe experiments: the runs are what matters.
            self._notify(f"tracking: experiment {name!r} gets no description ({reason(error)})")
        return str(experiment.experiment_id)

    def _enter(self, made_from: Mapping[str, str], position: int) -> None:
        """Find or create the run of attempts made from this, and write to it from byte `position` of the spool on.

        The run's history says which steps it has, its tag how many attempts it saw.
        """
        state = self.state
        run = self._find(made_from) or self._create(made_from, position)
        last_step = {}
        for key in run.data.metrics:
            history = self._mlflow.get_metric_history(run.info.run_id, key)
            last_step[key] = max(point.step for point in history)
        later = [record for record in iter_records(self._spool, position) if record.kind == "start"]
        sent_before = [
            record for record in later[:-1] if not _contradicts(record.payload.get("made_from", {}), made_from)
        ]
        seen = int(run.data.tags.get(ATTEMPT_TAG, 0))
        if self._replays and run.info.run_id not in self._entered:
            seen -= len(sent_before)  # they are about to be counted again
        self._entered.add(run.info.run_id)
        state.run_id, state.last_step, state.attempts, state.deferred = run.info.run_id, last_step, max(0, seen), []
        state.save(self._spool)

    def _find(self, made_from: Mapping[str, str]) -> "Run | None":
        """The run with this key that was made from this."""
        runs = self._mlflow.search_runs(
            [str(self.state.experiment_id)],
            f'tags.`{RUN_KEY_TAG}` = "{self._identity["run_key"]}"',
            order_by=["attributes.start_time ASC"],
        )
        return next((run for run in runs if not _contradicts(run.data.tags, made_from)), None)

    def _create(self, made_from: Mapping[str, str], position: int) -> "Run":
        first, _, _ = read_records(self._spool, position, max_bytes=1)
        return self._mlflow.create_run(
            str(self.state.experiment_id),
            start_time=first[0].timestamp_ms if first else None,
            tags={RUN_KEY_TAG: self._identity["run_key"], "mlflow.user": user(), **made_from},
            run_name=self._identity["run_name"],
        )

    def _change_run(self, start: Record) -> None:
        """Leave the run when an attempt begins that is made from something else: one curve is one training."""
        made_from = start.payload.get("made_from", {})
        run = self._mlflow.get_run(str(self.state.run_id))
        if not _contradicts(run.data.tags, made_from):
            return
        self.retry_deferred()  # for the last time
        if lost := len(self.state.deferred):
            self.refused += lost
            self._notify(f"tracking: {lost} records of the run before are left out: artifact store or registry fails")
        if run.info.status != "FINISHED":
            if run.info.status == "RUNNING":
                self._mlflow.set_terminated(run.info.run_id, "KILLED")
            self._mlflow.set_tag(run.info.run_id, ABANDONED_TAG, "true")
            self._mlflow.update_run(run.info.run_id, name=f"{self._identity['run_name']} (abandoned)")
            self._notify("tracking: another configuration or other data than before: this is another MLflow run")
        self._enter(made_from, start.start)
        if ABANDONED_TAG in self._mlflow.get_run(str(self.state.run_id)).data.tags:  # taken up again
            self._mlflow.delete_tag(str(self.state.run_id), ABANDONED_TAG)
            self._mlflow.update_run(str(self.state.run_id), name=self._identity["run_name"])

    def send(self, records: Sequence[Record], end: int) -> None:
        """Write the records in their order; the spool is acknowledged up to byte `end`.

        Raises whatever MLflow raises when the server does not answer; what was written before that stays
        acknowledged. A record that the server will never take is counted in `refused` and passed over.
        """
        waiting: list[Record] = []
        for record in records:
            if record.kind == "metrics":
                waiting.append(record)
                continue
            self._send_metrics(waiting)
            waiting = []
            if record.kind == "start":
                self._change_run(record)
                self.state.start = record.start
            self._send_one(record)
        self._send_metrics(waiting)
        self._acknowledge(end)

    def retry_deferred(self) -> None:
        """Try once more the records whose artifact store or registry failed."""
        for offset in list(self.state.deferred):
            records, _, _ = read_records(self._spool, offset, max_bytes=1)
            for record in records:
                self._send_one(record)

    def _acknowledge(self, end: int) -> None:
        self.state.offset = max(self.state.offset, end)
        self.state.save(self._spool)

    def _send_metrics(self, records: list[Record]) -> None:
        from mlflow.exceptions import MlflowException

        if not records:
            return
        try:
            self._writer.metrics(records)
            self._acknowledge(records[-1].end)
        except (MlflowException, ValueError, TypeError) as error:
            if isinstance(error, MlflowException) and error.error_code not in _FINAL:
                raise
            self._require_run()
            for record in records:  # one bad name refuses the whole request: find it
                self._send_one(record)

    def _send_one(self, record: Record) -> None:
        from mlflow.exceptions import MlflowException

        deferred = False
        try:
            self._writer.write(record)
        except Exception as error:  # a record must never end the tracking
            final = isinstance(error, FileNotFoundError) or getattr(error, "error_code", "") in _FINAL
            if isinstance(error, MlflowException) and not final and record.kind not in _STORED_ELSEWHERE:
                raise
            self._require_run()  # raises when it is the server itself that is away
            deferred = record.kind in _STORED_ELSEWHERE and not final
            self._pass_over(record, error, deferred)
        waiting = [offset for offset in self.state.deferred if offset != record.start]
        self.state.deferred = [*waiting, record.start] if deferred else waiting
        self._acknowledge(record.end)

    def _require_run(self) -> None:
        """Raise unless the server answers and still has the run (`connect` replaces a deleted one)."""
        if not self._exists(str(self.state.run_id)):
            raise TrackingError("the run was deleted")

    def _pass_over(self, record: Record, error: Exception, deferred: bool) -> None:
        """Go on without the record, and say so once per kind."""
        self.refused += not deferred
        if record.kind not in self._warned:
            self._warned.add(record.kind)
            fate = "is kept for a later try" if deferred else "is left out"
            self._notify(f"tracking: MLflow does not take a {record.kind} record, it {fate}: {reason(error)}")


def _contradicts(known: Mapping[str, str], made_from: Mapping[str, str]) -> bool:
    """Whether it is known to be made from something else; what is not known says nothing."""
    return any(known.get(name, value) != value for name, value in made_from.items())
