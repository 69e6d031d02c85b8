"""The evidence lower bound of each image, term by term, in bits per dimension (float64).

-log p(x_0) <= L_T + sum over t = T-1..1 of L_{t} + L_0 (Ho 2020, eq. 5; code t is the paper's t - 1,
so the KL at index t >= 1 is the paper's L_{t-1} with its t one larger). Bits/dim = nats / (D ln 2).
Images here are uint8 [B, C, H, W]; a number is always about given reverse variances, so it is
reported together with `sigma2`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from ddpm_core import noise
from ddpm_core.diffusion import (
    Images,
    Sigma2,
    Timesteps,
    p_mean_variance,
    q_sample,
    sigma2_table,
    x_0_from_eps,
)
from ddpm_core.errors import ConfigError
from ddpm_core.losses import eps_mse
from ddpm_core.sampling import EpsFn
from ddpm_core.schedule import NoiseSchedule, gather_table

PerImage = Float64[Tensor, " B"]
UInt8Images = UInt8[Tensor, "B C H W"]
_STREAM = "likelihood"


@dataclass(frozen=True)
class Terms:
    """An unbiased estimate of each image's ELBO, bits/dim, float64 [B]: total = prior + kl_sum + decoder."""

    total: PerImage
    prior: PerImage
    kl_sum: PerImage
    decoder: PerImage


@dataclass(frozen=True)
class ElboTerms:
    """The ELBO term by term, bits/dim, float64.

    `timesteps`: the K time steps. `prior` [B]: L_T. `terms` [B, K]: L_0 at t = 0, else the KL at t.
    `eps_mse` [B, K]: ||eps - eps_pred||^2 / D, from which the unclipped KL under any other variances
    follows without the network. All are means over the draws.
    """

    timesteps: tuple[int, ...]
    prior: Float64[Tensor, " B"]
    terms: Float64[Tensor, "B K"]
    eps_mse: Float64[Tensor, "B K"]

    @property
    def total(self) -> PerImage:
        """prior + sum of the terms [B]: the ELBO if `timesteps` are all of them."""
        return self.prior + self.terms.sum(1)


def _bits_per_dim(nats: Tensor) -> PerImage:
    """Sum of nats over the dimensions of each image, divided by D ln 2."""
    return nats.flatten(1).mean(1) / math.log(2.0)


def x_0_of(levels: UInt8Images) -> Float64[Tensor, "B C H W"]:
    """x_0 = k / 127.5 - 1 in float64."""
    return levels.to(torch.float64) / 127.5 - 1.0


def prior_bpd(schedule: NoiseSchedule, x_0: Images) -> PerImage:
    """L_T = KL(q(x_T | x_0) || N(0, I)) = 1/2 sum[abar x_0^2 - abar - ln(1 - abar)] (Ho 2020, eq. 5)."""
    abar = float(schedule.alphas_cumprod[-1])
    return _bits_per_dim(0.5 * (abar * x_0.to(torch.float64).square() - abar - math.log1p(-abar)))


def kl_bpd(
    schedule: NoiseSchedule,
    x_0: Images,
    t: Timesteps,
    eps: Images,
    eps_pred: Images,
    sigma2: Sigma2,
    clip_x_0: bool = False,
) -> PerImage:
    """KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)) at t in 1..T-1 (Ho 2020, eqs. 5, 8 and 12).

    D/2 [ln(sigma^2 / beta_tilde) - 1 + beta_tilde / sigma^2] + ||mu_tilde - mu_theta||^2 / (2 sigma^2),
    where ||mu_tilde - mu_theta||^2 = c_t^2 ||eps - eps_pred||^2, c_t = beta_t / sqrt(alpha_t (1 - abar_t)),
    or, with `clip_x_0`, the posterior's factor of x_0, squared, times ||x_0 - clamp(x_0_pred)||^2.
    Raises ConfigError for a t outside 1..T-1: at t = 0 the term is the decoder's.
    """
    x_0, eps, eps_pred = (tensor.to(torch.float64) for tensor in (x_0, eps, eps_pred))
    if t.device.type == "cpu" and bool((t < 1).any()):
        raise ConfigError(f"t: {int(t.min())} is not in 1..{schedule.num_timesteps - 1}; use decoder_bpd at t = 0")
    variance = gather_table(sigma2_table(schedule, sigma2), t, x_0)
    ratio = schedule.gather("posterior_variance", t, x_0) / variance
    if clip_x_0:
        x_t = q_sample(schedule, x_0, t, eps)
        error = x_0 - x_0_from_eps(schedule, x_t, t, eps_pred).clamp(-1.0, 1.0)
        factor = schedule.gather("posterior_mean_coef_x0", t, x_0)
    else:
        error = eps - eps_pred
        factor = schedule.gather("reverse_mean_coef_eps", t, x_0)
    return _bits_per_dim(0.5 * (ratio - 1.0 - ratio.log()) + (factor * error).square() / (2.0 * variance))


def kl_between_bpd(schedule: NoiseSchedule, x_0: Images, x_0_pred: Images, s: Timesteps, t: Timesteps) -> PerImage:
    """1/2 (SNR(s) - SNR(t)) ||x_0 - x_0_pred||^2 for s < t (Kingma 2021, VDM, eq. 14).

    The KL of a step from t to any earlier s under the posterior's own variance; with s = t - 1 it is
    `kl_bpd` for 'beta_tilde'. It gives the ELBO of any sub-sequence from the same predictions.
    """
    x_0 = x_0.to(torch.float64)
    difference = schedule.gather("snr", s, x_0) - schedule.gather("snr", t, x_0)
    return _bits_per_dim(0.5 * difference * (x_0 - x_0_pred.to(torch.float64)).square())


def decoder_nll_nats(
    levels: UInt8[Tensor, "*S"], mean: Float[Tensor, "*S"], sigma: Float[Tensor, "..."] | float
) -> Float64[Tensor, "*S"]:
    """-ln of the discretised Gaussian's mass of each level, elementwise (Ho 2020, eq. 13).

    The bin of level k is [x - 1/255, x + 1/255] around x = k / 127.5 - 1, open below at k = 0 and
    above at k = 255. `sigma` > 0 broadcasts against `mean`. Exact into the far tails: the difference
    of two CDFs is taken between logarithms, in the tail where they are small.
    """
    x = levels.to(torch.float64) / 127.5 - 1.0
    mean = mean.to(torch.float64)
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=mean.device)
    lower = torch.where(levels == 0, -math.inf, (x - 1.0 / 255.0 - mean) / sigma)
    upper = torch.where(levels == 255, math.inf, (x + 1.0 / 255.0 - mean) / sigma)
    # Reflect bins above the mean: Phi(b) - Phi(a) = Phi(-a) - Phi(-b) keeps both logs resolvable.
    above = lower > 0.0
    lower, upper = torch.where(above, -upper, lower), torch.where(above, -lower, upper)
    log_upper: Tensor = torch.special.log_ndtr(upper)
    log_ratio: Tensor = torch.special.log_ndtr(lower) - log_upper
    return -(log_upper + torch.log(-torch.expm1(log_ratio)))


def decoder_bpd(levels: UInt8Images, mean: Images, sigma: Tensor | float) -> PerImage:
    """L_0 = -log p_theta(x_0 | x_1) of the discretised Gaussian (Ho 2020, eq. 13); see `decoder_nll_nats`."""
    return _bits_per_dim(decoder_nll_nats(levels, mean, sigma))


def term_bpd(
    schedule: NoiseSchedule,
    levels: UInt8Images,
    t: int,
    eps: Images,
    eps_pred: Images,
    sigma2: Sigma2,
    clip_x_0: bool = False,
) -> PerImage:
    """The ELBO's term at one t, given the noise in x_t: `decoder_bpd` at t = 0, else `kl_bpd`."""
    x_0 = x_0_of(levels)
    t_batch = torch.full((levels.shape[0],), t, dtype=torch.int64, device=levels.device)
    if t > 0:
        return kl_bpd(schedule, x_0, t_batch, eps, eps_pred, sigma2, clip_x_0)
    x_t = q_sample(schedule, x_0, t_batch, eps.to(torch.float64))
    step = p_mean_variance(schedule, eps_pred.to(torch.float64), x_t, t_batch, sigma2, clip_x_0)
    return decoder_bpd(levels, step.mean, step.variance.sqrt())


@torch.no_grad()
def elbo_terms(
    schedule: NoiseSchedule,
    eps_fn: EpsFn,
    images: UInt8Images,
    ids: Int64[Tensor, " B"],
    seed: int,
    sigma2: Sigma2 = "beta_tilde",
    timesteps: Sequence[int] | None = None,
    draws: int = 1,
    clip_x_0: bool = False,
    network_dtype: torch.dtype = torch.float32,
) -> ElboTerms:
    """Every term of the ELBO (Ho 2020, eq. 5), each from `draws` draws of x_t ~ q(x_t | x_0).

    `timesteps`: which t, by default all of 0..T-1. The noise is keyed by (seed, id, draw, t). The
    network is called len(timesteps) * draws times on the batch [B, C, H, W], in `network_dtype`.
    """
    steps = tuple(range(schedule.num_timesteps)) if timesteps is None else tuple(timesteps)
    if draws < 1:
        raise ConfigError(f"draws: {draws} is not >= 1")
    ids = ids.to(images.device)
    x_0 = x_0_of(images)
    terms = torch.zeros(len(images), len(steps), dtype=torch.float64, device=images.device)
    errors = torch.zeros_like(terms)
    for column, t in enumerate(steps):
        t_batch = torch.full_like(ids, t)
        for draw in range(draws):
            counter = draw * schedule.num_timesteps + t
            eps = noise.normal(seed, _STREAM, ids, counter, tuple(x_0.shape[1:]), dtype=torch.float64)
            x_t = q_sample(schedule, x_0, t_batch, eps)
            eps_pred = eps_fn(x_t.to(network_dtype), t_batch)
            terms[:, column] += term_bpd(schedule, images, t, eps, eps_pred, sigma2, clip_x_0) / draws
            errors[:, column] += eps_mse(eps, eps_pred) / draws
    return ElboTerms(steps, prior_bpd(schedule, x_0), terms, errors)


def timestep_proposal(schedule: NoiseSchedule) -> Float64[Tensor, " S"]:
    """Probabilities of the S = T - 1 time steps 1..T-1 that are uniform in log-SNR (Kingma 2021, VDM, sec. 5.1).

    In log-SNR the KLs are 1/2 ||eps - eps_pred||^2 times a nearly constant factor, so weighting by the
    inverse of these probabilities evens out terms that differ by orders of magnitude over t.
    """
    steps = -schedule.log_snr.diff()
    return steps / steps.sum()


def stratified_timesteps(
    ids: Int64[Tensor, " B"], seed: int, proposal: Float64[Tensor, " S"], k: int
) -> Int64[Tensor, "B k"]:
    """For each image, `k` time steps in 1..T-1, one from each of k equally probable strata, keyed by (seed, id).

    Over the k columns t is expected k proposal[t - 1] times, so the mean over the columns of KL / proposal
    is an unbiased estimate of the sum of the KLs over all t. Raises ConfigError unless 1 <= k <= T - 1.
    """
    if not 1 <= k <= len(proposal):
        raise ConfigError(f"k: {k} is not in 1..{len(proposal)}, the number of KL terms")
    strata = torch.arange(k, dtype=torch.float64, device=ids.device)
    points = (strata + noise.uniform(seed, _STREAM + "/timesteps", ids, 0, k)) / k
    edges = proposal.to(ids.device).cumsum(0)[:-1]  # without the last, so that rounding cannot lead past it
    return 1 + torch.searchsorted(edges, points, right=True)


@torch.no_grad()
def estimate_bpd(
    schedule: NoiseSchedule,
    eps_fn: EpsFn,
    images: UInt8Images,
    ids: Int64[Tensor, " B"],
    seed: int,
    k: int,
    sigma2: Sigma2 = "beta_tilde",
    clip_x_0: bool = False,
) -> Terms:
    """An unbiased estimate of each image's ELBO from 1 + `k` network calls on the batch [B, C, H, W].

    L_T is exact, L_0 has one draw, and the sum of the KLs comes from `stratified_timesteps`, stratified and
    weighted by importance. A result
    depends on (seed, id) and the image only, so two models compared with one seed meet the same noise.
    """
    ids = ids.to(images.device)
    x_0 = x_0_of(images)
    shape = tuple(x_0.shape[1:])

    def predict(t: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        eps = noise.normal(seed, _STREAM + "/estimate", ids, draw, shape, dtype=torch.float64)
        return eps, eps_fn(q_sample(schedule, x_0, t, eps).to(torch.float32), t)

    decoder = term_bpd(schedule, images, 0, *predict(torch.zeros_like(ids), 0), sigma2, clip_x_0)
    kl_sum = torch.zeros_like(decoder)
    proposal = timestep_proposal(schedule).to(images.device)
    for draw, t in enumerate(stratified_timesteps(ids, seed, proposal, k).unbind(1), 1):
        kl_sum += kl_bpd(schedule, x_0, t, *predict(t, draw), sigma2, clip_x_0) / (k * proposal[t - 1])
    prior = prior_bpd(schedule, x_0)
    return Terms(prior + kl_sum + decoder, prior, kl_sum, decoder)


def optimal_sigma2(schedule: NoiseSchedule, mean_eps_mse: Float[Tensor, " T"]) -> Float64[Tensor, " T"]:
    """sigma*_t^2 = beta_tilde_t + c_t^2 E||eps - eps_pred||^2 / D: minimises the mean KL (Ho 2020,
    eq. 12, with its constant) over isotropic variances (Bao 2022, the optimal covariance with imperfect mean).

    `mean_eps_mse` [T]: the mean of `ElboTerms.eps_mse` over held-out images, never over those scored.
    """
    mse = mean_eps_mse.to(device="cpu", dtype=torch.float64)
    return sigma2_table(schedule, schedule.posterior_variance + schedule.reverse_mean_coef_eps**2 * mse)
