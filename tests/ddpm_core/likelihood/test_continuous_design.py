"""Where an image is evaluated in continuous time: unbiased, in strata, by importance (Kingma 2021, VDM, app. I.1)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core.likelihood.designs import GROUP_SIZE, continuous_design, importance_density
from ddpm_core.process.continuous import ContinuousProcess

torch.manual_seed(0)
PROCESS = ContinuousProcess.linear(-13.3, 5.0)
PROCESSES = [PROCESS, ContinuousProcess.learned(-7.0, 2.0), ContinuousProcess.edm()]


def later(design, values):
    return values[:, ~design.first]


@given(st.sampled_from(PROCESSES), st.integers(1, 12), st.integers(2, 3), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_each_replicate_has_gamma_0_and_one_time_in_each_stratum(process, share, replicates, n, seed):
    design = continuous_design(torch.arange(n), seed, process, share * replicates, replicates)
    low, high = process.ends
    assert design.t.shape == (n, replicates * (1 + share))
    assert design.first.sum() == replicates
    assert bool((design.t[:, design.first] == low).all())
    torch.testing.assert_close(design.weight[:, design.first], torch.full((n, replicates), 1 / replicates).double())
    assert bool((later(design, design.t) >= low).all())
    assert bool((later(design, design.t) <= high).all())
    torch.testing.assert_close(
        later(design, design.weight), torch.full((n, replicates * share), 1.0).double() / (replicates * share)
    )
    for r in range(replicates):
        place = (design.t[:, (design.replicate == r) & ~design.first] - low) / (high - low) * share
        assert place.floor().clamp(max=share - 1).long().tolist() == [list(range(share))] * n


def test_a_group_together_divides_gamma_evenly():
    """16 neighbours' times are equidistant (systematic sampling: Cochran 1977, ch. 8)."""
    design = continuous_design(torch.arange(GROUP_SIZE), 3, PROCESS, 4)
    for r in range(2):
        together = design.t[:, (design.replicate == r) & ~design.first].flatten().sort().values
        torch.testing.assert_close(
            together.diff(), torch.full((31,), 18.3 / 32, dtype=torch.float64), rtol=1e-9, atol=0
        )


@pytest.mark.parametrize("levels", [[1.0], [1.0, 1.0, 1.0], [0.01, 10.0], [5.0, 0.1, 2.0, 0.02, 1.0, 1.0, 3.0]])
def test_the_weighted_mean_is_the_integral_whatever_the_density(levels):
    """E[sum of weight f(gamma)] = the mean of f over gamma, also where a bin is rarely drawn."""
    density = torch.tensor(levels, dtype=torch.float64)
    density = density / density.sum()
    n = 4000
    design = continuous_design(torch.arange(n), 0, PROCESS, 8, density=density)
    values = torch.sin(design.t / 2) + 2
    found = design.replicate_values(torch.zeros(n).double(), torch.where(design.first, 0.0, values)).mean(1)
    exact = 2 + 2 * (math.cos(-13.3 / 2) - math.cos(5.0 / 2)) / 18.3
    assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / n**0.5
    # A bin is drawn as often as its probability.
    bins = ((later(design, design.t) + 13.3) / 18.3 * len(density)).long().clamp(max=len(density) - 1)
    share = bins.flatten().bincount(minlength=len(density)) / bins.numel()
    torch.testing.assert_close(share.double(), density, rtol=0, atol=0.005)


def test_a_design_depends_on_seed_and_position_only():
    positions = torch.tensor([5, 40, 17])
    one = continuous_design(torch.arange(64), 1, PROCESS, 6)
    two = continuous_design(positions, 1, PROCESS, 6)
    assert torch.equal(two.t, one.t[positions])
    assert torch.equal(two.weight, one.weight[positions])
    assert not torch.equal(continuous_design(positions, 2, PROCESS, 6).t, two.t)


def test_importance_follows_the_root_mean_square_of_the_terms_and_keeps_a_floor():
    """Nichol and Dhariwal 2021, eq. 18, over stretches of gamma; a fifth stays uniform."""
    gamma = torch.linspace(-13.3, 5.0, 4001, dtype=torch.float64)[:-1]
    terms = torch.exp(-((gamma + 5) ** 2) / 4)
    density = importance_density(PROCESS, gamma, terms)
    bins = len(density)
    assert float(density.sum()) == pytest.approx(1.0)
    assert float(density.min()) >= 0.2 / bins - 1e-12
    expected = terms.square().reshape(bins, -1).mean(1).sqrt()
    torch.testing.assert_close(density, 0.8 * expected / expected.sum() + 0.2 / bins, rtol=1e-2, atol=1e-4)
    # Stretches that the first pass missed count as the average one.
    inside = (gamma > -6) & (gamma < -4)
    missed = importance_density(PROCESS, gamma[inside], terms[inside])
    assert float(missed.sum()) == pytest.approx(1.0)
    assert float(missed.min()) > 0.5 / bins


def test_importance_makes_the_estimate_tighter():
    def spread(density):
        n = 2000
        design = continuous_design(torch.arange(n), 0, PROCESS, 4, density=density)
        values = torch.where(design.first, 0.0, torch.exp(-((design.t + 5) ** 2) / 0.5))
        return float(design.replicate_values(torch.zeros(n).double(), values).mean(1).std())

    gamma = torch.linspace(-13.3, 5.0, 3000, dtype=torch.float64)
    assert spread(importance_density(PROCESS, gamma, torch.exp(-((gamma + 5) ** 2) / 0.5))) < 0.6 * spread(None)
