"""The ledger of a running training: each rank notes the rows that it used, rank 0 proves what all of them used."""

from pipelines.data.epochs import Epochs, labels_to_bytes
from pipelines.data.ledger import Ledger
from pipelines.data.stream import MicroBatch
from pipelines.training.ranks import Ranks


class UsedRows:
    """Which rows were trained on.

    Args:
        epochs: Which rows each epoch takes, and how often.
        batch_size: Rows of each step, over all ranks.
        ranks: All that train.
    """

    def __init__(self, epochs: Epochs, batch_size: int, ranks: Ranks) -> None:
        self._epochs, self._batch_size, self._ranks = epochs, batch_size, ranks
        self._own = Ledger()  # what this rank used since the last gathering
        self._all = Ledger()  # rank 0: what all ranks used up to it

    def add(self, batch: MicroBatch) -> None:
        """Note a batch whose gradient was applied.

        Raises:
            LedgerError: A row of it was used before in the same pass.
        """
        self._own.add(batch.rows.passes, batch.rows.ids)

    def gather(self, done: int) -> dict[str, bytes] | None:
        """The ledger of all ranks after `done` steps as files, on rank 0; None on the others. A collective.

        With balanced classes there are the labels beside it, from which it can be checked again.

        Raises:
            LedgerError: The rows used are not those that were due, as often as they were.
        """
        parts, self._own = self._ranks.gather(self._own), Ledger()
        if self._ranks.rank != 0:
            return None
        for part in parts:
            self._all.merge(part)
        self._check(done)
        labels = self._epochs.labels
        return {"ledger.parquet": self._all.to_bytes()} | (
            {} if labels is None else {"labels.parquet": labels_to_bytes(labels)}
        )

    def restore(self, data: bytes, done: int) -> None:
        """Go on from the ledger that `gather` made after `done` steps.

        Raises:
            CheckpointError: `data` is no ledger.
            LedgerError: It is not that of `done` steps.
        """
        self._all = Ledger.from_bytes(data)
        self._check(done)

    @property
    def repeats(self) -> int | None:
        """How many rows, up to the last gathering, were used again in their epoch, of balanced classes; on rank 0."""
        return None if self._epochs.labels is None else self._all.repeats(self._epochs)

    def _check(self, done: int) -> None:
        self._all.check(self._epochs, done, self._batch_size)
