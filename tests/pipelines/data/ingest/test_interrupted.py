"""What an interrupted ingest says of what it leaves."""

import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.cli.console import Interrupted
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest


def test_the_parts_that_are_kept_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for index in range(20):
        Image.fromarray(np.full((8, 8), index, np.uint8)).save(source / f"{index}.png")
    config = IngestConfig(str(source), str(tmp_path / "out"))

    def interrupt(stage: str, done: int, total: int, rate: float) -> None:
        if stage == "write":
            raise Interrupted(signal.SIGINT)

    with pytest.raises(Interrupted) as interruption:
        ingest(config, interrupt)
    assert interruption.value.kept == "1 finished shard(s) are kept, run the same command to continue"
    assert ingest(config).dataset.num_rows == 20
