"""The command `jobs/evaluate.py` as a user runs it: refusals in one line, nothing written."""

from pathlib import Path

from support.job_process import check_refusals


def test_what_evaluation_refuses(tmp_path: Path) -> None:
    check_refusals(
        "evaluate.py",
        tmp_path,
        ["--model", "m", "--data", "d", "--output", "out"],
        [
            (["--target_halfwidth", "0"], 2, "target_halfwidth = 0.0: must be above 0 (bits/dim)"),
            (["--ode.steps", "5"], 2, "ode.steps = 5: must be an even number, at least 4"),
            (["--model", "nowhere"], 1, "model = nowhere: holds neither a model"),
        ],
    )
