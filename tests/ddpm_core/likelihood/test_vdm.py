"""The bound of continuous time (Kingma 2021, VDM, eqs. 8, 11, 17-19) in a world where it is known, and of T steps."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from support.denoisers import FunctionDenoiser, GreyWorld

from ddpm_core import counter_random
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.bounds import bound_of
from ddpm_core.likelihood.curves import steps_from_continuous
from ddpm_core.likelihood.designs import (
    GROUP_SIZE,
    Design,
    continuous_design,
    full_design,
    stratified_design,
    timestep_proposal,
)
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.intervals import MeanStatistics
from ddpm_core.process.continuous import ContinuousProcess

LN2 = math.log(2)
LEVELS, PROBABILITIES = (0, 60, 128, 255), (0.4, 0.1, 0.2, 0.3)
WORLD = GreyWorld(LEVELS, PROBABILITIES)
PIXEL = GreyWorld(LEVELS, PROBABILITIES, (1, 1, 1))
LINEAR = ContinuousProcess.linear(-13.3, 5.0)


def learned(seed, bend):
    torch.manual_seed(seed)
    process = ContinuousProcess.learned(-13.3, 5.0)
    with torch.no_grad():
        process.schedule.weight_3.mul_(bend)
    return process


SHAPES = {"linear": LINEAR, "learned": learned(0, 1.0), "curved": learned(1, 20.0), "nearly-linear": learned(2, 0.1)}


def bound(denoiser, num_timesteps=None):
    return bound_of(denoiser, "auto", num_timesteps)


@pytest.fixture
def given_noise(monkeypatch):
    """What the estimator takes for noise is what a test gives, image by image and column by column."""

    def use(noise):
        def normal(seed, stream, ids, t, shape, dtype):
            t = torch.as_tensor(t).expand(len(ids))
            return noise[ids, t % noise.shape[1]].reshape(-1, *shape).to(dtype)

        monkeypatch.setattr(counter_random, "normal", normal)

    return use


def test_terms_equal_the_reference(modern_reference, given_noise):
    """Kingma 2021, eqs. 8, 11 and 17, of a toy network, values from an independent float64 program."""
    reference = modern_reference["vdm_terms"]
    levels = torch.tensor(reference["x"], dtype=torch.uint8)
    noise = torch.tensor(reference["eps"], dtype=torch.float64)
    given_noise(noise[:, None])
    size = levels[0].numel()
    gammas = [row["gamma"] for row in reference["diffusion"]]

    def toy(z, gamma):
        return 0.9 * z + 0.1 * torch.sin(gamma)[:, None, None, None]

    def evaluate(low):
        process = ContinuousProcess.linear(low, 5.0)
        inside = [gamma for gamma in gammas if gamma > low]
        t = torch.tensor([low, *inside], dtype=torch.float64).expand(len(levels), -1)
        design = Design(t, torch.ones_like(t), torch.zeros(t.shape[1], dtype=torch.int64))
        denoiser = FunctionDenoiser(toy, process, tuple(levels.shape[1:]))
        found = elbo(denoiser, levels, torch.arange(len(levels)), design, 0, bound(denoiser).variance, batch_size=3)
        return found.prior * size * LN2, found.terms * size * LN2

    prior, terms = evaluate(-13.3)
    close = {"rtol": 1e-9, "atol": 0.0}
    torch.testing.assert_close(prior, torch.tensor(reference["prior"], dtype=torch.float64), **close)
    torch.testing.assert_close(terms[:, 0], torch.tensor(reference["recon"], dtype=torch.float64), **close)
    for column, row in enumerate(reference["diffusion"], 1):
        expected = torch.tensor(row["nats_per_unit_gamma"], dtype=torch.float64)
        torch.testing.assert_close(terms[:, column] / 18.3, expected, **close)
    at_minus_8 = torch.tensor(reference["recon_at_minus_8"], dtype=torch.float64)
    torch.testing.assert_close(evaluate(-8.0)[1][:, 0], at_minus_8, **close)


def quadrature(process, num_timesteps, given_noise):
    """(prior, diffusion, reconstruction) in bits/dim, all by the estimator: its images are the levels, its noise the
    nodes of a quadrature, and its times those of another one, or all T."""
    z = torch.linspace(-9, 9, 601, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
    levels = torch.tensor(LEVELS, dtype=torch.uint8).repeat_interleave(len(z)).reshape(-1, 1, 1, 1)
    weight = (WORLD.probabilities[:, None] * density).flatten()
    given_noise(z.repeat(len(LEVELS))[:, None])
    made = bound(PIXEL.denoiser(process), num_timesteps)
    n = len(levels)
    if num_timesteps is None:
        low, high = process.ends
        nodes, weights = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(90))
        t = torch.cat([torch.tensor([low], dtype=torch.float64), (low + high) / 2 + (high - low) / 2 * nodes]).expand(
            n, -1
        )
        columns = torch.cat([torch.ones(1), weights / 2]).double().expand(n, -1)
        design = Design(t, columns, torch.zeros(t.shape[1], dtype=torch.int64))
    else:
        design = full_design(num_timesteps + 1, n)
    found = elbo(made.denoiser, levels, torch.arange(n), design, 0, made.variance, batch_size=200_000)
    _, decoder, kl_sum = found.parts()
    return tuple(float((weight * part).sum()) for part in (found.prior, kl_sum, decoder))


@pytest.mark.parametrize("case", range(5))
def test_the_world_equals_the_reference(case, modern_reference, given_noise):
    """Prior, diffusion and reconstruction, of continuous time and of T steps, by quadrature."""
    expected = modern_reference["vdm_world"]["cases"][case]
    process = ContinuousProcess.linear(expected["g0"], expected["g1"])
    prior, diffusion, reconstruction = quadrature(process, expected["T"], given_noise)
    assert prior == pytest.approx(expected["prior"], abs=1e-6)
    assert diffusion == pytest.approx(expected["diffusion"], abs=1e-6)
    assert reconstruction == pytest.approx(expected["reconstruction"], abs=1e-6)
    if expected["T"] is None and expected["g0"] == -13.3:
        # What the best denoiser loses is the reconstruction and what z_1 differs from N(0, I): at most the prior.
        assert WORLD.entropy + reconstruction < prior + diffusion + reconstruction
        assert prior + diffusion < WORLD.entropy + prior + 1e-6


@pytest.mark.parametrize("name", SHAPES)
def test_the_continuous_bound_is_independent_of_the_interior_of_gamma(name, given_noise):
    """Kingma 2021, sec. 5.1: one number for all shapes; the bound of 10 steps is another for each."""
    assert quadrature(SHAPES[name], None, given_noise) == quadrature(LINEAR, None, given_noise)
    if name != "linear":
        in_steps = quadrature(SHAPES[name], 10, given_noise)[1]
        assert abs(in_steps - quadrature(LINEAR, 10, given_noise)[1]) > 1e-3
        assert in_steps > quadrature(LINEAR, None, given_noise)[1]


def total_of(case):
    return case["prior"] + case["diffusion"] + case["reconstruction"]


@pytest.mark.parametrize("density", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_of_the_bound_is_entropy_and_what_the_ends_cost(name, density, modern_reference):
    """The expected continuous bound, from 16 random times an image, within 4 standard errors, for every shape."""
    case, n = modern_reference["vdm_world"]["cases"][0], 3000
    denoiser, images, ids = WORLD.denoiser(SHAPES[name]), WORLD.images(n), torch.arange(n)
    bins = torch.tensor([1.0, 2.0, 5.0, 1.0, 0.5], dtype=torch.float64)
    design = continuous_design(ids, 3, SHAPES[name], 16, density=bins / bins.sum() if density else None)
    made = bound(denoiser)
    assert made.num_timesteps is None
    found = elbo(made.denoiser, images, ids, design, 3, made.variance, batch_size=n)
    # On these very images, so that their own surprise is not part of the error.
    gap = found.parts()[0] - WORLD.surprise(images)
    error = (
        4 * MeanStatistics.of(found.replicates - WORLD.surprise(images)[:, None], GROUP_SIZE).population.standard_error
    )
    assert abs(float(gap.mean()) - (total_of(case) - WORLD.entropy)) < error
    assert abs(float(gap.mean()) - case["reconstruction"] - case["prior"]) < error + case["prior"]
    assert abs(float(found.parts()[1].mean()) - case["reconstruction"]) < error
    torch.testing.assert_close(found.terms_clipped, found.terms)  # the best x_0 is inside [-1, 1] already
    assert torch.equal(found.decoder_draws[:, :, 0], found.terms[:, design.first])


@pytest.mark.parametrize("num_timesteps", [10, 50, 1000])
def test_the_estimate_of_t_steps_is_that_of_the_quadrature(num_timesteps, modern_reference):
    """Every kind of design for discrete time works on the steps of a continuous model."""
    cases = modern_reference["vdm_world"]["cases"]
    (case,) = [case for case in cases if case["T"] == num_timesteps and case["g0"] == -13.3]
    made, n = bound(WORLD.denoiser(LINEAR), num_timesteps), 2000
    assert made.num_timesteps == num_timesteps
    assert made.decoder == "softmax"
    images, ids, process = WORLD.images(n), torch.arange(n), made.denoiser.process
    assert process.num_timesteps == num_timesteps + 1
    torch.testing.assert_close(process.log_snr[[0, -1]], torch.tensor([13.3, -5.0], dtype=torch.float64))
    design = stratified_design(ids, 1, timestep_proposal(process), 10)
    found = elbo(made.denoiser, images, ids, design, 1, made.variance, batch_size=n)
    gap = MeanStatistics.of(found.replicates - WORLD.surprise(images)[:, None], GROUP_SIZE)
    assert abs(gap.mean - (total_of(case) - WORLD.entropy)) < 4 * gap.population.standard_error
    assert gap.population.standard_error < 0.05 * total_of(case)


def covers(variance, mean, target):
    return abs(mean - target) <= stats.t.ppf(0.975, variance.dof) * variance.standard_error


def expected_of_levels(given_noise):
    """The bound of a pixel of each level, by quadrature."""
    z = torch.linspace(-9, 9, 401, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
    nodes, weights = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(60))
    given_noise(z.repeat(len(LEVELS))[:, None])
    levels = torch.tensor(LEVELS, dtype=torch.uint8).repeat_interleave(len(z)).reshape(-1, 1, 1, 1)
    t = torch.cat([torch.tensor([-13.3], dtype=torch.float64), -4.15 + 9.15 * nodes]).expand(len(levels), -1)
    columns = torch.cat([torch.ones(1), weights / 2]).double().expand(len(levels), -1)
    design = Design(t, columns, torch.zeros(t.shape[1], dtype=torch.int64))
    made = bound(PIXEL.denoiser(LINEAR))
    total = elbo(made.denoiser, levels, torch.arange(len(levels)), design, 0, made.variance, 200_000).parts()[0]
    table = torch.zeros(256, dtype=torch.float64)
    table[WORLD.levels] = (total.reshape(len(LEVELS), -1) * density).sum(1)
    return table


def test_95_percent_intervals_cover_the_bound_92_to_98_percent_of_the_time(monkeypatch, given_noise):
    """200 seeds: that of given images with fixed ones, that of the population with fresh ones."""
    table = expected_of_levels(given_noise)
    monkeypatch.undo()
    n, denoiser = 64, WORLD.denoiser(LINEAR)
    fixed, made = WORLD.images(n, 7), bound(denoiser)
    of_fixed = float(table[fixed.long()].mean())
    of_population = float((WORLD.probabilities * table[WORLD.levels]).sum())
    given = population = 0
    for seed in range(8):
        for fresh in (False, True):
            images = WORLD.images(25 * n, 100 + seed) if fresh else fixed.repeat(25, 1, 1, 1)
            ids = torch.arange(len(images))
            design = continuous_design(ids, seed, LINEAR, 8)
            found = elbo(denoiser, images, ids, design, seed, made.variance, batch_size=len(images))
            for values in found.replicates.split(n):
                statistics = MeanStatistics.of(values, GROUP_SIZE)
                if fresh:
                    population += covers(statistics.population, statistics.mean, of_population)
                else:
                    given += covers(statistics.given_images, statistics.mean, of_fixed)
    assert 184 <= given <= 196
    assert 184 <= population <= 196


@pytest.mark.parametrize("low", [-13.3, -9.0])
def test_an_images_bound_is_that_of_its_own_noise_whatever_the_batch(low):
    """Bit for bit, also at the decoder: for other companions, and for another batch size."""
    denoiser, images, ids = WORLD.denoiser(ContinuousProcess.linear(low, 5.0)), WORLD.images(60), torch.arange(20, 80)
    made, rows = bound(denoiser), torch.tensor([4, 1])
    designs = [continuous_design(positions, 1, denoiser.process, 4) for positions in (ids, ids[rows])]
    full = elbo(denoiser, images, ids, designs[0], 3, made.variance, batch_size=360)
    part = elbo(denoiser, images[rows], ids[rows], designs[1], 3, made.variance, batch_size=7)
    for name in ("prior", "terms", "terms_clipped", "eps_mse", "decoder_draws"):
        assert torch.equal(getattr(part, name), getattr(full, name)[rows]), name


@pytest.mark.parametrize("num_timesteps", [10, 50])
def test_other_t_follow_from_continuous_evaluations(num_timesteps, modern_reference):
    """What the errors over gamma say of T steps: within 4 standard errors of the quadrature."""
    cases = modern_reference["vdm_world"]["cases"]
    (case,) = [case for case in cases if case["T"] == num_timesteps and case["g0"] == -13.3]
    n = 3000
    images, ids = WORLD.images(n), torch.arange(n)
    design = continuous_design(ids, 2, LINEAR, 32)
    found = elbo(WORLD.denoiser(LINEAR), images, ids, design, 2, bound(WORLD.denoiser(LINEAR)).variance, batch_size=n)
    later = ~design.first
    terms = torch.zeros_like(found.terms)
    terms[:, later] = steps_from_continuous(LINEAR, num_timesteps, design.t[:, later], found.eps_mse[:, later])
    sums = design.replicate_values(torch.zeros(n, dtype=torch.float64), terms)
    statistics = MeanStatistics.of(sums, GROUP_SIZE)
    # Averaged over a stretch of gamma around each step, it is biased by the curvature of the error.
    assert (
        abs(statistics.mean - case["diffusion"]) < 4 * statistics.population.standard_error + 0.02 * case["diffusion"]
    )


@pytest.mark.parametrize(("k", "replicates"), [(0, 2), (1, 2), (3, 2), (2, 3), (-2, 2)])
def test_a_bad_number_of_times_is_refused(k, replicates):
    with pytest.raises(ConfigError, match=rf"^k: {k} is not a multiple of {replicates}, at least {replicates}"):
        continuous_design(torch.arange(3), 0, LINEAR, k, replicates)
