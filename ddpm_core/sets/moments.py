"""Count, mean and scatter of a set of features: all that a Fréchet distance asks of it, and small enough to merge."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64

from ddpm_core.errors import ConfigError


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's matrix products and decompositions in one thread: how many there are decides the order of their sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, eq=False)
class Moments:
    """Of n features of d dimensions, in float64.

    Attributes:
        count: n >= 0.
        mean: [d], zeros where there are none.
        m2: [d, d], sum of (f - mean)(f - mean)ᵀ.
    """

    count: int
    mean: Float64[np.ndarray, " d"]
    m2: Float64[np.ndarray, "d d"]

    @classmethod
    def empty(cls, d: int) -> "Moments":
        """Of no features."""
        return cls(0, np.zeros(d), np.zeros((d, d)))

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"]) -> "Moments":
        """Of `features` [n, d]; the same bits with any number of threads. Raises ConfigError for features that are
        not finite."""
        count, d = features.shape
        if count == 0:
            return cls.empty(d)
        features = check_finite(features).astype(np.float64)
        mean = features.mean(0)
        deviations = torch.from_numpy(features - mean)
        with one_thread():
            m2 = (deviations.T @ deviations).numpy()
        return cls(count, mean, (m2 + m2.T) / 2.0)

    def merged(self, other: "Moments") -> "Moments":
        """Of both sets (Chan, Golub and LeVeque 1983, eq. 2.1). To rounding, the order of merges does not matter; for
        equal bits merge in one order."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        m2 = self.m2 + other.m2 + np.outer(difference, difference) * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """Unbiased: m2 / (n - 1). Raises ConfigError for n < 2."""
        if self.count < 2:
            raise ConfigError(f"images: {self.count} is not >= 2, which a covariance needs; compare more images")
        return self.m2 / (self.count - 1)


def check_finite(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """`features` as they are. Raises ConfigError if one is not finite."""
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
        raise ConfigError(f"features: those of row {row} are not all finite; look at the extractor and at that image")
    return features
