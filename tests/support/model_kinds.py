"""A tiny model of every kind that there is: what the network predicts, and on which process."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from support.sample_runs import NETWORK

from ddpm_core.config import UNetConfig
from ddpm_core.denoiser import NetworkDenoiser
from ddpm_core.model import save_model
from ddpm_core.parameterizations import denoiser_named
from ddpm_core.process.base import Process
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess

_FOURIER = replace(NETWORK, fourier_features=(2, 3))
EXTRA = {"step": 7, "dataset": {"id": "d" * 64, "uri": "/data/tiny", "num_rows": 9}, "code_version": "0.0+src.abc"}


@dataclass(frozen=True)
class Kind:
    """How to make one.

    Attributes:
        denoiser: Its name in a config.json.
        process: Makes a new one.
        told: What a person is told of it.
        network: On images of one channel, 8x8.
    """

    denoiser: str
    process: Callable[[], Process]
    told: str
    network: UNetConfig = NETWORK

    def build(self, weights_seed: int = 0, scale: float = 0.1) -> NetworkDenoiser:
        """With random weights everywhere, also where a new network has zeros; a learned schedule is as it begins."""
        torch.manual_seed(weights_seed)
        denoiser = denoiser_named(self.denoiser).build(self.network, self.process())
        for parameter in denoiser.network.parameters():
            parameter.data.copy_(torch.randn_like(parameter) * scale)
        return denoiser.eval().requires_grad_(False)

    def save(self, directory: Path, weights_seed: int = 0, scale: float = 0.1) -> str:
        """A model's files; returns the model id."""
        denoiser = self.build(weights_seed, scale)
        return save_model(directory, denoiser.named_weights(), denoiser, EXTRA)


def _zero_terminal_snr() -> DiscreteProcess:
    return DiscreteProcess.linear(20).rescaled_to_zero_terminal_snr()


KINDS = {
    "eps": Kind("eps", lambda: DiscreteProcess.linear(20), "ε-prediction, linear T = 20"),
    "eps, exploding": Kind(
        "eps",
        lambda: DiscreteProcess.from_alpha_sigma([1.0] * 12, [0.01 * 2.0**i for i in range(12)]),
        "ε-prediction, own table T = 12",
    ),
    "x_0": Kind("x_0", lambda: DiscreteProcess.cosine(20), "x_0-prediction, cosine T = 20"),
    "v": Kind("v", lambda: DiscreteProcess.linear(20), "v-prediction, linear T = 20", _FOURIER),
    "v, zero terminal SNR": Kind("v", _zero_terminal_snr, "v-prediction, linear T = 20 with zero terminal SNR"),
    "learned variances": Kind(
        "eps",
        lambda: DiscreteProcess.cosine(20),
        "ε-prediction, cosine T = 20, learned σ²",
        replace(NETWORK, learned_variance=True),
    ),
    "vdm": Kind(
        "residual_eps",
        ContinuousProcess.linear,
        "residual ε-prediction, continuous time, γ from -13.3 to 5",
        _FOURIER,
    ),
    "vdm, learned": Kind(
        "residual_eps",
        lambda: ContinuousProcess.learned(-9.0, 4.0),
        "residual ε-prediction, continuous time, learned γ from -9 to 4",
    ),
    "v, learned ends": Kind(
        "v",
        lambda: ContinuousProcess.learned(learned_ends=True),
        "v-prediction, continuous time, learned γ with learned ends",
    ),
    "eps, labels": Kind(
        "eps",
        lambda: DiscreteProcess.linear(20),
        "ε-prediction, linear T = 20, 3 classes",
        replace(NETWORK, num_classes=3),
    ),
    "vdm, labels": Kind(
        "residual_eps",
        ContinuousProcess.linear,
        "residual ε-prediction, continuous time, γ from -13.3 to 5, 3 classes",
        replace(_FOURIER, num_classes=3),
    ),
    "edm": Kind("edm", ContinuousProcess.edm, "EDM preconditioning, continuous time, σ from 0.002 to 80"),
}
