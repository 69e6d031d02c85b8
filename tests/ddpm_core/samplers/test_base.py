"""Ho 2020, algorithm 2; Song 2021 (DDIM), eqs. 12 and 16; worlds where the best eps is known."""

import itertools

import pytest
import torch
from support.denoisers import FunctionDenoiser

from ddpm_core import counter_random
from ddpm_core.errors import ConfigError
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import variance_named
from ddpm_core.samplers.base import STREAM, sample
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM

MEAN = torch.tensor([0.3, -0.2, 0.1, 0.0])
FACTOR = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0], [0.0, 0.2, 0.3, 0.0], [0.1, 0.0, 0.2, 0.6]])
COVARIANCE = FACTOR @ FACTOR.T
SHAPE = (1, 2, 2)


def gaussian(schedule):
    """E[eps | x_t] for x_0 ~ N(MEAN, COVARIANCE): sqrt(1-abar) (abar S + (1-abar) I)^-1 (x_t - sqrt(abar) m)."""

    def eps_fn(x_t, t):
        abar = float(schedule.alpha2[t[0]])
        covariance = abar * COVARIANCE.double() + (1 - abar) * torch.eye(4, dtype=torch.float64)
        centred = x_t.flatten(1).double() - abar**0.5 * MEAN.double()
        eps = (1 - abar) ** 0.5 * torch.linalg.solve(covariance, centred.T).T
        return eps.to(x_t.dtype).reshape(x_t.shape)

    return FunctionDenoiser(eps_fn, schedule, SHAPE)


def toy_eps(x_t, t):
    return 0.9 * x_t + 0.1 * torch.sin(t.float())[:, None, None, None]


def toy(schedule, shape):
    return FunctionDenoiser(toy_eps, schedule, shape)


def check_moments(x, covariance, bias):
    """Mean and covariance within 4 standard errors, plus what the discretisation can add."""
    x = x.flatten(1).double()
    n, centred = len(x), x - x.mean(0)
    mean_error = (x.mean(0) - MEAN.double()).abs()
    assert bool((mean_error < 4 * (covariance.diagonal().double() / n).sqrt() + bias).all())
    products = centred[:, :, None] * centred[:, None, :]
    error = (products.mean(0) - covariance.double()).abs()
    assert bool((error < 4 * products.std(0) / n**0.5 + bias).all())


@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde"])
def test_ddpm_samples_the_gaussian_it_was_given(sigma2):
    schedule = DiscreteProcess.linear(1000)
    x = sample(gaussian(schedule), DDPM(variance_named(sigma2)), torch.arange(5_000), 1, clip_x_0=False)
    check_moments(x, COVARIANCE, bias=0.005)


@pytest.mark.parametrize(("eta", "num_steps"), [(0.0, 200), (0.5, 400), (1.0, 1000)])
def test_ddim_samples_the_gaussian_it_was_given(eta, num_steps):
    schedule = DiscreteProcess.linear(1000)
    x = sample(gaussian(schedule), DDIM(num_steps, eta), torch.arange(5_000), 2, clip_x_0=False)
    check_moments(x, COVARIANCE, bias=0.01)


def ddim_covariance(schedule, num_steps):
    """The exact covariance of DDIM (eta = 0) on the Gaussian world: each step of eq. 12 is linear in x_t, so in the
    eigenbasis of COVARIANCE the variance is multiplied by a factor that the step's coefficients give."""
    variances, basis = torch.linalg.eigh(COVARIANCE.double())
    found, steps = torch.ones(4, dtype=torch.float64), schedule.grid(num_steps).flip(0).tolist()
    for t, s in zip(reversed(steps), [*reversed(steps[:-1]), -1], strict=True):
        a_t, a_s = float(schedule.alpha2[t]), float(schedule.alpha2[s]) if s >= 0 else 1.0
        eps = (1 - a_t) ** 0.5 / (a_t * variances + 1 - a_t)
        x_0 = (1 - (1 - a_t) ** 0.5 * eps) / a_t**0.5
        found = found * (a_s**0.5 * x_0 + (1 - a_s) ** 0.5 * eps) ** 2
    return basis @ found.diag() @ basis.T


@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_ddim_in_few_steps_has_the_mean_of_the_data_and_its_own_covariance(num_steps):
    """Song 2021, eq. 12 is a first-order step: in few of them the samples spread less than the data do, by an amount
    that is known here. The mean is the data's."""
    schedule = DiscreteProcess.linear(1000)
    x = sample(gaussian(schedule), DDIM(num_steps), torch.arange(5_000), 3, clip_x_0=False)
    check_moments(x, ddim_covariance(schedule, num_steps), bias=0.005)


def test_the_spread_of_ddim_approaches_that_of_the_data():
    schedule = DiscreteProcess.linear(1000)
    total = float(COVARIANCE.diagonal().sum())
    missing = [1 - float(ddim_covariance(schedule, k).diagonal().sum()) / total for k in (10, 20, 50, 1000)]
    assert missing == sorted(missing, reverse=True)
    assert missing[0] > 0.3
    assert 0 < missing[-1] < 0.02


@pytest.mark.parametrize("clip", [False, True])
def test_every_step_is_shown_with_its_input_and_prediction(clip):
    denoiser, ids = toy(DiscreteProcess.linear(20), (1, 4, 4)), torch.arange(3)
    for sampler, times in ((DDPM(), list(range(19, -1, -1))), (DDIM(4), [19, 13, 6, 0])):
        seen = []
        x = sample(denoiser, sampler, ids, 3, clip_x_0=clip, on_step=lambda *step, to=seen: to.append(step))
        assert sampler.times(denoiser.process).tolist() == times
        assert [k for k, _, _ in seen] == list(range(len(times)))
        assert torch.equal(seen[0][1], counter_random.normal(3, STREAM, ids, 20, (1, 4, 4)))
        torch.testing.assert_close(seen[-1][2], x, rtol=1e-5, atol=1e-5)
        assert torch.equal(sample(denoiser, sampler, ids, 3, clip_x_0=clip), x)


@pytest.mark.parametrize("clip", [False, True])
def test_full_ddim_with_eta_1_is_ddpm(clip):
    denoiser, ids = toy(DiscreteProcess.linear(50, 1e-3, 0.2), (3, 4, 4)), torch.arange(6)
    ddpm = sample(denoiser, DDPM(variance_named("beta_tilde")), ids, 5, clip)
    ddim = sample(denoiser, DDIM(50, eta=1.0), ids, 5, clip)
    torch.testing.assert_close(ddim, ddpm, rtol=1e-4, atol=1e-4)


def test_ddim_with_eta_0_draws_nothing_but_the_start(monkeypatch):
    denoiser, counters = toy(DiscreteProcess.linear(20), (1, 2, 2)), []
    real = counter_random.normal

    def recording(seed, stream, ids, t, shape, **kwargs):
        counters.append(t)
        return real(seed, stream, ids, t, shape, **kwargs)

    monkeypatch.setattr(counter_random, "normal", recording)
    sample(denoiser, DDIM(5), torch.arange(2), 0)
    assert counters == [20]
    counters.clear()
    sample(denoiser, DDPM(), torch.arange(2), 0)
    # One draw for each step but the last, which has no noise, and one for x_T.
    assert counters == [20, *range(19, 0, -1)]


def test_one_step_by_hand():
    """Ho 2020, algorithm 2, lines 3 and 4, at T = 2 with sigma^2 = beta."""
    schedule, ids = DiscreteProcess.from_betas([0.1, 0.3]), torch.tensor([9])
    x = counter_random.normal(4, STREAM, ids, 2, (1, 1, 2)).double()
    z = counter_random.normal(4, STREAM, ids, 1, (1, 1, 2)).double()
    x_1 = (x - 0.3 / (1 - 0.63) ** 0.5 * toy_eps(x, torch.tensor([1]))) / 0.7**0.5 + 0.3**0.5 * z
    x_0 = (x_1 - 0.1 / 0.1**0.5 * toy_eps(x_1, torch.tensor([0]))) / 0.9**0.5
    found = sample(toy(schedule, (1, 1, 2)), DDPM(variance_named("beta")), ids, 4, clip_x_0=False)
    torch.testing.assert_close(found.double(), x_0, rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch():
    denoiser = toy(DiscreteProcess.linear(10), (3, 4, 4))
    for sampler in (DDPM(), DDIM(4, eta=0.7)):
        together = sample(denoiser, sampler, torch.arange(10, 15), 3)
        shuffled = sample(denoiser, sampler, torch.tensor([13, 2, 11]), 3)
        assert torch.equal(shuffled[0], together[3])
        assert torch.equal(shuffled[2], together[1])
        assert not torch.equal(sample(denoiser, sampler, torch.arange(10, 15), 4), together)


def test_clipped_samples_are_in_range():
    x = sample(toy(DiscreteProcess.linear(20), (1, 4, 4)), DDIM(7, eta=0.3), torch.arange(8), 0)
    assert float(x.abs().max()) <= 1.0


@pytest.mark.parametrize(("num_timesteps", "num_steps"), [(1000, 50), (1000, 1000), (10, 3), (7, 1), (1, 1)])
def test_ddim_timesteps_span_the_whole_sequence(num_timesteps, num_steps):
    steps = DDIM(num_steps).times(DiscreteProcess.linear(num_timesteps)).flip(0).tolist()
    assert len(set(steps)) == num_steps
    assert steps == sorted(steps)
    assert steps[-1] == num_timesteps - 1
    if num_steps > 1:
        assert steps[0] == 0
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 0},
        {"steps": 11},
        {"eta": -0.1},
        {"timesteps": (3, 2)},
        {"timesteps": (0, 10)},
        {"timesteps": ()},
    ],
)
def test_bad_ddim_arguments_are_refused(arguments):
    with pytest.raises(ConfigError):
        sample(toy(DiscreteProcess.linear(10), (1, 2, 2)), DDIM(**arguments), torch.arange(1), 0)
