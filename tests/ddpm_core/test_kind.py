"""The line that tells a person what kind of model it is."""

from typing import Any

import pytest

from ddpm_core.kind import kind_of

LINEAR = {"name": "linear", "num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
GAMMA = {"gamma_min": -13.3, "gamma_max": 5.0}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"schedule": LINEAR}, "ε-prediction, linear T = 1,000"),
        (
            {"schedule": {"name": "cosine", "num_timesteps": 4000}, "network": {"learned_variance": True}},
            "ε-prediction, cosine T = 4,000, learned σ²",
        ),
        (
            {"denoiser": "v", "schedule": {**LINEAR, "zero_terminal_snr": True}},
            "v-prediction, linear T = 1,000 with zero terminal SNR",
        ),
        ({"denoiser": "x_0", "schedule": {"name": "table", "betas": [0.1] * 7}}, "x_0-prediction, own table T = 7"),
        ({"schedule": {"name": "alpha_sigma", "alpha": [1.0], "sigma": [9.0]}}, "ε-prediction, own table T = 1"),
        (
            {"denoiser": "residual_eps", "schedule": {"name": "gamma_linear", **GAMMA}},
            "residual ε-prediction, continuous time, γ from -13.3 to 5",
        ),
        (
            {"denoiser": "v", "schedule": {"name": "gamma_learned", **GAMMA, "learned_ends": False}},
            "v-prediction, continuous time, learned γ from -13.3 to 5",
        ),
        (
            {"schedule": {"name": "gamma_learned", **GAMMA, "learned_ends": True}},
            "ε-prediction, continuous time, learned γ with learned ends",
        ),
        (
            {
                "denoiser": "edm",
                "schedule": {
                    "name": "gamma_linear",
                    "gamma_min": -12.429216196844383,
                    "gamma_max": 8.764053269347762,
                    "family": "exploding",
                },
            },
            "EDM preconditioning, continuous time, σ from 0.002 to 80",
        ),
    ],
)
def test_prediction_process_and_learned_variances_are_told(config: dict[str, Any], told: str) -> None:
    assert kind_of({"network": {}, **config}) == told


def test_the_number_of_classes_is_told() -> None:
    config = {"network": {"num_classes": 1000}, "schedule": {"name": "linear", "num_timesteps": 1000}}
    assert kind_of(config) == "ε-prediction, linear T = 1,000, 1,000 classes"
