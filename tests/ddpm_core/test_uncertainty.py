"""Standard errors of a mean over images (Cochran 1977): against simulation."""

import math

import pytest
import torch

from ddpm_core.errors import ConfigError
from ddpm_core.uncertainty import mean_with_errors


def test_by_hand():
    found = mean_with_errors(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    assert found.mean == 3.5
    assert found.population_error == pytest.approx(math.sqrt(4.5 / 2))
    assert found.monte_carlo_error == pytest.approx(math.sqrt((2 + 0) / 2 / 4))


@pytest.mark.parametrize("finite", [False, True])
def test_errors_match_the_spread_of_repeated_experiments(finite):
    """Over 3000 experiments the mean squared error equals the mean reported variance, for both errors."""
    g = torch.Generator().manual_seed(0)
    images, draws, population = 20, 3, 30
    monte_carlo, sampling, reported_mc, reported_population = [], [], [], []
    for _ in range(3000):
        true = torch.randn(population, generator=g)
        chosen = true[torch.randperm(population, generator=g)[:images]]
        values = chosen[:, None] + 0.7 * torch.randn(images, draws, generator=g)
        found = mean_with_errors(values, population if finite else None)
        monte_carlo.append((found.mean - float(chosen.mean())) ** 2)
        sampling.append((found.mean - (float(true.mean()) if finite else 0.0)) ** 2)
        reported_mc.append(found.monte_carlo_error**2)
        reported_population.append(found.population_error**2)
    # 3000 chi-square draws: the relative error of a mean square is about sqrt(2 / 3000) = 2.6 %.
    assert sum(monte_carlo) / sum(reported_mc) == pytest.approx(1.0, abs=0.11)
    assert sum(sampling) / sum(reported_population) == pytest.approx(1.0, abs=0.11)


def test_the_whole_population_has_monte_carlo_error_only():
    values = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    found = mean_with_errors(values, population_size=10)
    assert found.population_error == pytest.approx(found.monte_carlo_error)


def test_one_draw_has_no_monte_carlo_error_to_give():
    assert mean_with_errors(torch.randn(10, 1)).monte_carlo_error is None


@pytest.mark.parametrize(("shape", "population"), [((1, 3), None), ((5, 1), 10), ((5, 2), 4)])
def test_what_cannot_be_known_is_refused(shape, population):
    with pytest.raises(ConfigError):
        mean_with_errors(torch.zeros(shape), population)
