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
"""The design of a round for the images at some positions of the order, from a seed; L_0 in two columns or more."""

# Between the seeds of a round and the next.
_ROUND_SEEDS = 1 << 33


@dataclass(frozen=True)
class Classification:
    """Of B images under K classes; float64 on the CPU.

    Attributes:
        posterior: [B, K], softmax of -ELBO + ln prior, in nats.
        bits_per_dim: [B, K], each class's bound: the best class's by all its draws, and the paired difference to it by
            the draws that the class took part in.
        margin: [B], the log posterior odds of the best class against the second, nats.
        margin_error: [B], its standard error by the draws.
        evaluations: int64 [B], calls of the network.
    """

    posterior: Float64[Tensor, "B K"]
    bits_per_dim: Float64[Tensor, "B K"]
    margin: Float64[Tensor, " B"]
    margin_error: Float64[Tensor, " B"]
    evaluations: Int64[Tensor, " B"]

    @property
    def predicted(self) -> Int64[Tensor, " B"]:
        """The place of the best class among the K."""
        return self.posterior.argmax(1)


@dataclass(frozen=True)
class Effort:
    """When to stop.

    Attributes:
        rounds: At most so many.
        separation: A class is given up when the best one leads it by so many standard errors; None: never.
    """

    rounds: int
    separation: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds: {self.rounds} is not >= 1")
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
        if effort.separation is not None:
            alive &= ~scores.behind(effort.separation)
        alive &= alive.sum(1, keepdim=True) > 1
        on_images(float(num_images - int(alive.any(1).sum())))
        if not bool(alive.any()):
            break
    return scores.result()


class _Scores:
    """The draws of all rounds; where a class took no part, NaN."""

    def __init__(self, num_images: int, log_prior: Tensor, nats: float) -> None:
        shape = (num_images, len(log_prior), 0)
        self._log_prior, self._nats = log_prior.double(), nats
        # In bits/dim: of the sum of the KLs, and of prior and L_0, each draw an unbiased estimate. [B, K, draws]
        self._kl, self._first, self._time = (torch.empty(shape, dtype=torch.float64) for _ in range(3))
        self._evaluations = torch.zeros(num_images, dtype=torch.int64)

    def add(self, image: Tensor, place: Tensor, of_pairs: Design, found: Elbo) -> None:
        """A round of P pairs of an image [P] and a class's place [P]."""
        first, weighted = of_pairs.first, of_pairs.weight * found.terms
        self._kl = self._with(self._kl, image, place, weighted[:, ~first] * int((~first).sum()))
        of_first = weighted[:, first] * int(first.sum()) + found.prior[:, None]
        self._first = self._with(self._first, image, place, of_first)
        self._time = self._with(self._time, image, place, of_pairs.t[:, ~first])
        self._evaluations += torch.bincount(image, minlength=len(self._evaluations)) * len(first)

    @staticmethod
    def _with(draws: Tensor, image: Tensor, place: Tensor, values: Tensor) -> Tensor:
        added = torch.full((*draws.shape[:2], values.shape[1]), math.nan, dtype=torch.float64)
        added[image, place] = values.double()
        return torch.cat([draws, added], 2)

    def _against_best(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The place of each image's best class [B]; its bound [B]; how much larger the others' are, with the standard
        errors, [B, K]: bits/dim.

        The best class is one that took part in every round of its image. The draws of the KLs are spread evenly over
        time; their error is that of successive differences (Cochran 1977, sec. 8.11), which sees no trend over time.
        """
        whole = self._kl.nanmean(2) + self._first.nanmean(2)
        taken = (~self._first.isnan()).sum(2)
        scores = torch.where(taken == taken.amax(1, keepdim=True), self._log_prior - self._nats * whole, -math.inf)
        best = scores.argmax(1)
        rows = torch.arange(len(best))
        kl, first = (draws - draws[rows, best][:, None] for draws in (self._kl, self._first))
        kl = kl.gather(2, self._time.nan_to_num(math.inf).argsort(dim=2, stable=True))
        squares = (first - first.nanmean(2, keepdim=True)).square().nansum(2) / ((taken - 1) * taken)
        count = (~kl.isnan()).sum(2)
        variance = kl.diff(dim=2).square().nansum(2) / (2 * (count - 1) * count) + squares
        return best, whole[rows, best], kl.nanmean(2) + first.nanmean(2), variance.sqrt()

    def behind(self, separation: float) -> Tensor:
        """Which classes the best one leads by more than so many standard errors, [B, K]."""
        best, _, difference, error = self._against_best()
        lead = self._log_prior[best][:, None] - self._log_prior + self._nats * difference
        return lead > separation * self._nats * error

    def result(self) -> Classification:
        """What all rounds say."""
        _, bits_per_dim, difference, error = self._against_best()
        logits = torch.log_softmax(self._log_prior - self._nats * difference, 1)
        top = logits.topk(2, 1)
        # Of the two, one has no error: the class that the differences are to.
        margin_error = self._nats * error.gather(1, top.indices).square().sum(1).sqrt()
        return Classification(
            logits.exp(),
            bits_per_dim[:, None] + difference,
            top.values[:, 0] - top.values[:, 1],
            margin_error,
            self._evaluations,
        )
