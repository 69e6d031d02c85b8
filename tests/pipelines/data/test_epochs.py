"""What an epoch takes: every trained row, and with balanced classes each class as often as the largest."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cli.errors import CheckpointError
from pipelines.data.epochs import Epochs, labels_from_bytes, labels_to_bytes
from pipelines.data.hold_out import HoldOut

labels_of = st.lists(st.integers(-1, 4), min_size=2, max_size=80).map(lambda labels: np.array(labels, np.int64))


def balanced(labels: np.ndarray, every: int = 0) -> Epochs:
    return Epochs(HoldOut(len(labels), every), labels)


@given(labels_of, st.integers(0, 9).filter(lambda every: every != 1), st.integers(0, 30))
def test_every_class_is_taken_as_often_as_the_largest_and_every_row_at_least_once(
    labels: np.ndarray, every: int, epoch: int
) -> None:
    epochs = balanced(labels, every)
    times, trained = epochs.multiplicities(epoch), epochs.hold_out.is_trained(np.arange(len(labels)))
    assert (times[~trained] == 0).all()
    assert (times[trained & (labels < 0)] == 1).all()
    classes = {label: times[trained & (labels == label)] for label in set(labels[trained & (labels >= 0)].tolist())}
    largest = max(map(len, classes.values()), default=0)
    for of_class in classes.values():
        assert of_class.sum() == largest
        # floor(n_max / n) for each, and 1 more for n_max mod n of them
        assert Counter(of_class.tolist()) == Counter(
            {largest // len(of_class): len(of_class) - largest % len(of_class)}
        ) + Counter({largest // len(of_class) + 1: largest % len(of_class)})
    assert times.sum() == epochs.length
    assert times.max(initial=1) <= epochs.passes


@given(labels_of, st.integers(0, 5))
def test_in_as_many_epochs_as_a_class_has_rows_each_is_repeated_equally_often(labels: np.ndarray, begin: int) -> None:
    epochs = balanced(labels)
    for label in set(labels[labels >= 0].tolist()):
        rows = labels == label
        taken = sum(epochs.multiplicities(begin + epoch)[rows] for epoch in range(int(rows.sum())))
        assert len(set(taken.tolist())) == 1


@given(labels_of, st.integers(0, 9).filter(lambda every: every != 1), st.integers(0, 9), st.integers(0, 80))
def test_a_pass_takes_no_row_twice_and_groups_of_rows_add_up(
    labels: np.ndarray, every: int, epoch: int, bound: int
) -> None:
    for epochs in (balanced(labels, every), Epochs(HoldOut(len(labels), every))):
        ids, bound = np.arange(len(labels)), min(bound, len(labels))
        index, passes = epochs.taken(epoch, ids)
        assert len(set(zip(index.tolist(), passes.tolist(), strict=True))) == len(index) == epochs.length
        assert set(passes.tolist()) <= set(range(epoch * epochs.passes, (epoch + 1) * epochs.passes))
        # a row that is taken m times belongs to the first m passes of the epoch
        first = passes == epoch * epochs.passes
        assert index[first].tolist() == ids[epochs.hold_out.is_trained(ids)].tolist()
        counts = Counter(index.tolist())
        assert all(again - epoch * epochs.passes < counts[row] for row, again in zip(index, passes, strict=True))
        below, rest = epochs.taken(epoch, ids[:bound]), epochs.taken(epoch, ids[bound:])
        assert epochs.below(epoch, np.array([0, bound, len(ids)])).tolist() == [0, len(below[0]), len(index)]
        assert [*below[0].tolist(), *(rest[0] + bound).tolist()] == index.tolist()


def test_a_rule_holds_for_ever() -> None:
    """A run that is continued by a later version must repeat the same rows."""
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2, -1])
    epochs = balanced(labels)
    assert (epochs.length, epochs.passes) == (16, 5)
    assert epochs.multiplicities(0).tolist() == [1, 1, 1, 1, 1, 1, 2, 2, 5, 1]
    assert epochs.multiplicities(1).tolist() == [1, 1, 1, 1, 1, 2, 2, 1, 5, 1]
    assert epochs.taken(1, np.arange(4, 9))[1].tolist() == [5, 5, 6, 5, 6, 5, 5, 6, 7, 8, 9]


def test_labels_are_kept_beside_the_ledger() -> None:
    labels = np.array([3, -1, 0, 2])
    np.testing.assert_array_equal(labels_from_bytes(labels_to_bytes(labels)), labels)
    with pytest.raises(CheckpointError, match=r"labels.parquet: cannot be read"):
        labels_from_bytes(b"PAR1")
