"""Training objectives: the loss of each row of a batch.

L_simple, L_vlb and min-SNR are one squared error, weighted by a table over t: each of them is its table.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from ddpm_core.denoiser import Labels, Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.process.base import Images, Time, q_sample
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import Beta, ReverseVariance, variance_table

Weights = Float64[Tensor, " T"]
Denoise = Callable[..., Prediction]


@runtime_checkable
class Objective(Protocol):
    """The loss of each row, whose mean training minimises. A module: its `state_dict` is kept in checkpoints."""

    def __call__(
        self, denoise: Denoise, x_0: Images, time: Time, eps: Images, label: Labels | None = None
    ) -> Float[Tensor, " B"]:
        """Each row's loss, from one call `denoise(z_t, time, label)` of the denoiser or what wraps it."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """What a resumed training goes on with; empty where nothing is remembered."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> object:
        """Go on with what `state_dict` gave. Raises RuntimeError if it is another objective's."""
        ...


class WeightedError(nn.Module):
    """weights[t] ||eps - eps_pred||^2 / D (Ho 2020, eqs. 12 and 14)."""

    def __init__(self, process: DiscreteProcess, weights: Weights) -> None:
        super().__init__()
        self.process = process
        self.weights: Tensor
        self.register_buffer("weights", weights.to(torch.float32), persistent=False)

    def forward(
        self, denoise: Denoise, x_0: Images, time: Time, eps: Images, label: Labels | None = None
    ) -> Float[Tensor, " B"]:
        """See `Objective`."""
        prediction = denoise(q_sample(self.process.at(time), x_0, eps), time, label)
        return self.weights[time] * eps_mse(eps, prediction.eps)


def eps_mse(eps: Float[Tensor, "B C H W"], eps_pred: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """||eps - eps_pred||^2 / D of each image (Ho 2020, eq. 14), in float32 at least."""
    dtype = torch.float64 if eps.dtype == torch.float64 else torch.float32
    return (eps.to(dtype) - eps_pred.to(dtype)).square().flatten(1).mean(1)


def simple_weight(process: DiscreteProcess) -> Weights:
    """L_simple: weight 1 at every t (Ho 2020, eq. 14)."""
    return torch.ones(process.num_timesteps, dtype=torch.float64)


def vlb_weight(process: DiscreteProcess, variance: ReverseVariance) -> Weights:
    """L_vlb: T beta_t^2 / (2 sigma_t^2 alpha_t (1 - abar_t)) (Ho 2020, eq. 12), so that with t uniform
    in 0..T-1 the mean loss is the sum over t of the ELBO's terms, in nats per dimension.

    For t >= 1 this is the part of L_{t-1} that depends on the network; what is left out,
    1/2 [ln(sigma^2 / beta_tilde) - 1 + beta_tilde / sigma^2], is 0 for sigma^2 = beta_tilde. At t = 0,
    where the ELBO has the decoder, the same Gaussian weight stands in for it.
    """
    return process.num_timesteps * process.coef_eps**2 / (2.0 * variance_table(process, variance))


def min_snr_weight(process: DiscreteProcess, gamma: float = 5.0) -> Weights:
    """min(SNR(t), gamma) / SNR(t) for eps-prediction (Hang 2023, sec. 3.4). Raises ConfigError unless
    gamma > 0."""
    if not gamma > 0.0:
        raise ConfigError(f"gamma: {gamma} is not > 0; Hang 2023 uses 5")
    return process.snr.clamp(max=gamma) / process.snr


def objective_named(name: str, process: DiscreteProcess, gamma: float = 5.0) -> WeightedError:
    """'simple', 'vlb' or 'min_snr' (uses `gamma`). Raises ConfigError for another name."""
    makers: dict[str, Callable[[], Weights]] = {
        "simple": lambda: simple_weight(process),
        "vlb": lambda: vlb_weight(process, Beta()),
        "min_snr": lambda: min_snr_weight(process, gamma),
    }
    if name not in makers:
        raise ConfigError(f"loss: {name!r} is not one of {sorted(makers)}")
    return WeightedError(process, makers[name]())
