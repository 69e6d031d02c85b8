"""Ho 2020, eqs. 2, 4, 6, 7; Nichol and Dhariwal 2021, eq. 17; Kingma 2021, eq. 2."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_core.errors import ConfigError
from ddpm_core.schedule import NoiseSchedule, gather_table

TABLES = ("betas", "alphas_cumprod", "posterior_variance", "posterior_mean_coef_x0", "posterior_mean_coef_xt")
betas_lists = st.lists(st.floats(1e-5, 0.999), min_size=1, max_size=50)


@pytest.mark.parametrize("name", ["linear-1000", "cosine-1000", "cosine-4000"])
@pytest.mark.parametrize("table", TABLES)
def test_tables_equal_the_reference(reference, name, table):
    kind, num_timesteps = name.split("-")
    schedule = getattr(NoiseSchedule, kind)(int(num_timesteps))
    values = reference["tables"][name]
    expected = torch.tensor(values[table], dtype=torch.float64)
    torch.testing.assert_close(getattr(schedule, table)[values["t"]], expected, rtol=1e-12, atol=0.0)


@given(betas_lists)
def test_posterior_is_bayes_rule(betas):
    """Ho 2020, eqs. 6-7: precision and precision-weighted mean of q(x_t|x_{t-1}) q(x_{t-1}|x_0)."""
    s = NoiseSchedule.from_betas(betas)
    prior_variance = 1.0 - s.alphas_cumprod_prev[1:]
    likelihood_precision = s.alphas[1:] / s.betas[1:]
    variance = 1.0 / (1.0 / prior_variance + likelihood_precision)
    torch.testing.assert_close(s.posterior_variance[1:], variance, rtol=1e-7, atol=0.0)
    coef_x0 = variance * s.alphas_cumprod_prev[1:].sqrt() / prior_variance
    coef_xt = variance * s.alphas[1:].sqrt() / s.betas[1:]
    torch.testing.assert_close(s.posterior_mean_coef_x0[1:], coef_x0, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(s.posterior_mean_coef_xt[1:], coef_xt, rtol=1e-7, atol=1e-12)


@given(betas_lists)
def test_variance_is_preserved_and_snr_falls(betas):
    """Ho 2020, eqs. 2 and 4: one step of unit variance stays at unit variance; SNR = abar / (1 - abar)."""
    s = NoiseSchedule.from_betas(betas)
    torch.testing.assert_close(s.alphas + s.betas, torch.ones_like(s.betas))
    torch.testing.assert_close(s.sqrt_alphas_cumprod**2 + s.sqrt_one_minus_alphas_cumprod**2, torch.ones_like(s.betas))
    assert bool((s.snr.diff() < 0).all())
    torch.testing.assert_close(s.log_snr.exp(), s.snr, rtol=1e-9, atol=0.0)
    assert float(s.posterior_variance[0]) == 0.0
    assert float(s.alphas_cumprod_prev[0]) == 1.0


def test_cosine_follows_its_alpha_bar():
    """Nichol and Dhariwal 2021, eq. 17, wherever beta is not clipped."""
    s = NoiseSchedule.cosine(100)
    f = [math.cos((i / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(101)]
    expected = torch.tensor([value / f[0] for value in f[1:]], dtype=torch.float64)
    torch.testing.assert_close(s.alphas_cumprod[:99], expected[:99], rtol=1e-10, atol=0.0)
    assert float(s.betas[-1]) == 0.999


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.linear(),
        NoiseSchedule.linear(1, 0.3, 0.5),
        NoiseSchedule.cosine(17, 0.01, 0.9),
        NoiseSchedule.from_betas([0.1, 1 / 3, 0.7]),
    ],
)
def test_config_round_trip_is_exact(schedule):
    again = NoiseSchedule.from_config(json.loads(json.dumps(schedule.to_config())))
    assert torch.equal(again.betas, schedule.betas)
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
        NoiseSchedule.from_config(config)


def test_gather_gives_factors_and_never_half():
    s = NoiseSchedule.linear()
    t = torch.tensor([0, 999])
    for dtype, expected in [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]:
        factor = s.gather("alphas_cumprod", t, torch.zeros(2, 3, 4, 4, dtype=dtype))
        assert factor.dtype == expected
        assert factor.shape == (2, 1, 1, 1)
        assert torch.equal(factor.flatten(), s.alphas_cumprod[t].to(expected))
    # In half precision the first abar would round to 1, that is to no noise at all.
    assert float(s.gather("sqrt_one_minus_alphas_cumprod", t, torch.zeros(2, 1, dtype=torch.float16))[0]) > 0


@pytest.mark.parametrize("t", [-1, 10])
def test_a_time_step_outside_the_table_is_refused(t):
    with pytest.raises(ConfigError, match="t: "):
        NoiseSchedule.linear(10).gather("betas", torch.tensor([0, t]), torch.zeros(2, 1))


def test_gather_copies_a_table_once():
    s = NoiseSchedule.linear(10)
    like = torch.zeros(1, 1)
    s.gather("betas", torch.tensor([0]), like)
    cached = s._device_tables[("betas", like.device, torch.float32)]
    s.gather("betas", torch.tensor([5]), like)
    assert s._device_tables[("betas", like.device, torch.float32)] is cached
    assert torch.equal(gather_table(s.betas, torch.tensor([3]), like).flatten(), s.betas[3:4].float())
