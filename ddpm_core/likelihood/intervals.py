"""How sure a mean over images is: of the random draws, of the choice of images, of both.

The image is the unit of sampling. Each image has R replicates, independent and unbiased estimates of its
value; images of one group may share random numbers, so Monte-Carlo variance is counted by group.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ddpm_core.errors import ConfigError


@dataclass(frozen=True)
class Variance:
    """The variance of a mean and the degrees of freedom it was estimated with."""

    value: float
    dof: float | int

    @property
    def standard_error(self) -> float:
        """Its square root."""
        return math.sqrt(self.value)

    def __add__(self, other: "Variance") -> "Variance":
        """Of the sum of two independent errors, with the degrees of freedom of Satterthwaite (1946)."""
        total = self.value + other.value
        parts = [(part.value, part.dof) for part in (self, other) if part.value > 0.0]
        return Variance(total, total**2 / sum(value**2 / dof for value, dof in parts) if parts else math.inf)


@dataclass(frozen=True)
class MeanStatistics:
    """Mergeable, JSON-able sums from which a mean over images and its variances follow.

    Attributes:
        num_images: N.
        mean: Of the images' values, each the mean of its replicates.
        squares: Sum of squared deviations of the images' values from `mean`.
        within: Sum over images of the variance of the image's value over its draws; None with one replicate.
        grouped: Sum over groups of the variance of the group's sum over its draws; None with one replicate.
        dof: Degrees of freedom of `grouped`.
    """

    num_images: int
    mean: float
    squares: float
    within: float | None
    grouped: float | None
    dof: int

    @classmethod
    def of(cls, values: Float[Tensor, "N R"], group_size: int = 1) -> "MeanStatistics":
        """Of `values` [N, R], N >= 1: within a replicate, `group_size` neighbours may share random numbers; replicates
        share none, nor do groups."""
        images, replicates = values.shape
        values = values.double()
        means = values.mean(1)
        mean = means.mean()
        squares = float((means - mean).square().sum())
        if replicates < 2:
            return cls(images, float(mean), squares, None, None, 0)
        groups = [(part - mean).sum(0) for part in values.split(group_size)]
        grouped = math.fsum(float(group.var()) for group in groups) / replicates
        dof = len(groups) * (replicates - 1)
        return cls(images, float(mean), squares, float(values.var(1).sum()) / replicates, grouped, dof)

    def merge(self, other: "MeanStatistics") -> "MeanStatistics":
        """Of both sets of images, between which no group is divided (Chan, Golub and LeVeque 1983)."""
        images = self.num_images + other.num_images
        difference = other.mean - self.mean
        squares = self.squares + other.squares + difference**2 * self.num_images * other.num_images / images
        mean = self.mean + difference * other.num_images / images
        if self.within is None or other.within is None or self.grouped is None or other.grouped is None:
            return MeanStatistics(images, mean, squares, None, None, 0)
        return MeanStatistics(
            images,
            mean,
            squares,
            self.within + other.within,
            self.grouped + other.grouped,
            self.dof + other.dof,
        )

    @property
    def given_images(self) -> Variance | None:
        """Monte-Carlo variance: how far the mean over exactly these images would move with other draws. None if
        every image has one replicate only."""
        return None if self.grouped is None else Variance(self.grouped / self.num_images**2, self.dof)

    def data_set(self, size: int) -> Variance | None:
        """Of the mean as an estimate for the finite set of `size` images of which these were drawn without
        replacement: Monte Carlo, and (1 - N/size) of the spread over images (Cochran 1977, ch. 10). None with one
        replicate. Raises ConfigError for a size below N, or one image out of several."""
        if size < self.num_images:
            raise ConfigError(f"size: {size} is below the {self.num_images} images drawn from it")
        given = self.given_images
        if given is None or size == self.num_images:
            return given
        return given + self._spread(1.0 - self.num_images / size)

    @property
    def population(self) -> Variance:
        """Of the mean as an estimate for everything the images were drawn from: Monte Carlo and spread over images.
        Raises ConfigError for one image."""
        given = self.given_images
        return self._spread(1.0) if given is None else given + self._spread(1.0)

    def _spread(self, fraction: float) -> Variance:
        """Variance of the mean from the choice of images: the observed one less what the draws alone cause."""
        if self.num_images < 2:
            raise ConfigError(f"images: {self.num_images} is not >= 2, which a spread needs; evaluate more images")
        dof = self.num_images - 1
        observed = self.squares / dof - (self.within or 0.0) / self.num_images
        return Variance(fraction * max(observed, 0.0) / self.num_images, dof)
