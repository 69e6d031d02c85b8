"""The ledger of a training's newest checkpoint: read, checked and printed.

python -m pipelines.training.ledger_report RUN      prints the ledger's table and checks it
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.cli.config import require
from pipelines.cli.errors import CheckpointError, LedgerError
from pipelines.data.hold_out import HoldOut
from pipelines.data.ledger import Ledger
from pipelines.models.checkpoints import CheckpointStore


def newest_ledger(store: CheckpointStore) -> tuple[dict[str, Any], Ledger]:
    """The newest checkpoint's state and ledger.

    Raises:
        CheckpointError: The run has no intact checkpoint.
    """
    newest = store.newest()
    if newest is None:
        raise CheckpointError(f"{store.location.uri}: holds no checkpoint; name a run that has one")
    try:
        return newest.state, Ledger.from_bytes(newest.read("ledger.parquet"))
    except CheckpointError as error:
        raise CheckpointError(f"{newest.location}/{error}") from error


def check_ledger(ledger: Ledger, state: Mapping[str, Any]) -> HoldOut:
    """As `Ledger.check`, for the checkpoint that `state` is the state.json of; returns what it held out.

    Raises:
        LedgerError: As of `Ledger.check`.
        CheckpointError: The state does not say how many rows there are and how they were trained on.
    """
    try:
        num_rows, batch_size = int(state["dataset"]["num_rows"]), int(state["config"]["train"]["batch_size"])
        hold_out = int(state["config"].get("data", {}).get("hold_out", 0))
        ledger.check(num_rows, state["step"], batch_size, hold_out)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"state.json lacks dataset.num_rows or batch_size ({error})") from error
    return HoldOut(num_rows, hold_out)


def main(argv: Sequence[str]) -> None:
    """Print and check the ledger of a run's newest checkpoint."""
    require(len(argv) == 1, "arguments", list(argv), "give one run directory, local or s3://")
    state, ledger = newest_ledger(CheckpointStore.open(argv[0]))
    try:
        held_out = check_ledger(ledger, state)
    except LedgerError as error:
        raise LedgerError(f"{argv[0]}: {error}; train from another checkpoint") from error
    except CheckpointError as error:
        raise CheckpointError(f"{argv[0]}: its newest {error}") from error
    num_rows, trained = held_out.num_rows, held_out.num_trained
    never = f", of which {num_rows - trained:,} are held out and were never used" if held_out.every else ""
    print(f"step {state['step']}: {ledger.total():,} rows used, data set of {num_rows:,}{never}")
    for epoch, rows in ledger:
        print(f"  epoch {epoch}: {rows:,} rows, each once{' (finished)' if rows == trained else ''}")


if __name__ == "__main__":
    from pipelines.cli.console import run_job

    run_job(main)
