"""The training stream: every step's rows are a pure function of the plan, on any number of ranks."""

from collections import Counter
from threading import Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.epochs import epochs_of
from pipelines.data.ledger import Ledger
from pipelines.data.stream import (
    MicroBatch,
    StreamPlan,
    micro_batches,
    read_here,
    read_window,
    segment_groups,
    shares,
    start_stream,
)

sizes = st.integers(1, 60)


def group_starts(sizes: list[int]) -> np.ndarray:
    return np.cumsum([0, *sizes], dtype=np.int64)


def planned_rows(plan: StreamPlan, starts: np.ndarray) -> list[tuple[int, int]]:
    """(epoch, id) of every position of the whole training, in order."""
    rows = []
    for window in range(plan.num_windows):
        for part in plan.segments(window):
            groups, index = segment_groups(plan, starts, part)
            read = np.concatenate([np.arange(starts[g], starts[g + 1]) for g in groups])
            rows += [(part.epoch, int(row)) for row in read[index]]
        del rows[plan.window_range(window)[1] * plan.batch_size :]
    return rows


group_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(group_sizes, sizes, st.integers(1, 80), st.integers(1, 30), st.integers(0, 9))
def test_every_row_exactly_once_per_epoch(
    groups: list[int], batch_size: int, steps: int, window_steps: int, seed: int
) -> None:
    starts = group_starts(groups)
    num_rows = int(starts[-1])
    plan = StreamPlan("unused", num_rows, seed, batch_size, steps, window_steps)
    rows = planned_rows(plan, starts)
    assert len(rows) == steps * batch_size
    used = Counter(rows)
    assert max(used.values()) == 1
    finished = steps * batch_size // num_rows
    assert sum(epoch < finished for epoch, _ in rows) == finished * num_rows
    assert all(epoch <= finished and 0 <= row < num_rows for epoch, row in rows)


BALANCED = np.random.default_rng(0).choice([-1, 0, 1, 2], 100, p=[0.1, 0.6, 0.2, 0.1])


@pytest.mark.parametrize("hold_out", [0, 7])
@pytest.mark.parametrize("window_steps", [1, 3, 50])
def test_balanced_epochs_take_each_row_as_often_as_they_must_on_any_windows(
    make_dataset, window_steps: int, hold_out: int
) -> None:
    labels = [None if label < 0 else int(label) for label in BALANCED]
    dataset = make_dataset(num_rows=100, shape=(64, 64, 3), shard_rows=48, labels=labels)
    assert dataset.num_groups == 3
    epochs = epochs_of(dataset, hold_out, balanced=True)
    plan = StreamPlan.of(dataset, 3, 16, 30, window_steps * 16 * 64 * 64 * 3, hold_out, balanced=True, labelled=True)
    assert (plan.num_rows, plan.window_steps) == (epochs.length, window_steps)
    used, images = Ledger(), dataset.read_images(0, 100)[1]
    for window in range(plan.num_windows):
        read = read_window(plan, dataset, window)
        used.add(read.passes, read.ids)
        np.testing.assert_array_equal(read.images, images[read.ids])
        np.testing.assert_array_equal(read.labels, BALANCED[read.ids])
        position = np.arange(*plan.window_range(window))[:, None] * 16 + np.arange(16)
        np.testing.assert_array_equal(read.passes // epochs.passes, position.reshape(-1) // epochs.length)
    used.check(epochs, 30, 16)
    for epoch in range(30 * 16 // epochs.length):
        counts = sum(np.bincount(used.ids(epoch * epochs.passes + k), minlength=100) for k in range(epochs.passes))
        np.testing.assert_array_equal(counts, epochs.multiplicities(epoch))


@given(st.integers(1, 50), sizes, st.integers(1, 40), st.integers(1, 40), st.integers(1, 30))
def test_more_steps_leave_the_rows_of_the_first_ones_as_they_were(
    num_rows: int, batch_size: int, steps: int, more: int, window_steps: int
) -> None:
    starts = group_starts([min(9, num_rows - start) for start in range(0, num_rows, 9)])
    short, long = (StreamPlan("unused", num_rows, 0, batch_size, n, window_steps) for n in (steps, steps + more))
    assert planned_rows(long, starts)[: steps * batch_size] == planned_rows(short, starts)


@given(sizes, st.integers(1, 8))
def test_shares_of_a_batch_cover_it_evenly(batch_size: int, world_size: int) -> None:
    edges = shares(batch_size, world_size)
    assert [row for share in edges for row in range(*share)] == list(range(batch_size))
    lengths = [high - low for low, high in edges]
    assert max(lengths) - min(lengths) <= 1


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    starts = group_starts([10] * 10)
    rows = planned_rows(StreamPlan("unused", 100, 0, 10, 20, 5), starts)
    first, second = ([row for epoch, row in rows if epoch == e] for e in (0, 1))
    assert first != second
    assert first != [row for epoch, row in planned_rows(StreamPlan("unused", 100, 1, 10, 20, 5), starts) if epoch == 0]
    # a window of 5 of the 10 row groups is drawn from all over the data set, not from its first half
    assert {row // 10 for row in first[:50]} != set(range(5))
    assert sorted(first[:50]) != first[:50]


def test_window_is_read_in_training_order(make_dataset) -> None:
    dataset = make_dataset(num_rows=100, shape=(32, 32, 3), shard_rows=48)
    plan = StreamPlan.of(dataset, seed=3, batch_size=16, steps=10, window_bytes=50 * 3072)
    assert plan.window_steps == 3
    _, images, _ = dataset.read_images(0, 100)
    for window in range(plan.num_windows):
        read = read_window(plan, dataset, window)
        first, stop = plan.window_range(window)
        assert len(read.ids) == (stop - first) * 16
        np.testing.assert_array_equal(read.images, images[read.ids])
        np.testing.assert_array_equal(read.passes, np.arange(first * 16, stop * 16) // 100)


def consume(plan: StreamPlan, shape: tuple[int, int, int], start: int, world_size: int) -> dict[int, list[MicroBatch]]:
    """Every step's shares as the ranks get them, read by one thread per rank as in training."""
    steps: dict[int, list[MicroBatch]] = {step: [None] * world_size for step in range(start, plan.steps)}  # type: ignore[list-item]

    def read(rank: int, iterator) -> None:
        for batch in micro_batches(iterator, rank, start, shape):
            steps[batch.step][rank] = batch

    threads = [Thread(target=read, args=pair) for pair in enumerate(start_stream(plan, start, world_size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return steps


@pytest.mark.parametrize(("world_size", "start", "window_bytes"), [(1, 0, 64 * 100), (3, 7, 64 * 100), (2, 0, 10**6)])
def test_a_worker_that_reads_itself_gets_its_share_of_every_step(
    make_dataset, world_size: int, start: int, window_bytes: int
) -> None:
    dataset = make_dataset(num_rows=90, shape=(8, 8, 1), shard_rows=48)
    plan = StreamPlan.of(dataset, seed=5, batch_size=16, steps=23, window_bytes=window_bytes)
    assert plan.is_one_window
    assert not StreamPlan.of(dataset, seed=5, batch_size=16, steps=23, window_bytes=64 * 80).is_one_window
    _, images, _ = dataset.read_images(0, 90)
    expected = planned_rows(plan, dataset.group_starts)
    ranks = [list(read_here(plan, dataset, rank, world_size, start)) for rank in range(world_size)]
    for parts in zip(*ranks, strict=True):
        step = parts[0].step
        assert [(part.step, len(part.rows.ids)) for part in parts] == [
            (step, high - low) for low, high in shares(16, world_size)
        ]
        rows = [(int(e), int(i)) for part in parts for e, i in zip(part.rows.passes, part.rows.ids, strict=True)]
        assert rows == expected[step * 16 : (step + 1) * 16]
        for share in parts:
            np.testing.assert_array_equal(share.rows.images, images[share.rows.ids])
    assert [batch.step for batch in ranks[0]] == list(range(start, 23))


@pytest.mark.ray
@pytest.mark.parametrize("world_size", [1, 3])
def test_ray_gives_the_labels_and_the_repeats_that_a_worker_reads_itself(
    ray_cluster, make_dataset, world_size: int
) -> None:
    labels = [None if label < 0 else int(label) for label in BALANCED]
    dataset = make_dataset(num_rows=100, shape=(8, 8, 1), shard_rows=48, labels=labels)
    plan = StreamPlan.of(dataset, 5, 16, 23, 64 * 16 * 4, hold_out=7, balanced=True, labelled=True)
    assert plan.num_windows == 6
    steps = consume(plan, dataset.image_shape, 2, world_size)
    for alone in read_here(plan, dataset, 0, 1, 2):
        parts = [part.rows for part in steps.pop(alone.step)]
        for name in ("images", "ids", "passes", "labels"):
            found = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(found, getattr(alone.rows, name))
        np.testing.assert_array_equal(alone.rows.labels, BALANCED[alone.rows.ids])
    assert steps == {}


@pytest.mark.ray
@pytest.mark.parametrize(("world_size", "start"), [(1, 0), (2, 0), (3, 0), (2, 7)])
def test_ray_gives_every_rank_its_share_of_every_step(ray_cluster, make_dataset, world_size: int, start: int) -> None:
    dataset = make_dataset(num_rows=100, shape=(8, 8, 1), shard_rows=48)
    plan = StreamPlan.of(dataset, seed=5, batch_size=16, steps=23, window_bytes=64 * 16 * 4)
    assert plan.num_windows == 6
    _, images, _ = dataset.read_images(0, 100)
    expected = planned_rows(plan, dataset.group_starts)
    steps = consume(plan, dataset.image_shape, start, world_size)
    assert sorted(steps) == list(range(start, 23))
    for step, parts in steps.items():
        assert [len(part.rows.ids) for part in parts] == [high - low for low, high in shares(16, world_size)]
        rows = [(int(e), int(i)) for part in parts for e, i in zip(part.rows.passes, part.rows.ids, strict=True)]
        assert rows == expected[step * 16 : (step + 1) * 16]
        for share in parts:
            np.testing.assert_array_equal(share.rows.images, images[share.rows.ids])
