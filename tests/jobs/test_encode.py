"""The command `jobs/encode.py` as a user runs it: refusals in one line, nothing written."""

from pathlib import Path

from support.job_process import check_refusals


def test_what_encoding_refuses(tmp_path: Path) -> None:
    check_refusals(
        "encode.py",
        tmp_path,
        ["--model", "m", "--data", "d", "--output", "out"],
        [
            (["--sampler.name", "ddpm"], 2, "sampler.name = 'ddpm': draws noise, and no way leads back"),
            (["--labels", "both"], 2, "labels"),
            (["--model", "nowhere"], 1, "model = nowhere: holds neither a model"),
        ],
    )
