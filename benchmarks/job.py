"""Training speed of the whole job through Ray Data and Ray Train, for benchmarks/train.py."""

import tempfile
from pathlib import Path

from random_data import make_data

from ddpm_core.unet import UNetConfig
from pipelines.tracking.spool import iter_records
from pipelines.training.config import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    GridConfig,
    NetworkConfig,
    OptimizationConfig,
    TrainConfig,
    ValidationConfig,
)
from pipelines.training.job import train


def job_rate(network: UNetConfig, batch_size: int, steps: int, precision: str, use_gpu: bool) -> float:
    """Images/s of a training job with one worker, from its own record of when each step was done.

    The first tenth of the steps (first batch, allocators, kernel selection) is left out. Everything else that
    a job does while it trains is in: reading and shuffling, the ledger, reports, metrics, the tracker.
    """
    height, width = network.height_width
    with tempfile.TemporaryDirectory() as directory:
        data = make_data(Path(directory) / "data", 20_000, (height, width, network.in_channels))
        config = TrainConfig(
            name="benchmark",
            root=directory,
            data=DataConfig(train=data.location.uri, validation=None),
            network=NetworkConfig(
                network.base_channels,
                network.channel_multipliers,
                network.num_res_blocks,
                network.attention_resolutions,
                network.num_heads,
                network.num_groups,
                network.dropout,
            ),
            train=OptimizationConfig(steps=steps, batch_size=batch_size, precision=precision),
            checkpoint=CheckpointConfig(every_steps=steps),
            validation=ValidationConfig(every_steps=steps),
            grid=GridConfig(every_steps=steps, num_images=1, sampler_steps=1),
            cluster=ClusterConfig(use_gpu=use_gpu),
        )
        train(config)
        times = {
            record.payload["step"]: record.timestamp_ms / 1000
            for record in iter_records(Path(directory) / "runs" / "benchmark" / "tracking" / "spool.jsonl")
            if record.kind == "metrics" and "train/loss" in record.payload["values"]
        }
    first = max(1, steps // 10)
    return (steps - first) * batch_size / (times[steps] - times[first])
