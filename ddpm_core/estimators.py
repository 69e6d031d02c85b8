"""Estimating the ELBO of many images: which (t, noise) each image is evaluated at, and what follows from it.

A design gives every image E evaluations of the network with weights, such that

    L_T + sum over evaluations of weight * term

is an unbiased estimate of the image's ELBO (Ho 2020, eq. 5), `term` being L_0 at t = 0 and the KL at t > 0. The
evaluations are divided among R replicates, each an estimate of its own, from which the Monte-Carlo error follows.
"""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from ddpm_core import noise
from ddpm_core.diffusion import Sigma2, p_mean_variance, q_sample, reverse_mean, sigma2_table
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood import decoder_bpd, kl_bpd, timestep_proposal, x_0_of
from ddpm_core.losses import eps_mse
from ddpm_core.schedule import NoiseSchedule

LN_2 = 0.6931471805599453
# Neighbours whose time steps are one equidistant set: large enough to see most t, small enough that a data set
# has many groups, each of which gives the Monte-Carlo error two degrees of freedom less one.
GROUP_SIZE = 16
_REPLICATES = 2
# As in `likelihood.elbo_terms`: a full design meets its noise.
_STREAM = "likelihood"
_PROPOSAL_BINS = 32
# Of the importance proposal: what is left to the plain one, so that no weight exceeds 1 / _FLOOR times the plain one.
_FLOOR = 0.2


@dataclass(frozen=True)
class Design:
    """The evaluations of B images: `t` int64 [B, E], `weight` float64 [B, E], `replicate` int64 [E] in 0..R-1."""

    t: Int64[Tensor, "B E"]
    weight: Float64[Tensor, "B E"]
    replicate: Int64[Tensor, " E"]

    @property
    def num_replicates(self) -> int:
        """R."""
        return int(self.replicate.max()) + 1


@dataclass(frozen=True)
class Scores:
    """What one call of the network says of each row, float64 [B].

    `eps_mse` is ||eps - eps_pred||^2 / D. In bits/dim: `term` is L_0 at t = 0 and the KL at t > 0, `term_clipped` the
    same with the predicted x_0 clamped to [-1, 1].
    """

    eps_mse: Float64[Tensor, " B"]
    term: Float64[Tensor, " B"]
    term_clipped: Float64[Tensor, " B"]


def full_design(num_timesteps: int, num_images: int, draws: int) -> Design:
    """Every t, `draws` times: the exact sum over t, R = `draws`. Raises ConfigError unless draws >= 1."""
    if draws < 1:
        raise ConfigError(f"draws: {draws} is not >= 1")
    t = torch.arange(num_timesteps).repeat(draws)
    replicate = torch.arange(draws).repeat_interleave(num_timesteps)
    weight = torch.full((num_images, len(t)), 1.0 / draws, dtype=torch.float64)
    return Design(t.expand(num_images, -1), weight, replicate)


def stratified_design(positions: Int64[Tensor, " B"], seed: int, proposal: Float64[Tensor, " S"], k: int) -> Design:
    """`k` of the KLs' time steps 1..S for each image, drawn with probabilities `proposal` [S], and t = 0 twice.

    In each of the R = 2 replicates, the GROUP_SIZE images of a group have k/2 points each that together divide the
    unit interval evenly, shifted by one random number (systematic sampling: Cochran 1977, ch. 8); the proposal's
    inverse distribution function makes them time steps. An image alone has stratified points, uniform over seeds.

    `positions` [B] is each image's place in the order of the evaluation: it gives its group and place in it.
    Raises ConfigError unless k is even and 2 <= k <= S.
    """
    if not 2 <= k <= len(proposal) or k % 2:
        raise ConfigError(f"k: {k} is not an even number in 2..{len(proposal)}, the number of KL terms")
    half = k // _REPLICATES
    group, place = positions // GROUP_SIZE, positions % GROUP_SIZE
    edges = proposal.cumsum(0)[:-1]  # without the last, so that rounding cannot lead past it
    columns, weights = [], []
    for replicate in range(_REPLICATES):
        shift = noise.uniform(seed, _STREAM + "/timesteps", group, replicate, 1)[:, 0]
        offset = (shift + place / GROUP_SIZE) % 1.0
        points = (torch.arange(half) + offset[:, None]) / half
        t = 1 + torch.searchsorted(edges, points, right=True)
        columns += [torch.zeros(len(t), 1, dtype=torch.int64), t]
        weight = 1.0 / (_REPLICATES * half * proposal[t - 1])
        weights += [torch.full_like(weight[:, :1], 1.0 / _REPLICATES), weight]
    replicate_of = torch.arange(_REPLICATES).repeat_interleave(1 + half)
    return Design(torch.cat(columns, 1), torch.cat(weights, 1), replicate_of)


def importance_proposal(
    schedule: NoiseSchedule, t: Int64[Tensor, " n"], kl: Float64[Tensor, " n"]
) -> Float64[Tensor, " S"]:
    """Probabilities of t = 1..T-1 in proportion to the root mean square of the KL (Nichol and Dhariwal 2021, eq. 18),
    from a first pass's KLs `kl` [n] at `t` [n] (t = 0 is passed over).

    The first pass is smoothed: the range of t is cut into stretches of equal steps in log-SNR, in each of which
    the KL per unit of log-SNR counts as constant. A fifth stays `timestep_proposal`, so no weight gets extreme.
    """
    plain = timestep_proposal(schedule)
    bins = min(_PROPOSAL_BINS, len(plain))
    bin_of = ((plain.cumsum(0) - plain / 2) * bins).long().clamp(max=bins - 1)
    density = (kl / plain[t - 1])[t > 0].square()
    count = torch.zeros(bins, dtype=torch.float64)
    total = torch.zeros(bins, dtype=torch.float64)
    count.index_add_(0, bin_of[t[t > 0] - 1], torch.ones_like(density))
    total.index_add_(0, bin_of[t[t > 0] - 1], density)
    # A stretch that the first pass missed counts as the average one.
    level = torch.where(count > 0, total / count.clamp(min=1.0), density.mean()).sqrt()
    wanted = plain * level[bin_of]
    return (1.0 - _FLOOR) * wanted / wanted.sum() + _FLOOR * plain


def evaluation_noise(
    seed: int, ids: Int64[Tensor, " B"], column: Int64[Tensor, " B"], shape: tuple[int, int, int]
) -> Float64[Tensor, "B C H W"]:
    """The noise of evaluation `column` of each image: a function of (seed, id, column)."""
    return noise.normal(seed, _STREAM, ids, column, shape, dtype=torch.float64)


def score(
    schedule: NoiseSchedule,
    levels: UInt8[Tensor, "B C H W"],
    t: Int64[Tensor, " B"],
    eps: Float[Tensor, "B C H W"],
    eps_pred: Float[Tensor, "B C H W"],
    sigma2: Sigma2,
) -> Scores:
    """The ELBO's term of each row at its own t, in float64 (Ho 2020, eqs. 5, 12 and 13)."""
    x_0, eps, eps_pred = x_0_of(levels), eps.double(), eps_pred.double()
    term = torch.empty(len(t), dtype=torch.float64, device=levels.device)
    clipped = torch.empty_like(term)
    first, later = (t == 0).nonzero()[:, 0], (t > 0).nonzero()[:, 0]
    for out, clip in ((term, False), (clipped, True)):
        if len(first):
            x_t = q_sample(schedule, x_0[first], t[first], eps[first])
            step = p_mean_variance(schedule, eps_pred[first], x_t, t[first], sigma2, clip)
            out[first] = decoder_bpd(levels[first], step.mean, step.variance.sqrt())
        if len(later):
            out[later] = kl_bpd(schedule, x_0[later], t[later], eps[later], eps_pred[later], sigma2, clip)
    return Scores(eps_mse(eps, eps_pred), term, clipped)


def decoder_terms(
    schedule: NoiseSchedule,
    levels: UInt8[Tensor, "B C H W"],
    eps: Float64[Tensor, "B C H W"],
    eps_pred: Float64[Tensor, "B C H W"],
    variances: Float64[Tensor, " G"],
) -> Float64[Tensor, "B G"]:
    """L_0 (Ho 2020, eq. 13), bits/dim, unclipped, under each of the variances, given the noise in x at t = 0 and its
    prediction."""
    t = torch.zeros(len(levels), dtype=torch.int64, device=levels.device)
    x_t = q_sample(schedule, x_0_of(levels), t, eps)
    mean, _ = reverse_mean(schedule, eps_pred, x_t, t)
    return torch.stack([decoder_bpd(levels, mean, float(variance) ** 0.5) for variance in variances], 1)


def replicate_values(
    design: Design, prior: Float64[Tensor, " B"], terms: Float64[Tensor, "B E"]
) -> Float64[Tensor, "B R"]:
    """Each replicate's unbiased estimate of the image's ELBO, bits/dim; with a prior of 0, of the sum of `terms`."""
    replicates = design.num_replicates
    parts = [(design.weight * terms)[:, design.replicate == r].sum(1) for r in range(replicates)]
    return prior[:, None] + replicates * torch.stack(parts, 1)


def kl_from_eps_mse(
    schedule: NoiseSchedule, t: Int64[Tensor, "*S"], mse: Float64[Tensor, "*S"], sigma2: Sigma2
) -> Float64[Tensor, "*S"]:
    """The unclipped KL at t >= 1, bits/dim, under any variances, from ||eps - eps_pred||^2 / D alone (Ho 2020, eq. 12,
    with its constant)."""
    variance = sigma2_table(schedule, sigma2)[t]
    ratio = schedule.posterior_variance[t] / variance
    error = schedule.reverse_mean_coef_eps[t].square() * mse / (2.0 * variance)
    return (0.5 * (ratio - 1.0 - ratio.log()) + error) / LN_2


def decoder_variances(schedule: NoiseSchedule) -> Float64[Tensor, " G"]:
    """Variances for L_0: what `sigma2_table` has at t = 0 for 'beta' and for 'beta_tilde', then a grid in steps of
    sqrt(2) from 1/16 to 4 times the former, from which the optimum is chosen."""
    beta = schedule.betas[0]
    grid = beta * 2.0 ** (torch.arange(-8, 5, dtype=torch.float64) / 2.0)
    return torch.cat([beta[None], sigma2_table(schedule, "beta_tilde")[:1], grid])


def subsequence_kl(
    schedule: NoiseSchedule,
    steps: list[int],
    t: Int64[Tensor, "*S"],
    mse: Float64[Tensor, "*S"],
    bandwidth: float = 0.0,
) -> Float64[Tensor, "*S"]:
    """Terms, bits/dim, whose weighted sum estimates the sum of the KLs of a sub-sequence `steps` (increasing, 0 first).

    The KL of the step from t to the one before it, s, under that step's posterior variance is
    1/2 (SNR(s) / SNR(t) - 1) ||eps - eps_pred||^2 (Kingma 2021, VDM, eq. 14, with ||x_0 - x_0_pred||^2 =
    ||eps - eps_pred||^2 / SNR(t)). With a bandwidth of 0 it counts at t alone, and the estimate is unbiased; otherwise
    its error is the average over the time steps within `bandwidth` of t in log-SNR, as many below as above: far more
    precise where few steps are drawn, and biased by the curvature of the error over t only.
    """
    factor = torch.zeros(schedule.num_timesteps, dtype=torch.float64)
    for before, now in itertools.pairwise(steps):
        near = (schedule.log_snr - schedule.log_snr[now]).abs() <= bandwidth
        below, above = int(near[1:now].sum()), int(near[now + 1 :].sum())
        reach = min(below, above)
        value = 0.5 * (schedule.snr[before] / schedule.snr[now] - 1.0) / (2 * reach + 1)
        factor[now - reach : now + reach + 1] += value
    return factor[t] * mse / LN_2
