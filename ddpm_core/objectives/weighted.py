"""Squared errors with a weight for each noise level: L_simple, L_vlb with fixed variances, min-SNR."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ddpm_core.denoiser import Denoise, Labels, NetworkDenoiser, Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.terms import squared_error
from ddpm_core.objectives.base import Objective
from ddpm_core.objectives.times import Times
from ddpm_core.process.base import Images, Marginal, Process, Time, q_sample
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import Beta, ReverseVariance, variance_table

Weights = Float64[Tensor, " T"]
Weight = Callable[[Marginal], Tensor]


def held_error(prediction: Prediction, x_0: Images, eps: Images) -> Float[Tensor, " B"]:
    """The squared error per dimension of what the prediction holds, eps or x_0: ||x_0 - x_0_pred||^2 SNR =
    ||eps - eps_pred||^2, but only what is held is known well at both ends."""
    return squared_error(eps if prediction.holds == "eps" else x_0, prediction.held)


class WeightedError(Objective):
    """weights[t] times the squared error per dimension of what the denoiser holds (Ho 2020, eqs. 12 and 14)."""

    def __init__(self, process: DiscreteProcess, times: Times, weights: Weights) -> None:
        super().__init__(process, times)
        self.weights: Tensor
        self.register_buffer("weights", weights.to(torch.float32), persistent=False)

    def at(
        self, denoise: Denoise, x_0: Images, time: Time, eps: Images, label: Labels | None = None
    ) -> Float[Tensor, " B"]:
        """See `Objective`."""
        prediction = denoise(q_sample(self.process.at(time), x_0, eps), time, label)
        return self.weights[time] * held_error(prediction, x_0, eps)


class ContinuousWeightedError(Objective):
    """The same with `weight`, a function of the noise level, where times have no table."""

    def __init__(self, process: Process, times: Times, weight: Weight) -> None:
        super().__init__(process, times)
        self._weight = weight

    def at(
        self, denoise: Denoise, x_0: Images, time: Time, eps: Images, label: Labels | None = None
    ) -> Float[Tensor, " B"]:
        """See `Objective`."""
        marginal = self.process.at(time)
        prediction = denoise(q_sample(marginal, x_0, eps), time, label)
        weight = self._weight(marginal)[:, 0, 0, 0].to(torch.float32)
        return weight * held_error(prediction, x_0, eps)


def simple_weight(process: DiscreteProcess, denoiser: NetworkDenoiser) -> Weights:
    """L_simple: the squared error of the network's own output, weight 1 at every t (Ho 2020, eq. 14, for eps)."""
    return denoiser.target_weight(process.at(process.timesteps))[:, 0, 0, 0]


def vlb_weight(process: DiscreteProcess, variance: ReverseVariance, holds: str = "eps") -> Weights:
    """L_vlb: T beta_t^2 / (2 sigma_t^2 alpha_t (1 - abar_t)) for eps (Ho 2020, eq. 12), so that with t uniform
    in 0..T-1 the mean loss is the sum over t of the ELBO's terms, in nats per dimension.

    For t >= 1 this is the part of L_{t-1} that depends on the network; what is left out,
    1/2 [ln(sigma^2 / beta_tilde) - 1 + beta_tilde / sigma^2], is 0 for sigma^2 = beta_tilde. At t = 0,
    where the ELBO has the decoder, the same Gaussian weight stands in for it.
    """
    coefficient = process.coef_eps if holds == "eps" else process.posterior_coef_x_0
    return process.num_timesteps * coefficient**2 / (2.0 * variance_table(process, variance))


def min_snr_weight(process: DiscreteProcess, gamma: float = 5.0, holds: str = "eps") -> Weights:
    """min(SNR(t), gamma) on x_0, hence min(SNR(t), gamma) / SNR(t) on eps (Hang 2023, sec. 3.4). Raises ConfigError
    unless gamma > 0."""
    _check_gamma(gamma)
    clamped = process.snr.clamp(max=gamma)
    return clamped / process.snr if holds == "eps" else clamped


def fixed_objective(name: str, denoiser: NetworkDenoiser, times: Times, gamma: float) -> Objective:
    """'simple', 'vlb' (discrete time only) or 'min_snr' (uses `gamma`), of a denoiser with fixed variances."""
    process, holds = denoiser.process, denoiser.holds
    if isinstance(process, DiscreteProcess):
        makers: dict[str, Callable[[], Weights]] = {
            "simple": lambda: simple_weight(process, denoiser),
            "vlb": lambda: vlb_weight(process, Beta(), holds),
            "min_snr": lambda: min_snr_weight(process, gamma, holds),
        }
        return WeightedError(process, times, makers[name]())
    if name == "simple":
        return ContinuousWeightedError(process, times, denoiser.target_weight)
    _check_gamma(gamma)

    def min_snr(marginal: Marginal) -> Tensor:
        snr = marginal.log_snr.exp()
        return snr.clamp(max=gamma) / (snr if holds == "eps" else 1.0)

    return ContinuousWeightedError(process, times, min_snr)


def _check_gamma(gamma: float) -> None:
    if not gamma > 0.0:
        raise ConfigError(f"gamma: {gamma} is not > 0; Hang 2023 uses 5")
