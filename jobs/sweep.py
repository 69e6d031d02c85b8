"""Train variants: `uv run jobs/sweep.py --config base.yaml --vary train.learning_rate=1e-4,3e-4 --vary seed=0,1`.

The same command continues a sweep that was interrupted; finished trainings are left alone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.cli.console import run_job, summary, waiting
from pipelines.sweeps.variants import sweep_of


def main(argv: Sequence[str]) -> None:
    """Parse, train, print the table."""
    asked = sweep_of(argv)
    with waiting("loading", at_once=True):  # after parsing, so that --help and a refused field come at once
        from pipelines.sweeps.job import sweep

    result = sweep(asked, [sys.executable, str(Path(__file__).with_name("train.py"))])
    summary(result.title, result.rows)
    if result.failure is not None:
        raise result.failure


if __name__ == "__main__":
    run_job(main)
