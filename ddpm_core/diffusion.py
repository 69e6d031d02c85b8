"""The forward process, its posterior and the reverse step, equation by equation.

Shapes: x_0, x_t, eps [B, C, H, W] in model range; t int64 [B], the table index 0..T-1. Everything
is computed in float64 for float64 tensors and in float32 otherwise.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ddpm_core.errors import ConfigError
from ddpm_core.schedule import NoiseSchedule, gather_table

Images = Float[Tensor, "B C H W"]
Timesteps = Int64[Tensor, " B"]
Factor = Float[Tensor, "B 1 1 1"]
Sigma2 = str | Tensor


@dataclass(frozen=True)
class GaussianParams:
    """N(mean, variance I): mean [B, C, H, W], variance [B, 1, 1, 1]."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class ReverseStep:
    """p_theta(x_{t-1} | x_t) = N(mean, variance I), with the x_0 that the mean was made from."""

    mean: Tensor
    variance: Tensor
    x_0_pred: Tensor


def q_sample(schedule: NoiseSchedule, x_0: Images, t: Timesteps, eps: Images) -> Images:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho 2020, eq. 4). Raises ConfigError for a bad t."""
    return (
        schedule.gather("sqrt_alphas_cumprod", t, x_0) * x_0
        + schedule.gather("sqrt_one_minus_alphas_cumprod", t, x_0) * eps
    )


def q_posterior(schedule: NoiseSchedule, x_0: Images, x_t: Images, t: Timesteps) -> GaussianParams:
    """q(x_{t-1} | x_t, x_0) = N(mu_tilde_t, beta_tilde_t I) (Ho 2020, eqs. 6-7)."""
    mean = (
        schedule.gather("posterior_mean_coef_x0", t, x_t) * x_0
        + schedule.gather("posterior_mean_coef_xt", t, x_t) * x_t
    )
    return GaussianParams(mean, schedule.gather("posterior_variance", t, x_t))


def x_0_from_eps(schedule: NoiseSchedule, x_t: Images, t: Timesteps, eps: Images) -> Images:
    """x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) (Ho 2020, eq. 4 solved for x_0; eq. 15)."""
    noise = schedule.gather("sqrt_one_minus_alphas_cumprod", t, x_t) * eps
    return (x_t - noise) / schedule.gather("sqrt_alphas_cumprod", t, x_t)


def eps_from_x_0(schedule: NoiseSchedule, x_t: Images, t: Timesteps, x_0: Images) -> Images:
    """eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t) (Ho 2020, eq. 4 solved for eps)."""
    signal = schedule.gather("sqrt_alphas_cumprod", t, x_t) * x_0
    return (x_t - signal) / schedule.gather("sqrt_one_minus_alphas_cumprod", t, x_t)


def v_from_eps(schedule: NoiseSchedule, x_t: Images, t: Timesteps, eps: Images) -> Images:
    """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans and Ho 2022, sec. 4 and app. D)."""
    x_0 = x_0_from_eps(schedule, x_t, t, eps)
    return (
        schedule.gather("sqrt_alphas_cumprod", t, x_t) * eps
        - schedule.gather("sqrt_one_minus_alphas_cumprod", t, x_t) * x_0
    )


def eps_from_v(schedule: NoiseSchedule, x_t: Images, t: Timesteps, v: Images) -> Images:
    """eps = sqrt(1 - abar_t) x_t + sqrt(abar_t) v (Salimans and Ho 2022, app. D)."""
    return (
        schedule.gather("sqrt_one_minus_alphas_cumprod", t, x_t) * x_t
        + schedule.gather("sqrt_alphas_cumprod", t, x_t) * v
    )


def x_0_from_v(schedule: NoiseSchedule, x_t: Images, t: Timesteps, v: Images) -> Images:
    """x_0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v (Salimans and Ho 2022, app. D)."""
    return (
        schedule.gather("sqrt_alphas_cumprod", t, x_t) * x_t
        - schedule.gather("sqrt_one_minus_alphas_cumprod", t, x_t) * v
    )


def sigma2_table(schedule: NoiseSchedule, kind: Sigma2) -> Float64[Tensor, " T"]:
    """The reverse variances sigma_t^2 for every t, float64 on the CPU (Ho 2020, sec. 3.2).

    'beta' is beta_t. 'beta_tilde' is the posterior variance, whose value at t = 0, which is 0 and
    would leave the decoder without a density, is replaced by the one at t = 1. A tensor [T] of
    positive numbers is taken as it is. Raises ConfigError for anything else.
    """
    num_timesteps = schedule.num_timesteps
    if isinstance(kind, Tensor):
        table = kind.detach().to(device="cpu", dtype=torch.float64)
        if table.shape != (num_timesteps,) or not bool(((table > 0) & table.isfinite()).all()):
            raise ConfigError(
                f"sigma2: a table of shape {tuple(kind.shape)} is not [{num_timesteps}] positive finite "
                "numbers; give one variance for each time step"
            )
        return table
    if kind == "beta":
        return schedule.betas
    if kind != "beta_tilde":
        raise ConfigError(f"sigma2: {kind!r} is not 'beta', 'beta_tilde' or a table [T]")
    if num_timesteps < 2:
        raise ConfigError("sigma2: 'beta_tilde' needs num_timesteps >= 2 (index 0 takes index 1's value)")
    return torch.cat([schedule.posterior_variance[1:2], schedule.posterior_variance[1:]])


def reverse_mean(
    schedule: NoiseSchedule, eps_pred: Images, x_t: Images, t: Timesteps, clip_x_0: bool = False
) -> tuple[Images, Images]:
    """mu_theta and the predicted x_0.

    Without clipping, mu_theta = (x_t - beta_t / sqrt(1 - abar_t) eps_pred) / sqrt(alpha_t) (Ho 2020,
    eq. 11). With it, the predicted x_0 is clamped to [-1, 1] and mu_theta is the posterior mean at
    that x_0 (Ho 2020, eq. 7).
    """
    x_0_pred = x_0_from_eps(schedule, x_t, t, eps_pred)
    if clip_x_0:
        x_0_pred = x_0_pred.clamp(-1.0, 1.0)
        return q_posterior(schedule, x_0_pred, x_t, t).mean, x_0_pred
    # Through eps, not x_0: at small abar_t, x_0_pred is large and its rounding would enter the mean.
    noise = schedule.gather("reverse_mean_coef_eps", t, x_t) * eps_pred
    return x_t / schedule.gather("sqrt_alphas", t, x_t) - noise, x_0_pred


def p_mean_variance(
    schedule: NoiseSchedule,
    eps_pred: Images,
    x_t: Images,
    t: Timesteps,
    sigma2: Sigma2,
    clip_x_0: bool = False,
) -> ReverseStep:
    """p_theta(x_{t-1} | x_t) = N(mu_theta, sigma_t^2 I) (Ho 2020, eqs. 1 and 11): see `reverse_mean` and
    `sigma2_table`. Raises ConfigError for a bad t or sigma2."""
    mean, x_0_pred = reverse_mean(schedule, eps_pred, x_t, t, clip_x_0)
    return ReverseStep(mean, gather_table(sigma2_table(schedule, sigma2), t, x_t), x_0_pred)


def ddim_posterior(schedule: NoiseSchedule, x_0: Images, eps: Images, t: int, s: int, eta: float) -> GaussianParams:
    """q_sigma(x_s | x_t, x_0) = N(sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma^2) eps, sigma^2 I) for s < t
    (Song 2021, DDIM, eqs. 7 and 12), eps being the noise that x_t holds next to x_0.

    sigma^2 = eta^2 (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s) (eq. 16); s = -1 is x_0 itself
    (abar = 1, sigma = 0). Raises ConfigError unless -1 <= s < t < T and 0 <= eta <= 1.
    """
    if not -1 <= s < t < schedule.num_timesteps:
        raise ConfigError(f"s, t: {s}, {t} do not satisfy -1 <= s < t < {schedule.num_timesteps}")
    check_eta(eta)
    abar_t = float(schedule.alphas_cumprod[t])
    abar_s = float(schedule.alphas_cumprod[s]) if s >= 0 else 1.0
    variance = eta**2 * (1.0 - abar_s) / (1.0 - abar_t) * (1.0 - abar_t / abar_s)
    mean = math.sqrt(abar_s) * x_0 + math.sqrt(max(1.0 - abar_s - variance, 0.0)) * eps
    return GaussianParams(mean, mean.new_full((mean.shape[0], *(1,) * (mean.dim() - 1)), variance))


def check_eta(eta: float) -> None:
    """Raise ConfigError unless 0 <= eta <= 1."""
    if not 0.0 <= eta <= 1.0:
        raise ConfigError(f"eta: {eta} is not in [0, 1]; 0 is deterministic DDIM, 1 is DDPM")
