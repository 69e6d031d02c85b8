"""The exactly-once ledger."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cli.errors import CheckpointError, LedgerError
from pipelines.data.epochs import Epochs
from pipelines.data.hold_out import HoldOut
from pipelines.data.ledger import Ledger


def ledger_of(pairs: list[tuple[int, int]]) -> Ledger:
    ledger = Ledger()
    epochs, ids = np.array(pairs, np.int64).reshape(-1, 2).T
    ledger.add(epochs, ids)
    return ledger


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**40)), unique=True, max_size=50)


@given(pairs)
def test_round_trip_keeps_every_row(rows: list[tuple[int, int]]) -> None:
    again = Ledger.from_bytes(ledger_of(rows).to_bytes())
    assert sorted((epoch, int(row)) for epoch in again.passes for row in again.ids(epoch)) == sorted(rows)
    assert again.total() == len(rows)


@given(pairs, pairs)
def test_merge_is_the_union_or_refuses(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    ledger = ledger_of(left)
    if set(left) & set(right):
        with pytest.raises(LedgerError, match="used twice"):
            ledger.merge(ledger_of(right))
    else:
        ledger.merge(ledger_of(right))
        assert ledger.total() == len(left) + len(right)


def test_a_row_twice_in_an_epoch_is_refused_at_once() -> None:
    ledger = ledger_of([(0, 1), (0, 2), (1, 1)])
    with pytest.raises(LedgerError, match=r"pass 0 over the data: 1 row\(s\)"):
        ledger.add(np.array([0]), np.array([2]))
    with pytest.raises(LedgerError, match="pass 5"):
        ledger_of([]).add(np.array([5, 5]), np.array([7, 7]))


def test_check_proves_finished_epochs_and_names_what_is_missing() -> None:
    rows = [(0, i) for i in range(10)] + [(1, i) for i in (3, 4)]
    ledger_of(rows).check(Epochs(HoldOut(10)), steps=3, batch_size=4)
    with pytest.raises(LedgerError, match="epoch 0 used 9 distinct rows"):
        ledger_of([row for row in rows if row != (0, 5)]).check(Epochs(HoldOut(10)), 3, 4)
    with pytest.raises(LedgerError, match="epoch 0 used 10 distinct rows"):
        ledger_of([(0, 99) if row == (0, 5) else row for row in rows]).check(Epochs(HoldOut(10)), 3, 4)
    with pytest.raises(LedgerError, match=r"holds epochs \[0, 1\]"):
        ledger_of(rows).check(Epochs(HoldOut(10)), 6, 4)


def test_check_proves_that_no_held_out_row_was_used() -> None:
    """Of 10 rows, 0 and 8 are held out: one of every 5."""
    trained = [1, 2, 3, 4, 5, 6, 7, 9]
    rows = [(0, i) for i in trained] + [(1, i) for i in (3, 4, 5, 6)]
    ledger_of(rows).check(Epochs(HoldOut(10, 5)), steps=3, batch_size=4)
    with pytest.raises(LedgerError, match=r"epoch 1 used 1 row\(s\) that are held out"):
        ledger_of([(1, 8) if row == (1, 3) else row for row in rows]).check(Epochs(HoldOut(10, 5)), 3, 4)
    with pytest.raises(LedgerError, match="epoch 0 used 7 distinct rows"):
        ledger_of([row for row in rows if row != (0, 5)]).check(Epochs(HoldOut(10, 5)), 3, 4)
    with pytest.raises(LedgerError, match=r"holds epochs \[0, 1\]"):
        ledger_of(rows).check(Epochs(HoldOut(10, 5)), 2, 4)


def test_check_proves_that_balanced_classes_repeat_the_rows_that_are_due() -> None:
    """Rows 0..4 are of one class, 5..7 of another: 5 places each, so an epoch of two passes takes 6 and 7 twice."""
    epochs = Epochs(HoldOut(8), np.array([0, 0, 0, 0, 0, 1, 1, 1]))
    rows = [(0, i) for i in range(8)] + [(1, 6), (1, 7)] + [(2, 0), (3, 5)]
    ledger_of(rows).check(epochs, 3, 4)
    # Row 5 has been used once in epoch 1, though by its second pass.
    assert ledger_of(rows).repeats(epochs) == 2
    with pytest.raises(LedgerError, match=r"epoch 0 used 1 row\(s\) more often than was due, 2 times"):
        ledger_of([(1, 5) if row == (1, 6) else row for row in rows]).check(epochs, 3, 4)
    with pytest.raises(LedgerError, match=r"epoch 1 used 1 row\(s\) more often than was due, 2 times"):
        ledger_of([(3, 7) if row == (3, 5) else row for row in rows]).check(epochs, 3, 4)
    with pytest.raises(LedgerError, match="epoch 0 used 9 rows"):
        ledger_of([row for row in rows if row != (0, 3)]).check(epochs, 3, 4)
    with pytest.raises(LedgerError, match="pass 1 over the data"):
        ledger_of(rows).add(np.array([1]), np.array([6]))


def test_a_finished_epoch_takes_a_few_bytes() -> None:
    full = Ledger()
    full.add(np.zeros(100_000, np.int64), np.random.default_rng(0).permutation(100_000))
    assert len(full.to_bytes()) < 3000


def test_damaged_bytes_are_refused() -> None:
    with pytest.raises(CheckpointError, match="ledger"):
        Ledger.from_bytes(b"not a ledger")
