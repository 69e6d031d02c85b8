"""Check a finished output from its bytes: `uv run jobs/verify.py OUTPUT [--recompute 0.01]`."""

from collections.abc import Sequence

from pipelines.config import parse
from pipelines.console import event, run_job, summary
from pipelines.verify import VerifyConfig, verify


def main(argv: Sequence[str]) -> None:
    """Parse, verify, print the summary; what is off is printed line by line and ends in exit code 1."""
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--uri")
    result = verify(parse(VerifyConfig, arguments, "Check a data set or sample set against its manifest."))
    for problem in result.problems:
        event(f"wrong: {problem}")
    summary(result.title, result.rows)
    result.require_no_problems()


if __name__ == "__main__":
    run_job(main)
