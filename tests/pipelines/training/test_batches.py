"""A rank's batches: every step's share, from any step on; the start of a stream is told apart from waiting for it."""

from dataclasses import replace

import numpy as np
import pytest

from pipelines.data.stream import StreamPlan
from pipelines.training import batches as module
from pipelines.training.batches import Batches
from pipelines.training.config import DataConfig
from pipelines.training.ranks import Ranks


@pytest.mark.parametrize("start", [0, 4])
def test_ranks_share_every_step_up_to_the_last(make_dataset, start: int) -> None:
    dataset = make_dataset(num_rows=50)
    plan = StreamPlan.of(dataset, seed=3, batch_size=9, steps=12, window_bytes=1 << 20)
    assert plan.is_one_window
    (alone, *pair) = [Batches(plan, dataset, DataConfig(), ranks) for ranks in (Ranks(0, 1), Ranks(0, 2), Ranks(1, 2))]
    for each in (alone, *pair):
        each.start(start)
    for step in range(start, 12):
        arrivals = [each.next() for each in (alone, *pair)]
        assert [arrival.batch.step for arrival in arrivals] == [step] * 3
        whole, low, high = (arrival.batch.rows for arrival in arrivals)
        np.testing.assert_array_equal(whole.ids, np.concatenate([low.ids, high.ids]))
        np.testing.assert_array_equal(whole.images, np.concatenate([low.images, high.images]))
        assert [arrival.start_s is None for arrival in arrivals] == [step > start] * 3
        assert (arrivals[0].waited_s > 0) == (step > start)
    for each in (alone, *pair):
        each.finish()


def test_where_a_stream_ends_the_next_one_goes_on(make_dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data's streams end after so many windows; here those of the process end after three steps."""
    dataset = make_dataset(num_rows=50)
    plan = StreamPlan.of(dataset, seed=3, batch_size=9, steps=8, window_bytes=1 << 20)
    read_here = module.read_here

    def short(plan: StreamPlan, dataset, rank: int, world_size: int, start: int):
        yield from read_here(replace(plan, steps=min(plan.steps, start + 3)), dataset, rank, world_size, start)

    monkeypatch.setattr(module, "read_here", short)
    batches = Batches(plan, dataset, DataConfig(), Ranks(0, 1))
    batches.start(0)
    arrivals = [batches.next() for _ in range(8)]
    assert [arrival.batch.step for arrival in arrivals] == list(range(8))
    assert [arrival.batch.step for arrival in arrivals if arrival.start_s is not None] == [0, 3, 6]
