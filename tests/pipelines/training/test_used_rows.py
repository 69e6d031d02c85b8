"""The ledger of a running training: what all ranks used, proved on rank 0 at each checkpoint."""

from typing import Any

import numpy as np
import pytest

from pipelines.cli.errors import LedgerError
from pipelines.data.epochs import Epochs
from pipelines.data.hold_out import HoldOut
from pipelines.data.ledger import Ledger
from pipelines.data.stream import MicroBatch, Rows
from pipelines.training.ranks import Ranks
from pipelines.training.used_rows import UsedRows


class WithOther(Ranks):
    """One of two ranks; `other` is what the second one gives to each gathering, in turn."""

    def gather(self, value: Any) -> list[Any]:
        return [value, ledgers.pop(0)]


ledgers: list[Ledger] = []


def batch(step: int, ids: list[int], epoch: int = 0) -> MicroBatch:
    return MicroBatch(step, Rows(np.zeros((len(ids), 1, 1, 1), np.uint8), np.array(ids), np.full(len(ids), epoch)))


def ledger(ids: list[int], epoch: int = 0) -> Ledger:
    made = Ledger()
    made.add(np.full(len(ids), epoch), np.array(ids))
    return made


def test_rank_0_has_what_all_ranks_used_since_the_beginning() -> None:
    rows = UsedRows(Epochs(HoldOut(12)), 4, WithOther(0, 2))
    for step, (ours, theirs) in enumerate([([0, 5], [7, 8]), ([1, 2], [3, 4]), ([6, 9], [10, 11])]):
        rows.add(batch(step, ours))
        ledgers.append(ledger(theirs))
        data = rows.gather(step + 1)
    assert data is not None
    assert list(Ledger.from_bytes(data["ledger.parquet"])) == [(0, 12)]


def test_the_other_ranks_give_theirs_and_begin_anew() -> None:
    rows = UsedRows(Epochs(HoldOut(12)), 4, WithOther(1, 2))
    for step, ids in enumerate([[0, 5], [1, 2]]):
        rows.add(batch(step, ids))
        ledgers.append(ledger([]))
        assert rows.gather(step + 1) is None
    rows.add(batch(2, [0, 5], epoch=1))


def test_a_resumed_training_goes_on_from_the_ledger_of_its_checkpoint() -> None:
    rows = UsedRows(Epochs(HoldOut(8)), 4, Ranks(0, 1))
    rows.restore(ledger([0, 1, 2, 3]).to_bytes(), 1)
    rows.add(batch(1, [4, 5, 6, 7]))
    data = rows.gather(2)
    assert data == {"ledger.parquet": ledger(list(range(8))).to_bytes()}
    with pytest.raises(LedgerError, match="4 of the 8 were due"):
        UsedRows(Epochs(HoldOut(8)), 4, Ranks(0, 1)).restore(ledger([0, 1, 2, 3, 4]).to_bytes(), 1)


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([1, 2, 3], "3 distinct rows"),
        ([1, 2, 3, 99], "ids up to 99"),
        ([1, 2, 3, int(HoldOut(20, 5).ids[0])], "held out for validation"),
    ],
)
def test_rows_that_were_not_due_are_found_at_the_next_checkpoint(ids: list[int], told: str) -> None:
    rows = UsedRows(Epochs(HoldOut(20, 5)), 4, Ranks(0, 1))
    rows.add(batch(0, ids))
    with pytest.raises(LedgerError, match=told):
        rows.gather(1)
