"""Denoisers that tests know everything of."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ddpm_core.denoiser import Labels, Prediction
from ddpm_core.process.base import Images, Process, Time
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
