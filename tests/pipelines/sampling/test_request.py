"""What a sample set's request is stored as: sample sets of before are found by it."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.sample_runs import save_tiny_model, tiny

from ddpm_core.model import load_model
from ddpm_core.samplers.ddim import DDIM
from pipelines.cli.config import digest
from pipelines.cli.errors import DataError
from pipelines.cluster.config import GpuClusterConfig
from pipelines.sampling.request import SampleRequest, request_of
from pipelines.sampling.sampler_config import SamplerConfig
from pipelines.sampling.samplers import SAMPLERS, SamplerKind
from pipelines.sampling.shard import Source, sample_batch
from pipelines.storage.location import Location

PATH = Location.parse("/out/manifest.json")
COMMON: dict[str, Any] = {
    "model_id": "m" * 64,
    "num_images": 22,
    "seed": 3,
    "clip_x_0": True,
    "dtype": "float32",
    "device": "cpu",
    "batch_size": 3,
    "shard_size": 6,
    "format": "parquet",
}
DDIM_5 = {**COMMON, "sampler": "ddim", "steps": 5, "eta": 0.0, "sigma2": None}
DDPM_20 = {**COMMON, "sampler": "ddpm", "steps": 20, "eta": None, "sigma2": "beta_tilde"}


@pytest.mark.parametrize(
    ("fields", "stored"),
    [
        ({}, DDIM_5),
        ({"sampler": {"steps": None}}, {**DDIM_5, "steps": 20}),
        ({"sampler": {"eta": 0.7}, "clip_x_0": False}, {**DDIM_5, "eta": 0.7, "clip_x_0": False}),
        ({"sampler": {"name": "ddpm", "steps": None}}, DDPM_20),
        ({"sampler": {"name": "ddpm", "steps": 20, "sigma2": "beta"}}, {**DDPM_20, "sigma2": "beta"}),
        (
            {"cluster": GpuClusterConfig(gpus_per_worker=0.5), "format": "webdataset"},
            {**DDIM_5, "device": "cuda", "format": "webdataset"},
        ),
    ],
)
def test_the_stored_values_are_those_of_version_1(tmp_path: Path, fields: dict[str, Any], stored: Any) -> None:
    model_id = save_tiny_model(tmp_path / "model")
    request = request_of(tiny(tmp_path, **fields), load_model(tmp_path / "model"))
    assert request.to_json() == {**stored, "model_id": model_id}
    again = SampleRequest.from_json(json.loads(json.dumps(request.to_json())), PATH)
    assert again == request == pickle.loads(pickle.dumps(request))
    assert again.on_gpu == (stored["device"] == "cuda")


def test_the_hashes_are_those_of_version_1() -> None:
    """As the code of before typed requests has computed them from the same fields."""
    assert [digest(SampleRequest.from_json(stored, PATH).to_json())[:16] for stored in (DDIM_5, DDPM_20)] == [
        "bc58e14609a12b50",
        "f1061a5b15a03f58",
    ]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"sampler": "euler"},
            f"request.sampler = 'euler': must be one of {', '.join(SAMPLERS)}",
        ),
        ({"eta": None}, "request.eta = None: must be a number"),
        ({"sigma2": "beta"}, "request.sigma2 = 'beta': must be null"),
        ({"steps": "5"}, "request.steps = '5': must be a whole number"),
        ({"order": 2}, "request.order = 2: is not known to this version"),
        ({"batch_size": None}, "request.batch_size = None: must be a whole number"),
    ],
)
def test_a_damaged_request_is_told_by_its_field(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=f"^/out/manifest.json: {told}; restore the file"):
        SampleRequest.from_json({**DDIM_5, **changed}, PATH)


@dataclass(frozen=True)
class Multistep(DDIM):
    """A sampler of another file, with an option that no other has."""

    order: int = 2


@dataclass(frozen=True)
class MultistepConfig(SamplerConfig):
    order: int = 2


def test_a_further_sampler_is_an_entry_and_its_options_are_keys_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = SamplerKind(
        Multistep,
        steps=lambda num_timesteps: num_timesteps or 7,
        chosen=lambda config, steps, denoiser: Multistep(steps, order=config.order),
        options=lambda multistep: {"order": multistep.order},
        stored=lambda read, steps: Multistep(steps, order=read("order", int)),
        described=lambda multistep: f", order {multistep.order}",
    )
    monkeypatch.setitem(SAMPLERS, "multistep", kind)
    config = tiny(tmp_path, sampler=MultistepConfig(cast(Any, "multistep"), 5, order=3))
    request = request_of(config, load_model(tmp_path / "model"))
    assert request.to_json() == {
        **DDIM_5,
        "model_id": request.model_id,
        "sampler": "multistep",
        "eta": None,
        "order": 3,
    }
    assert SampleRequest.from_json(request.to_json(), PATH) == request
    assert request.described_sampler == "multistep, 5 steps, order 3"
    images = sample_batch(request, Source(load_model(tmp_path / "model")), torch.arange(3))
    assert images.shape == (3, 8, 8, 1)
    with pytest.raises(DataError, match=r"request\.order = None: must be a whole number"):
        SampleRequest.from_json({**request.to_json(), "order": None}, PATH)


def test_the_samplers_options_are_told_to_a_person() -> None:
    ddim = SampleRequest.from_json(DDIM_5, PATH)
    assert (ddim.sampler, ddim.described_sampler) == (DDIM(5, 0.0), "ddim, 5 steps, η = 0.0")
    assert SampleRequest.from_json(DDPM_20, PATH).described_sampler == "ddpm, 20 steps, σ² = beta_tilde"
