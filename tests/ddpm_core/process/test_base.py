"""Ho 2020, eqs. 1-7, 11; Kingma 2021 (VDM), app. A: the forward process, its steps and its posterior."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core.denoiser import Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.process.base import Step, factor, q_sample
from ddpm_core.process.discrete import DiscreteProcess

processes = st.sampled_from(
    [DiscreteProcess.linear(), DiscreteProcess.cosine(100), DiscreteProcess.linear(8, 0.01, 0.3)]
)


def draw(process, seed, batch=5):
    g = torch.Generator().manual_seed(seed)
    x_0, eps = (torch.randn(batch, 2, 3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.randint(0, process.num_timesteps, (batch,), generator=g)
    return x_0, eps, t


def test_q_sample_is_the_composition_of_single_steps():
    """Ho 2020, eqs. 2 and 4: the mean and variance after t + 1 single steps, for every t."""
    process = DiscreteProcess.linear(8, 0.01, 0.3)
    x_0 = torch.full((8, 1, 1, 1), 0.7, dtype=torch.float64)
    marginal = process.at(torch.arange(8))
    mean, variance, means, variances = 0.7, 0.0, [], []
    for beta in process.step_variance.tolist():
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        means.append(mean)
        variances.append(variance)
    signal = q_sample(marginal, x_0, torch.zeros_like(x_0)).flatten()
    noise = q_sample(marginal, torch.zeros_like(x_0), torch.ones_like(x_0)).flatten()
    torch.testing.assert_close(signal, torch.tensor(means, dtype=torch.float64), rtol=1e-12, atol=0)
    # The factor of eps is the root of 1 - abar, not 1 - abar itself.
    torch.testing.assert_close(noise**2, torch.tensor(variances, dtype=torch.float64), rtol=1e-12, atol=0)


@given(processes, st.integers(0, 10**6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_two_forms_of_the_mean_agree(process, seed, clip):
    """Ho 2020, eqs. 7 and 11: the posterior mean at the predicted x_0 is the mean written with eps."""
    x_0, eps, t = draw(process, seed)
    x_0 = x_0.clamp(-1, 1)
    z_t, step = q_sample(process.at(t), x_0, eps), process.step(t, t - 1)
    prediction = Prediction.of_eps(z_t, process.at(t), eps)
    prediction = prediction.clipped() if clip else prediction
    posterior = step.posterior(z_t, x_0)
    torch.testing.assert_close(prediction.posterior_mean(step), posterior.mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(prediction.x_0, x_0, rtol=1e-6, atol=1e-6)
    kl_steps = t > 0
    torch.testing.assert_close(step.posterior_variance_clipped[kl_steps], posterior.variance[kl_steps])


def test_clipping_bounds_the_predicted_x_0_only_when_asked():
    process = DiscreteProcess.linear()
    z_t, t = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64), torch.tensor([500])
    free = Prediction.of_eps(z_t, process.at(t), torch.zeros_like(z_t))
    clipped = free.clipped()
    assert float(free.x_0) > 1.0
    assert float(clipped.x_0) == 1.0
    expected = process.posterior_coef_x_0[500] + 3.0 * process.posterior_coef_z[500]
    assert float(clipped.posterior_mean(process.step(t, t - 1))) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("t", "s"), [(3, 3), (3, 4), (8, 1), (3, -2)])
def test_bad_steps_are_refused(t, s):
    with pytest.raises(ConfigError):
        DiscreteProcess.linear(8).step(torch.tensor([t]), torch.tensor([s]))


@given(processes, st.data())
@settings(max_examples=30, deadline=None)
def test_the_general_step_is_that_of_the_tables_between_neighbours(process, data):
    """Kingma 2021, VDM, app. A.1 and A.2: from the two marginals alone; 0 for what is clipped at the data."""
    t = torch.tensor([data.draw(st.integers(0, process.num_timesteps - 1))])
    exact = process.step(t, t - 1)
    general = Step.between(t, exact.time_then, exact.now, exact.then)
    for name in ("alpha", "variance", "posterior_variance", "posterior_coef_x_0", "posterior_coef_z", "coef_eps"):
        torch.testing.assert_close(getattr(general, name), getattr(exact, name), rtol=1e-9, atol=1e-15)


def test_factors_are_never_half():
    process = DiscreteProcess.linear()
    alpha = process.at(torch.tensor([0, 999])).alpha
    assert (alpha.dtype, alpha.shape) == (torch.float64, (2, 1, 1, 1))
    for dtype, expected in [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]:
        found = factor(alpha, torch.zeros(2, 3, 4, 4, dtype=dtype))
        assert found.dtype == expected
        assert torch.equal(found.flatten(), process.alpha[[0, 999]].to(expected))
    # In half precision the first alpha would round to 1, that is to no noise at all.
    assert float(factor(process.at(torch.tensor([0])).sigma, torch.zeros(1, dtype=torch.float16))) > 0
