"""Distances of two sets of features: Fréchet's, its limit for many images, and the kernel distance.

What is called FID is `frechet_distance` of the features of one particular network (Heusel 2017), KID is
`kernel_distance` (Bińkowski 2018).
"""

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ddpm_core.counter_random import permutation
from ddpm_core.errors import ConfigError
from ddpm_core.sets import NUM_GROUPS
from ddpm_core.sets.jackknife import Estimate, jackknife, mean_of_blocks
from ddpm_core.sets.moments import Moments, one_thread

_BLOCK = 1024
# Rows of the smaller set in one block of a kernel distance, and those of each set that are looked at.
_KERNEL_BLOCK, _KERNEL_MOST = 1000, 50_000


def frechet_distance(a: Moments, b: Moments) -> float:
    """‖μ_a - μ_b‖² + tr(C_a + C_b - 2 (C_a^½ C_b C_a^½)^½) (Dowson and Landau 1982; Heusel 2017, eq. 6), >= 0.

    The squared distance of two normal distributions; both covariances with n - 1. Raises ConfigError for features of
    different size and for a set of fewer than two.
    """
    if len(a.mean) != len(b.mean):
        raise ConfigError(f"features: of {len(a.mean)} and {len(b.mean)} dimensions; compare those of one extractor")
    difference = a.mean - b.mean
    with one_thread():
        # tr (C_a^½ C_b C_a^½)^½ is the sum of the singular values of C_b^½ C_a^½, and of every F_bᵀ F_a with F Fᵀ = C.
        # Taken this way no root is taken of a product's rounding error, which matters where C is singular.
        shared = torch.linalg.svdvals(_factor(b.covariance).T @ _factor(a.covariance))
    traces = float(np.trace(a.covariance) + np.trace(b.covariance))
    distance = float(difference @ difference) + traces - 2.0 * math.fsum(shared.tolist())
    return max(distance, 0.0)


def _factor(covariance: Float64[np.ndarray, "d d"]) -> Float64[Tensor, "d d"]:
    """F with F Fᵀ = C; eigenvalues that rounding has made negative count as 0."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
    factor: Tensor = vectors * values.clamp(min=0.0).sqrt()
    return factor


def kernel_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m _"]) -> float:
    """Unbiased squared MMD with k(x, y) = (x·y / d + 1)³ (Bińkowski 2018, sec. 3 and eq. 4); may be below 0.

    In float64, block by block: memory for 1024 rows of either, beside the features. Raises ConfigError for features of
    different size and for a set of fewer than two.
    """
    (n, d), (m, other) = x.shape, y.shape
    if d != other:
        raise ConfigError(f"features: of {d} and {other} dimensions; compare those of one extractor")
    if min(n, m) < 2:
        raise ConfigError(f"images: {min(n, m)} is not >= 2, which a kernel distance needs; compare more images")
    within_x = (_kernel_sum(x, x) - _kernel_diagonal(x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _kernel_diagonal(y)) / (m * (m - 1))
    return float(within_x + within_y - 2.0 * _kernel_sum(x, y) / (n * m))


def kernel_rows(num_rows: int, stream: str) -> Int64[np.ndarray, " n"]:
    """Which rows of a set a kernel distance looks at, ascending: all, or 50,000 drawn at random."""
    rows: Int64[np.ndarray, " n"] = np.sort(permutation(0, stream, 0, num_rows)[:_KERNEL_MOST])
    return rows


def kernel_estimate(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], x_stream: str, y_stream: str) -> Estimate:
    """The mean `kernel_distance` of blocks of rows drawn without replacement, which are independent of each other.

    There are as many blocks as the smaller set has thousands of rows, at least 10. `x_stream` and `y_stream` are what
    the rows of `x` and `y` are dealt by. Raises ConfigError for what `kernel_distance` refuses.
    """
    num_blocks = max(NUM_GROUPS, min(len(x), len(y)) // _KERNEL_BLOCK)
    blocks = zip(_dealt(x, x_stream, num_blocks), _dealt(y, y_stream, num_blocks), strict=True)
    return mean_of_blocks(np.array([kernel_distance(*pair) for pair in blocks]))


def _dealt(x: Float[np.ndarray, "n d"], stream: str, num_blocks: int) -> Iterator[Float[np.ndarray, "m d"]]:
    order = permutation(0, stream, 0, len(x))
    for block in range(num_blocks):
        yield x[np.sort(order[block::num_blocks])]


def _kernel_sum(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    sums = []
    with one_thread():
        for left in torch.from_numpy(x).split(_BLOCK):
            for right in torch.from_numpy(y).split(_BLOCK):
                kernel = (left.double() @ right.double().T).div_(x.shape[1]).add_(1.0).pow_(3)
                sums.append(float(kernel.sum()))
    return math.fsum(sums)


def _kernel_diagonal(x: Float[np.ndarray, "n d"]) -> float:
    squares = np.square(x, dtype=np.float64).sum(1)
    return math.fsum(((squares / x.shape[1] + 1.0) ** 3).tolist())


def frechet_estimates(groups_a: Sequence[Moments], groups_b: Sequence[Moments]) -> tuple[Estimate, Estimate]:
    """The Fréchet distance and its limit for many images, FD∞, each with the interval of the jackknife.

    `groups_a` and `groups_b`: the moments of G groups of rows of each set; group g of both is left out together, so
    1 + G distances are computed. The first interval is one for the expected distance of sets of these sizes, the second
    for that of the two distributions.

    The distance of finite sets is larger than that of their distributions by about c/n (Chong and Forsyth 2020). FD∞ is
    the intercept of the line in 1/n through the distance of all n rows and the mean one of n (G - 1)/G:
    G FD - (G - 1) mean FD_g, which is Quenouille's (1956) correction. It varies hardly more than FD, where lines
    through halves or thirds of the rows do, and to first order it has the same standard error.

    Raises ConfigError for G < 2, for another number of groups, and for what `frechet_distance` refuses.
    """
    groups = len(groups_a)
    if groups != len(groups_b):
        raise ConfigError(f"groups: {groups} and {len(groups_b)} are not equally many")
    without = [frechet_distance(_merged(groups_a, g), _merged(groups_b, g)) for g in range(groups)]
    distance = jackknife(frechet_distance(_merged(groups_a), _merged(groups_b)), np.array(without))
    limit = groups * distance.value - (groups - 1) * math.fsum(without) / groups
    return distance, Estimate.of(limit, distance.standard_error, groups - 1)


def _merged(groups: Sequence[Moments], left_out: int | None = None) -> Moments:
    kept = [moments for g, moments in enumerate(groups) if g != left_out]
    return functools.reduce(Moments.merged, kept, Moments.empty(len(groups[0].mean)))
