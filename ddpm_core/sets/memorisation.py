"""Whether samples lie closer to the training images than images of the same kind that the model has not seen.

All from the distance of each sample, and of each held-out image, to its nearest training image. The training images are
given, as they are to the model: intervals are for other samples and other held-out images.
"""

import numpy as np
from jaxtyping import Float64

from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.intervals import Variance
from ddpm_core.sets.jackknife import Estimate

NEAR_QUANTILE = 0.01
"""Which of the held-out images' distances counts as near."""
ALARM_SHARE = 0.05
"""Of near samples, where unseen images would have `NEAR_QUANTILE`."""


def closer(samples: Float64[np.ndarray, " n"], held_out: Float64[np.ndarray, " m"]) -> Estimate:
    """P(sample's distance < held-out image's) + ½ P(equal) over all pairs (Mann and Whitney 1947): 0.5 where samples
    are as far from the training images as unseen images, 1 where each is closer than all of these.

    The variance is that of DeLong, DeLong and Clarke-Pearson (1988), the interval that of a share with it, of at most
    the 3 n m / (n + m) rows that give the variance of distances distributed alike. Raises ConfigError for fewer than
    two samples or held-out images.
    """
    _check(samples, held_out)
    of_samples = 1.0 - _placements(samples, held_out)
    of_held_out = _placements(held_out, samples)
    n, m = len(samples), len(held_out)
    variance = Variance(float(of_samples.var(ddof=1)) / n, n - 1) + Variance(float(of_held_out.var(ddof=1)) / m, m - 1)
    return Estimate.of_share(float(of_samples.mean()), variance, 3 * n * m // (n + m))


def near(samples: Float64[np.ndarray, " n"], held_out: Float64[np.ndarray, " m"]) -> Estimate:
    """Share of samples whose distance is not above the `NEAR_QUANTILE` of the held-out images' distances.

    The quantile is at place q (m + 1) of the ordered distances, linear between two, the first where q (m + 1) < 1 (type
    6 of Hyndman and Fan 1996): images like the held-out ones fall below it with probability q. The interval joins two
    score intervals (Wilson 1927), of the share below that distance and of the level q that the distance stands for, by
    the squares of their arms (Zou and Donner 2008); the standard error is that of a normal interval of its length.

    Raises ConfigError for fewer than two samples or held-out images.
    """
    _check(samples, held_out)
    share = _share_below(samples, held_out, NEAR_QUANTILE)
    of_samples = _score(share, len(samples))
    level = _score(NEAR_QUANTILE, len(held_out))
    least, most = (_share_below(samples, held_out, q) for q in (level.low, level.high))
    if level.low * (len(held_out) + 1) < 1.0:
        least = 0.0  # the distance may be below all of those seen
    low = share - float(np.hypot(share - of_samples.low, share - least))
    high = share + float(np.hypot(of_samples.high - share, most - share))
    low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(share, (high - low) / 2.0 / 1.96, low, high)


def nearest_ratios(distances: Float64[np.ndarray, "n K"]) -> Float64[np.ndarray, " n"]:
    """Distance to the nearest training image over that to the second nearest, 1 where both are 0: near 0 for a copy
    among others (Yoon 2023).

    `near` and `alarm` take these ratios of samples and of held-out images as they take distances. They find copies with
    noise, which are too far away to be near, and are no smaller for images that are smooth.
    """
    first, second = distances[:, 0], distances[:, 1]
    return np.where(second > 0.0, first / np.where(second > 0.0, second, 1.0), 1.0)


def alarm(near_samples: Estimate) -> bool:
    """Whether samples are copies beyond doubt: the interval of `near` lies above `ALARM_SHARE`."""
    return near_samples.low > ALARM_SHARE


def _check(samples: Float64[np.ndarray, " n"], held_out: Float64[np.ndarray, " m"]) -> None:
    if min(len(samples), len(held_out)) < 2:
        raise ConfigError(f"images: {len(samples)} samples and {len(held_out)} held out are not >= 2 of each")


def _placements(values: Float64[np.ndarray, " n"], among: Float64[np.ndarray, " m"]) -> Float64[np.ndarray, " n"]:
    """For each value the share of `among` below it, plus half of those equal to it."""
    ordered = np.sort(among)
    below, not_above = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    found: Float64[np.ndarray, " n"] = (below + not_above) / (2 * len(among))
    return found


def _share_below(samples: Float64[np.ndarray, " n"], held_out: Float64[np.ndarray, " m"], quantile: float) -> float:
    return float((samples <= np.quantile(held_out, quantile, method="weibull")).mean())


def _score(share: float, num_rows: int) -> Estimate:
    return Estimate.of_share(share, Variance(share * (1.0 - share) / num_rows, num_rows - 1), num_rows)
