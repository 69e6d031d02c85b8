"""The spool: the append-only JSONL file through which everything a run records goes on its way to MLflow.

One line is one record, `{"kind": ..., "timestamp_ms": ..., <payload>}`. Several processes of one machine
append to the same file; one reader (`pipelines.tracking.tracker.Tracker`) follows it. Because the file is the
only way in, an unreachable tracking server can neither slow a job down nor lose a record.

Kinds and their payload (? = optional):

    start     run_key, experiment, run_name, tracking_uri, artifact_root, made_from?    one per attempt of the run
    params    values {name: value}                                          immutable for the run
    tags      values {name: value}                                          may change between attempts
    metrics   step, values {name: float}
    image     key, step, path          a PNG file; one per key and step, shown as a slider
    artifact  path, artifact_path?     a file or directory, into that folder of the run's artifacts
    note      markdown                 the run's description; {run_id} in it becomes the run's id
    dataset   name, digest, uri, context
    model     uri, name, model_id, step, tags?, metrics?, dataset?, validation?    registered under `name`
    evaluated model_id, step, values, dataset                               a score of a model, also on its own curve
    finish    status                   FINISHED, FAILED or KILLED
    event     message                  a line for the job's display; not sent to MLflow
    fatal     error, message           a worker's error that no restart can mend; not sent to MLflow

A payload may bring its own `timestamp_ms`, for what was measured before it is appended. `path` and `uri` are
local paths or URIs that `pipelines.storage.location` reads; what they name must stay there until it is sent.
"""

import fcntl
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from pipelines.cli.errors import AlreadyRunningError, StorageError

log = logging.getLogger(__name__)

REQUIRED_FIELDS: dict[str, frozenset[str]] = {
    "start": frozenset({"run_key", "experiment", "run_name", "tracking_uri", "artifact_root"}),
    "params": frozenset({"values"}),
    "tags": frozenset({"values"}),
    "metrics": frozenset({"step", "values"}),
    "image": frozenset({"key", "step", "path"}),
    "artifact": frozenset({"path"}),
    "note": frozenset({"markdown"}),
    "dataset": frozenset({"name", "digest", "uri", "context"}),
    "model": frozenset({"uri", "name", "model_id", "step"}),
    "evaluated": frozenset({"model_id", "step", "values", "dataset"}),
    "finish": frozenset({"status"}),
    "event": frozenset({"message"}),
    "fatal": frozenset({"error", "message"}),
}


@dataclass(frozen=True)
class Record:
    """One line of the spool: `start` and `end` are its byte offsets in the file."""

    kind: str
    timestamp_ms: int
    payload: dict[str, Any]
    start: int
    end: int


def _plain(value: Any) -> Any:
    """JSON has no NumPy or torch scalars: take their Python value; anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _json(record: dict[str, Any]) -> str:
    """One line; numbers that JSON does not have (NaN, infinities) are null, and so no points of a metric."""
    try:
        return json.dumps(record, default=_plain, allow_nan=False)
    except ValueError:
        return json.dumps(_without_non_finite(json.loads(json.dumps(record, default=_plain))))


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Spool:
    """Appends records to the file at `path`; safe in several threads and processes, picklable, holds nothing open.

    Records that cannot be written (disk full, directory gone) wait in this process and are written, in order, by the
    next `append` or `flush` that can.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._waiting: deque[bytes] = deque()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Spool"], tuple[Path]]:
        return Spool, (self.path,)  # what waits here is not for another process to write, too

    def append(self, kind: str, **payload: Any) -> None:
        """Append one record in one write, stamped with the time of this call (ms since the epoch) by default.

        Never raises for the file's sake: a record that cannot be written waits, which is logged once. Raises
        ValueError for a kind or payload that this module does not define, which is a mistake in the calling code.
        """
        missing = REQUIRED_FIELDS.get(kind, frozenset({"a known kind"})) - payload.keys()
        if missing:
            raise ValueError(f"spool record {kind!r}: lacks {', '.join(sorted(missing))}")
        record = {"kind": kind, "timestamp_ms": time.time_ns() // 1_000_000, **payload}
        line = (_json(record) + "\n").encode()
        with self._lock:
            began = not self._waiting
            self._waiting.append(line)
            error = self._write_waiting()
        if error is not None and began:
            why = error.strerror or error
            log.warning("tracking spool %s: cannot be written (%s); records wait in memory", self.path, why)

    def flush(self) -> int:
        """Write what waits, as far as that is possible now; returns how many records still wait."""
        with self._lock:
            self._write_waiting()
            return len(self._waiting)

    def _write_waiting(self) -> OSError | None:
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            return error
        return None

    def _write(self, line: bytes) -> None:
        # O_APPEND makes a single write atomic against the other processes on a local file system.
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line  # a line was torn by a kill or a full disk: leave it alone
            if os.write(fd, line) != len(line):
                raise OSError(28, "disk full")
        finally:
            os.close(fd)


def read_records(path: Path, offset: int, max_bytes: int = 1 << 20) -> tuple[list[Record], int, int]:
    """The complete records from byte `offset` on, at least one if there is one, about `max_bytes` at most.

    Returns (records, offset after the last complete line read, number of unreadable lines skipped). A last
    line without its newline is being written, or was torn: it is left for the next call.
    """
    records, skipped, position = [], 0, offset
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return [], offset, 0
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break
            start, position = position, position + len(line)
            if line.strip():
                try:
                    payload = json.loads(line)
                    kind, timestamp_ms = payload.pop("kind"), int(payload.pop("timestamp_ms"))
                    if REQUIRED_FIELDS[kind] - payload.keys():
                        raise KeyError(kind)
                    records.append(Record(kind, timestamp_ms, payload, start, position))
                except (ValueError, KeyError, TypeError, AttributeError):
                    skipped += 1
            if position - offset >= max_bytes:
                break
    return records, position, skipped


def iter_records(path: Path, offset: int = 0) -> Iterator[Record]:
    """Every complete record from byte `offset` to the end of the file, read in pieces."""
    while True:
        records, end, _ = read_records(path, offset)
        yield from records
        if end == offset:
            return
        offset = end


@dataclass
class SpoolState:
    """How far MLflow has acknowledged a spool; stored beside it as `<spool>.state.json`.

    `offset`: every record before this byte is in MLflow, except those that start at the bytes in `deferred`.
    `last_step`: highest step stored per metric, so that steps reported again after a resume are skipped.
    `start`: byte of the last `start` record that was sent; it says whose records come next.
    `champion`: which version of the run's registered model is champion and why, as of the last `model` record.
    `tracking_uri` holds no credentials; another URI means another server, which has none of the records.
    """

    tracking_uri: str
    run_id: str | None = None
    experiment_id: str | None = None
    offset: int = 0
    attempts: int = 0
    last_step: dict[str, int] = field(default_factory=dict)
    deferred: list[int] = field(default_factory=list)
    start: int = 0
    champion: str | None = None

    @staticmethod
    def path_for(spool: Path) -> Path:
        """Where the state of this spool is stored."""
        return spool.with_name(spool.name + ".state.json")

    @classmethod
    def load(cls, spool: Path, tracking_uri: str) -> Self:
        """The stored state, or a fresh one if there is none, it is unreadable or is another server's."""
        try:
            state = cls(**json.loads(cls.path_for(spool).read_text()))
            if state.tracking_uri == tracking_uri and spool.stat().st_size >= state.offset:
                return state
        except (OSError, ValueError, TypeError):
            pass  # replaying from the beginning is safe: every write to MLflow is idempotent
        return cls(tracking_uri)

    def save(self, spool: Path) -> None:
        """Replace the stored state as a whole; raises OSError when the disk is full."""
        target = self.path_for(spool)
        scratch = target.with_name(target.name + ".tmp")
        scratch.write_text(json.dumps(asdict(self)))
        scratch.replace(target)


class SpoolLock:
    """Exclusive ownership of a spool by one process, released by the kernel when the process ends.

    Raises AlreadyRunningError when another process holds it, and StorageError when the directory cannot be written.
    """

    def __init__(self, spool: Path) -> None:
        path = spool.with_name(spool.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(
                f"tracking spool {spool}: cannot be written ({error.strerror}); "
                "free the disk or choose another run directory"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self._fd, 32, 0).decode().strip() or "unknown"
            os.close(self._fd)
            raise AlreadyRunningError(
                f"run of spool {spool}: another job (pid {owner}) is running it; "
                "one run has one driver: wait for that job or stop it first"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let another process own the spool."""
        os.close(self._fd)
