"""The likelihood of the probability-flow ODE in bits per dimension (Song 2021, score SDE, sec. 4.3 and app. D.2).

With xbar = x_t / sqrt(abar_t) and sbar_t = sqrt((1 - abar_t) / abar_t) the flow is d xbar / d sbar = eps(x_t, t)
(Song 2021, DDIM, eq. 14), and along it, by the instantaneous change of variables (Chen 2018, neural ODE, thm. 1),

    d ln p(xbar) / d ln sbar = -sbar tr(d eps / d xbar) = -r_t,   r_t = sqrt(1 - abar_t) tr(d eps / d x_t).

The model's density of xbar at index 0 is what the flow makes of x_{T-1} ~ N(0, I), so in D dimensions

    ln p(xbar_0) = ln N(x_{T-1}; 0, I) + D ln sqrt(abar_{T-1}) + integral of r_t d ln sbar from sbar_0 to sbar_{T-1}.

It is a density of xbar_0, which stands for x_0 but is blurred by noise of sd sbar_0. It has no decoder, so its
numbers are those of another model of the images than the one that `likelihood` bounds.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from ddpm_core import noise
from ddpm_core.errors import ConfigError
from ddpm_core.sampling import EpsFn
from ddpm_core.schedule import NoiseSchedule

PerImage = Float64[Tensor, " B"]
PerProbe = Float64[Tensor, "B P"]
States = Float64[Tensor, "B C H W"]
_STREAM = "ode"


@dataclass(frozen=True)
class OdeLikelihood:
    """-log2 p(xbar_0) / D + log2(127.5) of each image and how sure it is, bits/dim, float64 [B].

    `bits_per_dim`: the mean over the probes. `trace_error`: its standard error from the random probes,
    sd / sqrt(probes). `step_error`: |N steps - N/2 steps| on the same probes. The method is of second order, so the
    real error of the N steps is about a third of that, and mostly makes `bits_per_dim` too low. Both include what the
    integer time steps near 0 are too far apart for, which no N takes away.
    """

    bits_per_dim: PerImage
    trace_error: PerImage
    step_error: PerImage


def ode_timesteps(schedule: NoiseSchedule, num_steps: int) -> list[int]:
    """N + 1 increasing time steps from 0 to T-1 for N = `num_steps`, as uniform in log-SNR as integers allow.

    Where consecutive integers are already further apart than that, each is taken, and the rest of the N steps is
    uniform over the rest of the log-SNR. N is even: every second point is the grid of N/2 steps. Raises ConfigError
    unless N is even and 2 <= N <= T - 1.
    """
    last = schedule.num_timesteps - 1
    if num_steps % 2 or not 2 <= num_steps <= last:
        raise ConfigError(f"num_steps: {num_steps} is not an even number in 2..{last}, the model's time steps less one")
    gaps = -schedule.log_snr.diff().numpy()
    # The k widest gaps get one step each and the others N - k between them, for the least k that leaves none over one.
    widest = np.sort(gaps)[::-1]
    rest = widest[::-1].cumsum()[::-1]
    left = num_steps - np.arange(last)
    k = int(np.argmax(left * widest <= rest))
    position = np.concatenate([[0.0], np.minimum(gaps * (left[k] / rest[k]), 1.0).cumsum()])
    points = np.interp(np.arange(num_steps) * (position[-1] / num_steps), position, np.arange(last + 1.0))
    # Points are at least 1 apart; a limit just off the half keeps rounding errors from joining two at exact halves.
    return [*np.floor(points + 0.499).astype(int).tolist(), last]


def ode_bpd(
    schedule: NoiseSchedule,
    eps_fn: EpsFn,
    images: UInt8[Tensor, "B C H W"],
    ids: Int64[Tensor, " B"],
    seed: int,
    num_steps: int = 64,
    probes: int = 4,
    network_dtype: torch.dtype = torch.float32,
) -> OdeLikelihood:
    """Each image's negative log-likelihood under the flow, from xbar_0 = (k + u - 1/2) / 127.5 - 1, u ~ U(0, 1).

    `images`: the levels k. Over u this is on average an upper bound on -log2 of the mass of the image's bins, each
    1/127.5 wide (Theis 2016, sec. 3.1). The width is that of x_0 = k / 127.5 - 1; mixing it with (k + u) / 256,
    whose bins are 1/128 wide, costs 0.0056 bits/dim. u and the `probes` Rademacher vectors are keyed by (seed, id),
    so a result depends on (seed, id, image) alone.

    `eps_fn(x_t, t)` is called 3 `num_steps` times on the batch in `network_dtype`, and differentiated `probes` times
    each; it must be differentiable in x_t. Gradients are turned on here, whatever the caller has set, but never call
    this inside torch.inference_mode, which forbids them. Raises ConfigError for a bad `num_steps` or `probes`.
    """
    grid = ode_timesteps(schedule, num_steps)
    if probes < 2:
        raise ConfigError(f"probes: {probes} is not >= 2; the spread over them is the error of the trace")
    ids = ids.to(images.device)
    size = math.prod(images.shape[1:])
    u = noise.uniform(seed, _STREAM + "/dequantise", ids, 0, size).reshape(images.shape)
    xbar_0 = (images.to(torch.float64) + u - 0.5) / 127.5 - 1.0
    signs = [_rademacher(seed, ids, probe, tuple(images.shape)) for probe in range(probes)]
    fine, coarse = (
        math.log2(127.5) - _log_density(schedule, eps_fn, xbar_0, signs, steps, network_dtype) / (size * math.log(2.0))
        for steps in (grid, grid[::2])
    )
    bits = fine.mean(1)
    # Not std(1), whose last bits depend on how many images there are.
    spread = (fine - bits[:, None]).square().sum(1)
    return OdeLikelihood(bits, (spread / (probes * (probes - 1))).sqrt(), (bits - coarse.mean(1)).abs())


def _rademacher(seed: int, ids: Int64[Tensor, " B"], probe: int, shape: tuple[int, ...]) -> States:
    """Signs +1 or -1 of shape [B, C, H, W], keyed by (seed, id, probe)."""
    words = noise.random_words(seed, _STREAM + "/probe", ids, probe, math.prod(shape[1:]))
    return ((words & 1) * 2 - 1).to(torch.float64).reshape(shape)


@torch.no_grad()
def _log_density(
    schedule: NoiseSchedule,
    eps_fn: EpsFn,
    xbar: States,
    signs: Sequence[States],
    grid: Sequence[int],
    dtype: torch.dtype,
) -> PerProbe:
    """ln p(xbar_0) in nats for each probe: Heun's method over `grid` for the state and for its density.

    The state takes its trapezoid in sbar, in which the flow becomes straight at both ends. The density takes it, at
    the same two evaluations of a step, in ln sbar: there its rate tends to 0 and to D at the ends, while in sbar it
    falls like D / sbar, which a wide step cannot follow (the last one of the cosine schedule multiplies sbar by 32
    and would alone be 18 bits/dim off). The probes stay the same along the path (Grathwohl 2019, FFJORD, sec. 3.1).
    """
    sbar = (-0.5 * schedule.log_snr).exp().tolist()
    log_sbar = (-0.5 * schedule.log_snr).tolist()
    integral = xbar.new_zeros(len(xbar), len(signs))
    for s, t in itertools.pairwise(grid):
        width = sbar[t] - sbar[s]
        eps_s, rate_s = _field(schedule, eps_fn, xbar, s, signs, dtype)
        eps_t, rate_t = _field(schedule, eps_fn, xbar + width * eps_s, t, signs, dtype)
        xbar = xbar + 0.5 * width * (eps_s + eps_t)
        integral += 0.5 * (log_sbar[t] - log_sbar[s]) * (rate_s + rate_t)
    abar = float(schedule.alphas_cumprod[-1])
    # N(x_{T-1}; 0, I) and the D ln sqrt(abar) that makes it a density of xbar, dimension by dimension.
    prior = -0.5 * (abar * xbar.square() + math.log(2.0 * math.pi / abar)).flatten(1).sum(1)
    return prior[:, None] + integral


def _field(
    schedule: NoiseSchedule, eps_fn: EpsFn, xbar: States, t: int, signs: Sequence[States], dtype: torch.dtype
) -> tuple[States, PerProbe]:
    """eps(x_t, t), and sqrt(1 - abar_t) v^T (d eps / d x_t) v for each probe v, whose mean over probes estimates
    r_t (Hutchinson 1990; Grathwohl 2019, FFJORD, sec. 3.1). One call of the network serves all probes."""
    abar = float(schedule.alphas_cumprod[t])
    with torch.enable_grad():
        x_t = (math.sqrt(abar) * xbar).to(dtype).requires_grad_()
        eps = eps_fn(x_t, torch.full((len(xbar),), t, dtype=torch.int64, device=xbar.device))
    rates = []
    for left, v in zip(reversed(range(len(signs))), signs, strict=True):
        (product,) = torch.autograd.grad(eps, x_t, v.to(eps.dtype), retain_graph=left > 0)
        rates.append((product.to(torch.float64) * v).flatten(1).sum(1))
    return eps.detach().to(torch.float64), math.sqrt(1.0 - abar) * torch.stack(rates, 1)
