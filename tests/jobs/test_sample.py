"""The commands `jobs/sample.py` and `jobs/verify.py` as a user runs them: refusals in one line, nothing written."""

from pathlib import Path

from support.job_process import check_refusals, run_job


def test_what_sampling_refuses(tmp_path: Path) -> None:
    check_refusals(
        "sample.py",
        tmp_path,
        ["--model", "nowhere", "--output", "out"],
        [
            (["--num_images", "0"], 2, "num_images = 0: must be at least 1"),
            (["--num_images", "5"], 1, "model = nowhere: holds neither a model"),
        ],
    )


def test_verify_takes_its_output_without_a_name(tmp_path: Path) -> None:
    ended = run_job("verify.py", tmp_path, str(tmp_path))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1].startswith(f"error: {tmp_path}: no finished output (no manifest.json)")
