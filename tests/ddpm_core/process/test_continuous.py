"""Kingma 2021 (VDM), sec. 3 and app. A, and Karras 2022 (EDM): processes of continuous time, whose time is gamma."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.designs import continuous_design
from ddpm_core.process import process_from_config
from ddpm_core.process.base import Process, Step, q_sample
from ddpm_core.process.continuous import ContinuousProcess, continuous
from ddpm_core.process.discrete import DiscreteProcess, discrete

torch.manual_seed(0)
PROCESSES = {
    "linear": ContinuousProcess.linear(),
    "learned": ContinuousProcess.learned(-10.0, 6.0),
    "learned-ends": ContinuousProcess.learned(-13.3, 5.0, learned_ends=True),
    "edm": ContinuousProcess.edm(),
}
FIELDS = ("alpha", "variance", "unit_variance", "posterior_variance", "posterior_coef_x_0", "posterior_coef_z")


def times(*gammas):
    return torch.tensor(gammas, dtype=torch.float64)


@pytest.mark.parametrize("name", PROCESSES)
def test_it_is_a_process_whose_time_is_minus_log_snr(name):
    process = PROCESSES[name]
    assert isinstance(process, Process)
    assert continuous(process) is process
    gamma = torch.linspace(*process.ends, 41, dtype=torch.float64)
    now = process.at(gamma)
    alpha, sigma = now.alpha.flatten(), now.sigma.flatten()
    torch.testing.assert_close(alpha.square().log() - sigma.square().log(), -gamma, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(now.log_snr.flatten(), -gamma, rtol=0, atol=0)
    if name == "edm":
        assert torch.equal(alpha, torch.ones_like(alpha))
        torch.testing.assert_close(sigma[[0, -1]], times(0.002, 80.0), rtol=1e-12, atol=0)
        assert process.prior_variance == pytest.approx(6401.0)
        assert process.prior_signal == pytest.approx(1 / 6401.0)
    else:
        torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha), rtol=1e-15, atol=0)
        torch.testing.assert_close(sigma.square(), torch.sigmoid(gamma), rtol=1e-14, atol=0)
        assert process.prior_variance == 1.0
        assert process.prior_signal == pytest.approx(1 / (1 + math.exp(process.ends[1])), rel=1e-12)


@given(st.sampled_from(sorted(PROCESSES)), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_two_steps_are_one(name, u, v, w):
    """Kingma 2021, app. A.1 and A.2, at any three times: the steps compose, and the posterior is Bayes' rule."""
    process, places = PROCESSES[name], sorted({u, v, w})
    assume(len(places) == 3 and min(b - a for a, b in itertools.pairwise(places)) >= 1e-3)
    low, high = process.ends
    r, s, t = (times(low + place * (high - low)) for place in places)
    first, second, whole = process.step(s, r), process.step(t, s), process.step(t, r)
    torch.testing.assert_close(second.alpha * first.alpha, whole.alpha, rtol=1e-10, atol=0)
    total = second.variance + second.alpha.square() * first.variance
    torch.testing.assert_close(total, whole.variance, rtol=1e-8, atol=0)
    # sigma_t^2 (1 - SNR_t / SNR_s), in any family.
    torch.testing.assert_close(whole.variance, whole.now.sigma.square() * -torch.expm1(r - t), rtol=1e-14, atol=0)
    precision = whole.alpha.square() / whole.variance + 1 / whole.then.sigma.square()
    torch.testing.assert_close(whole.posterior_variance, 1 / precision, rtol=1e-8, atol=0)


def test_on_a_grid_it_is_the_discrete_process_of_its_tables():
    """The same alphas and sigmas as a table: the same steps, Ho 2020's among them."""
    process = PROCESSES["linear"]
    gamma = process.grid(12)
    assert float(gamma[0]) == 5.0
    torch.testing.assert_close(gamma.diff(), torch.full((11,), -18.3 / 12, dtype=torch.float64), rtol=1e-12, atol=0)
    assert torch.equal(process.after(gamma), torch.cat([gamma[1:], times(-13.3)]))
    now = process.at(torch.cat([gamma, times(-13.3)]).flip(0))
    table = DiscreteProcess.from_alpha_sigma(now.alpha.flatten(), now.sigma.flatten())
    t = torch.arange(12, 0, -1)
    ours, theirs = process.step(gamma, process.after(gamma)), table.step(t, t - 1)
    for name in FIELDS:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-15, msg=name)


@pytest.mark.parametrize("name", PROCESSES)
def test_grids_go_from_gamma_1_and_their_steps_lead_to_gamma_0(name):
    process = PROCESSES[name]
    low, high = process.ends
    for spacing in ("time", "log_snr"):
        for count in (1, 2, 7, 64):
            gamma = process.grid(count, spacing).detach()
            whole = torch.cat([gamma, process.after(gamma).detach()[-1:]])
            assert len(gamma) == count
            assert (float(whole[0]), float(whole[-1])) == (high, low)
            assert bool((whole.diff() < 0).all())
            assert process.noise_counters(gamma) == list(range(count + 1))
    even = process.grid(8, "log_snr").detach()
    torch.testing.assert_close(even.diff(), torch.full((7,), (low - high) / 8, dtype=torch.float64), rtol=1e-9, atol=0)
    places = torch.linspace(0, 1, 9, dtype=torch.float64)
    assert torch.equal(process.grid(8).detach(), process.gamma(places[1:]).detach().flip(0))


@pytest.mark.parametrize("name", PROCESSES)
def test_the_network_sees_0_to_1000(name):
    process = PROCESSES[name]
    low, high = process.schedule.gamma_min, process.schedule.gamma_max
    seen = process.conditioning(times(low, (low + high) / 2, high))
    torch.testing.assert_close(seen, times(0.0, 500.0, 1000.0), rtol=1e-12, atol=1e-9)
    discrete_one = DiscreteProcess.linear(10)
    assert discrete_one.conditioning(torch.tensor([0, 9])).tolist() == [0, 9]


def test_the_variance_grows_by_what_q_sample_adds():
    """Numbers, not formulas: z_t drawn by way of z_s has the moments of z_t (Kingma 2021, app. A.1)."""
    n, g = 200_000, torch.Generator().manual_seed(0)
    for process in (PROCESSES["linear"], PROCESSES["edm"]):
        step = process.step(times(1.0), times(-1.5))
        x_0 = torch.full((n, 1, 1, 1), 0.6, dtype=torch.float64)
        noise = torch.randn(2, n, 1, 1, 1, generator=g, dtype=torch.float64)
        z_t = step.alpha * q_sample(step.then, x_0, noise[0]) + step.variance.sqrt() * noise[1]
        sigma = float(step.now.sigma)
        assert float(z_t.mean()) == pytest.approx(0.6 * float(step.now.alpha), abs=4 * sigma / n**0.5)
        assert float(z_t.var()) == pytest.approx(sigma**2, rel=4 * (2 / n) ** 0.5)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_description_makes_the_same_kind(name):
    process = PROCESSES[name]
    config = json.loads(json.dumps(process.to_config()))
    assert config["name"] == ("gamma_learned" if name.startswith("learned") else "gamma_linear")
    assert config.get("family") == ("exploding" if name == "edm" else None)
    again = process_from_config(config)
    again.load_state_dict(process.state_dict())
    assert again.to_config() == process.to_config()
    places = torch.linspace(0, 1, 9, dtype=torch.float64)
    assert torch.equal(again.gamma(places), process.gamma(places))
    gamma = torch.linspace(*process.ends, 9, dtype=torch.float64)
    assert torch.equal(again.at(gamma).sigma, process.at(gamma).sigma)
    assert torch.equal(again.conditioning(gamma), process.conditioning(gamma))
    assert isinstance(again.at(gamma[:1]), type(process.at(gamma[:1])))
    assert isinstance(again.step(gamma[1:], gamma[:-1]), Step)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"name": "gamma_linear", "gamma_min": 1.0, "gamma_max": 0.0}, r"gamma_min: 1\.0"),
        ({"name": "gamma_linear", "learned_ends": True}, r"schedule: .*gamma_linear"),
    ],
)
def test_bad_descriptions_are_refused(config, match):
    with pytest.raises(ConfigError, match=match):
        process_from_config(config)


@pytest.mark.parametrize(("low", "high"), [(0.0, 80.0), (2.0, 1.0), (1.0, 1.0), (0.1, math.inf), (math.nan, 1.0)])
def test_bad_ends_of_edm_are_refused(low, high):
    with pytest.raises(ConfigError, match=rf"^schedule\.sigma_min, sigma_max: {low}, {high} do not satisfy"):
        ContinuousProcess.edm(low, high)


@pytest.mark.filterwarnings("error")
def test_numbers_of_learned_ends_are_numbers_without_a_warning():
    process = PROCESSES["learned-ends"]
    assert process.ends == pytest.approx((-13.3, 5.0), rel=1e-6)
    assert process.prior_signal == pytest.approx(1 / (1 + math.exp(process.ends[1])))
    assert process.grid(3).requires_grad
    assert continuous_design(torch.arange(2), 0, process, 4).t.requires_grad is False


def test_times_and_kinds_that_do_not_fit_are_refused():
    process = PROCESSES["linear"]
    with pytest.raises(ConfigError, match=r"^num_steps: 0 is not >= 1"):
        process.grid(0)
    with pytest.raises(ConfigError, match=r"^gamma: .*less noise$"):
        process.step(times(0.0), times(0.0))
    with pytest.raises(ConfigError, match=r"^process: ContinuousProcess has no table of time steps"):
        discrete(process)
    with pytest.raises(ConfigError, match=r"^process: DiscreteProcess has no continuous time"):
        continuous(DiscreteProcess.linear(10))
