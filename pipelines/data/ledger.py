"""The exactly-once ledger: which rows each epoch has really trained on.

Every rank notes the ids of each micro-batch after its gradient was applied; a checkpoint stores the union over
ranks, one compressed (roaring) bitmap for each epoch. Adding an id twice to an epoch is an error at once, so a
cardinality of N says that every row was used exactly once.
"""

import io
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyroaring import BitMap64

from pipelines.cli.errors import CheckpointError, LedgerError
from pipelines.data.hold_out import HoldOut

Int64s = npt.NDArray[np.int64]


class Ledger:
    """Row ids used in each epoch."""

    def __init__(self) -> None:
        self._used: dict[int, BitMap64] = {}

    @property
    def epochs(self) -> list[int]:
        """Epochs with at least one used row, ascending."""
        return sorted(self._used)

    def rows(self, epoch: int) -> int:
        """Number of rows used in an epoch."""
        return len(self._used.get(epoch, ()))

    def ids(self, epoch: int) -> Int64s:
        """The row ids used in an epoch, ascending."""
        return np.array(self._used.get(epoch, BitMap64()).to_array(), np.int64)

    def total(self) -> int:
        """Rows used over all epochs."""
        return sum(len(used) for used in self._used.values())

    def add(self, epochs: Int64s, ids: Int64s) -> None:
        """Note one micro-batch: `ids[i]` was used in `epochs[i]`.

        Raises:
            LedgerError: A row had been used in that epoch before.
        """
        for epoch in np.unique(epochs).tolist():
            self._join(epoch, BitMap64(ids[epochs == epoch].astype(np.uint64)), int((epochs == epoch).sum()))

    def merge(self, other: "Ledger") -> None:
        """Add another rank's notes.

        Raises:
            LedgerError: Both used the same row in the same epoch.
        """
        for epoch, used in other._used.items():
            self._join(epoch, used, len(used))

    def _join(self, epoch: int, used: BitMap64, count: int) -> None:
        have = self._used.setdefault(epoch, BitMap64())
        before = len(have)
        have |= used
        if len(have) != before + count:
            raise LedgerError(
                f"epoch {epoch}: {before + count - len(have)} row(s) were about to be used twice; "
                "nothing after the last checkpoint is kept"
            )

    def check(self, num_rows: int, steps: int, batch_size: int, hold_out: int = 0) -> None:
        """Prove that `steps` steps used every row of each finished epoch exactly once, and no held-out row ever.

        Args:
            num_rows: Of the data set.
            steps: Trained.
            batch_size: Rows of each step.
            hold_out: One row of every so many was held out (`HoldOut.every`); 0: none was.

        Raises:
            LedgerError: An epoch lacks rows, holds unknown or held-out ids, or the total is off.
        """
        held_out = HoldOut(num_rows, hold_out)
        trained, forbidden = held_out.num_trained, BitMap64(held_out.ids.astype(np.uint64))
        finished, rest = divmod(steps * batch_size, trained)
        expected = [*range(finished)] + ([finished] if rest else [])
        if self.epochs != expected:
            raise LedgerError(f"the ledger holds epochs {self.epochs}, but {steps} steps make {expected}")
        for epoch in expected:
            want = trained if epoch < finished else rest
            used = self._used[epoch]
            if wrong := used.intersection_cardinality(forbidden):
                raise LedgerError(f"epoch {epoch} used {wrong} row(s) that are held out for validation")
            if len(used) != want or used.max() >= num_rows:
                raise LedgerError(
                    f"epoch {epoch} used {len(used)} distinct rows (ids up to {used.max()}); "
                    f"{want} of the {trained} were due"
                )

    def to_bytes(self) -> bytes:
        """A Parquet table: epoch, rows, bitmap (64-bit roaring, portable format)."""
        for used in self._used.values():
            used.run_optimize()  # a finished epoch is one run: 27 bytes whatever its size
        table = pa.table(
            {
                "epoch": pa.array(self.epochs, pa.int64()),
                "rows": pa.array([self.rows(epoch) for epoch in self.epochs], pa.int64()),
                "bitmap": pa.array([self._used[epoch].serialize() for epoch in self.epochs], pa.binary()),
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Ledger":
        """The ledger that `to_bytes` wrote.

        Raises:
            CheckpointError: The bytes are no ledger.
        """
        ledger = cls()
        try:
            # without threads: Arrow's pool, still starting when a short command ends, can abort its exit
            for row in pq.read_table(io.BytesIO(data), use_threads=False, pre_buffer=False).to_pylist():
                ledger._used[row["epoch"]] = BitMap64.deserialize(row["bitmap"])
        except (pa.ArrowException, OSError, KeyError, IndexError, ValueError, TypeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"ledger.parquet: cannot be read ({reason}); restore the checkpoint") from error
        return ledger

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(epoch, rows) pairs, ascending."""
        return ((epoch, self.rows(epoch)) for epoch in self.epochs)
