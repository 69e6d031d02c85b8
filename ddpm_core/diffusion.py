"""The forward process, its posterior and the reverse step, equation by equation.

Shapes: x_0, x_t, eps [B, C, H, W] in model range; t int64 [B], the table index 0..T-1. Everything
is computed in float64 for float64 tensors and in float32 otherwise.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ddpm_core.errors import ConfigError
from ddpm_core.schedule import NoiseSchedule, gather_table

Images = Float[Tensor, "B C H W"]
Timesteps = Int64[Tensor, " B"]
Factor = Float[Tensor, "B 1 1 1"]
Sigma2 = Literal["beta", "beta_tilde"] | Tensor


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


def p_mean_variance(
    schedule: NoiseSchedule,
    eps_pred: Images,
    x_t: Images,
    t: Timesteps,
    sigma2: Sigma2,
    clip_x_0: bool = False,
) -> ReverseStep:
    """p_theta(x_{t-1} | x_t) = N(mu_theta, sigma_t^2 I) (Ho 2020, eqs. 1 and 11).

    Without clipping, mu_theta = (x_t - beta_t / sqrt(1 - abar_t) eps_pred) / sqrt(alpha_t). With it,
    the predicted x_0 is clamped to [-1, 1] and mu_theta is the posterior mean at that x_0 (eq. 7).
    """
    x_0_pred = x_0_from_eps(schedule, x_t, t, eps_pred)
    variance = gather_table(sigma2_table(schedule, sigma2), t, x_t)
    if clip_x_0:
        x_0_pred = x_0_pred.clamp(-1.0, 1.0)
        return ReverseStep(q_posterior(schedule, x_0_pred, x_t, t).mean, variance, x_0_pred)
    # Through eps, not x_0: at small abar_t, x_0_pred is large and its rounding would enter the mean.
    mean = (
        x_t / schedule.gather("alphas", t, x_t).sqrt()
        - schedule.gather("reverse_mean_coef_eps", t, x_t) * eps_pred
    )
    return ReverseStep(mean, variance, x_0_pred)
