"""What the tests of the quality job share: sets of small images, and configurations that compare them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cluster.config import GpuClusterConfig
from pipelines.data.dataset import PreparedDataset
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest
from pipelines.outputs.pictures import encode_png, to_picture
from pipelines.quality.config import QualityConfig

SIDE = 4


def blobs(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Images uint8 [count, 4, 4] whose 16 pixels are of a Gaussian distribution, in the middle of the range."""
    levels = np.random.default_rng(seed).normal(128.0 + shift, 20.0, (count, SIDE, SIDE))
    return levels.round().clip(0, 255).astype(np.uint8)


def prepared(path: Path, images: np.ndarray, labels: np.ndarray | None = None) -> PreparedDataset:
    """A prepared data set of grey images [n, H, W], by ingest of a Parquet file, as a user would make it."""
    pngs = [encode_png(to_picture(image[..., None])) for image in images]
    columns: dict[str, Any] = {"image": pngs} | ({} if labels is None else {"label": labels})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), f"{path}.parquet")
    return ingest(IngestConfig(f"{path}.parquet", str(path))).dataset


def compared(root: Path, samples: str | Path, reference: str | Path, **fields: Any) -> QualityConfig:
    """A comparison in pixels, in several shards of features and several blocks of neighbours."""
    values: dict[str, Any] = {
        "samples": str(samples),
        "reference": str(reference),
        "output": str(root / "quality"),
        "features": "pixels",
        "neighbours": 3,
        "batch_size": 16,
        "shard_size": 48,
        "block_size": 64,
        "cluster": GpuClusterConfig(),
        "root": str(root / "home"),
    }
    return QualityConfig(**{**values, **fields})
