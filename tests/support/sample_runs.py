"""What the tests of the sampling job share: tiny models without training, and configurations for them."""

from pathlib import Path
from typing import Any

import torch

from ddpm_core.config import UNetConfig
from ddpm_core.model import save_model
from ddpm_core.networks.unet import UNet
from ddpm_core.parameterizations import EpsDenoiser
from ddpm_core.process.discrete import DiscreteProcess
from pipelines.cluster.config import GpuClusterConfig
from pipelines.sampling.config import SampleConfig
from pipelines.sampling.sampler_config import SamplerConfig

NETWORK = UNetConfig(8, 1, 8, (1, 2), 1, (4,), num_heads=1, dropout=0.0, num_groups=4)


def tiny_state(weights_seed: int = 0, network: UNetConfig = NETWORK, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """Random weights everywhere, also where a new network has zeros."""
    torch.manual_seed(weights_seed)
    unet = UNet(network)
    return {name: torch.randn_like(value) * scale for name, value in unet.state_dict().items()}


def save_tiny_model(
    directory: Path,
    weights_seed: int = 0,
    network: UNetConfig = NETWORK,
    timesteps: int = 20,
    scale: float = 0.1,
    step: int = 7,
    extra: dict[str, Any] | None = None,
) -> str:
    """A model of `tiny_state`; returns the model id."""
    state = tiny_state(weights_seed, network, scale)
    extra = extra or {
        "step": step,
        "dataset": {"id": "d" * 64, "uri": "/data/tiny", "num_rows": 9},
        "code_version": "0.0+src.abc",
    }
    denoiser = EpsDenoiser.build(network, DiscreteProcess.linear(timesteps))
    return save_model(directory, state, denoiser, extra)


def tiny(root: Path, **fields: Any) -> SampleConfig:
    """A sample set of 22 images in 4 shards, each but the last of 2 batches, by 5 steps of DDIM.

    `sampler` may be a mapping of the fields in its section to change: `sampler={"steps": 6}`.
    """
    if not (root / "model").exists():
        save_tiny_model(root / "model")
    values: dict[str, Any] = {
        "model": str(root / "model"),
        "output": str(root / "samples"),
        "num_images": 22,
        "seed": 3,
        "batch_size": 3,
        "precision": "fp32",
        "shard_size": 6,
        "cluster": GpuClusterConfig(num_workers=2),
        "root": str(root / "home"),
    }
    sampler = fields.pop("sampler", {})
    if not isinstance(sampler, SamplerConfig):
        sampler = SamplerConfig(**{"name": "ddim", "steps": 5, **sampler})
    return SampleConfig(**{**values, "sampler": sampler, **fields})
