"""Sums of the manifolds: merging, lists with groups left out, and what is refused. Golden values: test_golden.py."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_core.errors import ConfigError
from ddpm_core.sets.jackknife import Estimate
from ddpm_core.sets.manifolds import (
    NO_BALL,
    ManifoldSums,
    RowSums,
    distances_without,
    list_length,
    neighbour_groups,
    radii,
)


def test_distances_without_each_group():
    distances = np.array([[1.0, 2.0, 3.0, np.inf]])
    groups = neighbour_groups(np.array([[0, 2, 1, -1]]), np.array([0, 1, 0]))
    assert groups.tolist() == [[0, 0, 1, -1]]
    assert distances_without(distances, groups, 1, 3).tolist() == [[1.0, 3.0, 1.0, 1.0]]
    assert distances_without(distances, groups, 2, 3).tolist() == [[2.0, np.inf, 2.0, 2.0]]
    with pytest.raises(ConfigError, match="lists of 4 are shorter than k, which is 5"):
        distances_without(distances, groups, 5, 3)


def test_a_ball_is_gone_without_its_own_group():
    assert radii(np.array([[1.0, 2.0]]), np.array([1]), 2, 2).tolist() == [[2.0, 2.0, NO_BALL]]


@pytest.mark.parametrize("k", [1, 5])
def test_lists_are_just_long_enough(k):
    length = list_length(k, 10)
    groups = np.random.default_rng(0).integers(0, 10, (200_000, length))
    left = length - np.stack([(groups == g).sum(1) for g in range(10)]).max(0)
    assert left.min() >= k
    assert length <= k + 13


@given(st.integers(2, 40), st.integers(0, 40), st.integers(0, 10**6))
def test_sums_do_not_depend_on_blocks(rows, cut, seed):
    rng = np.random.default_rng(seed)
    inside = rng.integers(0, 3, (rows, 4)).astype(np.int32)
    nearest, own = rng.random((rows, 4)), rng.random((rows, 4))

    def sums(part: slice) -> ManifoldSums:
        return ManifoldSums.of_samples(inside[part]) + ManifoldSums.of_references(
            inside[part], nearest[part], own[part]
        )

    whole = sums(slice(None))
    for merged in (sums(slice(cut)) + sums(slice(cut, None)), sums(slice(cut, None)) + sums(slice(cut))):
        for name in ("precise", "memberships", "recalled", "covered"):
            found, other = getattr(whole, name), getattr(merged, name)
            assert found.count == other.count == rows
            assert (found.sums == other.sums).all()
            assert (found.products == other.products).all()


def test_where_the_other_set_does_not_matter_the_variance_is_that_of_a_mean():
    """Every row finds the same without any group, so nothing but the spread over rows is left."""
    values = np.random.default_rng(0).integers(0, 5, 200)
    mean, variance = RowSums.of(np.repeat(values[:, None], 6, 1)).mean(np.ones(6))
    assert mean == pytest.approx(values.mean())
    assert variance.value == pytest.approx(values.var(ddof=1) / 200, rel=1e-9)


def test_where_rows_agree_the_variance_is_the_jackknife_of_the_other_set():
    values = np.array([10, 9, 8, 9, 7])  # without each group
    mean, variance = RowSums.of(np.repeat(np.array([[12, *values]]), 50, 0)).mean(np.ones(6))
    assert mean == 12.0
    assert variance.value == pytest.approx(4 / 5 * np.square(values - values.mean()).sum(), rel=1e-9)
    assert variance.dof == pytest.approx(4)


def test_sets_alike_in_everything_have_all_in_reach():
    inside = np.full((20, 3), 3, np.int32)
    inside[:, 1:] = 2
    sums = ManifoldSums.of_samples(inside) + ManifoldSums.of_references(inside, np.zeros((20, 3)), np.ones((20, 3)))
    found = sums.estimates(3)
    for share in (found.precision, found.recall, found.coverage):
        assert isinstance(share, Estimate)
        assert share.value == 1.0
        assert 0.7 < share.low < 0.9
    assert found.density.value == pytest.approx(1.0)


def test_too_few_rows():
    with pytest.raises(ConfigError, match="images: 0 samples and 0 of the reference"):
        ManifoldSums.empty(3).estimates(3)
