"""What the tests of the training job share: tiny real runs, and how their traces are read."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from pipelines.data.epochs import Epochs
from pipelines.data.hold_out import HoldOut
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest
from pipelines.data.ledger import Ledger
from pipelines.models.checkpoints import CheckpointStore
from pipelines.storage.location import Location
from pipelines.training.config import (
    CheckpointConfig,
    DataConfig,
    GridConfig,
    OptimizationConfig,
    TrainClusterConfig,
    TrainConfig,
    TrainTrackingConfig,
    ValidationConfig,
)
from pipelines.training.diffusion import DiffusionConfig
from pipelines.training.network import NetworkConfig

# A user's own cluster and tracking server are none of the tests' business.
for _name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
    os.environ.pop(_name, None)

ROWS, BATCH = 100, 16


def prepare_images(directory: Path, name: str, count: int, side: int = 32) -> str:
    """Ingest `count` random colour images; returns the prepared data set's path."""
    source, output = directory / f"{name}-images", directory / name
    source.mkdir()
    for index, pixels in enumerate(np.random.default_rng(count).integers(0, 256, (count, side, side, 3), np.uint8)):
        Image.fromarray(pixels).save(source / f"{index:04d}.png")
    ingest(IngestConfig(str(source), str(output)))
    return str(output)


def prepare_classes(directory: Path, name: str, counts: Mapping[str, int], side: int = 16) -> str:
    """Ingest so many random grey images of each class, in folders of their names; returns the data set's path."""
    source, output, rng = directory / f"{name}-images", directory / name, np.random.default_rng(len(counts))
    for label, count in counts.items():
        (source / label).mkdir(parents=True)
        for index, pixels in enumerate(rng.integers(0, 256, (count, side, side), np.uint8)):
            Image.fromarray(pixels).save(source / label / f"{index:04d}.png")
    ingest(IngestConfig(str(source), str(output)))
    return str(output)


def tiny(root: Path, name: str, num_workers: int = 1, **changes: Any) -> TrainConfig:
    """A training of 24 steps over almost four epochs, in two windows, that reaches everything once.

    `changes` holds fields, and for a section a mapping of its fields to change: `train={"steps": 12}`.
    """
    config = TrainConfig(
        name=name,
        root=str(root),
        data=DataConfig(str(root / "train"), str(root / "validation"), random_flip=True, window_mib=1),
        network=NetworkConfig(8, (1, 2), 1, attention_resolutions=(16,), num_heads=1, num_groups=4, dropout=0.0),
        diffusion=DiffusionConfig(num_timesteps=50),
        precision="fp32",
        batch_size=BATCH,
        train=OptimizationConfig(steps=24, learning_rate=1e-3, warmup_steps=5, ema_decay=0.9),
        checkpoint=CheckpointConfig(every_steps=6, keep=2),
        validation=ValidationConfig(every_steps=12, num_images=10, timesteps_per_image=4, batch_size=8),
        grid=GridConfig(every_steps=12, num_images=4, sampler_steps=4),
        cluster=TrainClusterConfig(num_workers=num_workers, threads_per_worker=1),
        tracking=TrainTrackingConfig(every_steps=5),
    )
    return changed(config, **changes)


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The config with other fields, see `tiny`."""
    values = {
        key: replace(getattr(config, key), **value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return replace(config, **values)


def run_directory(config: TrainConfig) -> Location:
    return Location.parse(config.root) / "runs" / config.name


def checkpoints(config: TrainConfig) -> CheckpointStore:
    return CheckpointStore.open(run_directory(config).uri)


def final_state(config: TrainConfig) -> dict[str, bytes]:
    """Weights, optimizer, EMA and ledger of the last step."""
    checkpoint = checkpoints(config).load(config.train.steps)
    names = ("weights.safetensors", "optimizer.safetensors", "model/ema.safetensors", "ledger.parquet")
    return {name: checkpoint.read(name) for name in names}


def ledger(config: TrainConfig) -> Ledger:
    return Ledger.from_bytes(final_state(config)["ledger.parquet"])


def assert_each_row_once(config: TrainConfig) -> None:
    """Every finished epoch used every row exactly once, and the last one the rows that were due, once each."""
    used, rows_due = ledger(config), config.train.steps * config.batch_size
    used.check(Epochs(HoldOut(ROWS)), config.train.steps, config.batch_size)
    assert used.total() == rows_due
    for epoch in range(rows_due // ROWS):
        assert used.ids(epoch).tolist() == list(range(ROWS))


def mlflow_run(config: TrainConfig) -> tuple[MlflowClient, Run]:
    """The one MLflow run of a training, in the database under its root."""
    client = MlflowClient(f"sqlite:///{config.root}/mlflow.db")
    experiment = client.get_experiment_by_name(config.name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def curve(config: TrainConfig, key: str = "train/loss") -> list[tuple[int, float]]:
    """(step, value) of every point of a metric, in order of step."""
    client, run = mlflow_run(config)
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))
