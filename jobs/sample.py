"""Generate images: `uv run jobs/sample.py --model models:/digits@champion --output DIRECTORY --num_images 1000`.

The same command continues a sample set that was interrupted, makes lost shards again, and leaves a complete one
alone.
"""

from collections.abc import Sequence

from pipelines.cli.config import parse
from pipelines.cli.console import run_job, summary, waiting
from pipelines.sampling.config import SampleConfig


def main(argv: Sequence[str]) -> None:
    """Parse, sample, print the summary."""
    config = parse(SampleConfig, argv, "Generate images with a trained model.")
    with waiting("loading PyTorch", at_once=True):  # after parsing, so that --help and a refused field come at once
        from pipelines.sampling.job import sample

    result = sample(config)
    summary(result.title, result.rows)


if __name__ == "__main__":
    run_job(main)
