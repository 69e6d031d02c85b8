"""The command `jobs/quality.py` as a user runs it: its --help, and a refusal in one line with nothing written."""

import os
import subprocess
import sys
from pathlib import Path

from support.job_process import REPOSITORY


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    outside = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PYTHONPATH"}
    environment = {key: value for key, value in os.environ.items() if key not in outside} | {"HOME": str(tmp_path)}
    command = [sys.executable, str(REPOSITORY / "jobs" / "quality.py"), *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_the_help_names_every_section(tmp_path: Path) -> None:
    shown = run(tmp_path, "--help").stdout
    for field in (
        "--samples",
        "--reference",
        "--features",
        "--onnx.size",
        "--memorisation.train_data",
        "--compare_with",
    ):
        assert field in shown


def test_a_refusal_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    ended = run(tmp_path, "--samples", "s", "--reference", "r", "--output", "out", "--neighbours", "0")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines() == ["error: neighbours = 0: must be in 1..100"]
    assert list(tmp_path.iterdir()) == []
