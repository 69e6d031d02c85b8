"""The likelihoods under any (alpha, sigma): closed forms in Gaussian worlds, and z_t's unit, which does not matter."""

import math

import pytest
import torch
from support.denoisers import FunctionDenoiser, GaussianWorld
from support.processes import PROCESSES, rescaled

from ddpm_core.denoiser import Prediction
from ddpm_core.likelihood.curves import optimal_variance, subsequence_kl
from ddpm_core.likelihood.designs import full_design, timestep_proposal
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.ode import ode_bpd
from ddpm_core.likelihood.terms import kl_bpd, prior_bpd, x_0_of
from ddpm_core.process.base import q_sample
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import Beta, BetaTilde, GivenVariance, variance_table

LN2 = math.log(2)
SHAPE = (1, 2, 2)
MEAN = torch.tensor([0.3, -0.2, 0.1, 0.0])
FACTOR = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0], [0.0, 0.2, 0.3, 0.0], [0.1, 0.0, 0.2, 0.6]])
WORLD = GaussianWorld(MEAN, FACTOR @ FACTOR.T, SHAPE)
VARIANCES = {"beta": Beta(), "beta_tilde": BetaTilde()}


def images(n, seed=0):
    return torch.randint(0, 256, (n, *SHAPE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def evaluate(process, variance=None, n=6):
    design = full_design(process.num_timesteps, n)
    return elbo(WORLD.denoiser(process), images(n), torch.arange(n), design, 0, variance or BetaTilde(), batch_size=120)


@pytest.mark.parametrize("sigma2", VARIANCES)
@pytest.mark.parametrize("name", PROCESSES)
def test_a_gaussian_world_meets_its_closed_form(name, sigma2):
    """Ho 2020, eqs. 5 and 12: along an axis of variance l, E(eps - eps*)^2 = alpha^2 l / (alpha^2 l + sigma^2), so the
    mean of every KL is known; likewise that of the prior's, with p(z_T) = N(0, V I), V = alpha^2 + sigma^2."""
    process, n = PROCESSES[name], 4000
    g = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(n, 4, generator=g, dtype=torch.float64) for _ in range(2))
    x_0, eps = (WORLD.mean + z * WORLD.variances.sqrt() @ WORLD.axes.T).reshape(n, *SHAPE), eps.reshape(n, *SHAPE)
    denoiser = WORLD.denoiser(process)
    for index in (1, 3, 10, 30, 59):
        t = torch.full((n,), index)
        now, step = process.at(t), process.step(t, t - 1)
        found = kl_bpd(step, x_0, eps, denoiser(q_sample(now, x_0, eps), t), VARIANCES[sigma2].of(step))
        alpha, sigma = float(process.alpha[index]), float(process.sigma[index])
        a_s, s_s = float(process.alpha[index - 1]), float(process.sigma[index - 1])
        added = sigma**2 - (alpha / a_s * s_s) ** 2
        tilde = added * s_s**2 / sigma**2
        s2 = tilde if sigma2 == "beta_tilde" else added * (a_s**2 + s_s**2) / (alpha**2 + sigma**2)
        mse = float((alpha**2 * WORLD.variances / (alpha**2 * WORLD.variances + sigma**2)).mean())
        # mu_tilde - mu_theta is (added a_s / sigma^2) (x_0 - x_0_pred), and x_0 - x_0_pred is sigma / alpha of eps's.
        nats = 0.5 * (math.log(s2 / tilde) - 1 + tilde / s2) + (added * a_s / (sigma * alpha)) ** 2 * mse / (2 * s2)
        assert abs(float(found.mean()) - nats / LN2) < 4 * float(found.std()) / n**0.5 + 1e-12
    alpha2, sigma2_last = float(process.alpha[-1] ** 2), float(process.sigma[-1] ** 2)
    normal = torch.distributions.Normal
    q = normal(alpha2**0.5 * x_0, torch.full_like(x_0, sigma2_last**0.5))
    p = normal(torch.zeros_like(x_0), torch.full_like(x_0, (alpha2 + sigma2_last) ** 0.5))
    expected = torch.distributions.kl_divergence(q, p).flatten(1).mean(1) / LN2
    torch.testing.assert_close(prior_bpd(process, x_0), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_optimal_variances_leave_no_gap_but_the_priors(name):
    """Data N(m, v I): with sigma^2 at its optimum (Bao 2022) every reverse step is exact, so L_T, the KLs and a
    Gaussian decoder add up to the differential entropy and KL(q(z_T) || p(z_T)) (the chain rule of Ho 2020, eq. 5)."""
    process, mean, variance = PROCESSES[name], 0.2, 0.09
    spread = process.alpha2 * variance + process.sigma2
    best = optimal_variance(process, process.alpha2 * variance / spread).table
    kls = 0.5 * (best[1:] / process.posterior_variance[1:]).log().sum()
    decoder = 0.5 * (2 * math.pi * math.e * best[0]).log()
    r, v = process.prior_signal, process.prior_variance
    prior = 0.5 * (r * (variance + mean**2) - r - math.log1p(-r))
    last, offset = float(spread[-1]), float(process.alpha[-1]) * mean
    left = 0.5 * (math.log(v / last) + (last + offset**2) / v - 1)
    entropy = 0.5 * math.log(2 * math.pi * math.e * variance)
    assert float(prior + kls + decoder) == pytest.approx(entropy + left, abs=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_flow_of_a_gaussian_world_has_its_density(name):
    """Song 2021, score SDE, app. D.2: ln N(z_T; 0, V I) at the exact flow's end, and the flow's change of volume."""
    coarse, size = PROCESSES[name], 400
    # The same process in finer steps, in which the error of the method is small.
    at = torch.linspace(0, coarse.num_timesteps - 1, size, dtype=torch.float64)
    low = at.long().clamp(max=coarse.num_timesteps - 2)
    log_alpha, log_snr = (t[low] + (at - low) * (t[low + 1] - t[low]) for t in (coarse.alpha.log(), coarse.log_snr))
    process = DiscreteProcess.from_alpha_sigma(log_alpha.exp(), (log_alpha - 0.5 * log_snr).exp())
    world = GaussianWorld(MEAN, 0.09 * torch.eye(4), SHAPE)  # one variance: every probe has the trace exactly
    first = []

    def watched(z_t, t):
        first.append(z_t.detach())
        return world.denoiser(process).function(z_t, t)

    denoiser = FunctionDenoiser(watched, process, SHAPE)
    found = ode_bpd(denoiser, images(20), torch.arange(20), 0, num_steps=198, probes=2)
    start, end = process.at(torch.tensor([0])), process.at(torch.tensor([size - 1]))
    z_end = world.flow(first[0], start, end)
    volume = 0.5 * (world.spread(end) / world.spread(start)).log().sum() + 4 * start.alpha.log().sum()
    v = math.sqrt(float(end.alpha) ** 2 + float(end.sigma) ** 2)
    log_p = torch.distributions.Normal(0.0, v).log_prob(z_end).flatten(1).sum(1) + volume
    expected = math.log2(127.5) - log_p / (4 * LN2)
    assert bool(((found.bits_per_dim - expected).abs() < found.step_error + 1e-9).all())
    assert bool((found.step_error < 0.05).all())


@pytest.mark.parametrize("name", PROCESSES)
def test_likelihoods_do_not_depend_on_the_unit_of_z(name):
    """z_t -> c_t z_t is a change of variables of the latents: every term of the bound stays, and so does the flow's
    density of x_0."""
    process = PROCESSES[name]
    other = rescaled(process)
    for variance in VARIANCES.values():
        one, two = evaluate(process, variance), evaluate(other, variance)
        for field in ("prior", "terms", "terms_clipped", "eps_mse", "decoder_draws"):
            torch.testing.assert_close(getattr(two, field), getattr(one, field), rtol=1e-7, atol=1e-9, msg=field)
    mse = one.eps_mse.mean(0)
    terms = [evaluate(p, optimal_variance(p, mse)).terms for p in (process, other)]
    torch.testing.assert_close(terms[1], terms[0], rtol=1e-7, atol=1e-9)
    flows = [ode_bpd(WORLD.denoiser(p), images(4), torch.arange(4), 0, 20, 2).bits_per_dim for p in (process, other)]
    torch.testing.assert_close(flows[1], flows[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(timestep_proposal(other), timestep_proposal(process), rtol=1e-8, atol=0)


def test_a_variance_preserving_process_has_its_bound_from_either_description():
    betas = DiscreteProcess.linear(60, 1e-3, 0.25)
    for variance in VARIANCES.values():
        one, two = evaluate(betas, variance), evaluate(PROCESSES["preserving"], variance)
        for field in ("prior", "terms", "terms_clipped", "eps_mse", "decoder_draws"):
            torch.testing.assert_close(getattr(two, field), getattr(one, field), rtol=1e-8, atol=1e-10, msg=field)
    flows = [ode_bpd(WORLD.denoiser(p), images(4), torch.arange(4), 0, 20, 2) for p in (betas, PROCESSES["preserving"])]
    torch.testing.assert_close(flows[1].bits_per_dim, flows[0].bits_per_dim, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_kl_of_any_step_is_half_the_difference_of_the_snrs(name):
    """Kingma 2021, VDM, eq. 14 and app. E: under the posterior's variance it is
    1/2 (SNR_s - SNR_t) ||x_0 - x_0_pred||^2 = 1/2 expm1(gamma_t - gamma_s) ||eps - eps_pred||^2, whichever of the two
    is predicted, between neighbours and further."""
    process, x_0 = PROCESSES[name], x_0_of(images(5))
    t, s = torch.tensor([1, 59, 59, 30, 40]), torch.tensor([0, 58, 0, 11, 39])
    g = torch.Generator().manual_seed(1)
    eps, wrong = (torch.randn(x_0.shape, generator=g, dtype=torch.float64) for _ in range(2))
    now, step = process.at(t), process.step(t, s)
    z = q_sample(now, x_0, eps)
    of_eps = Prediction.of_eps(z, now, eps + 0.3 * wrong)
    of_x_0 = Prediction.of_x_0(z, now, of_eps.x_0)
    snr_form = 0.5 * (process.snr[s] - process.snr[t]) * (x_0 - of_x_0.x_0).square().flatten(1).mean(1) / LN2
    gamma = -process.log_snr
    eps_form = 0.5 * torch.expm1(gamma[t] - gamma[s]) * (0.3 * wrong).square().flatten(1).mean(1) / LN2
    torch.testing.assert_close(snr_form, eps_form, rtol=1e-9, atol=0)
    for prediction in (of_eps, of_x_0):
        found = kl_bpd(step, x_0, eps, prediction, step.posterior_variance)
        torch.testing.assert_close(found, eps_form, rtol=1e-9, atol=1e-14)
    terms = subsequence_kl(process, [0, 30, 59], torch.tensor([0, 30, 59]), torch.ones(3, dtype=torch.float64)) * LN2
    expected = 0.5 * torch.expm1(torch.tensor([gamma[30] - gamma[0], gamma[59] - gamma[30]]))
    torch.testing.assert_close(terms[1:], expected.double(), rtol=1e-9, atol=0)
    table = variance_table(process, GivenVariance(process.posterior_variance_clipped))
    assert torch.equal(table, process.posterior_variance_clipped)


def of_gammas(gammas):
    """The variance-preserving process with gamma = -log SNR: alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma)."""
    gammas = torch.as_tensor(gammas, dtype=torch.float64)
    return DiscreteProcess.from_alpha_sigma(torch.sigmoid(-gammas).sqrt(), torch.sigmoid(gammas).sqrt())


def test_terms_equal_the_reference_of_vdm(modern_reference):
    """Kingma 2021, VDM: 1/2 ||eps - eps_pred||^2 for each unit of gamma, in a short step 1/2 expm1(h) of it; L_T."""
    reference = modern_reference["vdm_terms"]
    x_0, eps = (
        x_0_of(torch.tensor(reference["x"], dtype=torch.uint8)),
        torch.tensor(reference["eps"], dtype=torch.float64),
    )
    dimensions, h = x_0[0].numel(), 1e-3
    for case in reference["diffusion"]:
        process, t = of_gammas([case["gamma"] - h, case["gamma"], reference["g1"]]), torch.tensor([1, 1])
        now, step = process.at(t), process.step(t, t - 1)
        z = q_sample(now, x_0, eps)
        prediction = Prediction.of_eps(z, now, 0.9 * z + 0.1 * math.sin(case["gamma"]))
        found = kl_bpd(step, x_0, eps, prediction, BetaTilde().of(step)) * dimensions * LN2
        expected = torch.tensor(case["nats_per_unit_gamma"], dtype=torch.float64) * math.expm1(h)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        prior = prior_bpd(process, x_0) * dimensions * LN2
        torch.testing.assert_close(prior, torch.tensor(reference["prior"], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_the_bound_of_a_grey_world_equals_the_reference_of_vdm(modern_reference, steps):
    """Kingma 2021, VDM, eq. 14: 1/2 sum of expm1(gamma_i - gamma_{i-1}) E ||eps - eps*||^2 and L_T, by quadrature."""
    reference = modern_reference["vdm_world"]
    (case,) = (case for case in reference["cases"] if (case["T"], case["g0"]) == (steps, -13.3))
    process = of_gammas(torch.linspace(case["g0"], case["g1"], steps + 1, dtype=torch.float64))
    levels = torch.tensor(reference["levels"], dtype=torch.uint8).reshape(1, 1, 1, 4)
    probabilities = torch.tensor(reference["probs"], dtype=torch.float64)
    values, nodes = x_0_of(levels).flatten(), torch.linspace(-9, 9, 721, dtype=torch.float64)
    density = torch.exp(-nodes.square() / 2) / math.sqrt(2 * math.pi) * (nodes[1] - nodes[0])
    x_0 = values.repeat_interleave(len(nodes)).reshape(-1, 1, 1, 1)
    eps, weight = nodes.repeat(4).reshape(-1, 1, 1, 1), (probabilities[:, None] * density).flatten()
    diffusion = 0.0
    for index in range(1, steps + 1):
        t = torch.tensor([index])
        now, step = process.at(t), process.step(t, t - 1)
        z = q_sample(now, x_0, eps)
        distance = (z - now.alpha * values) ** 2 / (2 * now.sigma**2)
        best = (torch.softmax(probabilities.log() - distance, 3) * values).sum(3, keepdim=True)
        prediction = Prediction.of_x_0(z, now, best)
        diffusion += float((kl_bpd(step, x_0, eps, prediction, step.posterior_variance) * weight).sum())
    assert diffusion == pytest.approx(case["diffusion"], rel=1e-6)
    prior = float((prior_bpd(process, values.reshape(-1, 1, 1, 1)) * probabilities).sum())
    assert prior == pytest.approx(case["prior"], rel=1e-9)


def test_kls_with_predicted_variances_equal_the_reference(modern_reference):
    """Nichol and Dhariwal 2021, eq. 15: ln sigma^2 between those of beta_tilde and of beta, for each pixel."""
    of, terms = modern_reference["learned_range"], modern_reference["vdm_terms"]
    x_0, eps = x_0_of(torch.tensor(terms["x"], dtype=torch.uint8)), torch.tensor(terms["eps"], dtype=torch.float64)
    process = DiscreteProcess.linear(8, 0.01, 0.3)
    for row in of["rows"]:
        t = torch.tensor([row["t"]] * 2)
        now, step = process.at(t), process.step(t, t - 1)
        z, fraction = q_sample(now, x_0, eps), (row["v"] + 1) / 2
        ln_sigma2 = fraction * Beta().of(step).log() + (1 - fraction) * BetaTilde().of(step).log()
        assert float(ln_sigma2[0]) == pytest.approx(row["log_variance"], rel=1e-12)
        prediction = Prediction.of_eps(z, now, 0.9 * z + 0.1 * math.sin(row["t"]))
        found = kl_bpd(step, x_0, eps, prediction, ln_sigma2.exp().expand_as(x_0)) * x_0[0].numel() * LN2
        torch.testing.assert_close(found, torch.tensor(row["kl_nats"], dtype=torch.float64), rtol=1e-9, atol=0)
