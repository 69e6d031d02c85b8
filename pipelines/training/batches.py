"""A rank's share of each step's rows, one stream after the other, and how long the rank waited for it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.data.dataset import PreparedDataset
from pipelines.data.stream import MicroBatch, StreamPlan, micro_batches, read_here, start_stream
from pipelines.training.config import DataConfig
from pipelines.training.ranks import Ranks


@dataclass(frozen=True)
class Arrival:
    """A batch and the wait for it.

    Attributes:
        batch: This rank's share of a step.
        waited_s: Seconds that a running stream was waited for.
        start_s: Seconds until a new stream gave this, its first batch; None for its later ones. Starting a stream is no
            wait for data: it takes seconds, later batches milliseconds.
    """

    batch: MicroBatch
    waited_s: float
    start_s: float | None


class Batches:
    """This rank's batches, from any step to the last one of the plan.

    Args:
        plan: Which rows each step takes.
        dataset: That of the plan.
        config: How it is read.
        ranks: All that the batches are divided among.
    """

    def __init__(self, plan: StreamPlan, dataset: PreparedDataset, config: DataConfig, ranks: Ranks) -> None:
        self._plan, self._dataset, self._config, self._ranks = plan, dataset, config, ranks
        self._stream: Iterator[MicroBatch] = iter(())
        self._next_step, self._is_new = 0, False

    def start(self, done: int) -> None:
        """Start a stream at the first step after `done` steps. A collective, where Ray Data reads."""
        self._stream, self._next_step, self._is_new = self._open(done), done, True

    def next(self) -> Arrival:
        """The next step's batch. A collective where a stream ends before the training does: the next one is started."""
        waited = 0.0
        while True:
            before = time.perf_counter()
            batch = next(self._stream, None)
            seconds, is_new, self._is_new = time.perf_counter() - before, self._is_new, False
            if batch is not None:
                self._next_step = batch.step + 1
                return Arrival(batch, waited, seconds) if is_new else Arrival(batch, waited + seconds, None)
            waited += seconds
            self.start(self._next_step)

    def finish(self) -> None:
        """Take the end of the stream after the last step, so that what reads it ends as well."""
        next(self._stream, None)

    def _open(self, done: int) -> Iterator[MicroBatch]:
        ranks, plan, config = self._ranks, self._plan, self._config
        if plan.is_one_window:
            return read_here(plan, self._dataset, ranks.rank, ranks.world_size, done)
        iterators = None
        if ranks.rank == 0:
            # Built here, from the very step that was restored, so that data and weights cannot disagree.
            iterators = start_stream(plan, done, ranks.world_size, config.cpus_per_read, config.reads_ahead)
        return micro_batches(self._broadcast(iterators)[ranks.rank], ranks.rank, done, self._dataset.image_shape)

    def _broadcast(self, iterators: Any) -> Any:
        import ray  # Ray Data's iterators hold functions, which only Ray's pickle carries

        return ray.cloudpickle.loads(self._ranks.broadcast(ray.cloudpickle.dumps(iterators)))
