"""What follows from stored eps errors: Ho 2020, eq. 12; Kingma 2021 (VDM), eq. 14; Bao 2022."""

import pytest
import torch
from support.denoisers import terms_of, toy, toy_eps

from ddpm_core import counter_random
from ddpm_core.likelihood.curves import (
    decoder_variances,
    kl_from_eps_mse,
    optimal_variance,
    steps_from_continuous,
    subsequence_kl,
)
from ddpm_core.likelihood.designs import STREAM, full_design
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.terms import squared_error as eps_mse
from ddpm_core.likelihood.terms import x_0_of
from ddpm_core.process.base import q_sample
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import Beta, BetaTilde, GivenVariance, variance_named

SCHEDULE = DiscreteProcess.cosine(25)
T = SCHEDULE.num_timesteps
SHAPE = (2, 3, 3)


def images_like(seed, batch):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *SHAPE), generator=g).to(torch.uint8)


def noise_of(seed, ids, column):
    return counter_random.normal(seed, STREAM, ids, column, SHAPE, dtype=torch.float64)


@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde", "optimal"])
def test_the_kl_under_any_variances_follows_from_the_eps_error(sigma2):
    """Ho 2020, eq. 12, with its constant; 'optimal' as Bao 2022 has it."""
    optimal = optimal_variance(SCHEDULE, torch.linspace(0.9, 0.1, T))
    variance = optimal if sigma2 == "optimal" else variance_named(sigma2)
    images, t = images_like(3, 5), torch.tensor([1, 4, 10, 20, 24])
    eps = noise_of(1, torch.arange(5), t)
    eps_pred = eps + 0.3 * noise_of(2, torch.arange(5), t)
    expected = terms_of(SCHEDULE, images, t, eps, eps_pred, variance)
    torch.testing.assert_close(kl_from_eps_mse(SCHEDULE, t, eps_mse(eps, eps_pred), variance), expected)


@pytest.mark.parametrize("k", [2, 5, 10, 25])
def test_a_sub_sequences_elbo_follows_from_the_eps_errors(k):
    """Kingma 2021, VDM, eq. 14, against the same model with the sub-sequence's own schedule, evaluated directly."""
    steps = SCHEDULE.grid(k).flip(0).tolist()
    share = SCHEDULE.alpha2[steps]
    before = torch.cat([torch.ones(1, dtype=torch.float64), share[:-1]])
    short = DiscreteProcess.from_betas(1 - share / before)
    # The decoder keeps the variance it has in the full sequence: nothing else would follow from what is stored.
    variance = GivenVariance(torch.cat([SCHEDULE.posterior_variance[1:2], short.posterior_variance[1:]]))
    images = images_like(3, 4)
    design = full_design(T, 4, 1)
    evaluated = elbo(toy(SCHEDULE), images, torch.arange(4), design, 3, BetaTilde())
    found = evaluated.terms[:, 0] + subsequence_kl(SCHEDULE, steps, design.t, evaluated.eps_mse).sum(1)
    expected = torch.zeros(4, dtype=torch.float64)
    for index, step in enumerate(steps):
        eps = noise_of(3, torch.arange(4), torch.full((4,), step))
        t, full_t = torch.full((4,), index), torch.full((4,), step)
        eps_pred = toy_eps(q_sample(short.at(t), x_0_of(images), eps), full_t)
        expected += terms_of(short, images, t, eps, eps_pred, variance)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_the_optimal_variance_minimises_every_kl():
    """sigma*^2 = beta_tilde + c^2 mse: no other variance gives a smaller mean term, at any t."""
    schedule, images, ids = DiscreteProcess.linear(8, 0.01, 0.3), images_like(2, 6), torch.arange(6)
    design = full_design(8, 6)
    best = optimal_variance(schedule, elbo(toy(schedule), images, ids, design, 0, Beta()).eps_mse.mean(0))

    def mean_terms(variance):
        return elbo(toy(schedule), images, ids, design, 0, variance).terms.mean(0)[1:]

    smallest = mean_terms(best)
    for other in (GivenVariance(best.table * 0.98), GivenVariance(best.table * 1.02), Beta(), BetaTilde()):
        assert bool((mean_terms(other) > smallest).all())


def test_the_decoders_variances_are_both_choices_and_a_grid():
    """From which a decoder's variance is chosen (Ho 2020, sec. 3.3): in steps of sqrt(2) from 1/16 to 4 times beta."""
    found = decoder_variances(SCHEDULE)
    assert found[:2].tolist() == [float(SCHEDULE.step_variance[0]), float(SCHEDULE.posterior_variance[1])]
    assert float(found[2]) == pytest.approx(float(found[0]) / 16)
    assert float(found[-1]) == pytest.approx(float(found[0]) * 4)
    torch.testing.assert_close(found[3:] / found[2:-1], torch.full((12,), 2**0.5, dtype=torch.float64))


@pytest.mark.parametrize("num_timesteps", [3, 1000])
def test_steps_of_a_constant_error_follow_from_continuous_time_up_to_both_ends(num_timesteps):
    """Kingma 2021, VDM, eq. 14, where an average over neighbours is no approximation."""
    process = ContinuousProcess.learned(-6.0, 3.0)
    low, high = process.ends
    gamma = low + (high - low) * (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    found = steps_from_continuous(process, num_timesteps, gamma, torch.full_like(gamma, 0.7)).mean()
    edges = process.gamma(torch.linspace(0.0, 1.0, num_timesteps + 1, dtype=torch.float64)).detach()
    expected = 0.5 * 0.7 * edges.diff().expm1().sum() / torch.log(torch.tensor(2.0))
    assert float(found) == pytest.approx(float(expected), rel=1e-3)
