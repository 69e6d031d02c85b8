"""Classification by likelihood: the class c of the largest -ELBO(x | c) + ln prior(c) (Li 2023, eq. 7).

All classes of an image meet the same times and the same noise, so their differences are known far better than the
bounds themselves. Draws are made in rounds; a class that has fallen too far behind an image's best one is given up, and
an image with one class left is done (Li 2023, alg. 2, whose stages are fixed in advance; here the errors decide).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.bounds import Bound
from ddpm_core.likelihood.decoder import UInt8Images
from ddpm_core.likelihood.designs import Design
from ddpm_core.likelihood.elbo import Elbo, elbo

DesignOf = Callable[[Int64[Tensor, " B"], int], Design]
"""The design of a round for the images at some positions of the order, from a seed: one replicate, of two KLs or
more."""

# Rounds that the variance by the draws within the rounds counts as.
_DRAWS_COUNT = 2.0
# Between the seeds of a round and the next.
_ROUND_SEEDS = 1 << 33


@dataclass(frozen=True)
class Classification:
    """Of B images under K classes; float64 on the CPU.

    Attributes:
        posterior: [B, K], softmax of -ELBO + ln prior, in nats; NaN of an image with a draw that is not finite.
        predicted: int64 [B], the place of the best of the classes that took part in every round.
        bits_per_dim: [B, K], each class's bound: the best class's by all its draws, and the paired difference to it by
            the draws that the class took part in.
        margin: [B], the log posterior odds of that class against the next, nats.
        margin_error: [B], its standard error by the draws.
        evaluations: int64 [B], calls of the network.
    """

    posterior: Float64[Tensor, "B K"]
    predicted: Int64[Tensor, " B"]
    bits_per_dim: Float64[Tensor, "B K"]
    margin: Float64[Tensor, " B"]
    margin_error: Float64[Tensor, " B"]
    evaluations: Int64[Tensor, " B"]


@dataclass(frozen=True)
class Effort:
    """When to stop.

    Attributes:
        rounds: At most so many, and at least 2: an error is not known before.
        separation: After two rounds or more, a class is given up that the best one leads by so many standard errors;
            None: none is.
    """

    rounds: int
    separation: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise ConfigError(f"rounds: {self.rounds} is not >= 2, which an error needs")
        if self.separation is not None and not 0.0 < self.separation < math.inf:
            raise ConfigError(f"separation: {self.separation} is not a positive number of standard errors")


def classify(
    bound: Bound,
    levels: UInt8Images,
    ids: Int64[Tensor, " B"],
    positions: Int64[Tensor, " B"],
    classes: Int64[Tensor, " K"],
    log_prior: Float64[Tensor, " K"],
    design_of: DesignOf,
    effort: Effort,
    seed: int,
    batch_size: int = 64,
    on_images: Callable[[float], None] = lambda images: None,
) -> Classification:
    """The posterior of each image over `classes`.

    Noise and times of an image's rounds are functions of (seed, id) and (seed, position); those of the first round are
    the noise of `elbo` with the same seed. `levels`, `ids` lie on the denoiser's device. `on_images` is told how many
    images are done. Raises ConfigError for classes that the denoiser does not have and for fewer than two.
    """
    if len(classes) < 2:
        raise ConfigError(f"classes: {classes.tolist()} is not two or more, which can be told apart")
    num_images = len(levels)
    scores = _Scores(num_images, log_prior, math.prod(levels.shape[1:]) * math.log(2.0))
    alive = torch.ones(num_images, len(classes), dtype=torch.bool)
    for round_ in range(effort.rounds):
        image, place = alive.nonzero().unbind(1)
        round_seed = seed + round_ * _ROUND_SEEDS
        design = design_of(positions, round_seed)
        of_pairs = Design(design.t[image], design.weight[image], design.replicate)
        at = image.to(levels.device)
        found = elbo(
            bound.denoiser,
            levels[at],
            ids[at],
            of_pairs,
            round_seed,
            bound.variance,
            batch_size,
            label=classes[place].to(levels.device),
        )
        scores.add(image, place, of_pairs, found)
        if effort.separation is not None and round_ > 0:
            alive &= ~scores.behind(effort.separation)
        alive &= alive.sum(1, keepdim=True) > 1
        done = float(num_images - int(alive.any(1).sum()))
        on_images(max(done, num_images * (round_ + 1) / effort.rounds))
        if not bool(alive.any()):
            break
    return scores.result()


class _Scores:
    """The draws of all rounds; where a class took no part, NaN."""

    def __init__(self, num_images: int, log_prior: Tensor, nats: float) -> None:
        shape = (num_images, len(log_prior), 0)
        self._log_prior, self._nats = log_prior.double(), nats
        # In bits/dim: each round's estimate of the bound, [B, K, rounds], and the draws whose mean is the KLs' part of
        # it, [B, K, rounds, draws].
        self._bounds = torch.empty(shape, dtype=torch.float64)
        self._draws: Tensor | None = None
        self._finite = torch.ones(num_images, dtype=torch.bool)
        self._evaluations = torch.zeros(num_images, dtype=torch.int64)

    def add(self, image: Tensor, place: Tensor, of_pairs: Design, found: Elbo) -> None:
        """A round of P pairs of an image [P] and a class's place [P]."""
        first, weighted = of_pairs.first, of_pairs.weight * found.terms
        draws = weighted[:, ~first] * int((~first).sum())

        def placed(values: Tensor) -> Tensor:
            whole = torch.full((*self._bounds.shape[:2], 1, *values.shape[1:]), math.nan, dtype=torch.float64)
            whole[image, place, 0] = values
            return whole

        self._bounds = torch.cat([self._bounds, placed(weighted.sum(1) + found.prior)], 2)
        before = [] if self._draws is None else [self._draws]
        self._draws = torch.cat([*before, placed(draws)], 2)
        self._finite[image[~found.terms.isfinite().all(1)]] = False
        self._evaluations += torch.bincount(image, minlength=len(self._evaluations)) * len(first)

    def _against_best(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The place of each image's best class [B]; its bound [B]; how much larger the others' are, with the standard
        errors, [B, K]: bits/dim.

        The best class is one that took part in every round of its image. The variance of a round is that of its draws,
        which are spread evenly over time in rising order: by their successive differences, which see no trend over time
        but overstate what they cannot resolve (Cochran 1977, sec. 8.11). It counts as `_DRAWS_COUNT` rounds beside the
        variance between the rounds, which is exact and known the better the more there are.
        """
        assert self._draws is not None, "after a round"
        taken = (~self._bounds.isnan()).sum(2)
        whole = self._bounds.nanmean(2)
        scores = torch.where(taken == taken.amax(1, keepdim=True), self._log_prior - self._nats * whole, -math.inf)
        best = scores.argmax(1)
        rows = torch.arange(len(best))
        bounds, draws = (each - each[rows, best][:, None] for each in (self._bounds, self._draws))
        difference, count = bounds.nanmean(2), draws.shape[3]
        of_draws = (draws.diff(dim=3).square().sum(3) / (2 * (count - 1) * count)).nanmean(2)
        squares = (bounds - difference[:, :, None]).square().nansum(2)
        variance = (_DRAWS_COUNT * of_draws + squares) / (_DRAWS_COUNT + taken - 1)
        return best, whole[rows, best], difference, (variance / taken).sqrt()

    def behind(self, separation: float) -> Tensor:
        """Which classes the best one leads by more than so many standard errors, [B, K]."""
        best, _, difference, error = self._against_best()
        lead = self._log_prior[best][:, None] - self._log_prior + self._nats * difference
        return lead > separation * self._nats * error

    def result(self) -> Classification:
        """What all rounds say."""
        best, bits_per_dim, difference, error = self._against_best()
        logits = torch.log_softmax(self._log_prior - self._nats * difference, 1)
        logits[~self._finite] = math.nan
        rows = torch.arange(len(best))
        others = logits.index_put((rows, best), torch.tensor(-math.inf, dtype=torch.float64))
        second = others.argmax(1)
        return Classification(
            logits.exp(),
            best,
            bits_per_dim[:, None] + difference,
            logits[rows, best] - logits[rows, second],
            self._nats * error[rows, second],
            self._evaluations,
        )
