"""Random images as a prepared data set, for the benchmarks."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.data.dataset import FORMAT, FORMAT_VERSION, PreparedDataset, dataset_id, encode_shard, rows_per_group
from pipelines.outputs.shards import ShardedOutput, ShardOutput
from pipelines.storage.location import Location

SHARD_ROWS = 20_000


def make_data(directory: Path, rows: int, shape: tuple[int, int, int]) -> PreparedDataset:
    """A prepared data set of `rows` random images of shape (H, W, C)."""

    def compute(index: int) -> ShardOutput:
        count = min(SHARD_ROWS, rows - index * SHARD_ROWS)
        images = np.random.default_rng(index).integers(0, 256, (count, *shape), np.uint8)
        labels, sources = pa.array([None] * count, pa.int64()), pa.array(["random"] * count)
        return ShardOutput(encode_shard(index * SHARD_ROWS, images, labels, sources), count)

    output = ShardedOutput(Location.parse(directory), {"rows": rows, "shape": list(shape)})
    output.begin()
    records = output.compute(lambda: compute, -(-rows // SHARD_ROWS))
    fields = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "dataset_id": dataset_id(shape, records),
        "num_rows": rows,
        "image_shape": list(shape),
        "label_names": None,
        "rows_per_group": rows_per_group(shape),
        "rejected": 0,
    }
    output.commit(fields, records)
    return PreparedDataset.open(output.location)
