"""Prepare a data set: `uv run jobs/ingest.py --source IMAGES --output DIRECTORY [--image_size 64]`.

The same command continues a run that was interrupted, and makes lost shards of a finished data set again.
"""

from collections.abc import Sequence
from contextlib import closing

from pipelines.cli.config import parse
from pipelines.cli.console import ProgressLine, Waiting, event, run_job, summary
from pipelines.data.ingest.account import account_rows
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.decode import ADAPTATIONS
from pipelines.data.ingest.job import ingest

_DESCRIPTION = (
    "Turn images into a prepared data set: 8 bits, grey or sRGB. Colours of an embedded ICC profile are converted to "
    "sRGB, EXIF orientation is applied, transparent pixels show the background, an animation gives its first frame."
)


class _Progress:
    """One progress line per stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._waiting = Waiting("finding the images")

    def __call__(self, stage: str, done: int, total: int, rate: float) -> None:
        self.close()
        if stage != self._stage:
            self._stage, self._line = stage, ProgressLine(stage, total, "images", first=f"{stage}: starting")
        self._line.update(done, rate)
        if done == total:
            self._line.close()

    def close(self) -> None:
        """What is waited for has begun, or will not."""
        self._waiting.close()


def main(argv: Sequence[str]) -> None:
    """Parse, ingest, print the summary."""
    config = parse(IngestConfig, argv, _DESCRIPTION)
    with closing(_Progress()) as progress:
        result = ingest(config, progress)
    data = result.dataset
    if result.restored:
        event(f"{data.location}: {result.restored} lost shard(s) made again, equal to what the manifest records")
    elif result.already_complete:
        trouble = "" if result.not_compared is None else f" (its source could not be compared: {result.not_compared})"
        event(f"{data.location} is already complete: nothing to do{trouble}")
    rows = [
        ("images", f"{data.num_rows:,} of {'x'.join(map(str, data.image_shape))} (H x W x C)"),
        ("classes", "none named" if data.label_names is None else ", ".join(data.label_names[:20])),
        ("rejected", f"{data.rejected:,} (reasons in {data.location / 'rejected.parquet'})"),
        *[("adapted", f"{count:,} {ADAPTATIONS[kind]}") for kind, count in sorted((result.adapted or {}).items())],
        *(account_rows(result.account) if result.account is not None else ()),
        ("shards", f"{len(data.shards)}, {sum(shard.bytes for shard in data.shards) / 2**20:,.1f} MiB"),
        ("data set id", data.dataset_id[:12]),
        ("output", data.location.uri),
    ]
    summary("Prepared data set", rows)


if __name__ == "__main__":
    run_job(main)
