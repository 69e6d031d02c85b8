"""Ending a training on request with nothing lost: all ranks save the same step, and the driver learns which.

Driver and workers write to a board: entries of Ray's key-value store that belong to the driver's Ray job. Once
asked, each rank stops where it is and says which step it has begun. The last step is the latest that any rank has
begun, so each of them can still take part in it; nobody has gone beyond. Until it is asked, a step costs a lock.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from pipelines.cluster import ray_private

POLL_S = 0.25
_ANSWER_POLL_S = 0.05


class Board(Protocol):
    """Entries that the driver and all ranks see."""

    def get(self, name: str) -> str | None:
        """The entry, None where there is none."""

    def put(self, name: str, value: str) -> None:
        """Write the entry."""


class RayBoard:
    """The board of this process's Ray job."""

    def __init__(self) -> None:
        import ray

        self._prefix = f"ddpm/stop/{ray.get_runtime_context().get_job_id()}/"

    def get(self, name: str) -> str | None:
        """The entry, None where there is none."""
        value = ray_private.kv_get(self._prefix + name)
        return None if value is None else value.decode()

    def put(self, name: str, value: str) -> None:
        """Write the entry."""
        ray_private.kv_put(self._prefix + name, value)

    def clear(self) -> None:
        """Remove all entries."""
        ray_private.kv_delete(self._prefix)


class StopWatch:
    """A rank's side.

    Args:
        board: Of the driver's job.
        group: Names this set of ranks: a restart's answers must not be taken for theirs.
        rank: In 0..world_size-1.
        world_size: Number of ranks.
        done: Steps done already.
    """

    def __init__(self, board: Board, group: str, rank: int, world_size: int, done: int) -> None:
        self._board, self._group, self._rank, self._world_size = board, group, rank, world_size
        self._lock, self._agreed = threading.Lock(), threading.Event()
        self._begun, self._held, self._last = done, False, 0
        threading.Thread(target=self._watch, name="stop", daemon=True).start()

    def reached(self, done: int) -> bool:
        """Whether the training ends with `done` steps; every rank asks before each step.

        Once a stop was asked for, this waits for the answers of all ranks.
        """
        with self._lock:
            if not self._held:
                self._begun = done + 1
                return False
        self._agreed.wait()
        return done >= self._last

    def saved(self, step: int) -> None:
        """Tell the driver that this step is committed."""
        if self._rank == 0:
            self._board.put("saved", str(step))

    def _watch(self) -> None:
        if self._rank == 0:
            self._insist(lambda: self._board.put("running", self._group))
        self._await("asked", POLL_S)
        with self._lock:
            self._held, begun = True, self._begun
        self._insist(lambda: self._board.put(f"{self._group}/{self._rank}", str(begun)))
        if self._rank == 0:
            self._insist(lambda: self._board.put("heard", self._group))
            last = max(int(self._await(f"{self._group}/{rank}")) for rank in range(self._world_size))
            self._insist(lambda: self._board.put(f"{self._group}/last", str(last)))
        self._last = int(self._await(f"{self._group}/last"))
        self._agreed.set()

    def _await(self, name: str, poll_s: float = _ANSWER_POLL_S) -> str:
        """The entry, once it is there; a store that is away is waited for, as the training goes on without it."""
        while True:
            with suppress(Exception):
                if (value := self._board.get(name)) is not None:
                    return value
            time.sleep(poll_s)

    def _insist(self, write: Callable[[], None]) -> None:
        while True:
            with suppress(Exception):
                return write()
            time.sleep(POLL_S)


def ask_to_stop(
    board: Board,
    wait: Callable[[float], bool],
    say: Callable[[str], None],
    *,
    answer_s: float = 5.0,
    save_s: float = 120.0,
    leave_s: float = 5.0,
) -> None:
    """The driver's side: have the ranks save and end, and wait for it as long as there is hope.

    Args:
        board: Of this job.
        wait: Waits so many seconds; true when there is nothing to wait for any more.
        say: Called with a line for the user when there is something to wait for, and when it is committed.
        answer_s: Seconds for the ranks to answer at all.
        save_s: Seconds for the running step and the checkpoint.
        leave_s: Seconds after the commit for the last records to arrive.
    """
    if board.get("running") is None:
        return  # no rank has begun to train
    say("saving a checkpoint; a second signal ends the job without it")
    board.put("asked", "1")
    heard = saved = False
    deadline = time.monotonic() + answer_s
    while time.monotonic() < deadline and not wait(0.1):
        if not saved and (step := board.get("saved")) is not None:
            saved, deadline = True, time.monotonic() + leave_s
            say(f"step {int(step):,} is saved")
        elif not heard and board.get("heard") is not None:
            heard, deadline = True, time.monotonic() + save_s
