"""What a rank reports on its way to the driver's spool, and what of it a checkpoint has to keep."""

import time
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]
# Reports that may be lost with the controller or another rank: Ray holds one, and one can be on its way, half
# arrived, with the next one taken already.
_UNSURE_REPORTS = 3


class Reports:
    """The records of one rank. Rank 0 speaks for all; the others report their node's metrics alone.

    Args:
        rank: This one.
        send: Hands a report over; every rank sends the same number of them.
        node_metrics: Reads this node's metrics, in the one rank of each node that reports them.
    """

    def __init__(
        self, rank: int, send: Callable[[Record], None], node_metrics: Callable[[], dict[str, float]] | None = None
    ) -> None:
        self._rank, self._send, self._node_metrics = rank, send, node_metrics
        self._outbox: list[Record] = []
        self._unsure: list[list[Record]] = [[]]  # by report, the last one not yet sent

    def say(self, message: str) -> None:
        """A line for the user. It is not repeated by a run that resumes."""
        if self._rank == 0:
            self._outbox.append({"kind": "event", "message": message})

    def metrics(self, step: int, values: dict[str, float], seconds: float | None = None) -> None:
        """Values measured after `step` steps, at `seconds` since the epoch (None: now)."""
        stamp = int((seconds or time.time()) * 1000)
        self.record({"kind": "metrics", "step": step, "values": values, "timestamp_ms": stamp})

    def record(self, record: Record) -> None:
        """Any record of the spool."""
        if self._rank == 0:
            self._outbox.append(record)
            self._unsure[-1].append(record)

    def send(self, done: int) -> None:
        """Report all records since the last report, after `done` steps."""
        records, self._outbox = self._outbox, []
        if self._node_metrics is not None:
            records.append({"kind": "metrics", "step": done, "values": self._node_metrics()})
        self._unsure.append([])
        self._send({"records": records})

    def unsure(self) -> list[Record]:
        """The records that a checkpoint made now has to keep: those since the last call, and those of the last reports.

        Should they be lost on their way to the spool when the run dies, the run that resumes reports them again.
        """
        records = [record for report in self._unsure for record in report]
        del self._unsure[: -1 - _UNSURE_REPORTS]
        return records
