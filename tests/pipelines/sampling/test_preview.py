"""The preview of a sample set by class."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from support.sample_runs import tiny

from ddpm_core.model import load_model
from pipelines.outputs.pictures import encode_png, grid_png, to_picture
from pipelines.outputs.shards import ShardRecord
from pipelines.sampling.labels import SampleLabels
from pipelines.sampling.preview import preview_png
from pipelines.sampling.request import request_of
from pipelines.sampling.shard import RowLabels, encode_parquet
from pipelines.storage.location import Location


@pytest.mark.parametrize(("num_classes", "shown"), [(3, [0, 1, 2]), (31, list(range(0, 31, 2)))])
def test_of_many_classes_those_are_shown_that_are_spread_over_all(
    tmp_path: Path, num_classes: int, shown: list[int]
) -> None:
    names, each = [f"class {index}" for index in range(num_classes)], 2
    total = each * num_classes
    labels = SampleLabels(total, tuple(range(num_classes)), (each,) * num_classes)
    images = np.random.default_rng(0).integers(0, 256, (total, 8, 8, 1), np.uint8)
    records = []
    for shard, start in enumerate(range(0, total, 6)):
        ids = np.arange(start, min(start + 6, total))
        pngs = [encode_png(to_picture(images[index])) for index in ids]
        content = encode_parquet(start, pngs, RowLabels(labels.of(ids), names))
        (tmp_path / f"part-{shard:05d}.parquet").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        records.append(ShardRecord(f"part-{shard:05d}.parquet", len(ids), len(content), digest, {}))
    config = tiny(tmp_path, num_images=total)
    request = request_of(config, load_model(config.model))
    picture = preview_png(Location.parse(tmp_path), records, request, labels, names)
    expected = np.concatenate([images[each * label : each * label + each] for label in shown])
    assert picture == grid_png(expected, each, row_names=[names[label] for label in shown])
