"""Check a training run or a finished output from its bytes: `uv run jobs/verify.py OUTPUT [--recompute 0.01]`."""

from collections.abc import Sequence

from pipelines.cli.config import parse
from pipelines.cli.console import event, run_job, summary, waiting
from pipelines.verify.config import VerifyConfig


def main(argv: Sequence[str]) -> None:
    """Parse, verify, print the summary; what is off is printed line by line and ends in exit code 1."""
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--uri")
    config = parse(VerifyConfig, arguments, "Check a training run or another output against what it records of itself.")
    with waiting("loading PyTorch", at_once=True):  # after parsing, so that --help and a refused field come at once
        from pipelines.verify.job import verify
    with waiting("reading"):
        result = verify(config)
    for problem in result.problems:
        event(f"wrong: {problem}")
    summary(result.title, result.rows)
    result.require_no_problems()


if __name__ == "__main__":
    run_job(main)
