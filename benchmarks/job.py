"""Training speed of the whole job through Ray Data and Ray Train, for benchmarks/train.py and object_storage.py."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from random_data import make_data

from ddpm_core.config import UNetConfig
from pipelines.cluster.precision import PrecisionField
from pipelines.tracking.spool import iter_records
from pipelines.training.config import (
    CheckpointConfig,
    DataConfig,
    GridConfig,
    OptimizationConfig,
    TrainClusterConfig,
    TrainConfig,
    ValidationConfig,
)
from pipelines.training.driver import train
from pipelines.training.network import NetworkConfig


@dataclass(frozen=True)
class JobSpeed:
    """Images per second, and seconds per step that the step waited for its images."""

    images_per_second: float
    wait_per_step: float


def job_rate(network: UNetConfig, batch_size: int, steps: int, precision: PrecisionField, gpus: int) -> float:
    """Images/s of a training job with one worker on data on the local disk; see `job_speed`."""
    with tempfile.TemporaryDirectory() as directory:
        data = make_data(Path(directory), 20_000, (*network.height_width, network.in_channels))
        return job_speed(data.location.uri, network, batch_size, steps, precision, gpus).images_per_second


def job_speed(
    data: str, network: UNetConfig, batch_size: int, steps: int, precision: PrecisionField, gpus: int = 0
) -> JobSpeed:
    """Speed of a training job with one worker, from its own record of when each step was done.

    The first tenth of the steps (first batch, allocators, kernel selection) is left out, up to a report.
    Everything else that a job does while it trains is in: reading and shuffling, the ledger, reports, metrics, the
    tracker.
    """
    with tempfile.TemporaryDirectory() as directory:
        config = TrainConfig(
            name="benchmark",
            root=directory,
            data=DataConfig(train=data, validation=None),
            network=NetworkConfig(
                network.base_channels,
                network.channel_multipliers,
                network.num_res_blocks,
                network.attention_resolutions,
                network.num_heads,
                network.num_groups,
                network.dropout,
            ),
            precision=precision,
            batch_size=batch_size,
            train=OptimizationConfig(steps=steps),
            checkpoint=CheckpointConfig(every_steps=steps),
            validation=ValidationConfig(every_steps=steps),
            grid=GridConfig(every_steps=steps, num_images=1, sampler_steps=1),
            cluster=TrainClusterConfig(gpus_per_worker=gpus),
        )
        train(config)
        spool = Path(directory) / "runs" / "benchmark" / "tracking" / "spool.jsonl"
        metrics = [record for record in iter_records(spool) if record.kind == "metrics"]
    told = [(record.payload["step"], record.timestamp_ms / 1000, record.payload["values"]) for record in metrics]
    times = {step: seconds for step, seconds, values in told if "train/loss" in values}
    # A report tells of the steps since the one before.
    waits = {step: values["data_wait_seconds"] for step, _, values in told if "data_wait_seconds" in values}
    first = min(step for step in waits if step >= steps // 10)
    waited = sum(seconds for step, seconds in waits.items() if step > first)
    return JobSpeed((steps - first) * batch_size / (times[steps] - times[first]), waited / (steps - first))
