"""The training stream: which rows every step trains on, and Ray Data (or, of small data, the worker) reading ahead.

The whole training is one sequence of row positions 0, 1, 2, ...: epoch e holds positions [e·N, (e+1)·N),
and step s of a run with global batch size B trains on positions [s·B, (s+1)·B). Which row stands at a
position is a pure function of (data set, seed, window size). So a step consists of the same rows on any
number of workers, after any restart and any resize; to resume at step s is to read on at position s·B, and
"every row exactly once per epoch" holds by construction (the ledger proves it on what was really consumed).

Shuffling: an epoch visits the data set's row groups (about 1 MiB each) in a pseudo-random order drawn from
the whole data set; a window of that sequence (64 MiB by default) is read by one Ray task, which shuffles its
rows. A data set smaller than the window is shuffled as a whole.

Rows that are held out for validation have no position, and repeated rows of balanced classes have several: N counts
the rows of an epoch (pipelines/data/epochs.py), whatever their number in the data set.
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.cli.errors import LedgerError
from pipelines.cluster.placement import off_idle_nodes
from pipelines.data.dataset import PreparedDataset
from pipelines.data.epochs import epochs_of

if TYPE_CHECKING:
    from ray.data import DataIterator

Int64s = npt.NDArray[np.int64]
# Of one execution of Ray Data, whose start takes half a millisecond for each; then the next one begins.
MAX_WINDOWS = 4096


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of one epoch's sequence of row groups, repeats counted."""

    epoch: int
    start: int
    stop: int


@dataclass(frozen=True)
class StreamPlan:
    """The rows of every step.

    Attributes:
        data: URI of the prepared data set.
        num_rows: N, the rows of an epoch.
        seed: Of the order; the same seed gives the same order.
        batch_size: B, rows of one global batch.
        steps: Steps of the whole training.
        window_steps: Steps read and shuffled together by one task.
        hold_out: One row of every so many is held out (`HoldOut.every`); 0: none is.
        balanced: Whether an epoch takes every class equally often.
        labelled: Whether labels are read.
    """

    data: str
    num_rows: int
    seed: int
    batch_size: int
    steps: int
    window_steps: int
    hold_out: int = 0
    balanced: bool = False
    labelled: bool = False

    @classmethod
    def of(
        cls,
        dataset: PreparedDataset,
        seed: int,
        batch_size: int,
        steps: int,
        window_bytes: int,
        hold_out: int = 0,
        balanced: bool = False,
        labelled: bool = False,
    ) -> "StreamPlan":
        """A plan whose windows hold about `window_bytes` of images, at least one global batch."""
        row_bytes = int(np.prod(dataset.image_shape))
        window_steps = max(1, window_bytes // (row_bytes * batch_size))
        num_rows, uri = epochs_of(dataset, hold_out, balanced).length, dataset.location.uri
        return cls(uri, num_rows, seed, batch_size, steps, window_steps, hold_out, balanced, labelled)

    @property
    def is_one_window(self) -> bool:
        """Whether a whole epoch fits into a window: then each rank reads it all, without Ray Data's processes."""
        return self.num_rows <= self.window_steps * self.batch_size

    @property
    def num_windows(self) -> int:
        """Windows of the whole training; the last may be shorter."""
        return -(-self.steps // self.window_steps)

    def window_range(self, window: int) -> tuple[int, int]:
        """The steps [first, stop) of a window."""
        first = window * self.window_steps
        return first, min(first + self.window_steps, self.steps)

    def segments(self, window: int) -> list[Segment]:
        """The parts of a window, one for each epoch that it touches.

        The last part may reach beyond the last step: were it cut there, its rows would be shuffled otherwise,
        and a run that is continued to more steps would repeat some rows of the epoch and skip others.
        """
        first, stop = self.window_range(window)
        position, end = first * self.batch_size, (first + self.window_steps) * self.batch_size
        parts = []
        while position < stop * self.batch_size:
            epoch, offset = divmod(position, self.num_rows)
            length = min(self.num_rows - offset, end - position)
            parts.append(Segment(epoch, offset, offset + length))
            position += length
        return parts


def shares(batch_size: int, world_size: int) -> list[tuple[int, int]]:
    """Each rank's rows [low, high) of a global batch; sizes differ by at most one."""
    edges = [rank * batch_size // world_size for rank in range(world_size + 1)]
    return list(itertools.pairwise(edges))


def segment_groups(plan: StreamPlan, group_starts: Int64s, part: Segment) -> tuple[Int64s, Int64s]:
    """Where a segment's rows lie.

    Args:
        plan: The plan.
        group_starts: How many rows the epoch takes of those before each row group and, last, N; shape [G + 1].
        part: The segment.

    Returns:
        The row groups to read, in reading order, and for each of the segment's rows, in training order, its
        index among what the epoch takes of the rows read.
    """
    order = _group_order(plan.seed, part.epoch, len(group_starts) - 1)
    ends = np.cumsum(np.diff(group_starts)[order])
    first = int(np.searchsorted(ends, part.start, side="right"))
    last = int(np.searchsorted(ends, part.stop, side="left"))
    skipped = part.start - (int(ends[first - 1]) if first else 0)
    rows = _permutation(plan.seed, f"stream/rows/{part.start}", part.epoch, part.stop - part.start)
    return order[first : last + 1], rows + skipped


@lru_cache(maxsize=4)
def _group_order(seed: int, epoch: int, num_groups: int) -> Int64s:
    return _permutation(seed, "stream/groups", epoch, num_groups)


def _permutation(seed: int, stream: str, epoch: int, n: int) -> Int64s:
    # here: Ray's coordinator of the split loads this module too, and would spend seconds on importing torch
    from ddpm_core.counter_random import permutation

    return permutation(seed, stream, epoch, n)


@dataclass(frozen=True)
class Rows:
    """Rows in training order.

    Attributes:
        images: uint8 [n, H, W, C].
        ids: int64 [n], of the rows in the data set.
        passes: int64 [n]: the epoch, with balanced classes the pass over the data (`Epochs`).
        labels: int64 [n], below 0 where there is none; None: labels are not read.
    """

    images: npt.NDArray[np.uint8]
    ids: Int64s
    passes: Int64s
    labels: Int64s | None = None

    def __getitem__(self, rows: slice | Int64s) -> "Rows":
        """Some of them."""
        labels = None if self.labels is None else self.labels[rows]
        return Rows(self.images[rows], self.ids[rows], self.passes[rows], labels)


def read_window(plan: StreamPlan, dataset: PreparedDataset, window: int) -> Rows:
    """Read one window in training order."""
    first, stop = plan.window_range(window)
    due = (stop - first) * plan.batch_size
    images = np.empty((due, *dataset.image_shape), np.uint8)
    ids, passes, done = np.empty(due, np.int64), np.empty(due, np.int64), 0
    labels = np.empty(due, np.int64) if plan.labelled else None
    epochs = epochs_of(dataset, plan.hold_out, plan.balanced)
    for part in plan.segments(window):
        groups, order = segment_groups(plan, epochs.below(part.epoch, dataset.group_starts), part)
        group_ids, group_images = dataset.read_groups(groups.tolist())
        taken, taken_passes = epochs.taken(part.epoch, group_ids)
        order = order[: due - done]
        rows, end = taken[order], done + len(order)
        # mode="clip" lets NumPy gather straight into `out`: the images are copied once
        np.take(group_images, rows, axis=0, out=images[done:end], mode="clip")
        ids[done:end], passes[done:end] = group_ids[rows], taken_passes[order]
        if labels is not None:
            labels[done:end] = dataset.read_labels(groups.tolist())[rows]
        done = end
    return Rows(images, ids, passes, labels)


@dataclass(frozen=True)
class WindowReader:
    """The read task of the stream: a window's index in, one table row per rank out.

    A rank's row holds all its micro-batches of the window, so that a step costs a slice and not a message,
    and Ray Data's order-preserving split (one equal block to each rank in turn) hands every rank its own.
    """

    plan: StreamPlan
    world_size: int
    start_step: int

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Yield one single-row table for each rank and window."""
        dataset = _open(self.plan.data)
        for window in batch["window"].to_pylist():
            first, stop = self.plan.window_range(window)
            begin = max(first, self.start_step)
            read = read_window(self.plan, dataset, window)
            size = self.plan.batch_size
            batches = np.arange((begin - first) * size, (stop - first) * size).reshape(stop - begin, size)
            for rank, (low, high) in enumerate(shares(size, self.world_size)):
                # the only rank's rows are those of the window in order: a view, not a copy
                rows = read[batches[:, low:high].reshape(-1) if self.world_size > 1 else slice(batches[0, 0], None)]
                labels = {} if rows.labels is None else {"labels": _blob(rows.labels)}
                yield pa.table(
                    {
                        "rank": pa.array([rank]),
                        "start": pa.array([begin]),
                        "stop": pa.array([stop]),
                        "images": _blob(rows.images),
                        "ids": _blob(rows.ids),
                        "passes": _blob(rows.passes),
                        **labels,
                    }
                )


@lru_cache(maxsize=4)
def _open(uri: str) -> PreparedDataset:
    return PreparedDataset.open(uri)


def _blob(values: npt.NDArray[Any]) -> pa.Array:
    """One large_binary value over an array's memory, not copied."""
    data = pa.py_buffer(np.ascontiguousarray(values))
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def start_stream(
    plan: StreamPlan, start_step: int, world_size: int, cpus_per_read: float = 0.0, reads_ahead: int = 2
) -> list["DataIterator"]:
    """Start Ray Data on the next windows, at most `MAX_WINDOWS`, and return each rank's iterator.

    Args:
        plan: The plan.
        start_step: The first step still to be trained.
        world_size: Number of ranks.
        cpus_per_read: CPUs that a read task reserves; 0 lets it run beside workers that hold all CPUs, on nodes that
            have some.
        reads_ahead: Windows read at the same time.
    """
    import ray.data

    first = start_step // plan.window_steps
    windows = [{"window": window} for window in range(first, min(first + MAX_WINDOWS, plan.num_windows))]
    # items and not ray.data.range, whose own read tasks would each wait for a whole CPU
    stream = ray.data.from_items(windows, override_num_blocks=len(windows)).map_batches(
        WindowReader(plan, world_size, start_step),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cpus_per_read,
        label_selector=off_idle_nodes(),
        concurrency=reads_ahead,
    )
    # One table row, one block: the unit in which the split deals out. Order-preserving execution makes the
    # split deal in turn, so rank r gets exactly the rows made for rank r.
    stream.context.target_max_block_size = 1
    stream.context.execution_options.preserve_order = True
    stream.context.enable_progress_bars = False
    stream.context.print_on_execution_start = False
    return list(stream.streaming_split(world_size, equal=False))


@dataclass(frozen=True)
class MicroBatch:
    """One rank's share, `rows`, of the global batch of a step."""

    step: int
    rows: Rows


def micro_batches(
    iterator: "DataIterator", rank: int, start_step: int, image_shape: tuple[int, int, int]
) -> Iterator[MicroBatch]:
    """A rank's share of every step from `start_step` on.

    Raises:
        LedgerError: What arrives is not this rank's share of the expected step.
    """
    expected = start_step
    tables = iterator.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1)
    for table in cast(Iterator[pa.Table], tables):
        first, stop, owner = (table[name][0].as_py() for name in ("start", "stop", "rank"))
        if first != expected or owner != rank:
            raise LedgerError(
                f"training stream: rank {rank} expected step {expected} and was given step {first} of rank "
                f"{owner}: the split no longer deals in turn (has Ray been upgraded?)"
            )
        expected = stop
        own = Rows(
            _view(table["images"], np.uint8).reshape(-1, *image_shape),
            _view(table["ids"], np.int64),
            _view(table["passes"], np.int64),
            _view(table["labels"], np.int64) if "labels" in table.schema.names else None,
        )
        size = len(own.ids) // (stop - first)
        for index in range(stop - first):
            yield MicroBatch(first + index, own[index * size : (index + 1) * size])


def read_here(
    plan: StreamPlan, dataset: PreparedDataset, rank: int, world_size: int, start_step: int
) -> Iterator[MicroBatch]:
    """What `micro_batches` gives of `start_stream`, to the end of the training; this process reads a window ahead."""
    low, high = shares(plan.batch_size, world_size)[rank]
    windows = range(start_step // plan.window_steps, plan.num_windows)
    with ThreadPoolExecutor(1, "stream") as reader:
        ahead = [reader.submit(read_window, plan, dataset, window) for window in windows[:1]]
        for window in windows:
            read = ahead.pop().result()
            if window + 1 < plan.num_windows:
                ahead.append(reader.submit(read_window, plan, dataset, window + 1))
            first, stop = plan.window_range(window)
            for step in range(max(first, start_step), stop):
                at = (step - first) * plan.batch_size
                yield MicroBatch(step, read[at + low : at + high])


def _view(column: pa.ChunkedArray, dtype: Any) -> npt.NDArray[Any]:
    """The single binary value of a column as an array, not copied."""
    return np.frombuffer(column[0].as_buffer(), dtype)
