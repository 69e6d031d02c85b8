"""Ho 2020, eqs. 5, 8, 12, 13; Kingma 2021, eq. 14: against reference values, and unbiasedness."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.denoisers import FunctionDenoiser, toy, toy_eps

from ddpm_core import counter_random
from ddpm_core.denoiser import Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.curves import kl_from_eps_mse
from ddpm_core.likelihood.designs import GROUP_SIZE, full_design, stratified_design, timestep_proposal
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.terms import kl_bpd, prior_bpd, term_bpd, x_0_of
from ddpm_core.process.base import q_sample
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import Beta, BetaTilde, GivenVariance, variance_named


def kl_of(process, x_0, t, s, eps, eps_pred, variance=None, clip=False):
    """KL of the steps from t to s under `variance`, or under the posterior's own."""
    marginal, step = process.at(t), process.step(t, s)
    prediction = Prediction.of_eps(q_sample(marginal, x_0, eps), marginal, eps_pred)
    sigma2 = variance.of(step) if variance else step.posterior_variance
    return kl_bpd(step, x_0, eps, prediction.clipped() if clip else prediction, sigma2)


def images_like(seed, batch=4, shape=(2, 3, 3)):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *shape), generator=g).to(torch.uint8)


@pytest.mark.parametrize("case", range(8))
def test_elbo_terms_equal_the_reference(reference, case):
    expected = reference["elbo"][case]
    levels = torch.tensor(reference["x_0"], dtype=torch.uint8)
    noises = torch.tensor(reference["eps"], dtype=torch.float64)
    schedule = DiscreteProcess.from_betas(expected["betas"])
    x_0 = x_0_of(levels)
    columns = []
    for index, eps in enumerate(noises):
        t = torch.full((len(levels),), index)
        z_t = q_sample(schedule.at(t), x_0, eps)
        prediction = Prediction.of_eps(z_t, schedule.at(t), toy_eps(z_t, t))
        prediction = prediction.clipped() if expected["clip_denoised"] else prediction
        variance = variance_named(expected["sigma2"])
        columns.append(term_bpd(schedule.step(t, t - 1), levels, eps, prediction, variance))
    terms, prior = torch.stack(columns, 1), prior_bpd(schedule, x_0)
    close = {"rtol": 1e-9, "atol": 0.0}
    torch.testing.assert_close(prior, torch.tensor(expected["prior"], dtype=torch.float64), **close)
    torch.testing.assert_close(terms, torch.tensor(expected["terms"], dtype=torch.float64), **close)
    total = torch.tensor(expected["total"], dtype=torch.float64)
    torch.testing.assert_close(prior + terms.sum(1), total, **close)


@pytest.mark.parametrize("case", range(8))
def test_the_estimator_equals_the_reference_on_its_noise(reference, case, monkeypatch):
    """Every t once, and the reference's noise in place of its own: the terms, clipped or not, and their sum."""
    expected = reference["elbo"][case]
    levels = torch.tensor(reference["x_0"], dtype=torch.uint8)
    noises = torch.tensor(reference["eps"], dtype=torch.float64)
    schedule = DiscreteProcess.from_betas(expected["betas"])

    def given(seed, stream, ids, t, shape, dtype):
        return noises[t, ids]

    monkeypatch.setattr(counter_random, "normal", given)
    design, variance = full_design(len(noises), len(levels)), variance_named(expected["sigma2"])
    found = elbo(toy(schedule, noises.shape[2:]), levels, torch.arange(len(levels)), design, 0, variance, batch_size=5)
    terms = found.terms_clipped if expected["clip_denoised"] else found.terms
    close = {"rtol": 1e-9, "atol": 0.0}
    torch.testing.assert_close(terms, torch.tensor(expected["terms"], dtype=torch.float64), **close)
    torch.testing.assert_close(found.prior, torch.tensor(expected["prior"], dtype=torch.float64), **close)
    total = torch.tensor(expected["total"], dtype=torch.float64)
    torch.testing.assert_close(found.parts(expected["clip_denoised"])[0], total, **close)
    if not expected["clip_denoised"]:
        torch.testing.assert_close(found.replicates[:, 0], total, **close)
        kls = kl_from_eps_mse(schedule, design.t[:, 1:], found.eps_mse[:, 1:], variance)
        torch.testing.assert_close(kls, torch.tensor(expected["terms"], dtype=torch.float64)[:, 1:], **close)


@given(st.integers(0, 10**6), st.sampled_from(["beta", "beta_tilde"]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_kl_equals_torchs_gaussian_kl(seed, sigma2, clip):
    """Ho 2020, eq. 5: the closed form against torch.distributions for every t."""
    schedule = DiscreteProcess.linear(12, 0.01, 0.3)
    levels = images_like(seed, 11)
    x_0, t = x_0_of(levels), torch.arange(1, 12)
    eps = torch.randn(x_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z_t, step, variance = q_sample(schedule.at(t), x_0, eps), schedule.step(t, t - 1), variance_named(sigma2)
    prediction = Prediction.of_eps(z_t, schedule.at(t), toy_eps(z_t, t))
    prediction = prediction.clipped() if clip else prediction
    q, mean, sigma = step.posterior(z_t, x_0), prediction.posterior_mean(step), variance.of(step).sqrt()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(q.mean, q.variance.sqrt().expand_as(q.mean)),
        torch.distributions.Normal(mean, sigma.expand_as(mean)),
    )
    expected = kl.flatten(1).sum(1) / (x_0[0].numel() * math.log(2))
    found = kl_of(schedule, x_0, t, t - 1, eps, toy_eps(z_t, t), variance, clip)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_prior_equals_torchs_gaussian_kl():
    schedule = DiscreteProcess.linear(5, 0.1, 0.3)
    x_0 = x_0_of(images_like(3))
    share = schedule.alpha2[-1]
    q = torch.distributions.Normal(share.sqrt() * x_0, (1 - share).sqrt().expand_as(x_0))
    p = torch.distributions.Normal(torch.zeros_like(x_0), torch.ones_like(x_0))
    expected = torch.distributions.kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(prior_bpd(schedule, x_0), expected)


def test_snr_form_equals_the_kl_and_telescopes():
    """Kingma 2021, eq. 14: 1/2 (SNR(s) - SNR(t)) ||x_0 - x_0_pred||^2, for one step and for a jump."""
    schedule = DiscreteProcess.linear(12, 0.01, 0.3)
    x_0, t = x_0_of(images_like(1, 11)), torch.arange(1, 12)
    eps = torch.randn(x_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_t = q_sample(schedule.at(t), x_0, eps)
    x_0_pred = Prediction.of_eps(z_t, schedule.at(t), toy_eps(z_t, t)).x_0

    def snr_form(s, t, error):
        return 0.5 * (schedule.snr[s] - schedule.snr[t]) * error / math.log(2)

    errors = (x_0 - x_0_pred).square().flatten(1).mean(1)
    expected = kl_of(schedule, x_0, t, t - 1, eps, toy_eps(z_t, t), BetaTilde())
    torch.testing.assert_close(snr_form(t - 1, t, errors), expected, rtol=1e-9, atol=0)
    jumps = torch.tensor([0, 0, 1, 0, 3, 5, 0, 7, 2, 0, 4])
    expected = kl_of(schedule, x_0, t, jumps, eps, toy_eps(z_t, t))
    torch.testing.assert_close(snr_form(jumps, t, errors)[1:], expected[1:], rtol=1e-9, atol=0)
    # The same prediction at every step: the steps' sum is the jump's.
    error = errors[:1]
    steps = snr_form(t - 1, t, error.expand(11))
    torch.testing.assert_close(steps.sum(), snr_form(torch.tensor([0]), torch.tensor([11]), error)[0])


def test_elbo_is_the_terms_of_its_own_noise_and_batch_free():
    schedule, images, ids = DiscreteProcess.linear(6, 0.05, 0.3), images_like(0, 5), torch.arange(20, 25)
    design = full_design(6, 5, 2)
    full = elbo(toy(schedule), images, ids, design, 3, Beta())
    assert full.terms.shape == (5, 12)
    rows = torch.tensor([3, 1])
    part = elbo(toy(schedule), images[rows], ids[rows], full_design(6, 2, 2), 3, Beta(), batch_size=7)
    for name in ("prior", "terms", "terms_clipped", "eps_mse", "decoder_draws"):
        assert torch.equal(getattr(part, name), getattr(full, name)[rows]), name
    torch.testing.assert_close(full.replicates.mean(1), full.prior + full.terms.sum(1) / 2)
    total, decoder, kl_sum = full.parts()
    assert torch.equal(total, full.prior + decoder + kl_sum)
    torch.testing.assert_close(decoder, full.terms[:, [0, 6]].mean(1))
    # The squared errors alone give the unclipped KL under any other variances.
    tilde = elbo(toy(schedule), images, ids, design, 3, BetaTilde())
    coefficient = schedule.coef_eps[1:] ** 2 / (2 * schedule.posterior_variance[1:])
    torch.testing.assert_close(tilde.terms[:, 1:6], full.eps_mse[:, 1:6] * coefficient / math.log(2))


@pytest.mark.parametrize("clip", [False, True])
def test_the_estimate_is_unbiased(clip):
    """The mean of stratified estimates over seeds is the mean of the exact sum's draws, term by term."""
    schedule, images = DiscreteProcess.linear(8, 0.01, 0.3), images_like(5, 1, (1, 2, 2)).expand(4000, -1, -1, -1)
    ids, denoiser = torch.arange(4000), toy(schedule, (1, 2, 2))
    design = stratified_design(ids * GROUP_SIZE, 1, timestep_proposal(schedule), 3, replicates=1)
    estimate = elbo(denoiser, images, ids, design, 1, BetaTilde(), batch_size=4000).parts(clip)
    exact = elbo(denoiser, images, ids, full_design(8, 4000), 2, BetaTilde(), batch_size=4000).parts(clip)
    for a, b in zip(estimate, exact, strict=True):  # total, decoder, sum of the KLs
        error = ((a.var() + b.var()) / 4000) ** 0.5
        assert abs(float(a.mean() - b.mean())) < 4 * float(error)


def test_the_denoiser_is_called_with_batches_of_one_shape():
    shapes = []

    def recording(z_t, t):
        shapes.append((tuple(z_t.shape), z_t.dtype, tuple(t.shape)))
        return toy_eps(z_t, t)

    process, told = DiscreteProcess.linear(20), []
    design = stratified_design(torch.arange(4), 0, timestep_proposal(process), 5, replicates=1)
    denoiser = FunctionDenoiser(recording, process, (2, 3, 3))
    elbo(denoiser, images_like(0), torch.arange(4), design, 0, BetaTilde(), batch_size=7, on_images=told.append)
    assert shapes == [((7, 2, 3, 3), torch.float64, (7,))] * 4  # 4 images with 5 + 1 evaluations each, and padding
    assert told == [7 / 6, 14 / 6, 21 / 6, 4.0]


def test_beta_costs_half_a_bit_against_beta_tilde_even_with_perfect_means():
    """The constant D/2 [ln(beta / beta_tilde) - 1 + beta_tilde / beta], summed, at linear T = 1000."""
    schedule = DiscreteProcess.linear()
    x_0, t = x_0_of(images_like(0, 999)), torch.arange(1, 1000)
    eps = torch.randn(x_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cost = kl_of(schedule, x_0, t, t - 1, eps, eps, Beta()).sum()
    assert float(cost) == pytest.approx(0.49, abs=0.005)
    assert float(kl_of(schedule, x_0, t, t - 1, eps, eps, BetaTilde()).sum()) == 0.0


def test_bad_arguments_are_refused():
    schedule, images, ids = DiscreteProcess.linear(6), images_like(0), torch.arange(4)
    with pytest.raises(ConfigError, match="sigma2"):
        elbo(toy(schedule), images, ids, full_design(6, 4), 0, GivenVariance(torch.ones(5, dtype=torch.float64)))
    with pytest.raises(ConfigError, match="t: values"):
        elbo(toy(schedule), images, ids, full_design(7, 4), 0, Beta())
    for k in (0, 6):
        with pytest.raises(ConfigError, match="k:"):
            stratified_design(ids, 0, timestep_proposal(schedule), k, replicates=1)
