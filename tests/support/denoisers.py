"""Denoisers that tests know everything of."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ddpm_core.denoiser import Labels, Prediction
from ddpm_core.process.base import Images, Marginal, Process, Time
from ddpm_core.process.discrete import DiscreteProcess


@dataclass
class FunctionDenoiser:
    """Predicts eps by a function of (z_t, t), such as the exact one of a distribution; a `Denoiser`."""

    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    process: Process
    image_shape: tuple[int, int, int] = (1, 8, 8)
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable

    def __call__(self, z_t: Images, time: Time, label: Labels | None = None) -> Prediction:
        return Prediction.of_eps(z_t, self.process.at(time), self.function(z_t, time).to(z_t.dtype))

    def in_precision(self, precision: str) -> "FunctionDenoiser":
        return self


def abar(process: DiscreteProcess, t: torch.Tensor) -> torch.Tensor:
    """alpha_t^2 of each row, float64 [B, 1, 1, 1]: a variance-preserving process's share of the image."""
    return process.alpha2[t][:, None, None, None]


class GaussianWorld:
    """Flattened images x_0 ~ N(mean, covariance), of which everything is known under any (alpha, sigma)."""

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor, image_shape: tuple[int, int, int]) -> None:
        self.mean, self.covariance, self.image_shape = mean.double(), covariance.double(), image_shape
        self.variances, self.axes = torch.linalg.eigh(self.covariance)

    def spread(self, marginal: Marginal) -> torch.Tensor:
        """Variances of z_t along the axes, [B, D]."""
        return marginal.alpha.flatten(1).square() * self.variances + marginal.sigma.flatten(1).square()

    def denoiser(self, process: Process) -> FunctionDenoiser:
        """The best eps: sigma (alpha^2 S + sigma^2 I)^-1 (z_t - alpha m)."""

        def eps(z_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            now = process.at(time)
            along = (z_t.double().flatten(1) - now.alpha.flatten(1) * self.mean) @ self.axes
            return (along * now.sigma.flatten(1) / self.spread(now) @ self.axes.T).reshape(z_t.shape)

        return FunctionDenoiser(eps, process, self.image_shape)

    def flow(self, z: torch.Tensor, start: Marginal, end: Marginal) -> torch.Tensor:
        """Where the probability-flow ODE takes z: along each axis by the ratio of the standard deviations."""
        along = (z.flatten(1) - start.alpha.flatten(1) * self.mean) @ self.axes
        along = along * (self.spread(end) / self.spread(start)).sqrt()
        return (end.alpha.flatten(1) * self.mean + along @ self.axes.T).reshape(z.shape)
