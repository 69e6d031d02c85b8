"""Worlds where the Bayes-optimal eps and the entropy are known: the sampled ELBO meets its expectation.

Ho 2020, eq. 5: -log p(x_0) <= ELBO, with a gap that is a KL divergence, so the mean ELBO of any
network is at least the entropy of the images.
"""

import math

import pytest
import torch
from ddpm_core.diffusion import sigma2_table
from ddpm_core.schedule import NoiseSchedule
from scipy import integrate, stats

from ddpm_core import likelihood as lk

LEVELS = torch.tensor([0, 60, 200, 255])
PROBABILITIES = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
SCHEDULES = {
    "linear-50": NoiseSchedule.linear(50, 1e-3, 0.25),
    "cosine-30": NoiseSchedule.cosine(30),
    "linear-1000": NoiseSchedule.linear(1000),
}


def grey_eps(schedule):
    """E[eps | x_t] for x_0 iid over LEVELS: the posterior mean of x_0 in closed form, per dimension."""
    values = LEVELS.double() / 127.5 - 1.0

    def eps_fn(x_t, t):
        abar = schedule.gather("alphas_cumprod", t, x_t.double())[..., None]
        distance = (x_t.double()[..., None] - abar.sqrt() * values).square()
        weights = torch.softmax(PROBABILITIES.log() - distance / (2 * (1 - abar)), -1)
        x_0 = (weights * values).sum(-1)
        abar = abar[..., 0]
        return ((x_t.double() - abar.sqrt() * x_0) / (1 - abar).sqrt()).to(x_t.dtype)

    return eps_fn


def expected_term(schedule, sigma2, t, eps_fn):
    """The exact mean of one ELBO term over images and noise, bits/dim, by quadrature per grey level."""
    variance = float(sigma2_table(schedule, sigma2)[t])
    t_one = torch.tensor([t])

    def integrand(z, level):
        levels = torch.full((1, 1, 1, 1), level, dtype=torch.uint8)
        x_0 = lk.x_0_of(levels)
        eps = torch.full((1, 1, 1, 1), z, dtype=torch.float64)
        abar = schedule.alphas_cumprod[t]
        eps_pred = eps_fn(abar.sqrt() * x_0 + (1 - abar).sqrt() * eps, t_one)
        if t > 0:
            # Written out here, not through kl_bpd: this is the independent side of the comparison.
            beta_tilde = float(schedule.posterior_variance[t])
            c = float(schedule.betas[t] / (schedule.alphas[t] * (1 - abar)).sqrt())
            error = c**2 * float(eps - eps_pred) ** 2 / (2 * variance)
            nats = 0.5 * (math.log(variance / beta_tilde) - 1 + beta_tilde / variance) + error
        else:
            x_1 = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
            mean = (x_1 - schedule.betas[0] / (1 - abar).sqrt() * eps_pred) / schedule.alphas[0].sqrt()
            nats = float(lk.decoder_nll_nats(levels, mean, variance**0.5))
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
    found = lk.elbo_terms(
        schedule, eps_fn, grey_images(n), torch.arange(n), 0, sigma2, steps, network_dtype=torch.float64
    )
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
    estimates = lk.estimate_bpd(schedule, grey_eps(schedule), images, ids, 0, 25, sigma2)
    gap = estimates.total + log_p[images.long()].flatten(1).mean(1)
    assert float(gap.mean()) > -4 * float(gap.std()) / n**0.5
    assert float(estimates.total.mean()) > entropy - 4 * float(estimates.total.std()) / n**0.5
    if name == "linear-1000" and sigma2 == "beta_tilde":
        # 1000 small steps with the best eps: all that is lost is lost by the decoder's fixed width.
        assert abs(float((gap - estimates.decoder).mean())) < 0.05


@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde"])
def test_a_gaussian_world_meets_its_closed_form(sigma2):
    """x_0 ~ N(m, v): E(eps - eps*)^2 = abar v / (abar v + 1 - abar), so every KL's mean is known."""
    schedule, n, mean, variance = SCHEDULES["linear-50"], 4000, 0.2, 0.09
    g = torch.Generator().manual_seed(0)
    x_0 = mean + variance**0.5 * torch.randn(n, 1, 2, 2, generator=g, dtype=torch.float64)
    eps = torch.randn(n, 1, 2, 2, generator=g, dtype=torch.float64)
    for t in (1, 3, 10, 30, 49):
        t_batch = torch.full((n,), t)
        abar = float(schedule.alphas_cumprod[t])
        total = abar * variance + 1 - abar
        x_t = abar**0.5 * x_0 + (1 - abar) ** 0.5 * eps
        eps_best = (1 - abar) ** 0.5 / total * (x_t - abar**0.5 * mean)
        found = lk.kl_bpd(schedule, x_0, t_batch, eps, eps_best, sigma2)
        s2, tilde = float(sigma2_table(schedule, sigma2)[t]), float(schedule.posterior_variance[t])
        c2 = float(schedule.reverse_mean_coef_eps[t]) ** 2
        nats = 0.5 * (math.log(s2 / tilde) - 1 + tilde / s2) + c2 * abar * variance / total / (2 * s2)
        assert abs(float(found.mean()) - nats / math.log(2)) < 4 * float(found.std()) / n**0.5
    prior = lk.prior_bpd(schedule, x_0)
    abar = float(schedule.alphas_cumprod[-1])
    nats = 0.5 * (abar * (variance + mean**2) - abar - math.log1p(-abar))
    assert abs(float(prior.mean()) - nats / math.log(2)) < 4 * float(prior.std()) / n**0.5


def test_a_gaussian_worlds_elbo_is_its_differential_entropy_plus_the_gap():
    """With sigma^2 at its optimum the reverse process of a Gaussian is exact: the summed optimal KLs, L_T
    and the Gaussian decoder's mean add up to the differential entropy (the chain rule of eq. 5)."""
    schedule, variance = SCHEDULES["linear-1000"], 0.09
    abar = schedule.alphas_cumprod
    mse = abar * variance / (abar * variance + 1 - abar)
    best = lk.optimal_sigma2(schedule, mse)
    kl = 0.5 * (best[1:] / schedule.posterior_variance[1:]).log().sum()
    prior = 0.5 * (abar[-1] * variance - abar[-1] - torch.log1p(-abar[-1]))
    decoder = 0.5 * (2 * math.pi * math.e * best[0]).log()
    entropy = 0.5 * math.log(2 * math.pi * math.e * variance)
    assert float(kl + prior + decoder) == pytest.approx(entropy, abs=1e-6)
