"""What predicts the image in the noise: a network, how its output is meant, and the process it was made for."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from ddpm_core.config import UNetConfig
from ddpm_core.errors import ConfigError
from ddpm_core.networks.unet import UNet
from ddpm_core.process.base import Coefficient, Images, Marginal, Process, Step, Time, factor
from ddpm_core.process.discrete import DiscreteProcess

Labels = Int64[Tensor, " B"]
NO_LABEL = -1
"""The null class: of a row that has no label, or whose label a model trained with labels is not told."""
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Prediction:
    """What z_t = alpha x_0 + sigma eps is taken to consist of. Make one with `of_eps`, `of_x_0` or `of_v`.

    Given z_t, eps, x_0 and v = alpha eps - sigma x_0 (Salimans and Ho 2022, sec. 4) are affine in each other. One of
    eps and x_0 is held as it was predicted, the other is computed from it when it is asked for: `eps`, `x_0`, `v`, each
    [B, C, H, W]. At alpha = 0 there is no way from eps to x_0, at sigma = 0 none back.

    Attributes:
        z: z_t.
        marginal: Of the rows' times.
        holds: Which of the two is held.
        held: Its value.
        variance_fraction: Where ln sigma^2 of the reverse step lies between those of beta_tilde (0) and beta (1),
            [B, C, H, W], where the network predicts it, see `ddpm_core.process.variances.Learned`.
    """

    z: Images
    marginal: Marginal
    holds: Literal["eps", "x_0"]
    held: Images
    variance_fraction: Images | None = None

    @classmethod
    def of_eps(cls, z: Images, marginal: Marginal, eps: Images) -> "Prediction":
        """From the predicted noise (Ho 2020, eq. 11)."""
        return cls(z, marginal, "eps", eps)

    @classmethod
    def of_x_0(cls, z: Images, marginal: Marginal, x_0: Images) -> "Prediction":
        """From the predicted image."""
        return cls(z, marginal, "x_0", x_0)

    @classmethod
    def of_v(cls, z: Images, marginal: Marginal, v: Images) -> "Prediction":
        """From the predicted velocity: x_0 = (alpha z - sigma v) / (alpha^2 + sigma^2), the denominator being 1 for a
        variance-preserving process (Salimans and Ho 2022, app. D)."""
        norm = marginal.alpha.square() + marginal.sigma.square()
        x_0 = factor(marginal.alpha / norm, z) * z - factor(marginal.sigma / norm, z) * v
        return cls(z, marginal, "x_0", x_0)

    @cached_property
    def x_0(self) -> Images:
        """(z - sigma eps) / alpha (Ho 2020, eqs. 4 and 15)."""
        if self.holds == "x_0":
            return self.held
        return (self.z - factor(self.marginal.sigma, self.z) * self.held) / factor(self.marginal.alpha, self.z)

    @cached_property
    def eps(self) -> Images:
        """(z - alpha x_0) / sigma (Ho 2020, eq. 4)."""
        if self.holds == "eps":
            return self.held
        return (self.z - factor(self.marginal.alpha, self.z) * self.held) / factor(self.marginal.sigma, self.z)

    @cached_property
    def v(self) -> Images:
        """alpha eps - sigma x_0 (Salimans and Ho 2022, sec. 4)."""
        return factor(self.marginal.alpha, self.z) * self.eps - factor(self.marginal.sigma, self.z) * self.x_0

    def posterior_mean(self, step: Step) -> Images:
        """The mean of q(z_s | z_t, x_0) at the predicted x_0 (Ho 2020, eqs. 7 and 11), by way of what is held."""
        return step.mean_from_eps(self.z, self.held) if self.holds == "eps" else step.posterior(self.z, self.held).mean

    def clipped(self) -> "Prediction":
        """With x_0 clamped to the range of pixels, [-1, 1], and eps in agreement with it."""
        return self.with_x_0(self.x_0.clamp(-1.0, 1.0))

    def with_x_0(self, x_0: Images) -> "Prediction":
        """With another x_0, and eps in agreement with it."""
        return replace(self, holds="x_0", held=x_0)

    def __getitem__(self, rows: Tensor) -> "Prediction":
        """Some rows of the batch."""
        fraction = None if self.variance_fraction is None else self.variance_fraction[rows]
        return Prediction(self.z[rows], self.marginal[rows], self.holds, self.held[rows], fraction)


@runtime_checkable
class Denoiser(Protocol):
    """Network, parameterisation and process: what samplers and likelihoods call."""

    @property
    def process(self) -> Process:
        """Which z_t it was trained on."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    @property
    def num_classes(self) -> int | None:
        """K: `label` may be 0..K-1, or `NO_LABEL`; None of one that was trained without labels."""
        ...

    def __call__(self, z_t: Images, time: Time, label: Labels | None = None) -> Prediction:
        """What z_t consists of, in z_t's dtype; `label` [B], None: no row has one."""
        ...


Denoise = Callable[..., Prediction]
"""A denoiser, or what stands for one: called as denoise(z_t, time, label)."""


def check_label(denoiser: Denoiser, label: Labels | None) -> None:
    """Raise ConfigError for labels that the denoiser does not have."""
    if label is None or len(label) == 0:
        return
    low, high, classes = int(label.min()), int(label.max()), denoiser.num_classes
    if classes is None:
        if high > NO_LABEL:
            raise ConfigError(f"label: {high} needs a model that was trained with labels; leave the labels out")
    elif low < NO_LABEL or high >= classes:
        wrong = low if low < NO_LABEL else high
        raise ConfigError(f"label: {wrong} is not one of the model's classes 0..{classes - 1}, or {NO_LABEL} for none")


class NetworkDenoiser(nn.Module, ABC):
    """A network with a process: what is trained, saved and loaded. A subclass says what the network's output means.

    Attributes:
        network: Called as network(float32 [B, C, H, W], `Process.conditioning` of the time, label).
        process: The forward process; one with parameters is trained, too.
        precision: 'fp32', or 'bf16' for activations in bfloat16 by autocast; weights and the result are float32.
    """

    holds: ClassVar[Literal["eps", "x_0"]]
    """What its predictions hold."""

    def __init__(self, network: UNet, process: Process, precision: Precision = "fp32") -> None:
        super().__init__()
        self.network, self.process, self.precision = network, process, precision
        if self.learns_variance and not isinstance(process, DiscreteProcess):
            raise ConfigError(
                "network.learned_variance: True needs a process of discrete time, whose steps have a beta; leave it out"
            )

    @classmethod
    def build(cls, network: UNetConfig, process: Process) -> "NetworkDenoiser":
        """With a new network. Raises ConfigError where the process does not allow it."""
        return cls(UNet(network), process)

    @abstractmethod
    def read(self, z_t: Images, marginal: Marginal, output: Images) -> Prediction:
        """What the network's output, in z_t's dtype, says of z_t."""

    def scaled(self, z_t: Images, marginal: Marginal) -> Images:
        """What the network is given of z_t."""
        return z_t

    def target_weight(self, marginal: Marginal) -> Coefficient:
        """The factor that makes the squared error of what is held (`holds`) that of the network's own output."""
        return torch.ones_like(marginal.alpha)

    def forward(self, z_t: Images, time: Time, label: Labels | None = None) -> Prediction:
        """See `Denoiser`."""
        marginal, seen = self.process.at(time), self.process.conditioning(time)
        with torch.autocast(z_t.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output: Tensor = self.network(self.scaled(z_t, marginal).float(), seen, label)
        output = output.to(z_t.dtype)
        if not self.learns_variance:
            return self.read(z_t, marginal, output)
        output, v = output.chunk(2, dim=1)
        return replace(self.read(z_t, marginal, output), variance_fraction=(v + 1.0) / 2.0)

    @property
    def learns_variance(self) -> bool:
        """Whether the network predicts `Prediction.variance_fraction` in as many further channels."""
        return self.network.config.learned_variance

    def in_precision(self, precision: Precision) -> "NetworkDenoiser":
        """The same network, not a copy, in evaluation mode and computing in another precision."""
        denoiser = copy.copy(self)
        denoiser.precision = precision
        return denoiser.eval()

    def named_weights(self) -> dict[str, nn.Parameter]:
        """What is trained, by the names in a model's files: the network's parameters without a prefix, then the
        process's."""
        return {name.removeprefix("network."): parameter for name, parameter in self.named_parameters()}

    def to_config(self) -> dict[str, Any]:
        """The fields of a model's config.json from which `ddpm_core.model` builds the same denoiser."""
        return {"network": self.network.config.to_dict(), "schedule": self.process.to_config()}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.network.config.in_channels, *self.network.config.height_width

    @property
    def num_classes(self) -> int | None:
        """See `Denoiser`."""
        return self.network.config.num_classes

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.network.parameters()).device
