"""Kills: of workers at the worst moments and of the driver. Nothing is lost, repeated or different afterwards."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from train_runs import (
    assert_each_row_once,
    curve,
    final_state,
    mlflow_run,
    run_directory,
    tiny,
)

from pipelines.config import as_dict
from pipelines.tracking.tracker import replay
from pipelines.training.config import TrainConfig
from pipelines.training.job import train

pytestmark = [pytest.mark.ray, pytest.mark.slow]
REPOSITORY = Path(__file__).parents[3]
Loop = Callable[[dict[str, Any]], None]


def dying_loop(marks: Path) -> Loop:
    """The real training loop, in processes that kill themselves, each kind of death once.

    A closure, so that it travels to the workers by value.
    """

    def loop(loop_config: dict[str, Any]) -> None:
        import torch

        from pipelines.training.checkpoint import CheckpointStore
        from pipelines.training.learner import Learner
        from pipelines.training.loop import train_loop

        commit, step, clip = CheckpointStore.commit, Learner.step, torch.nn.utils.clip_grad_norm_
        now = {"step": -1, "rank": -1}

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
            now.update(step=batch.step, rank=learner.rank)
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


# The job, but for a worker that kills the driver and then waits for its own end.
DRIVER_DIES = """
import os, sys, threading
from pipelines.config import parse
from pipelines.training.job import train
from pipelines.training.config import TrainConfig
from pipelines.training.loop import train_loop

driver = os.getpid()

def loop(loop_config):
    from pipelines.training.learner import Learner
    step = Learner.step
    def last_step(learner, batch):
        if batch.step == 15 and learner.rank == 0:
            os.kill(driver, 9)
            threading.Event().wait()
        return step(learner, batch)
    Learner.step = last_step
    train_loop(loop_config)

train(parse(TrainConfig, sys.argv[1:], ""), loop=loop)
"""


def test_a_killed_driver_and_no_mlflow_server_cost_nothing(training_root: Path, two_workers: TrainConfig) -> None:
    import ray

    cluster = {"num_workers": 2, "address": ray.get_runtime_context().gcs_address}
    config = tiny(training_root, "driver-killed", cluster=cluster, tracking={"uri": "http://127.0.0.1:1"})
    recipe = training_root / "driver-killed.yaml"
    recipe.write_text(yaml.safe_dump(as_dict(config)))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}

    def run(*program: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *program, "--config", str(recipe)]
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)

    first = run("-c", DRIVER_DIES)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert not (run_directory(config) / "result.json").exists()
    second = run("jobs/train.py")
    assert second.returncode == 0, second.stderr
    # The checkpoint of step 12 may have been on its way when the driver died.
    assert re.search(r"resumed at step (6|12) on 2 worker\(s\)", second.stderr)
    assert "driver-killed: trained 24 steps" in second.stdout
    assert_each_row_once(config)
    assert final_state(config) == final_state(two_workers)

    spool = Path(run_directory(config).path) / "tracking/spool.jsonl"
    unreachable = "tracking: MLflow at http://127.0.0.1:1 cannot be used (Connection refused); the job goes on"
    assert [shown.stderr.count(unreachable) for shown in (first, second)] == [1, 1]
    assert re.search(rf"\d+ records are not in MLflow yet and wait in {spool}; run", second.stdout)
    replay(spool, f"sqlite:///{training_root}/mlflow.db")
    assert curve(config) == curve(two_workers)
    _, tracked = mlflow_run(config)
    assert tracked.info.status == "FINISHED"
