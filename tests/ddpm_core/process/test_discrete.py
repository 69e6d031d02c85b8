"""Ho 2020, eqs. 2, 4, 6, 7; Nichol and Dhariwal 2021, eq. 17; Kingma 2021, eq. 2."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_core.errors import ConfigError
from ddpm_core.process import process_from_config
from ddpm_core.process.discrete import DiscreteProcess

# By their names in the reference.
TABLES = {
    "betas": "step_variance",
    "alphas_cumprod": "alpha2",
    "posterior_variance": "posterior_variance",
    "posterior_mean_coef_x0": "posterior_coef_x_0",
    "posterior_mean_coef_xt": "posterior_coef_z",
}
betas_lists = st.lists(st.floats(1e-5, 0.999), min_size=1, max_size=50)


@pytest.mark.parametrize("name", ["linear-1000", "cosine-1000", "cosine-4000"])
@pytest.mark.parametrize("table", TABLES)
def test_tables_equal_the_reference(reference, name, table):
    kind, num_timesteps = name.split("-")
    schedule = getattr(DiscreteProcess, kind)(int(num_timesteps))
    values = reference["tables"][name]
    expected = torch.tensor(values[table], dtype=torch.float64)
    torch.testing.assert_close(getattr(schedule, TABLES[table])[values["t"]], expected, rtol=1e-12, atol=0.0)


@given(betas_lists)
def test_posterior_is_bayes_rule(betas):
    """Ho 2020, eqs. 6-7: precision and precision-weighted mean of q(x_t|x_{t-1}) q(x_{t-1}|x_0)."""
    s = DiscreteProcess.from_betas(betas)
    prior_variance = 1.0 - s.alpha2[:-1]
    likelihood_precision = s.step_alpha2[1:] / s.step_variance[1:]
    variance = 1.0 / (1.0 / prior_variance + likelihood_precision)
    torch.testing.assert_close(s.posterior_variance[1:], variance, rtol=1e-7, atol=0.0)
    coef_x0 = variance * s.alpha2[:-1].sqrt() / prior_variance
    coef_xt = variance * s.step_alpha2[1:].sqrt() / s.step_variance[1:]
    torch.testing.assert_close(s.posterior_coef_x_0[1:], coef_x0, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(s.posterior_coef_z[1:], coef_xt, rtol=1e-7, atol=1e-12)


@given(betas_lists)
def test_variance_is_preserved_and_snr_falls(betas):
    """Ho 2020, eqs. 2 and 4: one step of unit variance stays at unit variance; SNR = abar / (1 - abar)."""
    s = DiscreteProcess.from_betas(betas)
    torch.testing.assert_close(s.step_alpha2 + s.step_variance, torch.ones_like(s.step_variance))
    torch.testing.assert_close(s.alpha**2 + s.sigma**2, torch.ones_like(s.step_variance))
    assert bool((s.snr.diff() < 0).all())
    torch.testing.assert_close(s.log_snr.exp(), s.snr, rtol=1e-9, atol=0.0)
    assert float(s.posterior_variance[0]) == 0.0
    start = s.step(torch.tensor([0]), torch.tensor([-1])).then
    assert (float(start.alpha), float(start.sigma)) == (1.0, 0.0)


def test_cosine_follows_its_alpha_bar():
    """Nichol and Dhariwal 2021, eq. 17, wherever beta is not clipped."""
    s = DiscreteProcess.cosine(100)
    f = [math.cos((i / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(101)]
    expected = torch.tensor([value / f[0] for value in f[1:]], dtype=torch.float64)
    torch.testing.assert_close(s.alpha2[:99], expected[:99], rtol=1e-10, atol=0.0)
    assert float(s.step_variance[-1]) == 0.999


@pytest.mark.parametrize(
    "schedule",
    [
        DiscreteProcess.linear(),
        DiscreteProcess.linear(1, 0.3, 0.5),
        DiscreteProcess.cosine(17, 0.01, 0.9),
        DiscreteProcess.from_betas([0.1, 1 / 3, 0.7]),
    ],
)
def test_config_round_trip_is_exact(schedule):
    again = process_from_config(json.loads(json.dumps(schedule.to_config())))
    assert torch.equal(again.step_variance, schedule.step_variance)
    assert again.to_config() == schedule.to_config()


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"name": "quadratic"}, "schedule.name"),
        ({"name": "linear", "num_steps": 10}, "num_steps"),
        ({"name": "linear", "num_timesteps": 0}, "schedule.num_timesteps"),
        ({"name": "linear", "beta_end": 1.5}, "schedule.betas"),
        ({"name": "table", "betas": [0.1, 0.0]}, r"schedule.betas\[1\]"),
        ({"name": "table", "betas": [0.1, math.nan]}, r"schedule.betas\[1\]"),
        ({"name": "table", "betas": []}, "schedule.betas"),
    ],
)
def test_a_bad_schedule_is_refused_by_name(config, field):
    with pytest.raises(ConfigError, match=field):
        process_from_config(config)


@pytest.mark.parametrize("t", [-1, 10])
def test_a_time_step_outside_the_table_is_refused(t):
    with pytest.raises(ConfigError, match="t: "):
        DiscreteProcess.linear(10).at(torch.tensor([0, t]))


def test_tables_are_copied_to_a_device_once():
    process = DiscreteProcess.linear(10)
    process.at(torch.tensor([0]))
    key = ("_marginals", torch.device("cpu"))
    cached = process._on_device[key]
    process.at(torch.tensor([5]))
    assert process._on_device[key] is cached
    assert torch.equal(process.at(torch.tensor([3])).alpha.flatten(), process.alpha[3:4])
