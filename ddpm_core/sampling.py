"""Ancestral sampling (DDPM) and the DDIM family.

A sample depends on (seed, id) only: the starting noise and the noise of step t are drawn from
`noise.normal` keyed by (seed, id, t), whatever else is in the batch. The network is always called
with the whole batch, so equal batch shapes give bit-equal samples.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from ddpm_core import noise
from ddpm_core.diffusion import (
    Sigma2,
    check_eta,
    ddim_posterior,
    eps_from_x_0,
    reverse_mean,
    sigma2_table,
    x_0_from_eps,
)
from ddpm_core.errors import ConfigError
from ddpm_core.schedule import NoiseSchedule

EpsFn = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor, Tensor], None]
STREAM = "sample"


@torch.no_grad()
def sample_ddpm(
    schedule: NoiseSchedule,
    eps_fn: EpsFn,
    ids: Int64[Tensor, " B"],
    shape: tuple[int, int, int],
    seed: int,
    sigma2: Sigma2 = "beta_tilde",
    clip_x_0: bool = True,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> Float32[Tensor, "B C H W"]:
    """Ancestral sampling: x_{t-1} = mu_theta + sigma_t z for t = T-1..1, mu_theta at t = 0 (Ho 2020, alg. 2).

    `eps_fn(x_t, t)` is the network, called T times on [B, C, H, W] = [B, *shape]. Returns x_0 in
    model range; `clip_x_0` clamps every predicted x_0 to [-1, 1]. `on_step(t, x_t, x_0_pred)` is shown
    every step's input and prediction. Raises ConfigError for a bad sigma2.
    """
    sigmas = sigma2_table(schedule, sigma2).sqrt().tolist()
    ids = ids.to(device)
    x = noise.normal(seed, STREAM, ids, schedule.num_timesteps, shape)
    for t in reversed(range(schedule.num_timesteps)):
        t_batch = torch.full_like(ids, t)
        mean, x_0 = reverse_mean(schedule, eps_fn(x, t_batch), x, t_batch, clip_x_0)
        if on_step is not None:
            on_step(t, x, x_0)
        x = mean
        if t > 0:
            x = x + sigmas[t] * noise.normal(seed, STREAM, ids, t, shape)
    return x


def ddim_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """K = `num_steps` increasing time steps, evenly spaced over 0..T-1, both ends included (the last one
    alone for K = 1). Raises ConfigError unless 1 <= K <= T."""
    if not 1 <= num_steps <= num_timesteps:
        raise ConfigError(f"num_steps: {num_steps} is not in 1..{num_timesteps}, the model's time steps")
    if num_steps == 1:
        return [num_timesteps - 1]
    return [(i * (num_timesteps - 1) * 2 + num_steps - 1) // (2 * (num_steps - 1)) for i in range(num_steps)]


@torch.no_grad()
def sample_ddim(
    schedule: NoiseSchedule,
    eps_fn: EpsFn,
    ids: Int64[Tensor, " B"],
    shape: tuple[int, int, int],
    seed: int,
    num_steps: int = 50,
    eta: float = 0.0,
    clip_x_0: bool = True,
    timesteps: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> Float32[Tensor, "B C H W"]:
    """DDIM on a sub-sequence of the time steps (Song 2021, DDIM, eq. 12): x_s from q_sigma(x_s | x_t, x_0).

    `timesteps`: any increasing sub-sequence of 0..T-1, by default `ddim_timesteps(T, num_steps)`.
    `eta` = 0 is deterministic given the starting noise; `eta` = 1 is DDPM on the sub-sequence, and on
    the full one equals `sample_ddpm` with 'beta_tilde', noise for noise. With `clip_x_0` the
    predicted x_0 is clamped to [-1, 1] and eps is made to agree with it. `on_step(t, x_t, x_0_pred)`
    is shown every step's input and prediction. Raises ConfigError.
    """
    check_eta(eta)
    steps = list(timesteps) if timesteps is not None else ddim_timesteps(schedule.num_timesteps, num_steps)
    increasing = all(a < b for a, b in itertools.pairwise(steps))
    if not steps or not increasing or steps[0] < 0 or steps[-1] >= schedule.num_timesteps:
        raise ConfigError(f"timesteps: not an increasing sub-sequence of 0..{schedule.num_timesteps - 1}")
    ids = ids.to(device)
    x = noise.normal(seed, STREAM, ids, schedule.num_timesteps, shape)
    for t, s in zip(reversed(steps), [*reversed(steps[:-1]), -1], strict=True):
        t_batch = torch.full_like(ids, t)
        eps = eps_fn(x, t_batch)
        x_0 = x_0_from_eps(schedule, x, t_batch, eps)
        if clip_x_0:
            x_0 = x_0.clamp(-1.0, 1.0)
            eps = eps_from_x_0(schedule, x, t_batch, x_0)
        if on_step is not None:
            on_step(t, x, x_0)
        step = ddim_posterior(schedule, x_0, eps, t, s, eta)
        x = step.mean
        if eta > 0.0 and s >= 0:
            x = x + step.variance.sqrt() * noise.normal(seed, STREAM, ids, t, shape)
    return x
