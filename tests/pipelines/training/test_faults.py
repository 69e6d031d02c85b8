"""Workers killed at the worst moments: nothing is lost, repeated or different afterwards. Drivers: tests/chaos."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.train_runs import (
    assert_each_row_once,
    curve,
    final_state,
    tiny,
)

from pipelines.training.config import TrainConfig
from pipelines.training.driver import train

pytestmark = [pytest.mark.ray, pytest.mark.slow]
Loop = Callable[[dict[str, Any]], None]


def dying_loop(marks: Path) -> Loop:
    """The real training loop, in processes that kill themselves, each kind of death once.

    A closure, so that it travels to the workers by value.
    """

    def loop(loop_config: dict[str, Any]) -> None:
        import torch

        from pipelines.data import stream
        from pipelines.models.checkpoints import CheckpointStore
        from pipelines.training.learner import Learner
        from pipelines.training.worker import train_loop

        commit, step, clip = CheckpointStore.commit, Learner.step, torch.nn.utils.clip_grad_norm_
        now = {"step": -1, "rank": -1}
        # By Ray Data, and one stream after the other: neither must be seen beside the run whose workers read.
        stream.StreamPlan.is_one_window = property(lambda plan: False)  # type: ignore[assignment,method-assign]
        stream.MAX_WINDOWS = 1

        def die(mark: str) -> None:
            if not (marks / mark).exists():
                (marks / mark).touch()
                os.kill(os.getpid(), signal.SIGKILL)

        def dying_commit(store: CheckpointStore, done: int, state: dict[str, Any]) -> None:
            if done == 6:
                die("between upload and commit")
            commit(store, done, state)
            if done == 12:
                die("just after the commit")

        def watched_step(learner: Learner, batch: Any) -> Any:
            now.update(step=batch.step, rank=learner.ranks.rank)
            return step(learner, batch)

        def dying_clip(*arguments: Any, **options: Any) -> Any:
            if now == {"step": 20, "rank": 1}:
                die("between gradient and update")
            return clip(*arguments, **options)

        CheckpointStore.commit, Learner.step = dying_commit, watched_step
        torch.nn.utils.clip_grad_norm_ = dying_clip
        train_loop(loop_config)

    return loop


def test_workers_killed_at_the_worst_moments_lose_and_repeat_nothing(
    training_root: Path, tmp_path: Path, two_workers: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(training_root, "killed", num_workers=2)
    train(config, loop=dying_loop(tmp_path))
    assert sorted(mark.name for mark in tmp_path.iterdir() if mark.is_file()) == [
        "between gradient and update",
        "between upload and commit",
        "just after the commit",
    ]
    shown = capsys.readouterr().err
    assert shown.count("was lost") >= 3
    # The first death left no checkpoint: that attempt began anew.
    assert [f"resumed at step {step} on 2 worker(s)" in shown for step in (6, 12, 18)] == [False, True, True]
    assert_each_row_once(config)
    assert final_state(config) == final_state(two_workers)
    assert curve(config) == curve(two_workers)
    assert [step for step, _ in curve(config)] == list(range(1, 25))
    validation = "validation/beta_tilde/bits_per_dim"
    assert curve(config, validation) == curve(two_workers, validation)
