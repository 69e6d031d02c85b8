"""Song 2021 (DDIM), eqs. 7, 12 and 16, in worlds where the best eps and its flow are known."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.denoisers import FOUR_PIXELS, toy
from support.processes import PROCESSES, rescaled

from ddpm_core import counter_random
from ddpm_core.denoiser import Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.process.base import q_sample
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import variance_named
from ddpm_core.samplers.base import Clip, Predictor, sample
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM

processes = st.sampled_from(
    [DiscreteProcess.linear(), DiscreteProcess.cosine(100), DiscreteProcess.linear(8, 0.01, 0.3), *PROCESSES.values()]
)


def draw(seed, batch=5):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, 3, 4, generator=g, dtype=torch.float64) for _ in range(2)]


class Told(Predictor):
    """Predicts what it was told."""

    def __init__(self, prediction):
        self.prediction = prediction

    def __call__(self, z, time):
        return self.prediction


def ddim_step(process, x_0, eps, t, s, eta):
    """Mean and standard deviation of DDIM's z_s, given the x_0 and eps that z_t consists of."""
    t = torch.full((len(x_0),), t)
    step, marginal = process.step(t, torch.full_like(t, s)), process.at(t)
    prediction = Prediction.of_x_0(q_sample(marginal, x_0, eps), marginal, x_0)
    prediction.__dict__["eps"] = eps  # exactly, not by way of z_t
    sampler, denoise = DDIM(eta=eta), Told(prediction)
    mean, _ = sampler.step(step, prediction.z, denoise, None, None)
    moved, _ = sampler.step(step, prediction.z, denoise, lambda: torch.ones_like(x_0), None)
    return mean, moved - mean


@given(processes, st.integers(0, 10**6), st.floats(0, 1), st.data())
@settings(max_examples=50, deadline=None)
def test_ddim_keeps_the_marginals(process, seed, eta, data):
    """Song 2021, eq. 7: for any sigma, z_s given x_0 stays N(sqrt(abar_s) x_0, (1 - abar_s) I)."""
    t = data.draw(st.integers(1, process.num_timesteps - 1))
    s = data.draw(st.integers(0, t - 1))
    x_0, eps = draw(seed)
    mean, _ = ddim_step(process, x_0, torch.zeros_like(eps), t, s, eta)
    torch.testing.assert_close(mean, process.alpha[s] * x_0)
    mean, deviation = ddim_step(process, torch.zeros_like(x_0), eps, t, s, eta)
    total = (mean / eps) ** 2 + deviation**2
    torch.testing.assert_close(total, process.sigma2[s].expand_as(total), rtol=1e-8, atol=1e-12)


@given(processes, st.integers(0, 10**6), st.data())
@settings(max_examples=30, deadline=None)
def test_ddim_with_eta_1_between_neighbours_is_the_ddpm_posterior(process, seed, data):
    """Song 2021, eq. 16: eta = 1 on (t - 1, t) has beta_tilde and Ho 2020, eq. 7's mean."""
    t = data.draw(st.integers(1, process.num_timesteps - 1))
    x_0, eps = draw(seed)
    t_batch = torch.full((5,), t)
    expected = process.step(t_batch, t_batch - 1).posterior(q_sample(process.at(t_batch), x_0, eps), x_0)
    mean, deviation = ddim_step(process, x_0, eps, t, t - 1, 1.0)
    torch.testing.assert_close(mean, expected.mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(deviation**2, expected.variance.expand_as(mean), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(("eta", "num_steps"), [(0.0, 200), (0.5, 400), (1.0, 1000)])
def test_ddim_samples_the_gaussian_it_was_given(eta, num_steps):
    schedule = DiscreteProcess.linear(1000)
    x = sample(FOUR_PIXELS.denoiser(schedule), DDIM(num_steps, eta), torch.arange(5_000), 2, clip=None)
    FOUR_PIXELS.check_moments(x, bias=0.01)


def ddim_covariance(schedule, num_steps):
    """The exact covariance of DDIM (eta = 0) on the Gaussian world: each step of eq. 12 is linear in x_t, so in the
    eigenbasis of the covariance the variance is multiplied by a factor that the step's coefficients give."""
    variances, basis = torch.linalg.eigh(FOUR_PIXELS.covariance)
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
    x = sample(FOUR_PIXELS.denoiser(schedule), DDIM(num_steps), torch.arange(5_000), 3, clip=None)
    FOUR_PIXELS.check_moments(x, 0.005, ddim_covariance(schedule, num_steps))


def test_the_spread_of_ddim_approaches_that_of_the_data():
    schedule = DiscreteProcess.linear(1000)
    total = float(FOUR_PIXELS.covariance.diagonal().sum())
    missing = [1 - float(ddim_covariance(schedule, k).diagonal().sum()) / total for k in (10, 20, 50, 1000)]
    assert missing == sorted(missing, reverse=True)
    assert missing[0] > 0.3
    assert 0 < missing[-1] < 0.02


@pytest.mark.parametrize("clip", [None, Clip()])
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


def order(process, num_steps):
    """By which power of the number of steps the distance to the exact flow falls."""

    def error(count):
        times = process.grid(count, "log_snr")
        steps, denoiser = process.step(times[:-1], times[1:]), FOUR_PIXELS.denoiser(process)
        g = torch.Generator().manual_seed(0)
        start = torch.randn(20, 1, 2, 2, generator=g, dtype=torch.float64) * process.prior_variance**0.5
        z = start
        for k in range(count - 1):
            z, _ = DDIM().step(steps[k : k + 1], z, Predictor(denoiser, None, None), None, None)
        return float((z - FOUR_PIXELS.flow(start, process.at(times[:1]), process.at(times[-1:]))).abs().max())

    return math.log2(error(num_steps) / error(2 * num_steps - 1))


@pytest.mark.parametrize("name", PROCESSES)
def test_ddim_follows_the_flow_with_first_order(name):
    """Song 2021, DDIM, eq. 13: z_t = alpha_t m + (z_s - alpha_s m) sd_t / sd_s along every axis of a Gaussian, of which
    the error halves with the steps, under any (alpha, sigma) that one interpolates finely."""
    coarse = PROCESSES[name]
    at = torch.linspace(0, coarse.num_timesteps - 1, 12_001, dtype=torch.float64)
    low = at.long().clamp(max=coarse.num_timesteps - 2)
    log_alpha, log_snr = (t[low] + (at - low) * (t[low + 1] - t[low]) for t in (coarse.alpha.log(), coarse.log_snr))
    process = DiscreteProcess.from_alpha_sigma(log_alpha.exp(), (log_alpha - 0.5 * log_snr).exp())
    assert order(process, 101) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("name", PROCESSES)
def test_samples_do_not_depend_on_the_unit_of_z(name, eta):
    """z_t -> c_t z_t changes no image that is drawn."""
    found = [
        sample(FOUR_PIXELS.denoiser(process), DDIM(20, eta), torch.arange(50), 3)
        for process in (PROCESSES[name], rescaled(PROCESSES[name]))
    ]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_a_variance_preserving_process_has_its_samples_from_either_description(eta):
    found = [
        sample(FOUR_PIXELS.denoiser(process), DDIM(20, eta), torch.arange(50), 3)
        for process in (DiscreteProcess.linear(60, 1e-3, 0.25), PROCESSES["preserving"])
    ]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
