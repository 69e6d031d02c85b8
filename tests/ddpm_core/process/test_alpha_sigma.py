"""Kingma 2021 (VDM), app. A: processes of any alpha and sigma, variance preserving, exploding, or neither."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import PROCESSES, SCALES, random_tables, rescaled

from ddpm_core.denoiser import Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.process import process_from_config
from ddpm_core.process.base import Step, q_sample
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import Beta, BetaTilde, variance_table

TABLES = (
    "alpha2", "sigma2", "alpha", "sigma", "snr", "log_snr", "step_alpha2", "step_alpha", "step_variance",
    "unit_variance", "posterior_variance", "posterior_variance_clipped", "posterior_coef_x_0", "posterior_coef_z",
    "coef_eps",
)  # fmt: skip


def coefficients(step):
    names = ("alpha", "variance", "unit_variance", "posterior_variance", "posterior_coef_x_0", "posterior_coef_z")
    return {name: getattr(step, name) for name in (*names, "coef_eps")}


@pytest.mark.parametrize("name", PROCESSES)
def test_q_sample_is_the_composition_of_single_steps(name):
    """Kingma 2021, VDM, app. A.1: q(z_t | x_0) by way of every z_s between; Ho 2020, eq. 4."""
    process = PROCESSES[name]
    time = process.timesteps
    step, x_0 = process.step(time, time - 1), torch.full((len(time), 1, 1, 1), 0.7, dtype=torch.float64)
    mean, variance, means, variances = 0.7, 0.0, [], []
    for alpha, added in zip(step.alpha.flatten().tolist(), step.variance.flatten().tolist(), strict=True):
        mean, variance = alpha * mean, alpha**2 * variance + added
        means.append(mean)
        variances.append(variance)
    signal = q_sample(process.at(time), x_0, torch.zeros_like(x_0)).flatten()
    noise = q_sample(process.at(time), torch.zeros_like(x_0), torch.ones_like(x_0)).flatten()
    torch.testing.assert_close(signal, torch.tensor(means, dtype=torch.float64), rtol=1e-11, atol=0)
    torch.testing.assert_close(noise**2, torch.tensor(variances, dtype=torch.float64), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("t", "s"), [(1, 0), (30, 29), (59, 58), (59, 0), (40, 11)])
def test_the_posterior_is_bayes_rule_on_a_grid(name, t, s):
    """Kingma 2021, VDM, app. A.2: q(z_s | z_t, x_0) in proportion to q(z_t | z_s) q(z_s | x_0), by numerical sums."""
    process, x_0 = PROCESSES[name], 0.4
    a_t, s_t, a_s, s_s = (float(table[i]) for i in (t, s) for table in (process.alpha, process.sigma))
    z_t = a_t * x_0 + 1.3 * s_t
    z_s = a_s * x_0 + s_s * torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    added = s_t**2 - (a_t / a_s) ** 2 * s_s**2
    log_density = -((z_s - a_s * x_0) ** 2) / (2 * s_s**2) - (z_t - a_t / a_s * z_s) ** 2 / (2 * added)
    weight = torch.softmax(log_density, 0)
    mean = float((weight * z_s).sum())
    variance = float((weight * (z_s - mean) ** 2).sum())
    step = process.step(torch.tensor([t]), torch.tensor([s]))
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    found = step.posterior(z_t * one, x_0 * one)
    assert float(found.mean) == pytest.approx(mean, rel=1e-7, abs=1e-9)
    assert float(found.variance) == pytest.approx(variance, rel=1e-6)
    eps = (z_t - a_t * x_0) / s_t
    assert float(step.mean_from_eps(z_t * one, eps * one)) == pytest.approx(mean, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_beta_is_the_variance_of_data_of_variance_1(name):
    """Ho 2020, sec. 3.2: the two choices are right for data N(0, 1) and for a single point. By conditioning the joint
    Gaussian of z_s and z_t, under each kind of data."""
    process = PROCESSES[name]
    step = process.step(process.timesteps, process.timesteps - 1)
    for variance, data in ((step.unit_variance, 1.0), (step.posterior_variance, 0.0)):
        of_s, of_t = (m.alpha**2 * data + m.sigma**2 for m in (step.then, step.now))
        torch.testing.assert_close(variance, of_s - (step.alpha * of_s) ** 2 / of_t, rtol=1e-8, atol=1e-14)
    assert torch.equal(variance_table(process, Beta()), process.unit_variance)
    assert torch.equal(variance_table(process, BetaTilde()), process.posterior_variance_clipped)


@pytest.mark.parametrize(
    "betas_process", [DiscreteProcess.linear(), DiscreteProcess.cosine(100), DiscreteProcess.linear(8, 0.01, 0.3)]
)
def test_a_variance_preserving_process_given_as_alpha_and_sigma_is_that_of_its_betas(betas_process):
    """Ho 2020, eqs. 2, 4, 7 and 11, from the one description and from the other."""
    again = DiscreteProcess.from_alpha_sigma(betas_process.alpha, betas_process.sigma)
    for name in TABLES:
        torch.testing.assert_close(getattr(again, name), getattr(betas_process, name), rtol=1e-9, atol=1e-13, msg=name)
    # A schedule of betas has them exactly.
    assert torch.equal(betas_process.unit_variance, betas_process.step_variance)
    assert betas_process.posterior_variance_clipped[0] == betas_process.posterior_variance[1]
    assert betas_process.prior_variance == 1.0
    assert again.prior_variance == pytest.approx(betas_process.prior_variance)
    assert again.prior_signal == pytest.approx(betas_process.prior_signal)


@pytest.mark.parametrize("name", PROCESSES)
def test_rescaling_z_rescales_the_coefficients_and_nothing_else(name):
    """z_t -> c_t z_t: means by c_s, variances by c_s^2; those of the last step are in units of the image."""
    process, other = PROCESSES[name], rescaled(PROCESSES[name])
    c_t, c_s = SCALES, torch.cat([torch.ones(1, dtype=torch.float64), SCALES[:-1]])
    expected = {
        "step_alpha": c_t / c_s,
        "step_variance": c_t**2,
        "unit_variance": c_s**2,
        "posterior_variance": c_s**2,
        "posterior_variance_clipped": c_s**2,
        "posterior_coef_x_0": c_s,
        "posterior_coef_z": c_s / c_t,
        "coef_eps": c_s,
        "log_snr": torch.ones_like(c_s),
    }
    for table, scale in expected.items():
        wanted = getattr(process, table) * scale
        torch.testing.assert_close(getattr(other, table), wanted, rtol=1e-9, atol=1e-13, msg=table)
    assert other.prior_variance == pytest.approx(float(SCALES[-1]) ** 2 * process.prior_variance)
    assert other.prior_signal == pytest.approx(process.prior_signal)


@given(random_tables(), st.data())
@settings(max_examples=60, deadline=None)
def test_two_steps_are_one(tables, data):
    """Kingma 2021, VDM, app. A.1: r < s < t; alpha_{t|r} = alpha_{t|s} alpha_{s|r} and
    sigma^2_{t|r} = sigma^2_{t|s} + alpha_{t|s}^2 sigma^2_{s|r}."""
    process = DiscreteProcess.from_alpha_sigma(*tables)
    r, s, t = sorted(
        data.draw(st.lists(st.integers(-1, process.num_timesteps - 1), min_size=3, max_size=3, unique=True))
    )

    def step(now, then):
        return process.step(torch.tensor([now]), torch.tensor([then]))

    first, second, whole = step(s, r), step(t, s), step(t, r)
    torch.testing.assert_close(second.alpha * first.alpha, whole.alpha, rtol=1e-10, atol=0)
    total = second.variance + second.alpha**2 * first.variance
    torch.testing.assert_close(total, whole.variance, rtol=1e-8, atol=0)
    general = Step.between(whole.time, whole.time_then, whole.now, whole.then)
    for name, value in coefficients(whole).items():
        torch.testing.assert_close(value, getattr(general, name), rtol=1e-8, atol=0, msg=name)


@given(random_tables(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_eps_x_0_and_v_are_one_prediction(tables, seed):
    """Round trips at any alpha and sigma (Ho 2020, eqs. 4 and 15; Salimans and Ho 2022, app. D). A conversion loses as
    many digits as the part it looks for is smaller than z, so each is compared in units of z."""
    process, g = DiscreteProcess.from_alpha_sigma(*tables), torch.Generator().manual_seed(seed)
    x_0, eps = (torch.randn(6, 1, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    now = process.at(torch.randint(0, process.num_timesteps, (6,), generator=g))
    z = q_sample(now, x_0, eps)
    v = now.alpha * eps - now.sigma * x_0
    size = (now.alpha**2 + now.sigma**2).sqrt() * 10
    for of, value in ((Prediction.of_eps, eps), (Prediction.of_x_0, x_0), (Prediction.of_v, v)):
        found = of(z, now, value)
        assert bool(((found.x_0 - x_0).abs() * now.alpha <= 1e-13 * size).all())
        assert bool(((found.eps - eps).abs() * now.sigma <= 1e-13 * size).all())
        back = Prediction.of_v(z, now, found.v)
        assert bool(((back.x_0 - found.x_0).abs() * now.alpha <= 1e-11 * size).all())


@pytest.mark.parametrize("name", PROCESSES)
def test_the_description_makes_the_same_process(name):
    process = PROCESSES[name]
    again = process_from_config(json.loads(json.dumps(process.to_config())))
    assert again.to_config() == process.to_config()
    for table in TABLES:
        assert torch.equal(getattr(again, table), getattr(process, table))


@given(random_tables(), st.data())
@settings(max_examples=40, deadline=None)
def test_tables_whose_snr_does_not_strictly_fall_are_refused(tables, data):
    alpha, sigma = tables
    index = data.draw(st.integers(1, len(alpha) - 1))
    alpha[index] = alpha[index - 1] / sigma[index - 1] * sigma[index] * data.draw(st.floats(1.0 + 1e-9, 1e3))
    with pytest.raises(
        ConfigError, match=rf"^schedule\.alpha\[{index}\] / schedule\.sigma\[{index}\]: .*strictly falls$"
    ):
        DiscreteProcess.from_alpha_sigma(alpha, sigma)


@pytest.mark.parametrize(
    ("alpha", "sigma", "message"),
    [
        ([], [], r"schedule\.alpha, schedule\.sigma: shapes \(0,\) and \(0,\) are not both \[T\]"),
        ([1.0], [0.1, 0.2], r"shapes \(1,\) and \(2,\) are not both"),
        ([1.0, 1.0], [0.5, 0.5], r"schedule\.alpha\[1\] / schedule\.sigma\[1\]: 2\.0 is not below the one before it"),
        ([1.0, 0.0], [0.1, 0.2], r"schedule\.alpha\[1\]: 0\.0 is not in 1e-100\.\.1e100"),
        ([1.0, -1.0], [0.1, 0.2], r"schedule\.alpha\[1\]: -1\.0"),
        ([1.0, 0.9], [0.0, 0.2], r"schedule\.sigma\[0\]: 0\.0"),
        ([1.0, 0.9], [0.1, float("inf")], r"schedule\.sigma\[1\]: inf"),
        ([float("nan"), 0.9], [0.1, 0.2], r"schedule\.alpha\[0\]: nan"),
        # Its square would be 0, and everything after it nan.
        ([1.0, 1e-200], [0.1, 0.2], r"schedule\.alpha\[1\]: 1e-200"),
    ],
)
def test_bad_tables_are_refused(alpha, sigma, message):
    with pytest.raises(ConfigError, match=message):
        DiscreteProcess.from_alpha_sigma(alpha, sigma)
    with pytest.raises(ConfigError, match=message):
        process_from_config({"name": "alpha_sigma", "alpha": alpha, "sigma": sigma})
