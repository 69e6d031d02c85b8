"""Several ranks as threads of this process, for what has more than one collective."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import Any

from pipelines.training.ranks import Ranks


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """A rank whose peers share `values`, [world_size], and `barrier`."""

    values: list[Any]
    barrier: Barrier

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait()
        gathered = list(self.values)
        self.barrier.wait()  # nobody writes the next one's before all have read
        return gathered

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


def on_threads(world_size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` gives each of `world_size` ranks; a rank that fails ends the others."""
    values, barrier = [None] * world_size, Barrier(world_size, timeout=60)

    def run(rank: int) -> Any:
        try:
            return work(ThreadRanks(rank, world_size, values, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))
