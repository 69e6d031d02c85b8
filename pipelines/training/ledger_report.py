"""The ledger of a training's newest checkpoint: read, checked and printed.

python -m pipelines.training.ledger_report RUN      prints the ledger's table and checks it
"""

from collections.abc import Sequence

import numpy as np

from pipelines.cli.config import require
from pipelines.cli.errors import CheckpointError, LedgerError
from pipelines.data.epochs import Epochs, labels_from_bytes
from pipelines.data.hold_out import HoldOut
from pipelines.data.ledger import Ledger
from pipelines.models.checkpoints import Checkpoint, CheckpointStore


def newest_ledger(store: CheckpointStore) -> tuple[Checkpoint, Ledger]:
    """The newest checkpoint and its ledger.

    Raises:
        CheckpointError: The run has no intact checkpoint.
    """
    newest = store.newest()
    if newest is None:
        raise CheckpointError(f"{store.location.uri}: holds no checkpoint; name a run that has one")
    try:
        return newest, Ledger.from_bytes(newest.read("ledger.parquet"))
    except CheckpointError as error:
        raise CheckpointError(f"{newest.location}/{error}") from error


def check_ledger(ledger: Ledger, checkpoint: Checkpoint) -> Epochs:
    """As `Ledger.check`, for the ledger of a checkpoint; returns what its epochs are.

    Raises:
        LedgerError: As of `Ledger.check`.
        CheckpointError: The checkpoint does not say how many rows there are and how they were trained on.
    """
    state = checkpoint.state
    try:
        num_rows, batch_size = int(state["dataset"]["num_rows"]), int(state["config"]["train"]["batch_size"])
        data = state["config"].get("data", {})
        labels = labels_from_bytes(checkpoint.read("labels.parquet")) if data.get("balance_classes") else None
        if labels is not None and len(labels) != num_rows:
            raise CheckpointError(f"labels.parquet: has {len(labels)} labels, of {num_rows} rows; restore it")
        epochs = Epochs(HoldOut(num_rows, int(data.get("hold_out", 0))), labels)
        ledger.check(epochs, state["step"], batch_size)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"state.json lacks dataset.num_rows or batch_size ({error})") from error
    return epochs


def used_in_words(ledger: Ledger, epochs: Epochs) -> str:
    """How many rows were used, and how often, in a phrase."""
    total = f"{ledger.total():,} rows used"
    if epochs.labels is None:
        return f"{total}, each once in its epoch"
    return (
        f"{total}, each at least once in a finished epoch, {ledger.repeats(epochs):,} of them repeats that balance the "
        "classes"
    )


def main(argv: Sequence[str]) -> None:
    """Print and check the ledger of a run's newest checkpoint."""
    require(len(argv) == 1, "arguments", list(argv), "give one run directory, local or s3://")
    newest, ledger = newest_ledger(CheckpointStore.open(argv[0]))
    try:
        epochs = check_ledger(ledger, newest)
    except LedgerError as error:
        raise LedgerError(f"{argv[0]}: {error}; train from another checkpoint") from error
    except CheckpointError as error:
        raise CheckpointError(f"{argv[0]}: its newest {error}") from error
    num_rows, trained = epochs.hold_out.num_rows, epochs.hold_out.num_trained
    never = f", of which {num_rows - trained:,} are held out and were never used" if epochs.hold_out.every else ""
    print(f"step {newest.step}: {ledger.total():,} rows used, data set of {num_rows:,}{never}")
    for epoch in sorted({number // epochs.passes for number in ledger.passes}):
        passes = range(epoch * epochs.passes, (epoch + 1) * epochs.passes)
        ids = [ledger.ids(number) for number in passes]
        used, rows = sum(map(len, ids)), len(np.unique(np.concatenate(ids)))
        again = "" if epochs.labels is None else f", and {used - rows:,} repeats that balance the classes"
        finished = " (finished)" if used == epochs.length else ""
        print(f"  epoch {epoch}: {rows:,} rows, each once{again}{finished}")


if __name__ == "__main__":
    from pipelines.cli.console import run_job

    run_job(main)
