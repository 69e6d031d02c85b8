"""Measure bits/dim: `uv run jobs/evaluate.py --model models:/digits@champion --data DATA --output DIRECTORY`.

The same command continues an evaluation that was interrupted and leaves a complete one alone.
"""

from collections.abc import Sequence

from pipelines.cli.config import parse
from pipelines.cli.console import run_job, summary, waiting
from pipelines.evaluation.config import EvaluateConfig


def main(argv: Sequence[str]) -> None:
    """Parse, evaluate, print the summary."""
    config = parse(EvaluateConfig, argv, "Measure a model's bits per dimension on a data set.")
    with waiting("loading PyTorch", at_once=True):  # after parsing, so that --help and a refused field come at once
        from pipelines.evaluation.job import evaluate

    result = evaluate(config)
    summary(result.title, result.rows)
    if result.failure is not None:
        raise result.failure


if __name__ == "__main__":
    run_job(main)
