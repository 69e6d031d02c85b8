"""The commands `jobs/sample.py` and `jobs/verify.py` as a user runs them: refusals in one line, nothing written."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run(job: str, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    outside = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PYTHONPATH"}
    environment = {key: value for key, value in os.environ.items() if key not in outside}
    command = [sys.executable, str(REPOSITORY / "jobs" / job), *arguments]
    return subprocess.run(command, cwd=root, env={**environment, "HOME": str(root)}, capture_output=True, text=True)


def test_what_sampling_refuses(tmp_path: Path) -> None:
    for arguments, code, line in (
        (["--num_images", "0"], 2, "num_images = 0: must be at least 1"),
        (["--num_images", "5"], 1, "model = nowhere: holds neither a model"),
    ):
        ended = run("sample.py", tmp_path, "--model", "nowhere", "--output", "out", *arguments)
        assert (ended.returncode, ended.stdout) == (code, "")
        *said, message = ended.stderr.splitlines()  # what the job is at, and how it ended
        assert message.startswith(f"error: {line}")
        assert not any("error" in each for each in said)
    assert list(tmp_path.iterdir()) == []


def test_verify_takes_its_output_without_a_name(tmp_path: Path) -> None:
    ended = run("verify.py", tmp_path, str(tmp_path))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1].startswith(f"error: {tmp_path}: no finished output (no manifest.json)")
