"""Precision and recall (Kynkäänniemi 2019), density and coverage (Naeem 2020) of samples against reference images.

A set's manifold is the union of balls around its features, each as large as the distance to the k-th nearest other
feature of the set; the balls are closed.

Every number is a mean over the rows of one set of what each row finds in the other. Its variance has two parts (the
law of total variance): of the rows, independent where the other set is given, and of the other set. The second is that
of the delete-a-group jackknife, with the other set's balls or rows left out group by group, less what the finite
number of rows alone adds to it. A jackknife that leaves out groups of both sets at once counts that twice, and gives
intervals up to twice as wide. So arrays have 1 + G columns: 0 with all rows of the other set, 1 + g without its group
g. A ball keeps its radius whichever other rows are left out: how radii depend on each other is not in the variances,
which may leave density's interval too wide by a fifth or so.

All sums are integers, so the order in which they merge does not matter.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float64, Int, Int32, Int64

from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.intervals import Variance
from ddpm_core.sets.jackknife import Estimate

SHORTAGE = 1e-9
"""How likely a row's list of neighbours may be too short for some group left out."""
NO_BALL = -1.0
"""The radius of a row that is left out."""


def list_length(k: int, num_groups: int) -> int:
    """The K >= k nearest neighbours to keep of each row so that, whichever group is left out, k of them remain.

    As neighbours are in any group alike, the number that leaves is binomial (K, 1/G) at most in spread; K is the least
    for which G P(more than K - k leave) <= 1e-9. A row that chance still leaves short is given the K-th distance, which
    is too small by a place or so: of no weight in one replicate of many rows.
    """
    length = k
    while num_groups * _upper_tail(length, 1.0 / num_groups, length - k + 1) > SHORTAGE:
        length += 1
    return length


def _upper_tail(n: int, p: float, least: int) -> float:
    """P(a binomial (n, p) number >= least)."""
    return math.fsum(math.comb(n, i) * p**i * (1.0 - p) ** (n - i) for i in range(least, n + 1))


def neighbour_groups(ids: Int64[np.ndarray, "n K"], groups: Int64[np.ndarray, " base"]) -> Int64[np.ndarray, "n K"]:
    """The groups of neighbours, whose ids are places in `groups`; -1 where there is no neighbour (id -1)."""
    return np.where(ids < 0, np.int64(-1), groups[ids])


def distances_without(
    distances: Float64[np.ndarray, "n K"], groups: Int64[np.ndarray, "n K"], k: int, num_groups: int
) -> Float64[np.ndarray, "n columns"]:
    """[n, 1 + G]: of each row the distance to its k-th nearest of all rows, then without group 0, 1, … of these.

    From lists of the K >= k nearest: `distances` ascending, `groups` those of the neighbours (`neighbour_groups`).
    Raises ConfigError for K < k.
    """
    n, length = distances.shape
    if length < k:
        raise ConfigError(f"neighbours: lists of {length} are shorter than k, which is {k}")
    found = np.empty((n, 1 + num_groups))
    found[:, 0] = distances[:, k - 1]
    rows = np.arange(n)
    for group in range(num_groups):
        enough = np.cumsum(groups != group, axis=1) >= k
        enough[:, -1] = True
        found[:, 1 + group] = distances[rows, enough.argmax(axis=1)]
    return found


def radii(
    distances: Float64[np.ndarray, "n K"], own_groups: Int64[np.ndarray, " n"], k: int, num_groups: int
) -> Float64[np.ndarray, "n columns"]:
    """[n, 1 + G]: the balls' radii, the distance to the k-th nearest of the row's own set, from ascending lists of
    K >= k; -1 in the column without the row's own group, where it has no ball. Raises ConfigError for K < k."""
    if distances.shape[1] < k:
        raise ConfigError(f"neighbours: lists of {distances.shape[1]} are shorter than k, which is {k}")
    found = np.repeat(distances[:, k - 1, None], 1 + num_groups, axis=1)
    found[np.arange(len(found)), 1 + own_groups] = NO_BALL
    return found


@dataclass(frozen=True, eq=False)
class RowSums:
    """Mergeable sums of rows of 1 + G integers: what a row counts with all of the other set, and without each group.

    Attributes:
        count: Rows.
        sums: int64 [1 + G].
        products: Sum of the outer products of the rows, int64 [1 + G, 1 + G].
    """

    count: int
    sums: Int64[np.ndarray, " columns"]
    products: Int64[np.ndarray, "columns columns"]

    @classmethod
    def of(cls, rows: Int[np.ndarray, "n columns"]) -> "RowSums":
        """Of some rows."""
        # In float64, whose product is fast, all integers below 2^53 are exact.
        exact = rows.astype(np.float64)
        return cls(len(rows), exact.sum(0).astype(np.int64), (exact.T @ exact).astype(np.int64))

    def __add__(self, other: "RowSums") -> "RowSums":
        """Of both sets of rows, which share none."""
        return RowSums(self.count + other.count, self.sums + other.sums, self.products + other.products)

    def mean(self, scale: Float64[np.ndarray, " columns"]) -> tuple[float, Variance]:
        """The mean of column 0, and its variance: of the rows, and of the other set. `scale` multiplies the columns.

        With D_g the deviation of column g's mean from that of all G columns, the jackknife's (G - 1)/G Σ D_g² is too
        large by (G - 1)/G Σ v_g/n, v_g being the variance over rows of the same deviation.
        """
        n, groups = self.count, len(self.sums) - 1
        means = self.sums / n * scale
        covariances = (self.products * np.outer(scale, scale) - n * np.outer(means, means)) / (n - 1)
        others = covariances[1:, 1:]
        of_deviations = np.diagonal(others) - 2.0 * others.mean(1) + others.mean()
        excess = np.square(means[1:] - means[1:].mean()) - of_deviations / n
        of_other = max(float(excess.sum()) * (groups - 1) / groups, 0.0)
        of_rows = max(float(covariances[0, 0]), 0.0) / n
        return float(means[0]), Variance(of_rows, n - 1) + Variance(of_other, groups - 1)


@dataclass(frozen=True)
class Manifolds:
    """The four numbers, with intervals for what they would be on average over sets of these sizes.

    Attributes:
        precision: Share of samples in the reference images' manifold.
        recall: Share of reference images in the samples' manifold.
        density: Mean number of reference balls that a sample is in, over k: near 1 where both sets are alike.
        coverage: Share of reference images whose own ball holds a sample.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


@dataclass(frozen=True, eq=False)
class ManifoldSums:
    """What the four numbers are made of, added up over blocks of samples and of reference rows.

    Attributes:
        precise: Of samples: 1 where it is in the ball of a reference row.
        memberships: Of samples: the number of these balls.
        recalled: Of reference rows: 1 where it is in the ball of a sample.
        covered: Of reference rows: 1 where its own ball holds a sample.
    """

    precise: RowSums
    memberships: RowSums
    recalled: RowSums
    covered: RowSums

    @classmethod
    def empty(cls, num_groups: int) -> "ManifoldSums":
        """Of no rows."""
        nothing = RowSums.of(np.zeros((0, 1 + num_groups), np.int64))
        return cls(nothing, nothing, nothing, nothing)

    @classmethod
    def of_samples(cls, inside: Int32[np.ndarray, "n columns"]) -> "ManifoldSums":
        """Of some samples: in how many reference balls each is, `Neighbours.inside` with the references' `radii`."""
        nothing = RowSums.of(np.zeros((0, inside.shape[1]), np.int64))
        return cls(RowSums.of((inside > 0).astype(np.int64)), RowSums.of(inside), nothing, nothing)

    @classmethod
    def of_references(
        cls,
        inside: Int32[np.ndarray, "n columns"],
        nearest: Float64[np.ndarray, "n columns"],
        own_radii: Float64[np.ndarray, "n columns"],
    ) -> "ManifoldSums":
        """Of some reference rows: in how many samples' balls each is (`inside` with the samples' `radii`), the distance
        to its nearest sample (`distances_without` with k = 1), and its own `radii`, of which column 0 is used."""
        nothing = RowSums.of(np.zeros((0, inside.shape[1]), np.int64))
        covered = (nearest <= own_radii[:, :1]).astype(np.int64)
        return cls(nothing, nothing, RowSums.of((inside > 0).astype(np.int64)), RowSums.of(covered))

    def __add__(self, other: "ManifoldSums") -> "ManifoldSums":
        """Of both sets of rows, which share none."""
        return ManifoldSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def estimates(self, k: int) -> Manifolds:
        """The four numbers with their intervals, where groups are those of `group_of`. Raises ConfigError for fewer
        than two samples or reference rows, or fewer reference rows than groups."""
        samples, references, groups = self.precise.count, self.recalled.count, len(self.precise.sums) - 1
        if samples < 2 or references < max(groups, 2):
            raise ConfigError(
                f"images: {samples} samples and {references} of the reference are too few for an interval"
            )
        # Group g of n rows has (n - g) / G of them, rounded up; density is a mean over balls.
        left = references - (references - np.arange(groups) + groups - 1) // groups
        scale = np.concatenate([[1.0], references / left]) / k
        density, variance = self.memberships.mean(scale)
        precision, recall, coverage = (
            Estimate.of_share(*rows.mean(np.ones(1 + groups)), rows.count)
            for rows in (self.precise, self.recalled, self.covered)
        )
        of_density = Estimate.of(density, variance.standard_error, int(min(variance.dof, samples - 1)))
        return Manifolds(precision, recall, of_density, coverage)
