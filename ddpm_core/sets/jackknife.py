"""Intervals for what is no mean over images: the delete-a-group jackknife, the mean of independent blocks, shares.

The rows of a set are put into G groups at random, and the value is computed once more without each (Quenouille 1956;
Tukey 1958; Shao and Tu 1995, ch. 2.3).
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from ddpm_core.counter_random import permutation
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.intervals import Variance

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error, and the ends of its 95% interval by Student's t."""

    value: float
    standard_error: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, standard_error: float, dof: int) -> "Estimate":
        """The interval is `value` ± t `standard_error`, t with `dof` degrees of freedom."""
        half = student_quantile(dof) * standard_error
        return cls(value, standard_error, value - half, value + half)

    @classmethod
    def of_share(cls, value: float, variance: Variance, num_rows: int) -> "Estimate":
        """Of a share of `num_rows` rows: the score interval (Wilson 1927), which stays within 0..1 and is none too
        short near its ends, for the number of independent rows that would have this variance (Korn and Graubard 1998),
        at most all of them."""
        binomial = value * (1.0 - value)
        rows = min(binomial / variance.value, num_rows) if variance.value > 0.0 and binomial > 0.0 else num_rows
        t = student_quantile(int(min(variance.dof, num_rows)))
        middle, half = value + t**2 / (2 * rows), t * math.sqrt(binomial / rows + t**2 / (4 * rows**2))
        low, high = ((middle + sign * half) / (1 + t**2 / rows) for sign in (-1, 1))
        return cls(value, variance.standard_error, max(low, 0.0), min(high, 1.0))  # within but for rounding


def jackknife(value: float, replicates: Float64[np.ndarray, " G"]) -> Estimate:
    """Of a value of all rows and those without each of G groups: variance (G - 1)/G Σ (θ_g - mean θ)² (Shao and Tu
    1995, eq. 2.14), with G - 1 degrees of freedom. Raises ConfigError for G < 2."""
    groups = len(replicates)
    if groups < 2:
        raise ConfigError(f"groups: {groups} is not >= 2, which a jackknife needs")
    squares = float(np.square(replicates - replicates.mean()).sum())
    return Estimate.of(value, math.sqrt(squares * (groups - 1) / groups), groups - 1)


def mean_of_blocks(values: Float64[np.ndarray, " B"]) -> Estimate:
    """The mean of B values from independent blocks of rows. Raises ConfigError for B < 2."""
    blocks = len(values)
    if blocks < 2:
        raise ConfigError(f"blocks: {blocks} is not >= 2, which a spread needs; compare more images")
    return Estimate.of(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(blocks), blocks - 1)


def group_of(num_rows: int, num_groups: int, stream: str) -> Int64[np.ndarray, " num_rows"]:
    """In which of 0..G-1 each row is: its place in a random order of the rows, modulo G.

    A function of the three arguments. Groups differ in size by one row at most, and none has more of one label than
    chance gives it, however the rows are sorted. Raises ConfigError for G < 2 or fewer rows than groups.
    """
    if not 2 <= num_groups <= num_rows:
        raise ConfigError(f"groups: {num_groups} is not in 2..{num_rows}, the number of images")
    places = np.empty(num_rows, np.int64)
    places[permutation(0, stream, 0, num_rows)] = np.arange(num_rows)
    return places % num_groups


def student_quantile(dof: int, confidence: float = CONFIDENCE) -> float:
    """t with P(|T| < t) = `confidence` for Student's T with `dof` >= 1 degrees of freedom.

    By bisection of the finite sums for integer degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4) in
    the angle θ = atan(t / sqrt(dof)).
    """
    low, high = 0.0, math.pi / 2.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if _two_sided(middle, dof) < confidence else (low, middle)
    return math.sqrt(dof) * math.tan((low + high) / 2.0)


def _two_sided(theta: float, dof: int) -> float:
    """P(|T| < sqrt(dof) tan θ): a sum over powers of cos θ, each term the one before times (j - 1)/j cos² θ."""
    odd = dof % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for j in range(2 + odd, dof + 1, 2):
        total += term
        term *= (j - 1) / j * math.cos(theta) ** 2
    total *= math.sin(theta)
    return 2.0 / math.pi * (theta + total) if odd else total
