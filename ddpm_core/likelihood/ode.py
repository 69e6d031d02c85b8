"""The likelihood of the probability-flow ODE in bits per dimension (Song 2021, score SDE, sec. 4.3 and app. D.2).

With xbar = z_t / alpha_t and sbar_t = sigma_t / alpha_t the flow is d xbar / d sbar = eps(z_t, t) (Song 2021, DDIM,
eq. 14), and along it, by the instantaneous change of variables (Chen 2018, neural ODE, thm. 1),

    d ln p(xbar) / d ln sbar = -sbar tr(d eps / d xbar) = -r_t,   r_t = sigma_t tr(d eps / d z_t).

The model's density of xbar at index 0 is what the flow makes of z_{T-1} ~ N(0, V I), so in D dimensions

    ln p(xbar_0) = ln N(z_{T-1}; 0, V I) + D ln alpha_{T-1} + integral of r_t d ln sbar from sbar_0 to sbar_{T-1}.

It is a density of xbar_0, which stands for x_0 but is blurred by noise of sd sbar_0. It has no decoder, so its
numbers are those of another model of the images than the one that `ddpm_core.likelihood.elbo` bounds.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from ddpm_core import counter_random
from ddpm_core.denoiser import Denoiser
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.decoder import PerImage
from ddpm_core.process.discrete import DiscreteProcess, discrete

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


def ode_timesteps(process: DiscreteProcess, num_steps: int) -> list[int]:
    """N + 1 increasing time steps from 0 to T-1 for N = `num_steps`, even in log-SNR, see `DiscreteProcess.grid`.

    N is even: every second point is the grid of N/2 steps. Raises ConfigError unless N is even and 2 <= N <= T - 1.
    """
    last = process.num_timesteps - 1
    if num_steps % 2 or not 2 <= num_steps <= last:
        raise ConfigError(f"num_steps: {num_steps} is not an even number in 2..{last}, the model's time steps less one")
    increasing: list[int] = process.grid(num_steps + 1, "log_snr").flip(0).tolist()
    return increasing


def ode_bpd(
    denoiser: Denoiser,
    images: UInt8[Tensor, "B C H W"],
    ids: Int64[Tensor, " B"],
    seed: int,
    num_steps: int = 64,
    probes: int = 4,
) -> OdeLikelihood:
    """Each image's negative log-likelihood under the flow, from xbar_0 = (k + u - 1/2) / 127.5 - 1, u ~ U(0, 1).

    `images`: the levels k. Over u this is on average an upper bound on -log2 of the mass of the image's bins, each
    1/127.5 wide (Theis 2016, sec. 3.1). The width is that of x_0 = k / 127.5 - 1; mixing it with (k + u) / 256,
    whose bins are 1/128 wide, costs 0.0056 bits/dim. u and the `probes` Rademacher vectors are keyed by (seed, id),
    so a result depends on (seed, id, image) alone.

    The denoiser is called 3 `num_steps` times on the batch, z_t in float64, and differentiated `probes` times each; its
    eps must be differentiable in z_t. Gradients are turned on here, whatever the caller has set, but never call
    this inside torch.inference_mode, which forbids them. Raises ConfigError for a bad `num_steps` or
    `probes`, and for a process without time steps.
    """
    process = discrete(denoiser.process)
    grid = ode_timesteps(process, num_steps)
    if probes < 2:
        raise ConfigError(f"probes: {probes} is not >= 2; the spread over them is the error of the trace")
    ids = ids.to(images.device)
    size = math.prod(images.shape[1:])
    u = counter_random.uniform(seed, _STREAM + "/dequantise", ids, 0, size).reshape(images.shape)
    xbar_0 = (images.to(torch.float64) + u - 0.5) / 127.5 - 1.0
    signs = [_rademacher(seed, ids, probe, tuple(images.shape)) for probe in range(probes)]
    fine, coarse = (
        math.log2(127.5) - _log_density(denoiser, process, xbar_0, signs, steps) / (size * math.log(2.0))
        for steps in (grid, grid[::2])
    )
    bits = fine.mean(1)
    # Not std(1), whose last bits depend on how many images there are.
    spread = (fine - bits[:, None]).square().sum(1)
    return OdeLikelihood(bits, (spread / (probes * (probes - 1))).sqrt(), (bits - coarse.mean(1)).abs())


def _rademacher(seed: int, ids: Int64[Tensor, " B"], probe: int, shape: tuple[int, ...]) -> States:
    """Signs +1 or -1 of shape [B, C, H, W], keyed by (seed, id, probe)."""
    words = counter_random.random_words(seed, _STREAM + "/probe", ids, probe, math.prod(shape[1:]))
    return ((words & 1) * 2 - 1).to(torch.float64).reshape(shape)


@torch.no_grad()
def _log_density(
    denoiser: Denoiser, process: DiscreteProcess, xbar: States, signs: Sequence[States], grid: Sequence[int]
) -> PerProbe:
    """ln p(xbar_0) in nats for each probe: Heun's method over `grid` for the state and for its density.

    The state takes its trapezoid in sbar, in which the flow becomes straight at both ends. The density takes it, at
    the same two evaluations of a step, in ln sbar: there its rate tends to 0 and to D at the ends, while in sbar it
    falls like D / sbar, which a wide step cannot follow (the last one of the cosine schedule multiplies sbar by 32
    and would alone be 18 bits/dim off). The probes stay the same along the path (Grathwohl 2019, FFJORD, sec. 3.1).
    """
    sbar = (-0.5 * process.log_snr).exp().tolist()
    log_sbar = (-0.5 * process.log_snr).tolist()
    integral = xbar.new_zeros(len(xbar), len(signs))
    for s, t in itertools.pairwise(grid):
        width = sbar[t] - sbar[s]
        eps_s, rate_s = _field(denoiser, process, xbar, s, signs)
        eps_t, rate_t = _field(denoiser, process, xbar + width * eps_s, t, signs)
        xbar = xbar + 0.5 * width * (eps_s + eps_t)
        integral += 0.5 * (log_sbar[t] - log_sbar[s]) * (rate_s + rate_t)
    r = process.prior_signal
    # N(z_{T-1}; 0, V I) and the D ln alpha that makes it a density of xbar, dimension by dimension; r = alpha^2 / V.
    prior = -0.5 * (r * xbar.square() + math.log(2.0 * math.pi / r)).flatten(1).sum(1)
    return prior[:, None] + integral


def _field(
    denoiser: Denoiser, process: DiscreteProcess, xbar: States, t: int, signs: Sequence[States]
) -> tuple[States, PerProbe]:
    """eps(z_t, t), and sigma_t v^T (d eps / d z_t) v for each probe v, whose mean over probes estimates r_t (Hutchinson
    1990; Grathwohl 2019, FFJORD, sec. 3.1). One call of the network serves all probes."""
    alpha, sigma = float(process.alpha[t]), float(process.sigma[t])
    with torch.enable_grad():
        z_t = (alpha * xbar).requires_grad_()
        eps = denoiser(z_t, torch.full((len(xbar),), t, dtype=torch.int64, device=xbar.device)).eps
    rates = []
    for left, v in zip(reversed(range(len(signs))), signs, strict=True):
        (product,) = torch.autograd.grad(eps, z_t, v, retain_graph=left > 0)
        rates.append((product * v).flatten(1).sum(1))
    return eps.detach(), sigma * torch.stack(rates, 1)
