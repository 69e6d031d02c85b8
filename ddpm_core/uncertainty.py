"""The two errors of a mean over images: of the random draws, and of the choice of images."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ddpm_core.errors import ConfigError


@dataclass(frozen=True)
class MeanEstimate:
    """A mean with its standard errors, all in the unit of the values.

    `monte_carlo_error`: how far the mean over these same images would move with other random draws;
    None if every image has one draw only. `population_error`: how far it is from the mean over
    everything the images were drawn from (it includes the former).
    """

    mean: float
    monte_carlo_error: float | None
    population_error: float


def mean_with_errors(values: Float[Tensor, "N M"], population_size: int | None = None) -> MeanEstimate:
    """The mean of `values` [N, M] (M independent estimates for each of N >= 2 images), with two errors.

    The image is the unit of sampling: its M estimates are averaged first, never counted as M images.
    With s_i^2 the variance of image i's estimates and S^2 the variance of the image means,
    Monte Carlo: sum s_i^2 / (M N^2); population: S^2 / N. If the images are N of a finite set of
    `population_size` = P, drawn without replacement, it is (1 - N/P) S^2 / N + N/P (Monte Carlo)
    (Cochran 1977, ch. 10, two-stage sampling). Raises ConfigError where this needs more images or draws.
    """
    images, draws = values.shape
    if images < 2:
        raise ConfigError(f"images: {images} is not >= 2, which a standard error needs; evaluate more images")
    image_means = values.double().mean(1)
    between = float(image_means.var()) / images
    within = float(values.double().var(1).mean()) / (draws * images) if draws > 1 else None
    population = between
    if population_size is not None:
        if within is None or population_size < images:
            raise ConfigError(
                f"population_size: {population_size} needs >= 2 draws per image and >= {images} images in it"
            )
        fraction = images / population_size
        population = (1.0 - fraction) * between + fraction * within
    return MeanEstimate(float(image_means.mean()), None if within is None else math.sqrt(within), math.sqrt(population))
