"""Tiny trainings, one for each kind of process, prediction, objective and times, and their batches."""

from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from pipelines.data.stream import MicroBatch, Rows, shares
from pipelines.training.config import GridConfig, OptimizationConfig, TrainConfig, ValidationConfig
from pipelines.training.diffusion import DiffusionConfig
from pipelines.training.learner import Learner, StepResult, build
from pipelines.training.network import NetworkConfig
from pipelines.training.ranks import ALONE, Ranks

CPU = torch.device("cpu")
# Of an odd batch two ranks have shares of different size.
BATCH = 13


def configured(
    network: dict[str, Any], diffusion: dict[str, Any], train: dict[str, Any], precision: Any = "fp32"
) -> TrainConfig:
    return TrainConfig(
        precision=precision,
        batch_size=BATCH,
        network=NetworkConfig(8, (1, 2), 1, (4,), num_heads=1, num_groups=4, **network),
        diffusion=DiffusionConfig(num_timesteps=6, **diffusion),
        train=OptimizationConfig(learning_rate=3e-3, warmup_steps=2, ema_decay=0.9, **train),
        validation=ValidationConfig(timesteps_per_image=2),
        grid=GridConfig(sampler_steps=2),
    )


_VDM = {"prediction": "residual_eps", "gamma_min": -8.0, "gamma_max": 3.0}
_LEARNED = {**_VDM, "schedule": "gamma_learned"}
_FOURIER: dict[str, Any] = {"fourier_features": (0, 2)}
CASES: dict[str, TrainConfig] = {
    "simple": configured({}, {}, {}),
    "learned variance, vlb": configured({"learned_variance": True}, {"schedule": "cosine"}, {"loss": "vlb"}),
    "learned variance, hybrid": configured({"learned_variance": True}, {"schedule": "cosine"}, {"loss": "hybrid"}),
    "γ fixed": configured(_FOURIER, {**_VDM, "schedule": "gamma_linear"}, {"loss": "vlb"}),
    "γ learned": configured(_FOURIER, _LEARNED, {"loss": "vlb"}),
    "γ and ends learned": configured(
        _FOURIER, {**_LEARNED, "learned_ends": True}, {"loss": "vlb", "optimizer": "adamw", "weight_decay": 0.1}
    ),
    "γ and ends learned, T = 7": configured(
        {}, {**_LEARNED, "learned_ends": True}, {"loss": "vlb", "vlb_timesteps": 7, "times": "uniform"}
    ),
    "v without terminal SNR": configured({}, {"zero_terminal_snr": True, "prediction": "v"}, {}),
    "x_0, importance": configured({}, {"prediction": "x_0"}, {"loss": "min_snr", "times": "importance"}),
    "edm": configured({}, {"schedule": "edm", "prediction": "edm"}, {}),
}


def learner(config: TrainConfig, ranks: Ranks = ALONE) -> Learner:
    return Learner(lambda: build(config, (8, 8, 1)), config, CPU, ranks)


def batch(step: int, ranks: Ranks = ALONE) -> MicroBatch:
    """A rank's share of a step."""
    low, high = shares(BATCH, ranks.world_size)[ranks.rank]
    ids = np.arange(step * BATCH, (step + 1) * BATCH, dtype=np.int64)
    images = np.random.default_rng(step).integers(0, 256, (BATCH, 8, 8, 1), np.uint8)
    return MicroBatch(step, Rows(images[low:high], ids[low:high], np.zeros(high - low, np.int64)))


def train(trained: Learner, first: int, stop: int) -> list[StepResult]:
    """What steps `first` to `stop` - 1 give."""
    return [trained.step(batch(step, trained.ranks)) for step in range(first, stop)]


def saved(trained: Learner) -> dict[str, bytes]:
    """What a checkpoint has of a learner."""
    return {**trained.state(), "ema.safetensors": save_tensors(trained.ema.state_dict())}


def resumed(config: TrainConfig, files: dict[str, bytes], ranks: Ranks = ALONE) -> Learner:
    """A new learner that goes on from `saved`."""
    new = learner(config, ranks)
    names = ("weights", "optimizer", "ema", "objective")
    new.load(*(files.get(f"{name}.safetensors") for name in names))  # type: ignore[arg-type]  # objective may be None
    return new
