"""Ho 2020, eqs. 5, 8, 12, 13; Kingma 2021, eq. 14: against reference values, and unbiasedness."""

import math

import mpmath
import pytest
import torch
from ddpm_core.diffusion import p_mean_variance, q_posterior, q_sample, sigma2_table, x_0_from_eps
from ddpm_core.schedule import NoiseSchedule
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core import likelihood as lk
from ddpm_core import noise
from ddpm_core.errors import ConfigError


def toy_eps(x_t, t):
    """The reference file's network."""
    return 0.9 * x_t + 0.1 * torch.sin(t.double())[:, None, None, None].to(x_t.dtype)


def images_like(seed, batch=4, shape=(2, 3, 3)):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *shape), generator=g).to(torch.uint8)


@pytest.mark.parametrize("case", range(8))
def test_elbo_terms_equal_the_reference(reference, case):
    expected = reference["elbo"][case]
    levels = torch.tensor(reference["x_0"], dtype=torch.uint8)
    noises = torch.tensor(reference["eps"], dtype=torch.float64)
    schedule = NoiseSchedule.from_betas(expected["betas"])
    x_0 = lk.x_0_of(levels)
    columns = []
    for t, eps in enumerate(noises):
        t_batch = torch.full((len(levels),), t)
        eps_pred = toy_eps(q_sample(schedule, x_0, t_batch, eps), t_batch)
        clip = expected["clip_denoised"]
        columns.append(lk.term_bpd(schedule, levels, t, eps, eps_pred, expected["sigma2"], clip))
    terms, prior = torch.stack(columns, 1), lk.prior_bpd(schedule, x_0)
    close = {"rtol": 1e-9, "atol": 0.0}
    torch.testing.assert_close(prior, torch.tensor(expected["prior"], dtype=torch.float64), **close)
    torch.testing.assert_close(terms, torch.tensor(expected["terms"], dtype=torch.float64), **close)
    total = torch.tensor(expected["total"], dtype=torch.float64)
    torch.testing.assert_close(prior + terms.sum(1), total, **close)


def test_decoder_equals_the_reference(reference):
    """Ho 2020, eq. 13, in the middle, at the open ends and where a float32 CDF difference is 0."""
    for case in reference["decoder"]:
        level = torch.tensor([case["level"]], dtype=torch.uint8)
        mean = torch.tensor([case["mean"]], dtype=torch.float64)
        assert float(lk.decoder_nll_nats(level, mean, case["sigma"])) == pytest.approx(case["nll_nats"], rel=1e-9)


@given(st.integers(0, 255), st.floats(-1.5, 1.5), st.floats(1e-3, 1.0))
@settings(max_examples=200, deadline=None)
def test_decoder_equals_60_digit_arithmetic(level, mean, sigma):
    with mpmath.workdps(60):
        x, half = mpmath.mpf(level) / mpmath.mpf("127.5") - 1, mpmath.mpf(1) / 255

        def upper_tail(z):
            return mpmath.erfc(z / mpmath.sqrt(2)) / 2

        below = (x - half - mpmath.mpf(mean)) / mpmath.mpf(sigma)
        above = (x + half - mpmath.mpf(mean)) / mpmath.mpf(sigma)
        if level == 0:
            mass = upper_tail(-above)
        elif level == 255:
            mass = upper_tail(below)
        else:
            mass = upper_tail(below) - upper_tail(above) if below > 0 else upper_tail(-above) - upper_tail(-below)
        expected = float(-mpmath.log(mass))
    found = lk.decoder_nll_nats(
        torch.tensor([level], dtype=torch.uint8), torch.tensor([mean], dtype=torch.float64), sigma
    )
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(st.floats(-1.2, 1.2), st.floats(1e-3, 2.0))
@settings(max_examples=50, deadline=None)
def test_decoder_masses_sum_to_one(mean, sigma):
    levels = torch.arange(256).to(torch.uint8)
    nll = lk.decoder_nll_nats(levels, torch.full((256,), mean, dtype=torch.float64), sigma)
    assert float((-nll).exp().sum()) == pytest.approx(1.0, abs=1e-12)


@given(st.integers(0, 10**6), st.sampled_from(["beta", "beta_tilde"]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_kl_equals_torchs_gaussian_kl(seed, sigma2, clip):
    """Ho 2020, eq. 5: the closed form against torch.distributions for every t."""
    schedule = NoiseSchedule.linear(12, 0.01, 0.3)
    levels = images_like(seed, 11)
    x_0, t = lk.x_0_of(levels), torch.arange(1, 12)
    eps = torch.randn(x_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x_t = q_sample(schedule, x_0, t, eps)
    eps_pred = toy_eps(x_t, t)
    q = q_posterior(schedule, x_0, x_t, t)
    p = p_mean_variance(schedule, eps_pred, x_t, t, sigma2, clip)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(q.mean, q.variance.sqrt().expand_as(q.mean)),
        torch.distributions.Normal(p.mean, p.variance.sqrt().expand_as(p.mean)),
    )
    expected = kl.flatten(1).sum(1) / (x_0[0].numel() * math.log(2))
    found = lk.kl_bpd(schedule, x_0, t, eps, eps_pred, sigma2, clip)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_prior_equals_torchs_gaussian_kl():
    schedule = NoiseSchedule.linear(5, 0.1, 0.3)
    x_0 = lk.x_0_of(images_like(3))
    abar = schedule.alphas_cumprod[-1]
    q = torch.distributions.Normal(abar.sqrt() * x_0, (1 - abar).sqrt().expand_as(x_0))
    p = torch.distributions.Normal(torch.zeros_like(x_0), torch.ones_like(x_0))
    expected = torch.distributions.kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(lk.prior_bpd(schedule, x_0), expected)


def test_snr_form_equals_the_kl_and_telescopes():
    """Kingma 2021, eq. 14: 1/2 (SNR(s) - SNR(t)) ||x_0 - x_0_pred||^2, for one step and for a jump."""
    schedule = NoiseSchedule.linear(12, 0.01, 0.3)
    x_0, t = lk.x_0_of(images_like(1, 11)), torch.arange(1, 12)
    eps = torch.randn(x_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = q_sample(schedule, x_0, t, eps)
    x_0_pred = x_0_from_eps(schedule, x_t, t, toy_eps(x_t, t))
    expected = lk.kl_bpd(schedule, x_0, t, eps, toy_eps(x_t, t), "beta_tilde")
    torch.testing.assert_close(lk.kl_between_bpd(schedule, x_0, x_0_pred, t - 1, t), expected, rtol=1e-9, atol=0)
    one = x_0[:1].expand(11, -1, -1, -1)
    steps = lk.kl_between_bpd(schedule, one, x_0_pred[:1].expand_as(one), t - 1, t)
    jump = lk.kl_between_bpd(schedule, one[:1], x_0_pred[:1], torch.tensor([0]), torch.tensor([11]))
    torch.testing.assert_close(steps.sum(), jump[0])


def test_elbo_terms_is_the_terms_of_its_own_noise_and_batch_free():
    schedule, images, ids = NoiseSchedule.linear(6, 0.05, 0.3), images_like(0, 5), torch.arange(20, 25)
    full = lk.elbo_terms(schedule, toy_eps, images, ids, 3, "beta", draws=2)
    assert full.terms.shape == (5, 6)
    part = lk.elbo_terms(schedule, toy_eps, images[[3, 1]], ids[[3, 1]], 3, "beta", timesteps=[4, 0], draws=2)
    assert torch.equal(part.terms, full.terms[[3, 1]][:, [4, 0]])
    torch.testing.assert_close(full.total, full.prior + full.terms.sum(1))
    # The squared errors alone give the unclipped KL under any other variances.
    tilde = lk.elbo_terms(schedule, toy_eps, images, ids, 3, "beta_tilde", draws=2)
    coefficient = schedule.reverse_mean_coef_eps[1:] ** 2 / (2 * schedule.posterior_variance[1:])
    torch.testing.assert_close(tilde.terms[:, 1:], full.eps_mse[:, 1:] * coefficient / math.log(2))


@given(st.integers(2, 60), st.data())
@settings(max_examples=50, deadline=None)
def test_strata_hold_one_time_step_each(num_timesteps, data):
    k = data.draw(st.integers(1, num_timesteps - 1))
    proposal = lk.timestep_proposal(NoiseSchedule.linear(num_timesteps, 0.01, 0.3))
    t = lk.stratified_timesteps(torch.arange(50), 3, proposal, k)
    assert int(t.min()) >= 1
    assert int(t.max()) <= num_timesteps - 1
    upper = proposal.cumsum(0)
    lower = upper - proposal
    stratum = torch.arange(k).double() / k
    assert bool((upper[t - 1] >= stratum - 1e-9).all())
    assert bool((lower[t - 1] <= stratum + 1 / k + 1e-9).all())


def test_the_proposal_is_uniform_in_log_snr():
    """Kingma 2021, VDM, sec. 5.1: the probability of t is its share of the whole change of log-SNR."""
    schedule = NoiseSchedule.cosine(100)
    proposal = lk.timestep_proposal(schedule)
    change = (schedule.snr[:-1] / schedule.snr[1:]).log()
    torch.testing.assert_close(proposal, change / (schedule.snr[0] / schedule.snr[-1]).log(), rtol=1e-9, atol=0)
    assert float(proposal.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_time_step_is_expected_as_often_as_it_is_weighted(k):
    n = 40_000
    proposal = lk.timestep_proposal(NoiseSchedule.linear(12, 0.01, 0.3))
    t = lk.stratified_timesteps(torch.arange(n), 1, proposal, k)
    frequency = torch.bincount(t.flatten(), minlength=12)[1:].double() / n
    expected = k * proposal
    assert bool(((frequency - expected).abs() < 4 * (expected / n) ** 0.5).all())


def test_importance_makes_the_estimate_tighter_than_uniform_time_steps_would():
    """The spread of a single image's estimate against that of T / K times K uniformly drawn KLs."""
    schedule, images = NoiseSchedule.linear(), images_like(5, 1, (1, 2, 2)).expand(500, -1, -1, -1)
    ids = torch.arange(500)
    estimate = lk.estimate_bpd(schedule, toy_eps, images, ids, 1, 8).kl_sum
    uniform = torch.full((999,), 1 / 999, dtype=torch.float64)
    x_0 = lk.x_0_of(images)
    kls = []
    for draw, t in enumerate(lk.stratified_timesteps(ids, 1, uniform, 8).unbind(1)):
        eps = noise.normal(2, "uniform", ids, draw, (1, 2, 2), dtype=torch.float64)
        kls.append(lk.kl_bpd(schedule, x_0, t, eps, toy_eps(q_sample(schedule, x_0, t, eps), t), "beta_tilde"))
    assert float(estimate.std()) < 0.5 * float((torch.stack(kls).mean(0) * 999).std())


@pytest.mark.parametrize("clip", [False, True])
def test_the_estimate_is_unbiased(clip):
    """The mean of estimate_bpd over seeds is the mean of elbo_terms over draws, term by term."""
    schedule, images = NoiseSchedule.linear(8, 0.01, 0.3), images_like(5, 1, (1, 2, 2)).expand(4000, -1, -1, -1)
    ids = torch.arange(4000)
    estimate = lk.estimate_bpd(schedule, toy_eps, images, ids, 1, 3, "beta_tilde", clip)
    exact = lk.elbo_terms(schedule, toy_eps, images, ids, 2, "beta_tilde", clip_x_0=clip)
    pairs = [
        (estimate.kl_sum, exact.terms[:, 1:].sum(1)),
        (estimate.decoder, exact.terms[:, 0]),
        (estimate.total, exact.total),
    ]
    for a, b in pairs:
        error = ((a.var() + b.var()) / 4000) ** 0.5
        assert abs(float(a.mean() - b.mean())) < 4 * float(error)
    assert torch.equal(estimate.total, estimate.prior + estimate.kl_sum + estimate.decoder)


def test_the_estimate_calls_the_network_k_plus_1_times_on_one_shape():
    shapes = []

    def recording(x_t, t):
        shapes.append((tuple(x_t.shape), x_t.dtype, tuple(t.shape)))
        return toy_eps(x_t, t)

    lk.estimate_bpd(NoiseSchedule.linear(20), recording, images_like(0), torch.arange(4), 0, 5)
    assert shapes == [((4, 2, 3, 3), torch.float32, (4,))] * 6


def test_the_optimal_variance_minimises_every_kl():
    """sigma*^2 = beta_tilde + c^2 mse: no other variance gives a smaller mean term, at any t."""
    schedule, images, ids = NoiseSchedule.linear(8, 0.01, 0.3), images_like(2, 6), torch.arange(6)
    mse = lk.elbo_terms(schedule, toy_eps, images, ids, 0).eps_mse.mean(0)
    best = lk.optimal_sigma2(schedule, mse)

    def mean_terms(sigma2):
        return lk.elbo_terms(schedule, toy_eps, images, ids, 0, sigma2).terms.mean(0)[1:]

    smallest = mean_terms(best)
    for other in (best * 0.98, best * 1.02, sigma2_table(schedule, "beta"), sigma2_table(schedule, "beta_tilde")):
        assert bool((mean_terms(other) > smallest).all())


def test_beta_costs_half_a_bit_against_beta_tilde_even_with_perfect_means():
    """The constant D/2 [ln(beta / beta_tilde) - 1 + beta_tilde / beta], summed, at linear T = 1000."""
    schedule = NoiseSchedule.linear()
    x_0, t = lk.x_0_of(images_like(0, 999)), torch.arange(1, 1000)
    eps = torch.randn(x_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cost = lk.kl_bpd(schedule, x_0, t, eps, eps, "beta").sum()
    assert float(cost) == pytest.approx(0.49, abs=0.005)
    assert float(lk.kl_bpd(schedule, x_0, t, eps, eps, "beta_tilde").sum()) == 0.0


def test_bad_arguments_are_refused():
    schedule, images, ids = NoiseSchedule.linear(6), images_like(0), torch.arange(4)
    x_0 = lk.x_0_of(images)
    with pytest.raises(ConfigError, match="use decoder_bpd"):
        lk.kl_bpd(schedule, x_0, torch.tensor([0, 1, 2, 3]), x_0, x_0, "beta")
    with pytest.raises(ConfigError, match="draws"):
        lk.elbo_terms(schedule, toy_eps, images, ids, 0, draws=0)
    for k in (0, 6):
        with pytest.raises(ConfigError, match="k:"):
            lk.estimate_bpd(schedule, toy_eps, images, ids, 0, k)
