"""Standard errors of a mean over images (Cochran 1977): by hand, against simulation, and merged."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.intervals import MeanStatistics, Variance


def test_by_hand():
    found = MeanStatistics.of(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    assert found.mean == 3.5
    assert found.given_images.value == pytest.approx((2 + 0) / 2 / 4)
    assert found.given_images.dof == 2
    assert found.population.value == pytest.approx(0.25 + (4.5 - 0.5) / 2)
    assert found.data_set(2) == found.given_images
    assert found.data_set(4).value == pytest.approx(0.25 + 0.5 * (4.5 - 0.5) / 2)


def test_a_group_that_moves_together_counts_once():
    values = torch.tensor([[0.0, 2.0]]).expand(6, 2)
    assert MeanStatistics.of(values, 1).given_images.value == pytest.approx(1 / 6)
    grouped = MeanStatistics.of(values, 3)
    assert grouped.given_images.value == pytest.approx(1 / 2)
    assert grouped.dof == 2


@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize("finite", [False, True])
def test_errors_match_the_spread_of_repeated_experiments(finite, shared):
    """Over 3000 experiments the mean squared error equals the mean reported variance, for both errors."""
    g = torch.Generator().manual_seed(0)
    images, draws, population = 20, 3, 30
    monte_carlo, sampling, reported_mc, reported_population = [], [], [], []
    for _ in range(3000):
        true = torch.randn(population, generator=g)
        chosen = true[torch.randperm(population, generator=g)[:images]]
        common = shared * torch.randn(images // 4, draws, generator=g).repeat_interleave(4, 0)
        values = chosen[:, None] + 0.7 * torch.randn(images, draws, generator=g) + common
        found = MeanStatistics.of(values, 4)
        monte_carlo.append((found.mean - float(chosen.mean())) ** 2)
        sampling.append((found.mean - (float(true.mean()) if finite else 0.0)) ** 2)
        reported_mc.append(found.given_images.value)
        reported_population.append(found.data_set(population).value if finite else found.population.value)
    # 3000 chi-square draws: the relative error of a mean square is about sqrt(2 / 3000) = 2.6 %.
    assert sum(monte_carlo) / sum(reported_mc) == pytest.approx(1.0, abs=0.11)
    assert sum(sampling) / sum(reported_population) == pytest.approx(1.0, abs=0.11)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6))
def test_merging_is_the_statistics_of_all_images(first, second, replicates, seed):
    values = torch.randn(4 * (first + second), replicates, generator=torch.Generator().manual_seed(seed)).double()
    merged = MeanStatistics.of(values[: 4 * first], 4).merge(MeanStatistics.of(values[4 * first :], 4))
    whole = MeanStatistics.of(values, 4)
    for name in ("num_images", "mean", "squares", "dof", *(["within", "grouped"] if replicates > 1 else [])):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-9, abs=1e-12)


def test_one_replicate_has_no_monte_carlo_error():
    found = MeanStatistics.of(torch.randn(10, 1))
    assert found.given_images is None
    assert found.data_set(20) is None
    assert found.population.value == pytest.approx(found.squares / 9 / 10)


def test_degrees_of_freedom_add_as_satterthwaite_says():
    assert (Variance(1.0, 5) + Variance(1.0, 5)).dof == pytest.approx(10)
    assert (Variance(1.0, 5) + Variance(0.0, 1)).dof == pytest.approx(5)
    assert (Variance(0.0, 5) + Variance(0.0, 1)).dof == math.inf


def test_refusals():
    found = MeanStatistics.of(torch.randn(1, 2))
    with pytest.raises(ConfigError, match=r"images: 1 is not >= 2"):
        _ = found.population
    with pytest.raises(ConfigError, match="size: 0 is below the 1 images"):
        found.data_set(0)
