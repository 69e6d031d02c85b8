"""Which rows an epoch of a training takes, and how often each: a function of the data set and the epoch's number.

An epoch takes every row that is trained on once. With balanced classes it takes each of them at least once, and rows of
the smaller classes again, so that every class comes as often as the largest one. An epoch then consists of R passes:
pass e R + k takes the rows that epoch e takes more than k times, and whatever is drawn for a row is drawn by its pass.
"""

import io
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cli.errors import CheckpointError
from pipelines.data.dataset import PreparedDataset
from pipelines.data.hold_out import HoldOut

Int64s = npt.NDArray[np.int64]
# Of balanced classes: each pass has an entry of its own in the ledger.
MAX_PASSES = 1000


@dataclass(frozen=True, eq=False)
class Epochs:
    """The rows of every epoch.

    Attributes:
        hold_out: The data set's number of rows N, and which of them are never trained on.
        labels: int64 [N], below 0 where there is none, if classes are balanced; None: they are not.
    """

    hold_out: HoldOut
    labels: Int64s | None = None

    @cached_property
    def length(self) -> int:
        """Rows of an epoch, repeats included: with balanced classes, the largest one's rows for each of the others too,
        and every row without a label."""
        if self.labels is None:
            return self.hold_out.num_trained
        counts = self._classes[2]
        return int(len(counts) * counts.max(initial=0) + self.hold_out.num_trained - counts.sum())

    @cached_property
    def passes(self) -> int:
        """R, how often the epoch takes a row at most."""
        counts = self._classes[2]
        return int(-(-counts.max() // counts.min())) if len(counts) else 1

    @cached_property
    def _classes(self) -> tuple[Int64s, Int64s, Int64s]:
        """Of the trained rows with a label, if classes are balanced: their ids, each one's class counted without gaps,
        and the number of rows of each class."""
        none = np.empty(0, np.int64)
        if self.labels is None:
            return none, none, none
        rows = np.flatnonzero((self.labels >= 0) & self.hold_out.is_trained(np.arange(len(self.labels))))
        _, of_row, counts = np.unique(self.labels[rows], return_inverse=True, return_counts=True)
        return rows, of_row, counts

    @cached_property
    def _ranks(self) -> Int64s:
        """The place of each row of `_classes` among those of its class, which are in order of their ids."""
        rows, of_row, counts = self._classes
        ranks = np.empty(len(rows), np.int64)
        ranks[np.argsort(of_row, kind="stable")] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return ranks

    def multiplicities(self, epoch: int) -> Int64s:
        """How often the epoch takes each row: int64 [N], 0 for those that are held out.

        With n rows of a class and n_max of the largest, floor(n_max / n), and 1 more for r = n_max mod n of them: the
        j-th where floor((j + 1 + e) r / n) is above floor((j + e) r / n) in epoch e, so evenly spread over the class
        and, in n epochs, each as often as any other.
        """
        return _multiplicities(self, epoch)

    def below(self, epoch: int, bounds: Int64s) -> Int64s:
        """How many rows the epoch takes of 0..bound-1, repeats included, for each of `bounds` int64 [n] in 0..N."""
        if self.labels is None:
            return self.hold_out.trained_below(bounds)
        return np.cumsum(np.concatenate([[0], self.multiplicities(epoch)]))[bounds]

    def taken(self, epoch: int, rows: Int64s) -> tuple[Int64s, Int64s]:
        """What the epoch takes of `rows` int64 [n]: the index among them and the pass of each, int64 [m] both."""
        if self.labels is None:
            index = np.flatnonzero(self.hold_out.is_trained(rows))
            return index, np.full(len(index), epoch, np.int64)
        times = self.multiplicities(epoch)[rows]
        index = np.repeat(np.arange(len(rows)), times)
        return index, epoch * self.passes + np.arange(len(index)) - np.repeat(np.cumsum(times) - times, times)


@lru_cache(maxsize=4)
def _multiplicities(epochs: Epochs, epoch: int) -> Int64s:
    rows, of_row, counts = epochs._classes
    times = epochs.hold_out.is_trained(np.arange(epochs.hold_out.num_rows)).astype(np.int64)
    if len(rows):
        n, place = counts[of_row], epochs._ranks + epoch
        whole, rest = np.divmod(counts.max(), n)
        times[rows] = whole + ((place + 1) * rest // n > place * rest // n)
    return times


@lru_cache(maxsize=4)
def epochs_of(dataset: PreparedDataset, hold_out: int, balanced: bool) -> Epochs:
    """The epochs of a data set of which one row of every `hold_out` is held out; of balanced classes, its labels are
    read."""
    labels = dataset.read_labels() if balanced else None
    return Epochs(HoldOut(dataset.num_rows, hold_out), labels)


def labels_to_bytes(labels: Int64s) -> bytes:
    """A Parquet table with the one column `label`, which a checkpoint keeps beside the ledger of balanced classes."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"label": labels}), sink, compression="zstd")
    return sink.getvalue()


def labels_from_bytes(data: bytes) -> Int64s:
    """The labels that `labels_to_bytes` wrote. Raises CheckpointError for other bytes."""
    try:
        table = pq.read_table(io.BytesIO(data), use_threads=False, pre_buffer=False)
        return np.asarray(table["label"].cast(pa.int64()).to_numpy(), np.int64)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"labels.parquet: cannot be read ({reason}); restore the checkpoint") from error
