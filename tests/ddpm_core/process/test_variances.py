"""Ho 2020, sec. 3.2, Nichol and Dhariwal 2021, eq. 15: which variances the reverse steps may have."""

import math
from dataclasses import replace

import pytest
import torch
from support.denoisers import toy_eps
from support.processes import PROCESSES

from ddpm_core.denoiser import Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.elbo import x_0_of
from ddpm_core.likelihood.terms import kl_bpd
from ddpm_core.process.base import q_sample
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import Beta, BetaTilde, GivenVariance, Learned, variance_named, variance_table


def test_variance_tables():
    """beta, beta_tilde (index 0 takes index 1's value), or a table."""
    process = DiscreteProcess.linear(6, 0.1, 0.4)
    assert torch.equal(variance_table(process, variance_named("beta")), process.step_variance)
    tilde = variance_table(process, variance_named("beta_tilde"))
    assert torch.equal(tilde[1:], process.posterior_variance[1:])
    assert tilde[0] == tilde[1]
    table = torch.arange(1.0, 7.0, dtype=torch.float64)
    assert torch.equal(variance_table(process, GivenVariance(table)), table)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.zeros(6), torch.full((6,), float("inf"))])
def test_bad_variances_are_refused(bad):
    with pytest.raises(ConfigError, match="sigma2"):
        variance_table(DiscreteProcess.linear(6), GivenVariance(bad.double()))


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="sigma2: 'optimal'"):
        variance_named("optimal")


def test_beta_tilde_needs_a_second_step():
    with pytest.raises(ConfigError, match="num_timesteps >= 2"):
        variance_table(DiscreteProcess.linear(1), variance_named("beta_tilde"))


def predicted(process, t, s, fraction, z=None):
    """sigma^2 of the steps from t to s where the network says `fraction` of the way from beta_tilde to beta."""
    z = torch.zeros(len(t), 1, 2, 2, dtype=torch.float64) if z is None else z
    prediction = replace(Prediction.of_eps(z, process.at(t), z), variance_fraction=torch.full_like(z, fraction))
    return Learned().of(process.step(t, s), prediction)


@pytest.mark.parametrize("name", PROCESSES)
def test_learned_variances_lie_between_those_of_the_very_step(name):
    """Nichol and Dhariwal 2021, eq. 15: beta_tilde at v = -1, beta at v = 1, the geometric mean at 0; of the
    neighbours' steps, and of a sub-sequence's, which has its own (sec. 4)."""
    process = PROCESSES[name]
    t = torch.tensor([0, 1, 30, 59, 59])
    for s in (t - 1, torch.tensor([-1, 0, 3, 20, 0])):
        step, every = process.step(t, s), (len(t), 1, 2, 2)
        low, high = BetaTilde().of(step).expand(every), Beta().of(step).expand(every)
        torch.testing.assert_close(predicted(process, t, s, 0.0), low, rtol=1e-12, atol=0)
        torch.testing.assert_close(predicted(process, t, s, 1.0), high, rtol=1e-12, atol=0)
        torch.testing.assert_close(predicted(process, t, s, 0.5), (low * high).sqrt(), rtol=1e-12, atol=0)
        quarter = low**0.75 * high**0.25
        torch.testing.assert_close(predicted(process, t, s, 0.25), quarter, rtol=1e-12, atol=0)
    # Not that of the step to the neighbour.
    ratio = predicted(process, t[2:], s[2:], 0.5) / predicted(process, t[2:], t[2:] - 1, 0.5)
    assert bool((ratio.log().abs() > 0.1).all())


def test_learned_variances_equal_the_reference(modern_reference):
    """ln sigma^2 and the KL under it, values from an independent float64 program."""
    reference, terms = modern_reference["learned_range"], modern_reference["vdm_terms"]
    process = DiscreteProcess.linear(8, 0.01, 0.3)
    levels, eps = torch.tensor(terms["x"], dtype=torch.uint8), torch.tensor(terms["eps"], dtype=torch.float64)
    for row in reference["rows"]:
        t = torch.full((len(levels),), row["t"])
        step, z_t = process.step(t, t - 1), q_sample(process.at(t), x_0_of(levels), eps)
        prediction = Prediction.of_eps(z_t, process.at(t), toy_eps(z_t, t))
        prediction = replace(prediction, variance_fraction=torch.full_like(z_t, (row["v"] + 1) / 2))
        variance = Learned().of(step, prediction)
        expected = torch.full_like(variance, row["log_variance"])
        torch.testing.assert_close(variance.log(), expected, rtol=1e-9, atol=0)
        nats = kl_bpd(step, x_0_of(levels), eps, prediction, variance) * (levels[0].numel() * math.log(2))
        torch.testing.assert_close(nats, torch.tensor(row["kl_nats"], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("v", [-1e4, 1e4, -3e38, 3e38])
def test_an_extreme_fraction_leaves_a_variance(v):
    """Far outside [-1, 1] it stays positive and finite, so that no likelihood is 0 / 0."""
    process, t = DiscreteProcess.linear(8, 0.01, 0.3), torch.arange(8)
    found = predicted(process, t, t - 1, (v + 1) / 2)
    assert bool((found > 0).all())
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("sigma2", ["beta", "learned"])
@pytest.mark.parametrize("process", [ContinuousProcess.linear(), ContinuousProcess.edm()], ids=["preserving", "edm"])
def test_continuous_time_has_beta_tilde_only(process, sigma2):
    with pytest.raises(ConfigError, match=rf"^sigma2: '{sigma2}' is no variance of a continuous process.*beta_tilde"):
        variance_named(sigma2).check(process)
    variance_named("beta_tilde").check(process)


def test_learned_variances_need_a_network_that_predicts_them():
    process, t = DiscreteProcess.linear(6), torch.tensor([3])
    z = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    for prediction in (None, Prediction.of_eps(z, process.at(t), z)):
        with pytest.raises(ConfigError, match=r"^sigma2: 'learned' needs a model that predicts its variances"):
            Learned().of(process.step(t, t - 1), prediction)
    with pytest.raises(ConfigError, match="num_timesteps >= 2"):
        Learned().check(DiscreteProcess.linear(1))
