"""Compare samples with a reference: `uv run jobs/quality.py --samples SAMPLES --reference DATA --output DIRECTORY`.

The same command continues a comparison that was interrupted and leaves a complete one alone.
"""

from collections.abc import Sequence

from pipelines.cli.config import parse
from pipelines.cli.console import run_job, summary, waiting
from pipelines.quality.config import QualityConfig


def main(argv: Sequence[str]) -> None:
    """Parse, compare, print the summary."""
    config = parse(QualityConfig, argv, "Compare a set of images with a reference: how good are the samples?")
    with waiting("loading PyTorch", at_once=True):  # after parsing, so that --help and a refused field come at once
        from pipelines.quality.job import quality

    result = quality(config)
    summary(result.title, result.rows)
    if result.failure is not None:
        raise result.failure


if __name__ == "__main__":
    run_job(main)
