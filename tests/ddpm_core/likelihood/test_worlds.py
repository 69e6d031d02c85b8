"""Worlds where the Bayes-optimal eps and the entropy are known: the sampled ELBO meets its expectation.

Ho 2020, eq. 5: -log p(x_0) <= ELBO, with a gap that is a KL divergence, so the mean ELBO of any
network is at least the entropy of the images.
"""

import math

import pytest
import torch
from scipy import integrate, stats
from support.denoisers import FunctionDenoiser, abar

from ddpm_core.denoiser import Prediction
from ddpm_core.likelihood.curves import optimal_variance
from ddpm_core.likelihood.decoder import decoder_nll_nats
from ddpm_core.likelihood.designs import Design, stratified_design, timestep_proposal
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.terms import kl_bpd, prior_bpd, x_0_of
from ddpm_core.process.base import q_sample
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import variance_named, variance_table

LEVELS = torch.tensor([0, 60, 200, 255])
PROBABILITIES = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
SCHEDULES = {
    "linear-50": DiscreteProcess.linear(50, 1e-3, 0.25),
    "cosine-30": DiscreteProcess.cosine(30),
    "linear-1000": DiscreteProcess.linear(1000),
}


def grey_eps(schedule):
    """E[eps | x_t] for x_0 iid over LEVELS: the posterior mean of x_0 in closed form, per dimension."""
    values = LEVELS.double() / 127.5 - 1.0

    def eps_fn(x_t, t):
        share = abar(schedule, t)[..., None]
        distance = (x_t.double()[..., None] - share.sqrt() * values).square()
        weights = torch.softmax(PROBABILITIES.log() - distance / (2 * (1 - share)), -1)
        x_0 = (weights * values).sum(-1)
        share = share[..., 0]
        return ((x_t.double() - share.sqrt() * x_0) / (1 - share).sqrt()).to(x_t.dtype)

    return eps_fn


def expected_term(schedule, sigma2, t, eps_fn):
    """The exact mean of one ELBO term over images and noise, bits/dim, by quadrature per grey level."""
    variance = float(variance_table(schedule, variance_named(sigma2))[t])
    t_one = torch.tensor([t])

    def integrand(z, level):
        levels = torch.full((1, 1, 1, 1), level, dtype=torch.uint8)
        x_0 = x_0_of(levels)
        eps = torch.full((1, 1, 1, 1), z, dtype=torch.float64)
        share = schedule.alpha2[t]
        eps_pred = eps_fn(share.sqrt() * x_0 + (1 - share).sqrt() * eps, t_one)
        if t > 0:
            # Written out here, not through kl_bpd: this is the independent side of the comparison.
            beta_tilde = float(schedule.posterior_variance[t])
            c = float(schedule.step_variance[t] / (schedule.step_alpha2[t] * (1 - share)).sqrt())
            error = c**2 * float(eps - eps_pred) ** 2 / (2 * variance)
            nats = 0.5 * (math.log(variance / beta_tilde) - 1 + beta_tilde / variance) + error
        else:
            x_1 = share.sqrt() * x_0 + (1 - share).sqrt() * eps
            mean = (x_1 - schedule.step_variance[0] / (1 - share).sqrt() * eps_pred) / schedule.step_alpha2[0].sqrt()
            nats = float(decoder_nll_nats(levels, mean, variance**0.5))
        return stats.norm.pdf(z) * nats / math.log(2)

    return sum(
        float(p) * integrate.quad(integrand, -9, 9, args=(int(level),), limit=200, epsabs=1e-9)[0]
        for level, p in zip(LEVELS, PROBABILITIES, strict=True)
    )


def grey_images(n, shape=(1, 2, 2)):
    index = torch.multinomial(
        PROBABILITIES, n * math.prod(shape), replacement=True, generator=torch.Generator().manual_seed(1)
    )
    return LEVELS[index].reshape(n, *shape).to(torch.uint8)


@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde"])
@pytest.mark.parametrize("name", ["linear-50", "cosine-30"])
def test_grey_levels_meet_the_quadrature_term_by_term(name, sigma2):
    schedule, n = SCHEDULES[name], 3000
    eps_fn = grey_eps(schedule)
    steps = [0, 1, 5, 20, schedule.num_timesteps - 1]
    once = torch.ones(n, len(steps), dtype=torch.float64)
    design = Design(torch.tensor(steps).expand(n, -1), once, torch.zeros(len(steps), dtype=torch.int64))
    denoiser = FunctionDenoiser(eps_fn, schedule, (1, 2, 2))
    found = elbo(denoiser, grey_images(n), torch.arange(n), design, 0, variance_named(sigma2), batch_size=n)
    for column, t in enumerate(steps):
        sampled = found.terms[:, column]
        error = float(sampled.std()) / n**0.5
        assert abs(float(sampled.mean()) - expected_term(schedule, sigma2, t, eps_fn)) < 4 * error + 1e-9, t


@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_elbo_is_never_below_the_entropy(name, sigma2):
    schedule, n = SCHEDULES[name], 2000
    images, ids = grey_images(n), torch.arange(n)
    entropy = -float((PROBABILITIES * PROBABILITIES.log2()).sum())
    # On these very images the code length under the true distribution, which the bound exceeds on average.
    log_p = torch.zeros(256, dtype=torch.float64)
    log_p[LEVELS] = PROBABILITIES.log2()
    design = stratified_design(ids, 0, timestep_proposal(schedule), 25, replicates=1)
    denoiser = FunctionDenoiser(grey_eps(schedule), schedule, (1, 2, 2))
    total, decoder, _ = elbo(denoiser, images, ids, design, 0, variance_named(sigma2), batch_size=n).parts()
    gap = total + log_p[images.long()].flatten(1).mean(1)
    assert float(gap.mean()) > -4 * float(gap.std()) / n**0.5
    assert float(total.mean()) > entropy - 4 * float(total.std()) / n**0.5
    if name == "linear-1000" and sigma2 == "beta_tilde":
        # 1000 small steps with the best eps: all that is lost is lost by the decoder's fixed width.
        assert abs(float((gap - decoder).mean())) < 0.05


@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde"])
def test_a_gaussian_world_meets_its_closed_form(sigma2):
    """x_0 ~ N(m, v): E(eps - eps*)^2 = abar v / (abar v + 1 - abar), so every KL's mean is known."""
    schedule, n, mean, variance = SCHEDULES["linear-50"], 4000, 0.2, 0.09
    g = torch.Generator().manual_seed(0)
    x_0 = mean + variance**0.5 * torch.randn(n, 1, 2, 2, generator=g, dtype=torch.float64)
    eps = torch.randn(n, 1, 2, 2, generator=g, dtype=torch.float64)
    for t in (1, 3, 10, 30, 49):
        t_batch = torch.full((n,), t)
        share = float(schedule.alpha2[t])
        total = share * variance + 1 - share
        z_t, step = q_sample(schedule.at(t_batch), x_0, eps), schedule.step(t_batch, t_batch - 1)
        eps_best = (1 - share) ** 0.5 / total * (z_t - share**0.5 * mean)
        best, sigma_2 = Prediction.of_eps(z_t, schedule.at(t_batch), eps_best), variance_named(sigma2).of(step)
        found = kl_bpd(step, x_0, eps, best, sigma_2)
        s2, tilde = float(sigma_2[0]), float(schedule.posterior_variance[t])
        c2 = float(schedule.coef_eps[t]) ** 2
        nats = 0.5 * (math.log(s2 / tilde) - 1 + tilde / s2) + c2 * share * variance / total / (2 * s2)
        assert abs(float(found.mean()) - nats / math.log(2)) < 4 * float(found.std()) / n**0.5
    prior = prior_bpd(schedule, x_0)
    share = float(schedule.alpha2[-1])
    nats = 0.5 * (share * (variance + mean**2) - share - math.log1p(-share))
    assert abs(float(prior.mean()) - nats / math.log(2)) < 4 * float(prior.std()) / n**0.5


def test_a_gaussian_worlds_elbo_is_its_differential_entropy_plus_the_gap():
    """With sigma^2 at its optimum the reverse process of a Gaussian is exact: the summed optimal KLs, L_T
    and the Gaussian decoder's mean add up to the differential entropy (the chain rule of eq. 5)."""
    schedule, variance = SCHEDULES["linear-1000"], 0.09
    share = schedule.alpha2
    mse = share * variance / (share * variance + 1 - share)
    best = optimal_variance(schedule, mse).table
    kl = 0.5 * (best[1:] / schedule.posterior_variance[1:]).log().sum()
    prior = 0.5 * (share[-1] * variance - share[-1] - torch.log1p(-share[-1]))
    decoder = 0.5 * (2 * math.pi * math.e * best[0]).log()
    entropy = 0.5 * math.log(2 * math.pi * math.e * variance)
    assert float(kl + prior + decoder) == pytest.approx(entropy, abs=1e-6)
