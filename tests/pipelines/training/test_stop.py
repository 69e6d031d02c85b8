"""Stopping on request: all ranks end with the same step, which nobody misses and nobody passes."""

import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.board_in_memory import Entries

from pipelines.training import stop
from pipelines.training.stop import StopWatch, ask_to_stop

PATIENCE_S = 60.0


@pytest.fixture(autouse=True, scope="module")
def _fast():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stop, "POLL_S", 0.001)
        patch.setattr(stop, "_ANSWER_POLL_S", 0.001)
        yield


def train(board: Entries, world_size: int, steps: int, on_step: Callable[[int], None], start: int = 0) -> list[int]:
    """Ranks in threads that meet in every step, as DDP's do; the number of steps each of them has done at its end."""
    together, done = threading.Barrier(world_size, timeout=PATIENCE_S), [start] * world_size

    def rank(index: int) -> None:
        watch = StopWatch(board, "group", index, world_size, start)
        while done[index] < steps and not watch.reached(done[index]):
            together.wait()  # the sum of gradients: hangs unless all ranks take part
            if index == 0:
                on_step(done[index] + 1)
            done[index] += 1
        watch.saved(done[index])

    threads = [threading.Thread(target=rank, args=(index,), daemon=True) for index in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"hangs at {done}"
    return done


@settings(max_examples=30)
@given(world_size=st.integers(1, 4), asked_at=st.integers(1, 20), failures=st.integers(0, 8), start=st.integers(0, 5))
def test_all_ranks_end_with_one_step_after_it(world_size: int, asked_at: int, failures: int, start: int) -> None:
    board = Entries(failures)

    def on_step(step: int) -> None:
        if step == start + asked_at:
            board.values["asked"] = "1"
        if step > start + asked_at:
            threading.Event().wait(0.002)  # a step takes longer than a rank's look at the board

    done = train(board, world_size, 100_000, on_step, start)
    assert len(set(done)) == 1
    assert start + asked_at <= done[0] < 100_000
    assert board.values["saved"] == str(done[0])


def test_without_a_request_nothing_ends_early() -> None:
    board = Entries()
    assert train(board, 3, 200, lambda step: None) == [200] * 3
    assert "heard" not in board.values


def test_a_request_before_the_first_step_ends_with_none_done() -> None:
    board = Entries()
    board.put("asked", "1")
    watch = StopWatch(board, "group", 0, 1, 7)
    watch._agreed.wait(PATIENCE_S)
    assert watch.reached(7)


def test_answers_of_ranks_that_were_restarted_since_do_not_count() -> None:
    board = Entries()
    board.values |= {"before/0": "900", "before/1": "901", "before/last": "901"}
    board.put("asked", "1")
    assert train(board, 2, 100_000, lambda step: None)[0] < 900


def test_the_driver_learns_which_step_was_saved() -> None:
    board, found = Entries(), []
    waiting = (board, threading.Event().wait, found.append)
    driver = threading.Thread(target=ask_to_stop, args=waiting, kwargs={"leave_s": 0}, daemon=True)

    def on_step(step: int) -> None:
        if step == 5:
            driver.start()
        if step >= 5:
            threading.Event().wait(0.002)

    done = train(board, 2, 100_000, on_step)
    driver.join(PATIENCE_S)
    assert found == ["saving a checkpoint; a second signal ends the job without it", f"step {done[0]:,} is saved"]


def test_the_driver_does_not_wait_for_ranks_that_are_not_there() -> None:
    board, said = Entries(), []
    ask_to_stop(board, lambda seconds: pytest.fail("waits for nobody"), said.append)
    assert (board.values, said) == ({}, [])
    board.put("running", "lost")  # they were lost, and nobody answers
    ask_to_stop(board, threading.Event().wait, said.append, answer_s=0.2)
    board.put("heard", "lost")  # or they hang afterwards
    ask_to_stop(board, threading.Event().wait, said.append, save_s=0.2)
    ask_to_stop(board, lambda seconds: True, said.append)  # a second signal
    assert not any("is saved" in line for line in said)
