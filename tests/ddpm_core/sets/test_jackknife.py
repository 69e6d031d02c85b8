"""Intervals: Student's t, the jackknife by hand, Wilson's score interval, and the groups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.intervals import Variance
from ddpm_core.sets.jackknife import Estimate, group_of, jackknife, mean_of_blocks, student_quantile


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 9, 19, 100, 999])
def test_student_quantiles(dof):
    assert student_quantile(dof) == pytest.approx(stats.t.ppf(0.975, dof), rel=1e-9)
    assert student_quantile(dof, 0.5) == pytest.approx(stats.t.ppf(0.75, dof), rel=1e-9)


def test_the_jackknife_of_a_mean_is_the_standard_error_of_a_mean_tukey_1958():
    values = np.random.default_rng(0).standard_normal(12)
    without = (values.sum() - values) / 11
    found, expected = jackknife(float(values.mean()), without), mean_of_blocks(values)
    assert found.standard_error == pytest.approx(stats.sem(values), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 11) * stats.sem(values), rel=1e-9)


def test_the_interval_of_a_share_is_wilsons_1927():
    variance = Variance(0.1 * 0.9 / 500, 10**6)
    found = Estimate.of_share(0.1, variance, 500)
    expected = stats.binomtest(50, 500).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    nothing = Estimate.of_share(0.0, Variance(0.0, 499), 500)
    assert nothing.low == pytest.approx(0.0, abs=1e-12)
    assert 0.005 < nothing.high < 0.01


@given(st.integers(2, 300), st.integers(2, 20), st.integers(0, 3))
def test_groups_are_even_and_the_streams_own(rows, groups, stream):
    if groups > rows:
        with pytest.raises(ConfigError, match="groups: "):
            group_of(rows, groups, "a")
        return
    found = group_of(rows, groups, f"stream {stream}")
    sizes = np.bincount(found, minlength=groups)
    assert sizes.tolist() == [-(-(rows - g) // groups) for g in range(groups)]
    assert (found == group_of(rows, groups, f"stream {stream}")).all()


def test_groups_do_not_follow_the_order_of_rows():
    found = group_of(10_000, 10, "samples")
    halves = np.bincount(found[:5000], minlength=10)
    assert stats.chisquare(halves).pvalue > 0.01
    assert (found != group_of(10_000, 10, "reference")).any()


def test_too_few_for_an_interval():
    with pytest.raises(ConfigError, match="groups: 1"):
        jackknife(1.0, np.ones(1))
    with pytest.raises(ConfigError, match="blocks: 1"):
        mean_of_blocks(np.ones(1))
