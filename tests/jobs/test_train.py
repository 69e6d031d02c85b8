"""The command `jobs/train.py` as a user runs it."""

from pathlib import Path

import yaml
from support.job_process import run_job

from pipelines.cli.config import as_dict
from pipelines.training.config import TrainConfig


def test_bad_usage_is_one_line_exit_code_2_and_no_file(tmp_path: Path) -> None:
    ended = run_job("train.py", tmp_path, "--train.stepz", "5")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: unrecognized arguments: --train.stepz 5; did you mean --train.steps?\n"
    ended = run_job("train.py", tmp_path, "--data.train", "nowhere")
    assert (ended.returncode, ended.stdout) == (1, "")
    line = ended.stderr.splitlines()[-1]  # it said before that it is loading
    assert line.startswith(f"error: {tmp_path}/nowhere: not a prepared data set (no manifest.json)")
    assert list(tmp_path.iterdir()) == []


def test_print_config_prints_the_defaults_as_a_recipe(tmp_path: Path) -> None:
    ended = run_job("train.py", tmp_path, "--print_config")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert yaml.safe_load(ended.stdout) == as_dict(TrainConfig())
    assert list(tmp_path.iterdir()) == []
