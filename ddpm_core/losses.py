"""Training objectives: one squared error, weighted by a table over t.

L_simple, L_vlb and min-SNR differ only in the table, so a new objective is a new table.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ddpm_core.diffusion import Sigma2, sigma2_table
from ddpm_core.errors import ConfigError
from ddpm_core.schedule import NoiseSchedule

Weights = Float64[Tensor, " T"]


def eps_mse(eps: Float[Tensor, "B C H W"], eps_pred: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """||eps - eps_pred||^2 / D of each image (Ho 2020, eq. 14), in float32 at least."""
    dtype = torch.float64 if eps.dtype == torch.float64 else torch.float32
    return (eps.to(dtype) - eps_pred.to(dtype)).square().flatten(1).mean(1)


def simple_weight(schedule: NoiseSchedule) -> Weights:
    """L_simple: weight 1 at every t (Ho 2020, eq. 14)."""
    return torch.ones(schedule.num_timesteps, dtype=torch.float64)


def vlb_weight(schedule: NoiseSchedule, sigma2: Sigma2 = "beta") -> Weights:
    """L_vlb: T beta_t^2 / (2 sigma_t^2 alpha_t (1 - abar_t)) (Ho 2020, eq. 12), so that with t uniform
    in 0..T-1 the mean loss is the sum over t of the ELBO's terms, in nats per dimension.

    For t >= 1 this is the part of L_{t-1} that depends on the network; what is left out,
    1/2 [ln(sigma^2 / beta_tilde) - 1 + beta_tilde / sigma^2], is 0 for sigma^2 = beta_tilde. At t = 0,
    where the ELBO has the decoder, the same Gaussian weight stands in for it.
    """
    return schedule.num_timesteps * schedule.reverse_mean_coef_eps**2 / (2.0 * sigma2_table(schedule, sigma2))


def min_snr_weight(schedule: NoiseSchedule, gamma: float = 5.0) -> Weights:
    """min(SNR(t), gamma) / SNR(t) for eps-prediction (Hang 2023, sec. 3.4). Raises ConfigError unless
    gamma > 0."""
    if not gamma > 0.0:
        raise ConfigError(f"gamma: {gamma} is not > 0; Hang 2023 uses 5")
    return schedule.snr.clamp(max=gamma) / schedule.snr


def loss_weights(name: str, schedule: NoiseSchedule, sigma2: Sigma2 = "beta", gamma: float = 5.0) -> Weights:
    """The weight table of 'simple', 'vlb' (uses `sigma2`) or 'min_snr' (uses `gamma`), float64 [T]."""
    if name == "simple":
        return simple_weight(schedule)
    if name == "vlb":
        return vlb_weight(schedule, sigma2)
    if name == "min_snr":
        return min_snr_weight(schedule, gamma)
    raise ConfigError(f"loss: {name!r} is not one of 'simple', 'vlb', 'min_snr'")


def weighted_loss(
    eps: Float[Tensor, "B C H W"],
    eps_pred: Float[Tensor, "B C H W"],
    t: Int64[Tensor, " B"],
    weights: Float[Tensor, " T"],
) -> Float[Tensor, ""]:
    """The batch mean of weights[t] ||eps - eps_pred||^2 / D, a scalar.

    Keep `weights` on the device of the images: a table on the CPU would be copied at every step.
    """
    errors = eps_mse(eps, eps_pred)
    return (weights.to(device=errors.device, dtype=errors.dtype).index_select(0, t) * errors).mean()
