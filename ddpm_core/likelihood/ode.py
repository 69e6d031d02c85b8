"""The likelihood of the probability-flow ODE in bits per dimension (Song 2021, score SDE, sec. 4.3 and app. D.2).

With xbar = z_t / alpha_t and sbar_t = sigma_t / alpha_t the flow is d xbar / d sbar = eps(z_t, t) (Song 2021, DDIM,
eq. 14), and along it, by the instantaneous change of variables (Chen 2018, neural ODE, thm. 1),

    d ln p(xbar) / d ln sbar = -sbar tr(d eps / d xbar) = -r_t,   r_t = sigma_t tr(d eps / d z_t).

The model's density of xbar at index 0 is what the flow makes of z_{T-1} ~ N(0, V I), so in D dimensions

    ln p(xbar_0) = ln N(z_{T-1}; 0, V I) + D ln alpha_{T-1} + integral of r_t d ln sbar from sbar_0 to sbar_{T-1}.

It is a density of xbar_0, which stands for x_0 but is blurred by noise of sd sbar_0. A table of time steps has no
decoder for it: images are dequantised uniformly, and the numbers are those of another model of the images than the one
that `ddpm_core.likelihood.elbo` bounds.

Continuous time has the decoder p(x | z_0), and z_0 ~ q(z_0 | x) is how its bound dequantises, so the flow takes the
place of the diffusion in the very same bound (Kingma 2021, VDM, eq. 11; Song 2021, score SDE, sec. 4.3):

    -ln p(x) <= E[-ln p(x | z_0) + ln q(xbar_0 | x) - ln p(xbar_0)].
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float64, Int64, Shaped, UInt8
from torch import Tensor

from ddpm_core import counter_random
from ddpm_core.denoiser import Denoise, Denoiser, Labels, check_label
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.decoder import PerImage, bits_per_dim, softmax_nll_nats
from ddpm_core.likelihood.terms import x_0_of
from ddpm_core.process.base import Process
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import discrete

PerProbe = Float64[Tensor, "B P"]
Times = Shaped[Tensor, " N1"]
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


def ode_times(process: Process, num_steps: int) -> Times:
    """N + 1 times, the least noisy first, for N = `num_steps`: even in log-SNR, see `DiscreteProcess.grid`.

    N is even: every second point is the grid of N/2 steps. Raises ConfigError unless N is even and, of a table of T
    time steps, 2 <= N <= T - 1; and for a process that ends at SNR 0, where xbar does not exist.
    """
    if isinstance(process, ContinuousProcess):
        if num_steps % 2 or num_steps < 2:
            raise ConfigError(f"num_steps: {num_steps} is not an even number, at least 2")
        noisiest_first = process.grid(num_steps, "log_snr")
        return torch.cat([noisiest_first, process.after(noisiest_first[-1:])]).flip(0)
    last = discrete(process).num_timesteps - 1
    if num_steps % 2 or not 2 <= num_steps <= last:
        raise ConfigError(f"num_steps: {num_steps} is not an even number in 2..{last}, the model's time steps less one")
    if process.prior_signal == 0.0:
        raise ConfigError("schedule.zero_terminal_snr: True has no flow to SNR 0; leave the ODE's likelihood out")
    return process.grid(num_steps + 1, "log_snr").flip(0)


def ode_bpd(
    denoiser: Denoiser,
    images: UInt8[Tensor, "B C H W"],
    ids: Int64[Tensor, " B"],
    seed: int,
    num_steps: int = 64,
    probes: int = 4,
    label: Labels | None = None,
) -> OdeLikelihood:
    """Each image's negative log-likelihood under the flow. `images`: the levels k; `label`: what the denoiser is told
    of each, None: nothing.

    Discrete time: from xbar_0 = (k + u - 1/2) / 127.5 - 1, u ~ U(0, 1). Over u this is on average an upper bound on
    -log2 of the mass of the image's bins, each 1/127.5 wide (Theis 2016, sec. 3.1). The width is that of x_0 =
    k / 127.5 - 1; mixing it with (k + u) / 256, whose bins are 1/128 wide, costs 0.0056 bits/dim.

    Continuous time: from z_0 ~ q(z_0 | x), see above; on average an upper bound on -log2 p(x).

    u, the noise of z_0 and the `probes` Rademacher vectors are keyed by (seed, id), so a result depends on (seed, id,
    image) alone.

    The denoiser is called 3 `num_steps` times on the batch, z_t in float64, and differentiated `probes` times each; its
    eps must be differentiable in z_t. Gradients are turned on here, whatever the caller has set, but never call
    this inside torch.inference_mode, which forbids them. Raises ConfigError for a bad `num_steps` or
    `probes`, see `ode_times`, and for labels that the denoiser does not have.
    """
    check_label(denoiser, label)
    process = denoiser.process
    times = ode_times(process, num_steps).detach()
    if probes < 2:
        raise ConfigError(f"probes: {probes} is not >= 2; the spread over them is the error of the trace")
    ids = ids.to(images.device)
    size = math.prod(images.shape[1:])
    xbar_0, known = _dequantised(process, times, images, ids, seed)
    signs = [_rademacher(seed, ids, probe, tuple(images.shape)) for probe in range(probes)]
    fine, coarse = (
        known[:, None]
        - _log_density(partial(denoiser, label=label), process, xbar_0, signs, steps) / (size * math.log(2.0))
        for steps in (times, times[::2])
    )
    bits = fine.mean(1)
    # Not std(1), whose last bits depend on how many images there are.
    spread = (fine - bits[:, None]).square().sum(1)
    return OdeLikelihood(bits, (spread / (probes * (probes - 1))).sqrt(), (bits - coarse.mean(1)).abs())


def _dequantised(
    process: Process, times: Times, levels: UInt8[Tensor, "B C H W"], ids: Int64[Tensor, " B"], seed: int
) -> tuple[States, PerImage]:
    """xbar_0, and what stands beside its density, bits/dim: the width of the bins, or decoder and entropy of z_0."""
    x_0, shape = x_0_of(levels), tuple(levels.shape[1:])
    if not isinstance(process, ContinuousProcess):
        u = counter_random.uniform(seed, _STREAM + "/dequantise", ids, 0, math.prod(shape)).reshape(levels.shape)
        xbar = (levels.to(torch.float64) + u - 0.5) / 127.5 - 1.0
        return xbar, torch.full((len(levels),), math.log2(127.5), dtype=torch.float64, device=levels.device)
    first = process.at(times[:1].to(levels.device))
    eps = counter_random.normal(seed, _STREAM + "/dequantise", ids, 0, shape, dtype=torch.float64)
    blur = first.sigma / first.alpha
    xbar = x_0 + blur * eps
    entropy = -0.5 * (eps.square() + math.log(2.0 * math.pi)) - blur.log()
    return xbar, bits_per_dim(softmax_nll_nats(levels, xbar, first.log_snr) + entropy)


def _rademacher(seed: int, ids: Int64[Tensor, " B"], probe: int, shape: tuple[int, ...]) -> States:
    """Signs +1 or -1 of shape [B, C, H, W], keyed by (seed, id, probe)."""
    words = counter_random.random_words(seed, _STREAM + "/probe", ids, probe, math.prod(shape[1:]))
    return ((words & 1) * 2 - 1).to(torch.float64).reshape(shape)


@torch.no_grad()
def _log_density(denoise: Denoise, process: Process, xbar: States, signs: Sequence[States], times: Times) -> PerProbe:
    """ln p(xbar_0) in nats for each probe: Heun's method over `times` for the state and for its density.

    The state takes its trapezoid in sbar, in which the flow becomes straight at both ends. The density takes it, at
    the same two evaluations of a step, in ln sbar: there its rate tends to 0 and to D at the ends, while in sbar it
    falls like D / sbar, which a wide step cannot follow (the last one of the cosine schedule multiplies sbar by 32
    and would alone be 18 bits/dim off). The probes stay the same along the path (Grathwohl 2019, FFJORD, sec. 3.1).
    """
    marginal = process.at(times)
    alpha, sigma = (value[:, 0, 0, 0].tolist() for value in (marginal.alpha, marginal.sigma))
    log_sbar = (-0.5 * marginal.log_snr[:, 0, 0, 0]).tolist()
    sbar = (-0.5 * marginal.log_snr[:, 0, 0, 0]).exp().tolist()
    integral = xbar.new_zeros(len(xbar), len(signs))
    for s, t in itertools.pairwise(range(len(times))):
        width = sbar[t] - sbar[s]
        eps_s, rate_s = _field(denoise, alpha[s], sigma[s], xbar, times[s], signs)
        eps_t, rate_t = _field(denoise, alpha[t], sigma[t], xbar + width * eps_s, times[t], signs)
        xbar = xbar + 0.5 * width * (eps_s + eps_t)
        integral += 0.5 * (log_sbar[t] - log_sbar[s]) * (rate_s + rate_t)
    r = process.prior_signal
    # N(z_{T-1}; 0, V I) and the D ln alpha that makes it a density of xbar, dimension by dimension; r = alpha^2 / V.
    prior = -0.5 * (r * xbar.square() + math.log(2.0 * math.pi / r)).flatten(1).sum(1)
    return prior[:, None] + integral


def _field(
    denoise: Denoise, alpha: float, sigma: float, xbar: States, time: Tensor, signs: Sequence[States]
) -> tuple[States, PerProbe]:
    """eps(z_t, t), and sigma_t v^T (d eps / d z_t) v for each probe v, whose mean over probes estimates r_t (Hutchinson
    1990; Grathwohl 2019, FFJORD, sec. 3.1). One call of the network serves all probes."""
    with torch.enable_grad():
        z_t = (alpha * xbar).requires_grad_()
        eps = denoise(z_t, time.to(xbar.device).expand(len(xbar))).eps
    rates = []
    for left, v in zip(reversed(range(len(signs))), signs, strict=True):
        (product,) = torch.autograd.grad(eps, z_t, v, retain_graph=left > 0)
        rates.append((product * v).flatten(1).sum(1))
    return eps.detach(), sigma * torch.stack(rates, 1)
