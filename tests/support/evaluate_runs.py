"""What the tests of the evaluation job share: a tiny model and configurations for it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cluster.config import GpuClusterConfig
from pipelines.evaluation.config import EvaluateConfig, OdeConfig
from pipelines.evaluation.request import EvaluateRequest
from support.sample_runs import save_tiny_model

if TYPE_CHECKING:
    from pipelines.data.dataset import PreparedDataset

ROWS = 70


def tiny_evaluation(root: Path, data: "PreparedDataset", **fields: Any) -> EvaluateConfig:
    """70 images in 5 shards, 8 + 2 evaluations each, of a model with T = 20."""
    if not (root / "model").exists():
        save_tiny_model(root / "model")
    values: dict[str, Any] = {
        "model": str(root / "model"),
        "data": data.location.uri,
        "train_data": data.location.uri,
        "output": str(root / "evaluation"),
        "timesteps_per_image": 8,
        "seed": 3,
        "batch_size": 24,
        "precision": "fp32",
        "shard_size": 16,
        "cluster": GpuClusterConfig(num_workers=2),
        "root": str(root / "home"),
    }
    return EvaluateConfig(**{**values, **fields})


def evaluate_request(**fields: Any) -> EvaluateRequest:
    """8 time steps of each image, in batches of 24 evaluations."""
    values: dict[str, Any] = {
        "model_id": "m" * 64,
        "dataset_id": "d" * 64,
        "estimator": "stratified",
        "timesteps_per_image": 8,
        "draws": None,
        "sigma2": "beta_tilde",
        "num_images": None,
        "target_halfwidth": None,
        "seed": 3,
        "dtype": "float32",
        "device": "cpu",
        "by_label": False,
        "train_dataset_id": None,
        "ode": OdeConfig(),
        "batch_size": 24,
        "shard_size": 16,
    }
    return EvaluateRequest(**{**values, **fields})
