"""Tracking a run in MLflow without ever slowing it down: `Tracker` follows the run's spool.

    python -m pipelines.tracking.tracker SPOOL      send what a finished job could not

Any process of the driver's machine appends to the spool (`pipelines.tracking.spool`); the tracker, of which a run has
exactly one, shows new records to the job's display and sends them to MLflow in the background. While MLflow
does not answer, the records wait in the file.
"""

import argparse
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pipelines.cli.console import event, run_job
from pipelines.cli.errors import DDPMError, RequestMismatchError, StorageError, TrackingError, exit_code
from pipelines.storage.location import Location
from pipelines.tracking.client import reason, sqlite_path, sqlite_uri
from pipelines.tracking.mlflow_run import MlflowRun
from pipelines.tracking.spool import REQUIRED_FIELDS, Record, Spool, SpoolLock, SpoolState, iter_records, read_records

LISTEN_INTERVAL_S = 0.2
SEND_INTERVAL_S = 2.0
SLOW_INTERVAL_S = 30.0  # longest back-off, and how often the mirror and the deferred records are looked after
LAST_TRIES = 3  # failures after which a finishing job stops waiting for MLflow


@dataclass(frozen=True)
class TrackingReport:
    """What became of a run's records when its job ended.

    `link` says where to look at the run (None: MLflow never answered); `pending` records wait in the spool;
    `champion` says which version of the run's registered model is champion and why (None: no model was registered);
    `refused` ones MLflow will not take; `advice` is one line about the pending ones (None: there are none).
    """

    run_id: str | None
    link: str | None
    pending: int
    refused: int
    advice: str | None
    champion: str | None


def resolve_tracking_uri(tracking_uri: str | None, root: Path) -> str:
    """The given URI, else MLFLOW_TRACKING_URI, else a SQLite file in `root`; SQLite paths become absolute."""
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(root / "mlflow.db")
    path = sqlite_path(uri)
    if path is None:
        return uri
    _, separator, options = uri.partition("?")
    return sqlite_uri(path.absolute()) + separator + options


def without_credentials(uri: str) -> str:
    """The URI without user name and password.

    >>> without_credentials("https://ann:secret@mlflow.example:5000")
    'https://mlflow.example:5000'
    """
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def run_link(tracking_uri: str, experiment_id: str, run_id: str) -> str:
    """Where a person sees the run: its page, or for a database the command that serves it and the page."""
    page = f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
    if urlsplit(tracking_uri).scheme in ("http", "https"):
        return without_credentials(tracking_uri).rstrip("/") + page
    hidden = without_credentials(tracking_uri) != tracking_uri
    store = '"$MLFLOW_TRACKING_URI"' if hidden else shlex.quote(tracking_uri)
    return (
        f"http://127.0.0.1:5000{page} (start it: uv run mlflow ui --backend-store-uri {store} --port 5000 --workers 1)"
    )


class Tracker:
    """Follows a run's spool: to the listener at once, to MLflow in the background.

    Args:
        spool: Path of the spool on this machine's disk; its directory is made.
        run_key: Identity of the run across restarts, without double quotes; a job that gives the same key
            continues the same MLflow run.
        made_from: Tags that say what the run is made from, such as the hash of its configuration. An attempt with the
            same key but other values of these is another MLflow run.
        experiment: Name of the MLflow experiment.
        run_name: Name of the MLflow run.
        root: Directory for the database when no tracking URI is given, and for artifacts of a database.
        tracking_uri: See `resolve_tracking_uri`.
        notify: Called, from another thread, with one line about something a person should know.
        listener: Called, from another thread, with every record appended from now on, also in an outage.
        mirror: Object that holds the unsent part of the spool for a run whose directory is not on this
            machine; the spool is restored from it where it is absent. With a database on this machine, `notify` hears
            that only this machine has the run.

    Raises:
        AlreadyRunningError: Another job of this machine is running this run (its pid is named).
        RequestMismatchError: The spool belongs to a run with another key.
        StorageError: The spool's directory cannot be written.
    """

    def __init__(
        self,
        spool: str | os.PathLike[str],
        *,
        run_key: str,
        experiment: str,
        run_name: str,
        root: Path,
        tracking_uri: str | None = None,
        notify: Callable[[str], None],
        listener: Callable[[Record], None] | None = None,
        mirror: Location | None = None,
        made_from: Mapping[str, str] | None = None,
    ) -> None:
        self.spool = Spool(Path(spool).absolute())
        self._path, self._notify, self._listener, self._mirror = self.spool.path, notify, listener, mirror
        self._mirrored = False
        self._lock = SpoolLock(self._path)
        try:
            self._restore()
            first, _, _ = read_records(self._path, 0, max_bytes=1)
            known = first[0].payload.get("run_key", run_key) if first else run_key
            if known != run_key:
                raise RequestMismatchError(
                    f"tracking spool {self._path}: belongs to run {known!r}, not {run_key!r}; "
                    "use another run directory, or delete the spool with its .state.json"
                )
        except BaseException:
            self._lock.release()
            raise
        self._uri = resolve_tracking_uri(tracking_uri, root)
        if mirror is not None and (database := sqlite_path(self._uri)):
            notify(
                f"tracking: runs and registered models are on this machine only, in {database}; "
                "name a server that other machines reach too (tracking.uri or MLFLOW_TRACKING_URI)"
            )
        self._listened = self._path.stat().st_size if self._path.exists() else 0
        identity: dict[str, Any] = {
            "run_key": run_key,
            "experiment": experiment,
            "run_name": run_name,
            "tracking_uri": without_credentials(self._uri),
            "artifact_root": str(root.absolute() / "mlartifacts"),
            "made_from": dict(made_from or {}),
        }
        self.spool.append("start", **identity)
        state = SpoolState.load(self._path, without_credentials(self._uri))
        self._run = MlflowRun(self._path, identity, self._uri, state, notify)
        self._finishing, self._heard = threading.Event(), threading.Condition()
        self._threads = [
            threading.Thread(target=loop, name=f"tracking-{loop.__name__.strip('_')}", daemon=True)
            for loop in (self._listen, self._send)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def run_id(self) -> str | None:
        """Of the MLflow run; None until MLflow has answered for the first time."""
        return self._run.state.run_id

    @property
    def link(self) -> str | None:
        """Where a person sees the run; None until MLflow has answered for the first time."""
        state = self._run.state
        return run_link(self._uri, state.experiment_id or "", state.run_id) if state.run_id else None

    def catch_up(self, timeout_s: float = 5.0) -> bool:
        """Wait until the listener has heard all that any process had appended; False after `timeout_s`."""
        _, end, _ = read_records(self._path, self._listened, sys.maxsize)
        with self._heard:
            return self._heard.wait_for(lambda: self._listened >= end, timeout_s)

    def finish(self, status: str, timeout_s: float = 60.0) -> TrackingReport:
        """End the attempt with `status` (FINISHED, FAILED or KILLED) and wait for MLflow up to `timeout_s`.

        Returns at once when nothing is pending, and after three failures when MLflow does not answer; records that a
        full disk refuses are waited for first.
        """
        deadline = time.monotonic() + timeout_s
        self.spool.append("finish", status=status)
        while (unwritten := self.spool.flush()) and time.monotonic() < deadline:
            time.sleep(0.5)  # a full disk may be freed
        self._finishing.set()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        state = self._run.state
        pending = sum(1 for _ in iter_records(self._path, state.offset)) + len(state.deferred)
        self._write_mirror(pending > 0)
        if not any(thread.is_alive() for thread in self._threads):
            self._lock.release()  # otherwise it ends with the process, as a thread still uses the spool
        advice = None
        if pending:
            advice = (
                f"{pending} records are not in MLflow yet and wait in {self._path}; "
                f"run the same command again or: python -m pipelines.tracking.tracker {shlex.quote(str(self._path))}"
            )
        if unwritten:
            advice = (
                f"{unwritten} records are lost, {self._path} cannot be written; free the disk, run the same command"
            )
        return TrackingReport(state.run_id, self.link, pending, self._run.refused, advice, state.champion)

    def _listen(self) -> None:
        complained = False
        while True:
            last_round = self._finishing.is_set()
            records, end, _ = read_records(self._path, self._listened)
            for record in records if self._listener else []:
                try:
                    assert self._listener is not None
                    self._listener(record)
                except Exception as error:  # noqa: BLE001  a display must never end the tracking
                    if not complained:
                        self._notify(f"tracking: the display fails on {record.kind} records: {reason(error)}")
                    complained = True
            advanced = end > self._listened
            with self._heard:
                self._listened = end
                self._heard.notify_all()
            if last_round and not advanced:
                return
            if not advanced:
                self._finishing.wait(LISTEN_INTERVAL_S)

    def _send(self) -> None:
        connected = announced = away = False
        delay, last_tries, looked_after = SEND_INTERVAL_S, 0, time.monotonic()
        while True:
            last_round = self._finishing.is_set()
            try:
                if not connected:
                    self._run.connect()
                    connected, delay = True, SEND_INTERVAL_S
                    if away:
                        self._notify("tracking: MLflow answers again, what was kept is being sent")
                    away = False
                skipped = send_new_records(self._path, self._run)
                if not announced:  # not before the start record has been sent, which may change the run
                    self._notify(f"tracking: {self.link}")
                    announced = True
                if skipped:
                    self._notify(f"tracking: {skipped} unreadable lines of {self._path} were left out")
                if last_round or time.monotonic() - looked_after > SLOW_INTERVAL_S:
                    looked_after = time.monotonic()
                    self._run.retry_deferred()
                    if self._mirrored:
                        self._write_mirror(bool(self._run.state.deferred))
                if last_round:
                    return
            except Exception as error:  # noqa: BLE001  tracking must never end the job
                if not away:
                    self._notify(
                        f"tracking: MLflow at {without_credentials(self._uri)} cannot be used "
                        f"({reason(error)}); the job goes on and keeps its records in {self._path}"
                    )
                    looked_after = -SLOW_INTERVAL_S  # mirror the spool now
                connected, away, delay = False, True, min(2 * delay, SLOW_INTERVAL_S)
                last_tries += last_round
                if last_tries >= LAST_TRIES:
                    return
                if time.monotonic() - looked_after > SLOW_INTERVAL_S:
                    looked_after = time.monotonic()
                    self._write_mirror(True)
            if last_round:
                time.sleep(1.0)  # between the last tries; the event is set and no longer a clock
            else:
                self._finishing.wait(delay)

    def _restore(self) -> None:
        if self._mirror is not None and not self._path.exists() and self._mirror.exists():
            content = self._mirror.read_bytes()
            if content:
                self._path.write_bytes(content)
                self._mirrored = True

    def _write_mirror(self, pending: bool) -> None:
        """Copy the unsent records to the mirror, or empty it when all are sent."""
        if self._mirror is None or not (pending or self._mirrored):
            return
        unsent, state = b"", self._run.state
        with suppress(StorageError, OSError):  # the run's storage is away too: the spool still has everything
            if pending:
                with self._path.open("rb") as file:
                    begun = [state.start] if state.start < state.offset else []
                    for offset in [*begun, *state.deferred]:
                        file.seek(offset)
                        unsent += file.readline()
                    file.seek(state.offset)
                    unsent += file.read()
            self._mirror.write_bytes(unsent)
            self._mirrored = pending


def send_new_records(spool: Path, run: MlflowRun) -> int:
    """Send everything the spool has beyond the acknowledged offset; returns how many lines it cannot read."""
    unreadable = 0
    while True:
        records, end, skipped = read_records(spool, run.state.offset)
        unreadable += skipped
        if end == run.state.offset:
            return unreadable
        run.send(records, end)


def replay(spool: Path, tracking_uri: str | None = None, notify: Callable[[str], None] = print) -> str:
    """Send to MLflow what a job left in its spool; returns where to see the run.

    Args:
        spool: Path of the spool file.
        tracking_uri: Default: MLFLOW_TRACKING_URI, else the one that the job used.
        notify: Called with one line about something a person should know.

    Raises:
        AlreadyRunningError: The job is still running.
        TrackingError: It is not a spool, or MLflow does not take everything now.
    """
    if not spool.is_file():
        raise TrackingError(f"{spool}: is not a tracking spool (no such file); give a run's .jsonl file")
    starts = [record for record in iter_records(spool) if record.kind == "start"]
    if not starts:
        raise TrackingError(f"{spool}: is not a tracking spool (no start record); give a run's .jsonl file")
    identity = starts[-1].payload
    if not all(isinstance(identity[name], str) for name in REQUIRED_FIELDS["start"]):
        raise TrackingError(f"{spool}: is not a tracking spool (its start record is damaged); restore it")
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or identity["tracking_uri"]
    uri = resolve_tracking_uri(uri, Path(identity["artifact_root"]).parent)
    lock = SpoolLock(spool)
    try:
        run = MlflowRun(spool, identity, uri, SpoolState.load(spool, without_credentials(uri)), notify)
        try:
            run.connect()
            send_new_records(spool, run)
            run.retry_deferred()
        except Exception as error:
            raise TrackingError(
                f"MLflow at {without_credentials(uri)}: cannot be used ({reason(error)}); try again when it is back"
            ) from error
        if run.state.deferred:
            raise TrackingError(
                f"MLflow at {without_credentials(uri)}: its artifact store or registry does not take "
                f"{len(run.state.deferred)} records; see the server's log and try again"
            )
        return run_link(uri, str(run.state.experiment_id), str(run.state.run_id))
    finally:
        lock.release()


def main(argv: Sequence[str]) -> int:
    """The command `python -m pipelines.tracking.tracker SPOOL`; returns its exit code."""
    parser = argparse.ArgumentParser(
        "pipelines.tracking.tracker", description="Send spooled records to MLflow.", allow_abbrev=False
    )
    parser.add_argument("spool", type=Path, help="the run's tracking spool (.jsonl)")
    parser.add_argument("--tracking-uri", help="default: MLFLOW_TRACKING_URI, else the one the job used")
    arguments = parser.parse_args(argv)
    try:
        print(f"sent: {replay(arguments.spool.absolute(), arguments.tracking_uri)}")
    except DDPMError as error:
        event(f"error: {error}")
        return exit_code(error)
    return 0


if __name__ == "__main__":
    run_job(lambda argv: sys.exit(main(argv)))
