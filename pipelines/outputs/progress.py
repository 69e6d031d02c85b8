"""How far the shards are that are being made: whoever computes one tells, and the driver hears.

Between machines it goes through Ray's key-value store, one key for each actor: no process is started for it, and
what is lost is replaced a second later. It is for the eye alone; nothing is decided by it.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pipelines.cluster import ray_private

_NAMESPACE = "ddpm-progress"
_INTERVAL_S = 1.0

Tell = Callable[[int, float, float], None]
"""Takes a shard's index, how many of its rows are made, and in how many seconds."""

_tell: Callable[[float], None] | None = None


def made(rows: float) -> None:
    """Tell how many rows of the shard that this process computes are made; a fraction stands for a part of the steps
    of a row."""
    if _tell is not None:
        _tell(rows)


@contextmanager
def telling(tell: Callable[[float], None] | None) -> Iterator[None]:
    """Hand what is `made` in the block to `tell`."""
    global _tell
    before, _tell = _tell, tell
    try:
        yield
    finally:
        _tell = before


@dataclass
class Counted:
    """Tells with every step of a batch how many rows of the shard are made: those `before` it, and its share.

    Called with every step, as a sampler's `on_step` is.

    Attributes:
        before: Rows of the batches before.
        rows: Of this batch, without what only fills it up.
        steps: That it takes.
        also: Called with the same arguments, first.
    """

    before: int
    rows: int
    steps: int
    also: Callable[..., None] | None = None
    _done: int = field(default=0, init=False)

    def __call__(self, *step: Any) -> None:
        """One step more is done."""
        if self.also is not None:
            self.also(*step)
        self._done += 1
        made(self.before + self.rows * self._done / self.steps)


@dataclass(frozen=True)
class Progress:
    """Where a computation stands.

    Attributes:
        shards: Shards done, found ones included.
        num_shards: Shards in all.
        rows: Rows of them.
        rate: Rows per second of this run, of unfinished shards too, since it began to compute; 0.0 before that.
        making: Rows done of the shards that are being made.
    """

    shards: int
    num_shards: int
    rows: int
    rate: float
    making: float = 0.0


class Tally:
    """Counts what is done, of finished shards and of those that are being made; any thread may tell it.

    Args:
        found: Shards that were there before, and `rows` of them.
        num_shards: Shards in all.
        on_progress: Called with every change, but about unfinished shards not more often than twice a second.
    """

    def __init__(self, found: int, rows: int, num_shards: int, on_progress: Callable[[Progress], None]) -> None:
        self._shards, self._rows, self._before, self._num_shards = found, rows, rows, num_shards
        self._on_progress, self._lock = on_progress, threading.Lock()
        self._finished: set[int] = set()
        self._making: dict[int, float] = {}
        self._began: float | None = None
        self._shown = 0.0
        on_progress(Progress(found, num_shards, rows, 0.0))

    def finished(self, index: int, rows: int, seconds: float) -> None:
        """A shard of so many rows is done and took so long."""
        with self._lock:
            self._finished.add(index)
            self._making.pop(index, None)
            self._shards += 1
            self._rows += rows
            self._show(seconds)

    def making(self, index: int, rows: float, seconds: float) -> None:
        """So much of a shard has been done, in so long."""
        with self._lock:
            if index not in self._finished:
                self._making[index] = rows
                if time.monotonic() - self._shown > _INTERVAL_S / 2:
                    self._show(seconds)

    def _show(self, seconds: float) -> None:
        self._shown = now = time.monotonic()
        self._began = min(self._began or now, now - seconds)
        making = sum(self._making.values())
        rate = (self._rows + making - self._before) / max(now - self._began, 1e-9)
        self._on_progress(Progress(self._shards, self._num_shards, self._rows, rate, making))


class Board:
    """Where the actors of one computation, named as no other, write how far they are."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._latest: tuple[int, float, float] | None = None
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Board, (self._name,)

    def post(self, index: int, rows: float, seconds: float) -> None:
        """Write, in the background, that `rows` of shard `index` were made in `seconds`; called in an actor."""
        self._latest = index, rows, seconds
        self._changed.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="progress", daemon=True)
            self._thread.start()

    def _write(self) -> None:
        key = f"{self._name}/{socket.gethostname()}/{os.getpid()}"
        while self._changed.wait():
            self._changed.clear()
            with suppress(Exception):  # the next one may come through
                ray_private.kv_put(key, json.dumps(self._latest), _NAMESPACE)
            time.sleep(_INTERVAL_S)

    def read(self) -> list[tuple[int, float, float]]:
        """(index, rows, seconds) of each actor's latest shard."""
        keys = ray_private.kv_list(f"{self._name}/", _NAMESPACE)
        contents = [ray_private.kv_get(key, _NAMESPACE) for key in keys]
        return [json.loads(content) for content in contents if content]

    @contextmanager
    def read_into(self, tally: Tally) -> Iterator[None]:
        """Hand what the actors write to the tally, for the time of a block."""
        over = threading.Event()

        def follow() -> None:
            while not over.wait(_INTERVAL_S):
                with suppress(Exception):  # Ray has not started yet, or is busy: the next look may tell
                    for index, rows, seconds in self.read():
                        tally.making(index, rows, seconds)

        thread = threading.Thread(target=follow, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(_INTERVAL_S)
            self._clear()

    def _clear(self) -> None:
        with suppress(Exception):  # Ray has gone, and the store with it
            ray_private.kv_delete(f"{self._name}/", _NAMESPACE)
