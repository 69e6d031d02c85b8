"""The ledger of a running training: each rank notes the rows that it used, rank 0 proves what all of them used."""

from pipelines.data.hold_out import HoldOut
from pipelines.data.ledger import Ledger
from pipelines.data.stream import MicroBatch
from pipelines.training.ranks import Ranks


class UsedRows:
    """Which rows were trained on.

    Args:
        hold_out: The data set's number of rows, and which of them are never trained on.
        batch_size: Rows of each step, over all ranks.
        ranks: All that train.
    """

    def __init__(self, hold_out: HoldOut, batch_size: int, ranks: Ranks) -> None:
        self._hold_out, self._batch_size, self._ranks = hold_out, batch_size, ranks
        self._own = Ledger()  # what this rank used since the last gathering
        self._all = Ledger()  # rank 0: what all ranks used up to it

    def add(self, batch: MicroBatch) -> None:
        """Note a batch whose gradient was applied.

        Raises:
            LedgerError: A row of it was used before in the same epoch.
        """
        self._own.add(batch.epochs, batch.ids)

    def gather(self, done: int) -> bytes | None:
        """The ledger of all ranks after `done` steps as a file, on rank 0; None on the others. A collective.

        Raises:
            LedgerError: The rows used are not those that were due, once each.
        """
        parts, self._own = self._ranks.gather(self._own), Ledger()
        if self._ranks.rank != 0:
            return None
        for part in parts:
            self._all.merge(part)
        self._check(done)
        return self._all.to_bytes()

    def restore(self, data: bytes, done: int) -> None:
        """Go on from the ledger that `gather` made after `done` steps.

        Raises:
            CheckpointError: `data` is no ledger.
            LedgerError: It is not that of `done` steps.
        """
        self._all = Ledger.from_bytes(data)
        self._check(done)

    def _check(self, done: int) -> None:
        self._all.check(self._hold_out.num_rows, done, self._batch_size, self._hold_out.every)
