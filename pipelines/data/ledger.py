"""The exactly-once ledger: which rows each epoch has really trained on.

Every rank notes the ids of each micro-batch after its gradient was applied; a checkpoint stores the union over
ranks, one compressed (roaring) bitmap for each epoch. Adding an id twice to an epoch is an error at once, so a
cardinality of N says that every row was used exactly once. With balanced classes there is a bitmap for each pass of an
epoch (pipelines/data/epochs.py), in which no row comes twice either; without, a pass is an epoch.
"""

import io
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyroaring import BitMap64

from pipelines.cli.errors import CheckpointError, LedgerError
from pipelines.data.epochs import Epochs

Int64s = npt.NDArray[np.int64]


class Ledger:
    """Row ids used in each pass."""

    def __init__(self) -> None:
        self._used: dict[int, BitMap64] = {}

    @property
    def passes(self) -> list[int]:
        """Passes with at least one used row, ascending."""
        return sorted(self._used)

    def rows(self, number: int) -> int:
        """Number of rows used in a pass."""
        return len(self._used.get(number, ()))

    def ids(self, number: int) -> Int64s:
        """The row ids used in a pass, ascending."""
        return np.array(self._used.get(number, BitMap64()).to_array(), np.int64)

    def total(self) -> int:
        """Rows used over all passes."""
        return sum(len(used) for used in self._used.values())

    def repeats(self, epochs: Epochs) -> int:
        """How many of them were not the first use of a row in its epoch.

        Uses of a row are shuffled: before an epoch ends, a later pass may hold it and the first one not yet.
        """
        by_epoch: dict[int, list[BitMap64]] = {}
        for number, used in self._used.items():
            by_epoch.setdefault(number // epochs.passes, []).append(used)
        return sum(sum(map(len, parts)) - len(BitMap64.union(*parts)) for parts in by_epoch.values())

    def add(self, passes: Int64s, ids: Int64s) -> None:
        """Note one micro-batch: `ids[i]` was used in `passes[i]`.

        Raises:
            LedgerError: A row had been used in that pass before.
        """
        for number in np.unique(passes).tolist():
            self._join(number, BitMap64(ids[passes == number].astype(np.uint64)), int((passes == number).sum()))

    def merge(self, other: "Ledger") -> None:
        """Add another rank's notes.

        Raises:
            LedgerError: Both used the same row in the same pass.
        """
        for number, used in other._used.items():
            self._join(number, used, len(used))

    def _join(self, number: int, used: BitMap64, count: int) -> None:
        have = self._used.setdefault(number, BitMap64())
        before = len(have)
        have |= used
        if len(have) != before + count:
            raise LedgerError(
                f"pass {number} over the data: {before + count - len(have)} row(s) were about to be used twice; "
                "nothing after the last checkpoint is kept"
            )

    def check(self, epochs: Epochs, steps: int, batch_size: int) -> None:
        """Prove that `steps` steps used exactly the rows that each finished epoch takes, as often as it takes them, of
        the current one none that it does not, and no held-out row ever.

        Args:
            epochs: Of the training.
            steps: Trained.
            batch_size: Rows of each step.

        Raises:
            LedgerError: An epoch lacks rows, holds unknown or held-out ids, or the total is off.
        """
        num_rows, R = epochs.hold_out.num_rows, epochs.passes
        forbidden = BitMap64(epochs.hold_out.ids.astype(np.uint64))
        finished, rest = divmod(steps * batch_size, epochs.length)
        expected = [*range(finished)] + ([finished] if rest else [])
        held = sorted({number // R for number in self._used})
        if held != expected:
            raise LedgerError(f"the ledger holds epochs {held}, but {steps} steps make {expected}")
        for epoch in expected:
            want = epochs.length if epoch < finished else rest
            parts = [self._used.get(number, BitMap64()) for number in range(epoch * R, (epoch + 1) * R)]
            if wrong := sum(part.intersection_cardinality(forbidden) for part in parts):
                raise LedgerError(f"epoch {epoch} used {wrong} row(s) that are held out for validation")
            used, highest = sum(map(len, parts)), max(part.max() for part in parts if part)
            if used != want or highest >= num_rows:
                distinct = "distinct rows" if R == 1 else "rows"
                raise LedgerError(
                    f"epoch {epoch} used {used} {distinct} (ids up to {highest}); "
                    f"{want} of the {epochs.length} were due"
                )
            if epochs.labels is not None:
                times = epochs.multiplicities(epoch)
                for again, part in enumerate(parts):
                    if wrong := len(part - BitMap64(np.flatnonzero(times > again).astype(np.uint64))):
                        raise LedgerError(
                            f"epoch {epoch} used {wrong} row(s) more often than was due, {again + 1} times"
                        )

    def to_bytes(self) -> bytes:
        """A Parquet table: epoch (the pass), rows, bitmap (64-bit roaring, portable format)."""
        for used in self._used.values():
            used.run_optimize()  # a finished epoch is one run: 27 bytes whatever its size
        table = pa.table(
            {
                "epoch": pa.array(self.passes, pa.int64()),
                "rows": pa.array([self.rows(number) for number in self.passes], pa.int64()),
                "bitmap": pa.array([self._used[number].serialize() for number in self.passes], pa.binary()),
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
        """(pass, rows) pairs, ascending."""
        return ((number, self.rows(number)) for number in self.passes)
