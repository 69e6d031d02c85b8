"""Progress of shards that are being made: counted once, whoever tells it and however often."""

import pickle

import pytest

from pipelines.outputs.progress import Board, Counted, Progress, Tally, made, telling


def test_rows_of_unfinished_shards_count_until_their_shard_is_finished() -> None:
    seen: list[Progress] = []
    tally = Tally(found=1, rows=10, num_shards=3, on_progress=seen.append)
    tally.making(1, 2.5, seconds=5.0)
    tally.finished(1, 10, seconds=20.0)
    tally.making(1, 9.0, seconds=18.0)  # late news of a finished shard
    tally.finished(2, 10, seconds=20.0)
    assert [(step.shards, step.rows, step.making) for step in seen] == [
        (1, 10, 0),
        (1, 10, 2.5),
        (2, 20, 0),
        (3, 30, 0),
    ]
    assert seen[0].rate == 0
    assert seen[1].rate == pytest.approx(2.5 / 5, rel=0.01)
    assert seen[-1].rate == pytest.approx(20 / 20, rel=0.01), "of this run, and of all of its time"


def test_many_words_of_a_shard_are_few_to_the_display() -> None:
    seen: list[Progress] = []
    tally = Tally(found=0, rows=0, num_shards=1, on_progress=seen.append)
    for step in range(1000):
        tally.making(0, step / 1000, seconds=1.0)
    assert len(seen) < 100


def test_made_is_heard_where_somebody_listens() -> None:
    heard: list[float] = []
    made(1.0)
    with telling(heard.append):
        made(2.0)
        with telling(lambda rows: None):
            made(3.0)
        made(4.0)
    made(5.0)
    assert heard == [2.0, 4.0]


def test_every_step_of_a_batch_is_its_share_of_the_rows_and_goes_on_to_who_watches() -> None:
    heard: list[float] = []
    seen: list[tuple[int, str]] = []
    on_step = Counted(before=8, rows=6, steps=3, also=lambda *step: seen.append(step))
    with telling(heard.append):
        for k in range(3):
            on_step(k, "z")
        Counted(14, 2, 1)(0, "z")
    assert heard == [10.0, 12.0, 14.0, 16.0]
    assert seen == [(0, "z"), (1, "z"), (2, "z")]


def test_a_board_travels_by_its_name() -> None:
    assert pickle.loads(pickle.dumps(Board("abc")))._name == "abc"
