"""What the tests of the evaluation job share: a tiny model, configurations for it, the job's computation by itself."""

import io
from pathlib import Path
from typing import Any

import pandas as pd
from support.sample_runs import save_tiny_model

from ddpm_core.model import Model, load_model
from pipelines.cluster.config import GpuClusterConfig
from pipelines.data.dataset import PreparedDataset
from pipelines.data.hold_out import HoldOut
from pipelines.evaluation import first_pass, results
from pipelines.evaluation.config import EvaluateConfig, OdeConfig
from pipelines.evaluation.inputs import Inputs, request_of
from pipelines.evaluation.kind import EVALUATION
from pipelines.evaluation.request import EvaluateRequest
from pipelines.evaluation.results import Evaluation
from pipelines.evaluation.shard import TermShards
from pipelines.evaluation.terms import bound_for
from pipelines.models.find import find_model
from pipelines.models.used import UsedModel
from pipelines.storage.location import Location

ROWS = 70


def tiny_evaluation(root: Path, data: PreparedDataset, **fields: Any) -> EvaluateConfig:
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


def in_process(
    config: EvaluateConfig, data: PreparedDataset, hold_out: HoldOut | None = None
) -> tuple[Evaluation, pd.DataFrame, Model]:
    """The job's computation, in this process: numbers, rows, model."""
    found, model = find_model(config.model, None, Path(config.root)), load_model(config.model)
    location = Location.parse(config.output)
    inputs = Inputs(UsedModel(found, model), data, data, hold_out)
    request = request_of(config, inputs)
    output = EVALUATION.output(location, request)
    output.begin()
    found.keep(location / "model")
    first = first_pass.FirstPass(location, request, data, data, 1)
    output.compute(first, first.num_parts, into=first_pass.DIRECTORY, suffix=first_pass.SUFFIX)
    num_shards = -(-len(request.order(inputs.num_rows)) // config.shard_size)
    records = output.compute(TermShards(location, request, data, 1), num_shards)
    names = [record.name for record in records]
    rows = pd.concat(pd.read_parquet(io.BytesIO((output.shards / name).read_bytes())) for name in names)
    return results.results(location, request, names, bound_for(request, model), inputs.num_rows), rows, model
