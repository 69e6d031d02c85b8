"""Ho 2020, algorithm 2: ancestral sampling, in worlds where the best eps is known."""

import pytest
import torch
from support.denoisers import FOUR_PIXELS, GaussianWorld, toy, toy_eps
from support.processes import PROCESSES, rescaled

from ddpm_core import counter_random
from ddpm_core.likelihood.curves import optimal_variance
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import Beta, BetaTilde, variance_named
from ddpm_core.samplers.base import sample
from ddpm_core.samplers.ddpm import DDPM
from ddpm_core.samplers.start import STREAM


@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde"])
def test_ddpm_samples_the_gaussian_it_was_given(sigma2):
    schedule = DiscreteProcess.linear(1000)
    x = sample(FOUR_PIXELS.denoiser(schedule), DDPM(variance_named(sigma2)), torch.arange(5_000), 1, clip=None)
    FOUR_PIXELS.check_moments(x, bias=0.005)


def test_one_step_by_hand():
    """Ho 2020, algorithm 2, lines 3 and 4, at T = 2 with sigma^2 = beta."""
    schedule, ids = DiscreteProcess.from_betas([0.1, 0.3]), torch.tensor([9])
    x = counter_random.normal(4, STREAM, ids, 2, (1, 1, 2)).double()
    z = counter_random.normal(4, STREAM, ids, 1, (1, 1, 2)).double()
    x_1 = (x - 0.3 / (1 - 0.63) ** 0.5 * toy_eps(x, torch.tensor([1]))) / 0.7**0.5 + 0.3**0.5 * z
    x_0 = (x_1 - 0.1 / 0.1**0.5 * toy_eps(x_1, torch.tensor([0]))) / 0.9**0.5
    found = sample(toy(schedule, (1, 1, 2)), DDPM(variance_named("beta")), ids, 4, clip=None)
    torch.testing.assert_close(found.double(), x_0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde", "optimal"])
@pytest.mark.parametrize("name", PROCESSES)
def test_ancestral_samples_have_the_moments_of_their_chain(name, sigma2):
    """Data N(m, v I): every reverse step is affine in z_t, so the samples' mean and variance follow from the alphas and
    sigmas, step by step (Ho 2020, alg. 2; Kingma 2021, VDM, app. A.2). With the optimal variances (Bao 2022) they are
    the data's, but for the prior's."""
    process, m, v, n = PROCESSES[name], 0.3, 0.25, 4000
    world = GaussianWorld(torch.full((4,), m), v * torch.eye(4), (1, 2, 2))
    mse = process.alpha2 * v / (process.alpha2 * v + process.sigma2)
    variance = {"beta": Beta(), "beta_tilde": BetaTilde(), "optimal": optimal_variance(process, mse)}[sigma2]
    alpha, sigma = process.alpha.tolist(), process.sigma.tolist()
    mean, spread = 0.0, alpha[-1] ** 2 + sigma[-1] ** 2
    for t in range(59, -1, -1):
        a_s, s_s = (alpha[t - 1], sigma[t - 1]) if t else (1.0, 0.0)
        total_t, total_s = alpha[t] ** 2 * v + sigma[t] ** 2, a_s**2 * v + s_s**2
        # E[z_s | z_t] = a_s m + slope (z_t - a_t m), by conditioning the joint Gaussian of the two.
        slope = alpha[t] / a_s * total_s / total_t
        added = sigma[t] ** 2 - (alpha[t] / a_s * s_s) ** 2
        noise = {
            "beta": added * (a_s**2 + s_s**2) / (alpha[t] ** 2 + sigma[t] ** 2),
            "beta_tilde": added * s_s**2 / sigma[t] ** 2,
            "optimal": total_s - slope**2 * total_t,
        }[sigma2]
        mean, spread = a_s * m + slope * (mean - alpha[t] * m), slope**2 * spread + (noise if t else 0.0)
    x = sample(world.denoiser(process), DDPM(variance), torch.arange(n), 1, clip=None).double()
    assert float(x.mean()) == pytest.approx(mean, abs=4 * (spread / (4 * n)) ** 0.5)
    assert float(x.var()) == pytest.approx(spread, abs=4 * spread * (2 / (4 * n)) ** 0.5)
    if sigma2 == "optimal":
        assert mean == pytest.approx(m, abs=0.02)
        assert spread == pytest.approx(v, rel=0.02)


@pytest.mark.parametrize("name", PROCESSES)
def test_samples_do_not_depend_on_the_unit_of_z(name):
    """z_t -> c_t z_t changes no image that is drawn, with any variance."""
    one, two = PROCESSES[name], rescaled(PROCESSES[name])
    ids = torch.arange(50)
    for variance in (Beta(), BetaTilde()):
        found = [sample(FOUR_PIXELS.denoiser(process), DDPM(variance), ids, 3) for process in (one, two)]
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


def test_a_variance_preserving_process_has_its_samples_from_either_description():
    ids, betas = torch.arange(50), DiscreteProcess.linear(60, 1e-3, 0.25)
    for sigma2 in ("beta", "beta_tilde"):
        sampler = DDPM(variance_named(sigma2))
        found = [sample(FOUR_PIXELS.denoiser(p), sampler, ids, 3) for p in (betas, PROCESSES["preserving"])]
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
