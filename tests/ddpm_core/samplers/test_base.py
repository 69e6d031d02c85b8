"""Ho 2020, algorithm 2; Song 2021 (DDIM), eqs. 12 and 16; worlds where the best eps is known."""

import itertools

import pytest
import torch
from ddpm_core.sampling import STREAM, ddim_timesteps, sample_ddim, sample_ddpm
from ddpm_core.schedule import NoiseSchedule

from ddpm_core import noise
from ddpm_core.errors import ConfigError

MEAN = torch.tensor([0.3, -0.2, 0.1, 0.0])
FACTOR = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0], [0.0, 0.2, 0.3, 0.0], [0.1, 0.0, 0.2, 0.6]])
COVARIANCE = FACTOR @ FACTOR.T
SHAPE = (1, 2, 2)


def gaussian_eps(schedule):
    """E[eps | x_t] for x_0 ~ N(MEAN, COVARIANCE): sqrt(1-abar) (abar S + (1-abar) I)^-1 (x_t - sqrt(abar) m)."""

    def eps_fn(x_t, t):
        abar = float(schedule.alphas_cumprod[t[0]])
        covariance = abar * COVARIANCE.double() + (1 - abar) * torch.eye(4, dtype=torch.float64)
        centred = x_t.flatten(1).double() - abar**0.5 * MEAN.double()
        eps = (1 - abar) ** 0.5 * torch.linalg.solve(covariance, centred.T).T
        return eps.to(x_t.dtype).reshape(x_t.shape)

    return eps_fn


def toy_eps(x_t, t):
    return 0.9 * x_t + 0.1 * torch.sin(t.float())[:, None, None, None]


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
    schedule = NoiseSchedule.linear(1000)
    x = sample_ddpm(schedule, gaussian_eps(schedule), torch.arange(5_000), SHAPE, 1, sigma2, clip_x_0=False)
    check_moments(x, COVARIANCE, bias=0.005)


@pytest.mark.parametrize(("eta", "num_steps"), [(0.0, 200), (0.5, 400), (1.0, 1000)])
def test_ddim_samples_the_gaussian_it_was_given(eta, num_steps):
    schedule = NoiseSchedule.linear(1000)
    eps_fn = gaussian_eps(schedule)
    x = sample_ddim(schedule, eps_fn, torch.arange(5_000), SHAPE, 2, num_steps, eta, clip_x_0=False)
    check_moments(x, COVARIANCE, bias=0.01)


def ddim_covariance(schedule, num_steps):
    """The exact covariance of DDIM (eta = 0) on the Gaussian world: each step of eq. 12 is linear in x_t, so in the
    eigenbasis of COVARIANCE the variance is multiplied by a factor that the step's coefficients give."""
    variances, basis = torch.linalg.eigh(COVARIANCE.double())
    found, steps = torch.ones(4, dtype=torch.float64), ddim_timesteps(schedule.num_timesteps, num_steps)
    for t, s in zip(reversed(steps), [*reversed(steps[:-1]), -1], strict=True):
        a_t, a_s = float(schedule.alphas_cumprod[t]), float(schedule.alphas_cumprod[s]) if s >= 0 else 1.0
        eps = (1 - a_t) ** 0.5 / (a_t * variances + 1 - a_t)
        x_0 = (1 - (1 - a_t) ** 0.5 * eps) / a_t**0.5
        found = found * (a_s**0.5 * x_0 + (1 - a_s) ** 0.5 * eps) ** 2
    return basis @ found.diag() @ basis.T


@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_ddim_in_few_steps_has_the_mean_of_the_data_and_its_own_covariance(num_steps):
    """Song 2021, eq. 12 is a first-order step: in few of them the samples spread less than the data do, by an amount
    that is known here. The mean is the data's."""
    schedule = NoiseSchedule.linear(1000)
    x = sample_ddim(schedule, gaussian_eps(schedule), torch.arange(5_000), SHAPE, 3, num_steps, clip_x_0=False)
    check_moments(x, ddim_covariance(schedule, num_steps), bias=0.005)


def test_the_spread_of_ddim_approaches_that_of_the_data():
    schedule = NoiseSchedule.linear(1000)
    total = float(COVARIANCE.diagonal().sum())
    missing = [1 - float(ddim_covariance(schedule, k).diagonal().sum()) / total for k in (10, 20, 50, 1000)]
    assert missing == sorted(missing, reverse=True)
    assert missing[0] > 0.3
    assert 0 < missing[-1] < 0.02


@pytest.mark.parametrize("clip", [False, True])
def test_every_step_is_shown_with_its_input_and_prediction(clip):
    schedule, ids = NoiseSchedule.linear(20), torch.arange(3)
    for sample, times in ((sample_ddpm, list(range(19, -1, -1))), (sample_ddim, [19, 13, 6, 0])):
        seen = []
        kwargs = {} if sample is sample_ddpm else {"num_steps": 4}
        x = sample(
            schedule, toy_eps, ids, (1, 4, 4), 3, clip_x_0=clip, on_step=lambda *s, to=seen: to.append(s), **kwargs
        )
        assert [t for t, _, _ in seen] == times
        assert torch.equal(seen[0][1], noise.normal(3, STREAM, ids, 20, (1, 4, 4)))
        torch.testing.assert_close(seen[-1][2], x, rtol=1e-5, atol=1e-5)
        assert torch.equal(sample(schedule, toy_eps, ids, (1, 4, 4), 3, clip_x_0=clip, **kwargs), x)


@pytest.mark.parametrize("clip", [False, True])
def test_full_ddim_with_eta_1_is_ddpm(clip):
    schedule, ids = NoiseSchedule.linear(50, 1e-3, 0.2), torch.arange(6)
    ddpm = sample_ddpm(schedule, toy_eps, ids, (3, 4, 4), 5, "beta_tilde", clip)
    ddim = sample_ddim(schedule, toy_eps, ids, (3, 4, 4), 5, num_steps=50, eta=1.0, clip_x_0=clip)
    torch.testing.assert_close(ddim, ddpm, rtol=1e-4, atol=1e-4)


def test_ddim_with_eta_0_draws_nothing_but_the_start(monkeypatch):
    schedule, counters = NoiseSchedule.linear(20), []
    real = noise.normal

    def recording(seed, stream, ids, t, shape, **kwargs):
        counters.append(t)
        return real(seed, stream, ids, t, shape, **kwargs)

    monkeypatch.setattr(noise, "normal", recording)
    sample_ddim(schedule, toy_eps, torch.arange(2), (1, 2, 2), 0, num_steps=5)
    assert counters == [20]
    counters.clear()
    sample_ddpm(schedule, toy_eps, torch.arange(2), (1, 2, 2), 0)
    # One draw for each step but the last, which has no noise, and one for x_T.
    assert counters == [20, *range(19, 0, -1)]


def test_one_step_by_hand():
    """Ho 2020, algorithm 2, lines 3 and 4, at T = 2 with sigma^2 = beta."""
    schedule, ids = NoiseSchedule.from_betas([0.1, 0.3]), torch.tensor([9])
    x = noise.normal(4, STREAM, ids, 2, (1, 1, 2)).double()
    z = noise.normal(4, STREAM, ids, 1, (1, 1, 2)).double()
    x_1 = (x - 0.3 / (1 - 0.63) ** 0.5 * toy_eps(x, torch.tensor([1]))) / 0.7**0.5 + 0.3**0.5 * z
    x_0 = (x_1 - 0.1 / 0.1**0.5 * toy_eps(x_1, torch.tensor([0]))) / 0.9**0.5
    found = sample_ddpm(schedule, toy_eps, ids, (1, 1, 2), 4, "beta", clip_x_0=False)
    torch.testing.assert_close(found.double(), x_0, rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch():
    schedule = NoiseSchedule.linear(10)
    for sample in (sample_ddpm, sample_ddim):
        kwargs = {} if sample is sample_ddpm else {"num_steps": 4, "eta": 0.7}
        together = sample(schedule, toy_eps, torch.arange(10, 15), (3, 4, 4), 3, **kwargs)
        shuffled = sample(schedule, toy_eps, torch.tensor([13, 2, 11]), (3, 4, 4), 3, **kwargs)
        assert torch.equal(shuffled[0], together[3])
        assert torch.equal(shuffled[2], together[1])
        other_seed = sample(schedule, toy_eps, torch.arange(10, 15), (3, 4, 4), 4, **kwargs)
        assert not torch.equal(other_seed, together)


def test_clipped_samples_are_in_range():
    x = sample_ddim(NoiseSchedule.linear(20), toy_eps, torch.arange(8), (1, 4, 4), 0, num_steps=7, eta=0.3)
    assert float(x.abs().max()) <= 1.0


@pytest.mark.parametrize(("num_timesteps", "num_steps"), [(1000, 50), (1000, 1000), (10, 3), (7, 1), (1, 1)])
def test_ddim_timesteps_span_the_whole_sequence(num_timesteps, num_steps):
    steps = ddim_timesteps(num_timesteps, num_steps)
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
        {"num_steps": 0},
        {"num_steps": 11},
        {"eta": -0.1},
        {"timesteps": [3, 2]},
        {"timesteps": [0, 10]},
        {"timesteps": []},
    ],
)
def test_bad_ddim_arguments_are_refused(arguments):
    with pytest.raises(ConfigError):
        sample_ddim(NoiseSchedule.linear(10), toy_eps, torch.arange(1), (1, 2, 2), 0, **arguments)
