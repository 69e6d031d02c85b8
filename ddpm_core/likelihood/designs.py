"""Which (t, noise) each image's ELBO is evaluated at.

A design gives every image E evaluations of the network with weights, such that

    L_T + sum over evaluations of weight * term

is an unbiased estimate of the image's ELBO (Ho 2020, eq. 5), `term` being L_0 at t = 0 and the KL at t > 0. The
evaluations are divided among R replicates, each an estimate of its own, from which the Monte-Carlo error follows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64, Shaped
from torch import Tensor

from ddpm_core import counter_random
from ddpm_core.errors import ConfigError
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess

# Neighbours whose time steps are one equidistant set: large enough to see most t, small enough that a data set
# has many groups, each of which gives the Monte-Carlo error two degrees of freedom less one.
GROUP_SIZE = 16
STREAM = "likelihood"
_PROPOSAL_BINS = 32
# Of the importance proposal: what is left to the plain one, so that no weight exceeds 1 / _FLOOR times the plain one.
_FLOOR = 0.2


@dataclass(frozen=True)
class Design:
    """The evaluations of B images: `t` int64 [B, E], in continuous time gamma, float64; `weight` float64 [B, E],
    `replicate` int64 [E] in 0..R-1. The first column of each replicate is that of L_0."""

    t: Shaped[Tensor, "B E"]
    weight: Float64[Tensor, "B E"]
    replicate: Int64[Tensor, " E"]

    @property
    def first(self) -> Bool[Tensor, " E"]:
        """Which columns are those of L_0."""
        before = torch.full((1,), -1, dtype=self.replicate.dtype)
        return self.replicate.diff(prepend=before) != 0

    @property
    def num_replicates(self) -> int:
        """R."""
        return int(self.replicate.max()) + 1

    def replicate_values(self, prior: Float64[Tensor, " B"], terms: Float64[Tensor, "B E"]) -> Float64[Tensor, "B R"]:
        """Each replicate's unbiased estimate of the ELBO, bits/dim; with a prior of 0, of the sum of `terms`."""
        replicates = self.num_replicates
        parts = [(self.weight * terms)[:, self.replicate == r].sum(1) for r in range(replicates)]
        return prior[:, None] + replicates * torch.stack(parts, 1)


def full_design(num_timesteps: int, num_images: int, draws: int = 1) -> Design:
    """Every t, `draws` times: the exact sum over t, R = `draws`. Raises ConfigError unless draws >= 1."""
    if draws < 1:
        raise ConfigError(f"draws: {draws} is not >= 1")
    t = torch.arange(num_timesteps).repeat(draws)
    replicate = torch.arange(draws).repeat_interleave(num_timesteps)
    weight = torch.full((num_images, len(t)), 1.0 / draws, dtype=torch.float64)
    return Design(t.expand(num_images, -1), weight, replicate)


def stratified_design(
    positions: Int64[Tensor, " B"], seed: int, proposal: Float64[Tensor, " S"], k: int, replicates: int = 2
) -> Design:
    """`k` of the KLs' time steps 1..S for each image, drawn with probabilities `proposal` [S], and t = 0 once in each
    of the R = `replicates`.

    In each replicate, the GROUP_SIZE images of a group have k/R points each that together divide the unit interval
    evenly, shifted by one random number (systematic sampling: Cochran 1977, ch. 8); the proposal's inverse distribution
    function makes them time steps. An image alone has stratified points, uniform over seeds.

    `positions` [B] is each image's place in the order of the evaluation: it gives its group and place in it.
    Raises ConfigError unless k is a multiple of R and R <= k <= S.
    """
    if not replicates <= k <= len(proposal) or k % replicates:
        rule = "an even number in 2" if replicates == 2 else f"a multiple of {replicates} in {replicates}"
        raise ConfigError(f"k: {k} is not {rule}..{len(proposal)}, the number of KL terms")
    edges = proposal.cumsum(0)[:-1]  # without the last, so that rounding cannot lead past it
    columns, weights = [], []
    for points in _systematic_points(positions, seed, k // replicates, replicates):
        t = 1 + torch.searchsorted(edges, points, right=True)
        columns += [torch.zeros(len(t), 1, dtype=torch.int64), t]
        weight = 1.0 / (k * proposal[t - 1])
        weights += [torch.full_like(weight[:, :1], 1.0 / replicates), weight]
    replicate_of = torch.arange(replicates).repeat_interleave(1 + k // replicates)
    return Design(torch.cat(columns, 1), torch.cat(weights, 1), replicate_of)


def continuous_design(
    positions: Int64[Tensor, " B"],
    seed: int,
    process: ContinuousProcess,
    k: int,
    replicates: int = 2,
    density: Float64[Tensor, " S"] | None = None,
) -> Design:
    """The same over gamma between the ends of a continuous process: uniform, or with the probabilities `density` [S] of
    S equal bins (Kingma 2021, VDM, app. I.1). Column 0 of each replicate is gamma_0.

    Raises ConfigError unless k is a multiple of R and R <= k.
    """
    if k < replicates or k % replicates:
        raise ConfigError(f"k: {k} is not a multiple of {replicates}, at least {replicates}")
    low, high = process.ends
    bins = torch.ones(1, dtype=torch.float64) if density is None else density
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), bins.cumsum(0)])
    columns, weights = [], []
    for points in _systematic_points(positions, seed, k // replicates, replicates):
        bin_of = torch.searchsorted(edges[1:-1], points, right=True)
        place = (bin_of + ((points - edges[bin_of]) / bins[bin_of]).clamp(0.0, 1.0)) / len(bins)
        columns += [torch.full((len(points), 1), low, dtype=torch.float64), low + (high - low) * place]
        weight = 1.0 / (k * len(bins) * bins[bin_of])
        weights += [torch.full_like(weight[:, :1], 1.0 / replicates), weight]
    replicate_of = torch.arange(replicates).repeat_interleave(1 + k // replicates)
    return Design(torch.cat(columns, 1), torch.cat(weights, 1), replicate_of)


def _systematic_points(
    positions: Int64[Tensor, " B"], seed: int, share: int, replicates: int
) -> Iterator[Float64[Tensor, "B share"]]:
    """Each replicate's points in the unit interval, see `stratified_design`."""
    group, place = positions // GROUP_SIZE, positions % GROUP_SIZE
    for replicate in range(replicates):
        shift = counter_random.uniform(seed, STREAM + "/timesteps", group, replicate, 1)[:, 0]
        offset = (shift + place / GROUP_SIZE) % 1.0
        yield (torch.arange(share) + offset[:, None]) / share


def timestep_proposal(process: DiscreteProcess) -> Float64[Tensor, " S"]:
    """Probabilities of the S = T - 1 time steps 1..T-1 that are uniform in log-SNR (Kingma 2021, VDM, sec. 5.1).

    In log-SNR the KLs are 1/2 ||eps - eps_pred||^2 times a nearly constant factor, so weighting by the
    inverse of these probabilities evens out terms that differ by orders of magnitude over t.
    """
    steps = -process.log_snr.diff()
    finite = steps[steps.isfinite()]
    if len(finite) < len(steps):  # down to an SNR of 0 it is an infinite way, which counts as the longest of the others
        steps = steps.clamp(max=float(finite.max()) if len(finite) else 1.0)
    return steps / steps.sum()


def importance_proposal(
    process: DiscreteProcess, t: Int64[Tensor, " n"], kl: Float64[Tensor, " n"]
) -> Float64[Tensor, " S"]:
    """Probabilities of t = 1..T-1 in proportion to the root mean square of the KL (Nichol and Dhariwal 2021, eq. 18),
    from a first pass's KLs `kl` [n] at `t` [n] (t = 0 is passed over).

    The first pass is smoothed: the range of t is cut into stretches of equal steps in log-SNR, in each of which
    the KL per unit of log-SNR counts as constant. A fifth stays `timestep_proposal`, so no weight gets extreme.
    """
    plain = timestep_proposal(process)
    bins = min(_PROPOSAL_BINS, len(plain))
    bin_of = ((plain.cumsum(0) - plain / 2) * bins).long().clamp(max=bins - 1)
    level = _level(bin_of[t[t > 0] - 1], (kl / plain[t - 1])[t > 0], bins)
    wanted = plain * level[bin_of]
    return (1.0 - _FLOOR) * wanted / wanted.sum() + _FLOOR * plain


def importance_density(
    process: ContinuousProcess, gamma: Float64[Tensor, " n"], terms: Float64[Tensor, " n"]
) -> Float64[Tensor, " S"]:
    """The same for continuous time: probabilities of S equal bins of gamma, from a first pass's `terms` [n] at `gamma`
    [n] (those of L_0 left out), for `continuous_design`."""
    low, high = process.ends
    bin_of = ((gamma - low) / (high - low) * _PROPOSAL_BINS).long().clamp(0, _PROPOSAL_BINS - 1)
    level = _level(bin_of, terms, _PROPOSAL_BINS)
    return (1.0 - _FLOOR) * level / level.sum() + _FLOOR / _PROPOSAL_BINS


def _level(bin_of: Int64[Tensor, " n"], values: Float64[Tensor, " n"], bins: int) -> Float64[Tensor, " S"]:
    """The root mean square of the values in each bin; a bin that has none counts as the average one."""
    count = torch.zeros(bins, dtype=torch.float64)
    total = torch.zeros(bins, dtype=torch.float64)
    square = values.square()
    count.index_add_(0, bin_of, torch.ones_like(square))
    total.index_add_(0, bin_of, square)
    return torch.where(count > 0, total / count.clamp(min=1.0), square.mean()).sqrt()
