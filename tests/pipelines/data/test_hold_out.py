"""Which rows are held out: about a twentieth, a share of everything, never trained on, a function of N alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.epochs import Epochs
from pipelines.data.hold_out import HoldOut
from pipelines.data.ledger import Ledger
from pipelines.data.stream import StreamPlan, read_window


@given(st.integers(0, 5000), st.integers(2, 60))
def test_one_row_of_every_group_is_held_out(num_rows: int, every: int) -> None:
    found = HoldOut(num_rows, every)
    assert (found.ids // every).tolist() == list(range(num_rows // every))
    assert found.num_trained + len(found.ids) == num_rows
    bounds = np.arange(num_rows + 1)
    expected = [int(bound - (found.ids < bound).sum()) for bound in bounds]
    assert found.trained_below(bounds).tolist() == expected
    assert np.flatnonzero(~found.is_trained(np.arange(num_rows))).tolist() == found.ids.tolist()


@pytest.mark.parametrize(
    ("num_rows", "every", "held_out"),
    [(0, 0, 0), (19, 0, 0), (20, 20, 1), (39, 20, 1), (60_000, 20, 3000), (200_000, 20, 10_000), (10**6, 100, 10_000)],
)
def test_the_usual_share_is_a_twentieth_and_at_most_10_000(num_rows: int, every: int, held_out: int) -> None:
    found = HoldOut.usual(num_rows)
    assert (found.every, len(found.ids), found.num_trained) == (every, held_out, num_rows - held_out)


def test_a_rule_holds_for_ever() -> None:
    """A run that is continued by a later version must hold out the same rows."""
    assert HoldOut(200, 20).ids.tolist() == [0, 32, 44, 77, 89, 101, 134, 146, 178, 191]


@pytest.mark.parametrize("period", [2, 4, 5, 10, 19, 20, 21, 100, 1000])
def test_data_that_repeat_themselves_and_sorted_ones_are_held_out_evenly(period: int) -> None:
    ids = HoldOut(100_000, 20).ids
    for classes in (ids % period, ids * period // 100_000):
        counts = Counter(classes.tolist())
        assert len(counts) == period
        assert max(counts.values()) <= 2 * len(ids) / period + 1


def test_a_sample_is_spread_over_all_held_out_rows() -> None:
    found = HoldOut(2000, 20)
    assert found.sample(1000).tolist() == found.ids.tolist()
    assert found.sample(4).tolist() == found.ids[[0, 25, 50, 75]].tolist()
    assert HoldOut(5).sample(4).tolist() == []


@pytest.mark.parametrize("shape", [(8, 8, 1), (400, 400, 4)])  # groups of many rows, and of one
def test_the_stream_has_every_other_row_once_per_epoch_and_no_held_out_one(make_dataset, shape) -> None:
    num_rows = 45 if shape == (400, 400, 4) else 100
    dataset = make_dataset(num_rows=num_rows, shape=shape, shard_rows=48)
    hold_out = HoldOut(num_rows, 7)
    row_bytes = int(np.prod(shape))
    plan = StreamPlan.of(dataset, seed=3, batch_size=16, steps=12, window_bytes=50 * row_bytes, hold_out=7)
    assert plan.num_rows == hold_out.num_trained
    _, images, _ = dataset.read_images(0, num_rows)
    ledger = Ledger()
    for window in range(plan.num_windows):
        read = read_window(plan, dataset, window)
        first, stop = plan.window_range(window)
        np.testing.assert_array_equal(read.images, images[read.ids])
        np.testing.assert_array_equal(read.passes, np.arange(first * 16, stop * 16) // hold_out.num_trained)
        ledger.add(read.passes, read.ids)
    ledger.check(Epochs(hold_out), 12, 16)
    trained = np.flatnonzero(hold_out.is_trained(np.arange(num_rows))).tolist()
    for epoch in range(12 * 16 // hold_out.num_trained):
        assert ledger.ids(epoch).tolist() == trained
