"""What the tests of the encoding job share: configurations for a tiny model, and its shards without the job."""

from pathlib import Path
from typing import Any

from support.sample_runs import save_tiny_model

from ddpm_core.model import load_model
from pipelines.cluster.config import GpuClusterConfig
from pipelines.data.dataset import PreparedDataset
from pipelines.encoding.config import EncodeConfig
from pipelines.encoding.request import EncodeRequest, request_of
from pipelines.encoding.shard import EncodeShards
from pipelines.models.find import find_model
from pipelines.sampling.sampler_config import SamplerConfig
from pipelines.storage.location import Location


def tiny_encoding(root: Path, data: PreparedDataset, **fields: Any) -> EncodeConfig:
    """Shards of 6 images in 2 batches by 5 steps of DDIM; `sampler` may be a mapping of the fields to change."""
    if not (root / "model").exists():
        save_tiny_model(root / "model")
    values: dict[str, Any] = {
        "model": str(root / "model"),
        "data": data.location.uri,
        "output": str(root / "encoding"),
        "batch_size": 3,
        "precision": "fp32",
        "shard_size": 6,
        "cluster": GpuClusterConfig(num_workers=2),
        "root": str(root / "home"),
    }
    sampler = SamplerConfig(**{"name": "ddim", "steps": 5, **fields.pop("sampler", {})})
    return EncodeConfig(**{**values, "sampler": sampler, **fields})


def request_by_hand(config: EncodeConfig, data: PreparedDataset) -> EncodeRequest:
    """As the job makes it."""
    return request_of(config, load_model(config.model), data)


def shards_of(config: EncodeConfig, data: PreparedDataset) -> EncodeShards:
    """The function of an encoding's shards; the output holds the model."""
    location = Location.parse(config.output)
    find_model(config.model, None, Path(config.root)).keep(location / "model")
    return EncodeShards(location, request_by_hand(config, data), data, threads=1)
