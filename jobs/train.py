"""Train a DDPM: `uv run jobs/train.py`, or `ray job submit -- python jobs/train.py --config configs/….yaml`.

With no arguments it trains on 8x8 digits that come with the package, on this machine, into ~/ddpm. The same
command resumes a run that was interrupted; a finished run is left alone.
"""

from collections.abc import Sequence

from pipelines.cli.config import parse
from pipelines.cli.console import run_job, summary, waiting
from pipelines.training.config import TrainConfig


def main(argv: Sequence[str]) -> None:
    """Parse, train, print the summary."""
    config = parse(TrainConfig, argv, "Train a denoising diffusion model (DDPM) on prepared images.")
    with waiting("loading", at_once=True):  # after parsing, so that --help and a refused field come at once
        from pipelines.training.driver import train

    result = train(config)
    summary(result.title, result.rows)


if __name__ == "__main__":
    run_job(main)
