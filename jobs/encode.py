"""Encode images: `uv run jobs/encode.py --model models:/digits@champion --data DATA --output DIRECTORY`.

The same command continues an encoding that was interrupted, makes lost shards again, and leaves a complete one alone.
"""

from collections.abc import Sequence

from pipelines.cli.config import parse
from pipelines.cli.console import run_job, summary, waiting
from pipelines.encoding.config import EncodeConfig


def main(argv: Sequence[str]) -> None:
    """Parse, encode, print the summary."""
    config = parse(EncodeConfig, argv, "Encode images as the noise that a deterministic sampler makes them of.")
    with waiting("loading PyTorch", at_once=True):  # after parsing, so that --help and a refused field come at once
        from pipelines.encoding.job import encode

    result = encode(config)
    summary(result.title, result.rows)


if __name__ == "__main__":
    run_job(main)
