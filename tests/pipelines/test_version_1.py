"""Outputs of format version 1 stay readable for ever: what the first release wrote, and the numbers that it gave.

tests/fixtures/v1 holds a prepared data set (120 digits), a model, a run directory of 10 training steps and, in
expected.json, the requests, images, rows and losses that came of them. None of it is ever made again.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load as load_tensors
from support.train_runs import tiny

from ddpm_core.model import load_model
from ddpm_core.parameterizations import EpsDenoiser
from ddpm_core.process import process_from_config
from pipelines.data.dataset import PreparedDataset
from pipelines.data.epochs import Epochs
from pipelines.data.hold_out import HoldOut
from pipelines.data.ingest.decode import decode_image
from pipelines.data.ledger import Ledger
from pipelines.data.stream import StreamPlan, read_here
from pipelines.evaluation.config import EvaluateConfig, OdeConfig
from pipelines.evaluation.job import evaluate
from pipelines.models.checkpoints import CheckpointStore
from pipelines.models.find import find_model
from pipelines.sampling.config import SampleConfig
from pipelines.sampling.job import sample
from pipelines.sampling.sampler_config import SamplerConfig
from pipelines.sampling.shard import decode_shard
from pipelines.training.learner import Learner
from pipelines.verify.config import VerifyConfig
from pipelines.verify.job import verify

V1 = Path(__file__).parents[1] / "fixtures" / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text())

SAMPLES: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "ddpm, sigma2 beta, not clipped": {"sampler": SamplerConfig(sigma2="beta"), "clip_x_0": False},
    "ddim": {"sampler": SamplerConfig("ddim", 10)},
    "ddim, eta 0.5": {"sampler": SamplerConfig("ddim", 10, eta=0.5)},
    "run, ddpm": {"model": "run"},
}
EVALUATIONS: dict[str, dict[str, Any]] = {
    "all": {"estimator": "all"},
    "stratified, ode, by label": {"by_label": True, "ode": OdeConfig(num_images=2, steps=8, probes=2)},
    "importance, sigma2 beta": {"estimator": "importance", "sigma2": "beta"},
    "run, stratified, held out": {"model": "run", "held_out": True, "num_images": None},
}


@pytest.fixture(autouse=True)
def no_cluster_or_server_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the one MLflow database of all jobs here."""
    return tmp_path_factory.mktemp("root")


def manifest_of_the_same_request(output: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """What is asked for today is stored as it was then."""
    manifest: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    assert manifest["request"] == expected["request"]
    assert manifest["request_sha256"] == expected["request_sha256"]
    return manifest


@pytest.mark.parametrize("case", SAMPLES)
def test_images_are_the_same_within_one_level(case: str, root: Path, tmp_path: Path) -> None:
    fields = {"num_images": 4, "seed": 3, "batch_size": 4, "precision": "fp32", "root": str(root), **SAMPLES[case]}
    model = str(V1 / fields.pop("model", "model"))
    sample(SampleConfig(model=model, output=str(tmp_path / "samples"), **fields))
    expected = EXPECTED["samples"][case]
    manifest_of_the_same_request(tmp_path / "samples", expected)
    (shard,) = (tmp_path / "samples" / "data").iterdir()
    images = [decode_image(png, None, None)[..., 0] for _, png in decode_shard(shard.read_bytes(), "parquet")]
    np.testing.assert_allclose(np.array(images, int), expected["images"], rtol=0, atol=1)


@pytest.mark.parametrize("case", EVALUATIONS)
def test_every_number_of_an_evaluation_is_the_same(case: str, root: Path, tmp_path: Path) -> None:
    """Within 1e-6, of its size where that is above 1: a float32 network on other CPUs moves them by half of that."""
    data = str(V1 / "data")
    fields = {"num_images": 16, "seed": 5, "timesteps_per_image": 16, "batch_size": 32, "precision": "fp32"}
    fields |= {"root": str(root), "data": data, "train_data": data, **EVALUATIONS[case]}
    model = str(V1 / fields.pop("model", "model"))
    evaluate(EvaluateConfig(model=model, output=str(tmp_path / "evaluation"), **fields))
    expected = EXPECTED["evaluations"][case]
    manifest = manifest_of_the_same_request(tmp_path / "evaluation", expected)
    means = {name: found["mean"] for name, found in manifest["results"]["means"].items()}
    assert means == pytest.approx(expected["means"], rel=1e-6, abs=1e-6)
    (shard,) = (tmp_path / "evaluation" / "terms").iterdir()
    rows = pq.read_table(shard)
    for column, numbers in expected["rows"].items():
        found, wanted = (np.array(values, float) for values in (rows[column].to_pylist(), numbers))  # null: NaN
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6, nan_ok=True), column


def test_a_run_directory_is_found_as_a_model_and_everything_in_it_is_right(tmp_path: Path) -> None:
    found = find_model(str(V1 / "run"), None, tmp_path)
    assert (found.name, found.uri) == ("run", str(V1 / "run" / "checkpoints" / "step-00000010" / "model"))
    assert found.model_id == EXPECTED["samples"]["run, ddpm"]["request"]["model_id"]
    assert found.score == "560.2737 ± 37.4084 bits/dim (4 validation images, σ² = beta_tilde)"
    assert load_model(found.uri).config["extra"]["step"] == 10
    for place in ("run", "data"):
        result = verify(VerifyConfig(str(V1 / place)))
        assert (result.problems, result.rows[-1]) == ([], ("verdict", "everything is right"))


def test_a_training_goes_on(tmp_path: Path) -> None:
    """From the stored weights, moments, averages and ledger, with the losses of the release that began it."""
    network = {"base_channels": 4, "channel_multipliers": (1, 1), "attention_resolutions": (4,), "num_groups": 2}
    config = tiny(
        tmp_path,
        "tiny",
        data={
            "train": str(V1 / "data"),
            "validation": "held-out",
            "hold_out": 20,
            "window_mib": 64,
            "random_flip": True,
        },
        network={**network, "dropout": 0.1},
        diffusion={"schedule": "cosine"},
        train={"steps": 14, "learning_rate": 5e-3},
    )
    checkpoint = CheckpointStore.open(str(V1 / "run")).newest()
    assert checkpoint is not None
    assert checkpoint.state["config"] == config.semantic()
    data = PreparedDataset.open(V1 / "data")
    assert checkpoint.state["dataset"]["id"] == data.dataset_id
    Ledger.from_bytes(checkpoint.read("ledger.parquet")).check(
        Epochs(HoldOut(data.num_rows, 20)), 10, config.batch_size
    )
    shape, process = config.network.unet_config(data.image_shape), config.diffusion.process()
    learner = Learner(lambda: EpsDenoiser.build(shape, process), config, torch.device("cpu"))
    names = ("weights.safetensors", "optimizer.safetensors", "model/ema.safetensors")
    learner.load(*(checkpoint.read(name) for name in names))
    assert learner.state() == {name: checkpoint.read(name) for name in names[:2]}
    torch.testing.assert_close(learner.ema.state_dict(), load_tensors(checkpoint.read(names[2])), rtol=0, atol=0)
    plan = StreamPlan.of(data, config.seed, config.batch_size, 14, 64 << 20, 20)
    losses = {str(batch.step + 1): float(learner.step(batch).loss) for batch in read_here(plan, data, 0, 1, 10)}
    assert losses == pytest.approx(EXPECTED["continued"], rel=1e-4)


def test_schedules_have_the_same_tables() -> None:
    for stored in EXPECTED["schedules"].values():
        process = process_from_config(stored["schedule"])
        assert process.to_config() == stored["schedule"]
        alpha = process.at(torch.arange(process.num_timesteps)).alpha.flatten()
        assert alpha.square().tolist() == pytest.approx(stored["abar"], rel=1e-12)
