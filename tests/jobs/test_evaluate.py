"""The command `jobs/evaluate.py` as a user runs it: refusals in one line, nothing written."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_what_evaluation_refuses(tmp_path: Path) -> None:
    outside = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PYTHONPATH"}
    environment = {key: value for key, value in os.environ.items() if key not in outside}
    for arguments, code, line in (
        (["--target_halfwidth", "0"], 2, "target_halfwidth = 0.0: must be above 0 (bits/dim)"),
        (["--ode.steps", "5"], 2, "ode.steps = 5: must be an even number, at least 4"),
        (["--model", "nowhere"], 1, "model = nowhere: holds neither a model"),
    ):
        command = [sys.executable, str(REPOSITORY / "jobs" / "evaluate.py"), "--model", "m", "--data", "d", *arguments]
        ended = subprocess.run(
            [*command, "--output", "out"],
            cwd=tmp_path,
            env={**environment, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert (ended.returncode, ended.stdout) == (code, "")
        *said, message = ended.stderr.splitlines()  # what the job is at, and how it ended
        assert message.startswith(f"error: {line}")
        assert not any("error" in each for each in said)
    assert list(tmp_path.iterdir()) == []
