"""Every sampler that a job can ask for: what a request stores of it, and that it is found again."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from support.sample_runs import NETWORK, tiny, tiny_state

from ddpm_core.model import load_model, save_model
from ddpm_core.parameterizations import VDenoiser
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.samplers.base import Clip, Sampler
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM
from ddpm_core.samplers.dpm_solver import DPMSolver
from ddpm_core.samplers.heun import Heun
from pipelines.cli.errors import ConfigError
from pipelines.sampling.request import SampleRequest, request_of
from pipelines.storage.location import Location

PATH = Location.parse("/out/manifest.json")
ASKED: list[tuple[dict[str, Any], Sampler, dict[str, Any], str]] = [
    ({"name": "ddpm", "steps": 7}, DDPM(steps=7), {"sigma2": "beta_tilde"}, "ddpm, 7 steps, σ² = beta_tilde"),
    (
        {"name": "ddim", "steps": 7, "spacing": "quadratic"},
        DDIM(7, 0.0, "quadratic"),
        {"eta": 0.0, "spacing": "quadratic"},
        "ddim, 7 steps, η = 0.0, spacing quadratic",
    ),
    ({"name": "dpmpp_2m", "steps": 7, "spacing": "time"}, DPMSolver(7, 2, 0, "time"), {}, "dpmpp_2m, 7 steps"),
    (
        {"name": "dpmpp_2m", "steps": None},
        DPMSolver(20, 2, 0, "log_snr"),
        {"spacing": "log_snr"},
        "dpmpp_2m, 20 steps, spacing log_snr",
    ),
    (
        {"name": "dpmpp_3m", "steps": 7, "spacing": "edm"},
        DPMSolver(7, 3, 0, "edm"),
        {"spacing": "edm"},
        "dpmpp_3m, 7 steps, spacing edm",
    ),
    (
        {"name": "dpmpp_2m_sde", "steps": 7},
        DPMSolver(7, 2, 1, "log_snr"),
        {"spacing": "log_snr"},
        "dpmpp_2m_sde, 7 steps, spacing log_snr",
    ),
    (
        {"name": "dpmpp_3m_sde", "steps": 7, "spacing": "time"},
        DPMSolver(7, 3, 1, "time"),
        {},
        "dpmpp_3m_sde, 7 steps",
    ),
    ({"name": "heun", "steps": 7}, Heun(7), {"spacing": "edm"}, "heun, 7 steps, spacing edm"),
    (
        {"name": "heun", "steps": 7, "churn": 20.0, "spacing": "time"},
        Heun(7, "time", 20.0),
        {"churn": 20.0, "churn_noise": 1.0},
        "heun, 7 steps, churn 20",
    ),
    (
        {
            "name": "heun",
            "steps": 7,
            "churn": 20.0,
            "churn_interval": (0.05, 50.0),
            "churn_noise": 1.003,
            "spacing": "time",
        },
        Heun(7, "time", 20.0, (0.05, 50.0), 1.003),
        {"churn": 20.0, "churn_interval": [0.05, 50.0], "churn_noise": 1.003},
        "heun, 7 steps, churn 20",
    ),
]


@pytest.mark.parametrize(("asked", "sampler", "stored", "described"), ASKED)
def test_a_sampler_is_stored_and_found_again(
    tmp_path: Path, asked: dict[str, Any], sampler: Sampler, stored: dict[str, Any], described: str
) -> None:
    config = tiny(tmp_path, sampler=asked)
    request = request_of(config, load_model(tmp_path / "model"))
    assert request.sampler == sampler
    assert request.described_sampler == described
    values = request.to_json()
    options = {"eta": None, "sigma2": None, **stored}
    assert (values["sampler"], values["steps"]) == (asked["name"], asked["steps"] or 20)
    assert {name: value for name, value in values.items() if name in options or "churn" in name or "spac" in name} == (
        options
    )
    assert (
        SampleRequest.from_json(json.loads(json.dumps(values)), PATH) == request == pickle.loads(pickle.dumps(request))
    )
    assert request.with_steps(9).sampler.steps == request.with_steps(9).steps == 9  # type: ignore[attr-defined]


def test_without_a_grid_a_model_that_ends_at_snr_0_is_sampled_evenly_in_time(tmp_path: Path) -> None:
    process = DiscreteProcess.linear(20).rescaled_to_zero_terminal_snr()
    save_model(tmp_path / "model", tiny_state(), VDenoiser.build(NETWORK, process), {"step": 1})
    for name, made in (("heun", Heun(7, "time")), ("dpmpp_3m_sde", DPMSolver(7, 3, 1, "time"))):
        config = tiny(tmp_path, sampler={"name": name, "steps": 7})
        assert request_of(config, load_model(tmp_path / "model")).sampler == made


def test_a_grid_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    process = DiscreteProcess.linear(20).rescaled_to_zero_terminal_snr()
    save_model(tmp_path / "model", tiny_state(), VDenoiser.build(NETWORK, process), {"step": 1})
    for spacing in ("log_snr", "edm"):
        with pytest.raises(ConfigError, match=rf"^sampler\.spacing: '{spacing}' needs a process that ends above SNR 0"):
            request_of(tiny(tmp_path, sampler={"name": "heun", "spacing": spacing}), load_model(tmp_path / "model"))


def test_clipping_is_stored_beside_the_sampler(tmp_path: Path) -> None:
    config = tiny(tmp_path, dynamic_threshold=99.5)
    values = request_of(config, load_model(tmp_path / "model")).to_json()
    assert (values["clip_x_0"], values["dynamic_threshold"]) == (True, 99.5)
    request = SampleRequest.from_json(values, PATH)
    assert request.clip == Clip(99.5)
    for wrong, rule in (({"dynamic_threshold": 0.0}, "percentile"), ({"dynamic_threshold": 101.0}, "percentile"),
                        ({"dynamic_threshold": 99.0, "clip_x_0": False}, "is a way of clipping")):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"^dynamic_threshold = .*{rule}"):
            tiny(tmp_path, **wrong)
    for ids, sampler in (((-1, 2), "ddim"), ((1, 2), "ddpm")):
        with pytest.raises(ConfigError, match=r"^interpolate = "):
            tiny(tmp_path, interpolate=ids, sampler={"name": sampler})
    beyond = tiny(tmp_path, num_images=8, interpolate=(1, 8), sampler={"name": "ddim"})
    with pytest.raises(ConfigError, match=r"^interpolate = \(1, 8\): must be two ids of the images, 0\.\.7$"):
        request_of(beyond, load_model(tmp_path / "model"))
