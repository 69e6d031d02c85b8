"""Ho 2020, eqs. 1-7, 11, 15; Salimans and Ho 2022 (v); Song 2021 (DDIM), eqs. 7, 12, 16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core import diffusion as d
from ddpm_core.errors import ConfigError
from ddpm_core.schedule import NoiseSchedule

schedules = st.sampled_from([NoiseSchedule.linear(), NoiseSchedule.cosine(100), NoiseSchedule.linear(8, 0.01, 0.3)])


def draw(schedule, seed, batch=5):
    g = torch.Generator().manual_seed(seed)
    x_0, eps = (torch.randn(batch, 2, 3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.randint(0, schedule.num_timesteps, (batch,), generator=g)
    return x_0, eps, t


def test_q_sample_is_the_composition_of_single_steps():
    """Ho 2020, eqs. 2 and 4: the mean and variance after t + 1 single steps, for every t."""
    s = NoiseSchedule.linear(8, 0.01, 0.3)
    x_0 = torch.full((8, 1, 1, 1), 0.7, dtype=torch.float64)
    t = torch.arange(8)
    mean, variance, means, variances = 0.7, 0.0, [], []
    for beta in s.betas.tolist():
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        means.append(mean)
        variances.append(variance)
    signal = d.q_sample(s, x_0, t, torch.zeros_like(x_0)).flatten()
    noise = d.q_sample(s, torch.zeros_like(x_0), t, torch.ones_like(x_0)).flatten()
    torch.testing.assert_close(signal, torch.tensor(means, dtype=torch.float64), rtol=1e-12, atol=0)
    # The factor of eps is the root of 1 - abar, not 1 - abar itself.
    torch.testing.assert_close(noise**2, torch.tensor(variances, dtype=torch.float64), rtol=1e-12, atol=0)


@given(schedules, st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_eps_x_0_and_v_are_one_prediction(schedule, seed):
    """Round trips in float64 (Ho 2020, eqs. 4 and 15; Salimans and Ho 2022, app. D)."""
    x_0, eps, t = draw(schedule, seed)
    x_t = d.q_sample(schedule, x_0, t, eps)
    v = d.v_from_eps(schedule, x_t, t, eps)
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(d.x_0_from_eps(schedule, x_t, t, eps), x_0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d.eps_from_x_0(schedule, x_t, t, x_0), eps, **close)
    torch.testing.assert_close(d.eps_from_v(schedule, x_t, t, v), eps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d.x_0_from_v(schedule, x_t, t, v), x_0, rtol=1e-6, atol=1e-6)
    # v is the tangent of the circle that (x_0, eps) -> x_t moves on: sqrt(abar) eps - sqrt(1-abar) x_0.
    a = schedule.gather("sqrt_alphas_cumprod", t, x_0)
    b = schedule.gather("sqrt_one_minus_alphas_cumprod", t, x_0)
    torch.testing.assert_close(v, a * eps - b * x_0, rtol=1e-6, atol=1e-6)


@given(schedules, st.integers(0, 10**6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_two_forms_of_the_mean_agree(schedule, seed, clip):
    """Ho 2020, eqs. 7 and 11: the posterior mean at the predicted x_0 is the mean written with eps."""
    x_0, eps, t = draw(schedule, seed)
    x_0 = x_0.clamp(-1, 1)
    x_t = d.q_sample(schedule, x_0, t, eps)
    step = d.p_mean_variance(schedule, eps, x_t, t, "beta_tilde", clip_x_0=clip)
    posterior = d.q_posterior(schedule, x_0, x_t, t)
    torch.testing.assert_close(step.mean, posterior.mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(step.x_0_pred, x_0, rtol=1e-6, atol=1e-6)
    kl_steps = t > 0
    torch.testing.assert_close(step.variance[kl_steps], posterior.variance[kl_steps])


def test_clipping_bounds_the_predicted_x_0_only_when_asked():
    s = NoiseSchedule.linear()
    x_t, t = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64), torch.tensor([500])
    free = d.p_mean_variance(s, torch.zeros_like(x_t), x_t, t, "beta")
    clipped = d.p_mean_variance(s, torch.zeros_like(x_t), x_t, t, "beta", clip_x_0=True)
    assert float(free.x_0_pred) > 1.0
    assert float(clipped.x_0_pred) == 1.0
    expected = s.posterior_mean_coef_x0[500] + 3.0 * s.posterior_mean_coef_xt[500]
    assert float(clipped.mean) == pytest.approx(float(expected), rel=1e-12)


def test_sigma2_tables():
    """Ho 2020, sec. 3.2: beta, beta_tilde (index 0 takes index 1's value), or a table."""
    s = NoiseSchedule.linear(6, 0.1, 0.4)
    assert torch.equal(d.sigma2_table(s, "beta"), s.betas)
    tilde = d.sigma2_table(s, "beta_tilde")
    assert torch.equal(tilde[1:], s.posterior_variance[1:])
    assert tilde[0] == tilde[1]
    table = torch.arange(1, 7)
    assert torch.equal(d.sigma2_table(s, table), table.double())


@pytest.mark.parametrize("bad", ["learned", torch.ones(3), torch.zeros(6), torch.full((6,), float("inf"))])
def test_bad_variances_are_refused(bad):
    with pytest.raises(ConfigError, match="sigma2"):
        d.sigma2_table(NoiseSchedule.linear(6), bad)


def test_beta_tilde_needs_a_second_step():
    with pytest.raises(ConfigError, match="num_timesteps >= 2"):
        d.sigma2_table(NoiseSchedule.linear(1), "beta_tilde")


@given(schedules, st.integers(0, 10**6), st.floats(0, 1), st.data())
@settings(max_examples=50, deadline=None)
def test_ddim_keeps_the_marginals(schedule, seed, eta, data):
    """Song 2021, eq. 7: for any sigma, x_s given x_0 stays N(sqrt(abar_s) x_0, (1 - abar_s) I)."""
    t = data.draw(st.integers(1, schedule.num_timesteps - 1))
    s = data.draw(st.integers(0, t - 1))
    x_0, eps, _ = draw(schedule, seed)
    of_x_0 = d.ddim_posterior(schedule, x_0, torch.zeros_like(eps), t, s, eta)
    of_eps = d.ddim_posterior(schedule, torch.zeros_like(x_0), eps, t, s, eta)
    torch.testing.assert_close(of_x_0.mean, schedule.alphas_cumprod[s].sqrt() * x_0)
    total = (of_eps.mean / eps) ** 2 + of_eps.variance
    torch.testing.assert_close(total, (1 - schedule.alphas_cumprod[s]).expand_as(total), rtol=1e-8, atol=1e-12)


@given(schedules, st.integers(0, 10**6), st.data())
@settings(max_examples=30, deadline=None)
def test_ddim_with_eta_1_between_neighbours_is_the_ddpm_posterior(schedule, seed, data):
    """Song 2021, eq. 16: eta = 1 on (t - 1, t) has beta_tilde and Ho 2020, eq. 7's mean."""
    t = data.draw(st.integers(1, schedule.num_timesteps - 1))
    x_0, eps, _ = draw(schedule, seed)
    t_batch = torch.full((5,), t)
    expected = d.q_posterior(schedule, x_0, d.q_sample(schedule, x_0, t_batch, eps), t_batch)
    found = d.ddim_posterior(schedule, x_0, eps, t, t - 1, 1.0)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.variance, expected.variance, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(("t", "s", "eta"), [(3, 3, 0.0), (3, 4, 0.0), (8, 1, 0.0), (3, -2, 0.0), (3, 1, 1.1)])
def test_ddim_refuses_bad_steps(t, s, eta):
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ConfigError):
        d.ddim_posterior(NoiseSchedule.linear(8), x, x, t, s, eta)
