"""Unbiased designs, and the coverage of the intervals in closed-form worlds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.denoisers import FunctionDenoiser, abar, terms_of, toy

from ddpm_core import counter_random
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.designs import (
    GROUP_SIZE,
    STREAM,
    full_design,
    importance_proposal,
    stratified_design,
    timestep_proposal,
)
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.intervals import MeanStatistics
from ddpm_core.likelihood.terms import prior_bpd, x_0_of
from ddpm_core.process.base import q_sample
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import BetaTilde, variance_named

SCHEDULE = DiscreteProcess.cosine(25)
T = SCHEDULE.num_timesteps
GREYS = torch.tensor([0, 60, 200, 255])
GREY_PROBABILITIES = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
ESTIMATORS = ["all", "stratified", "importance"]
SHAPE = (1, 4, 4)


class GreyWorld:
    """Pixels iid over four grey levels."""

    levels, probabilities = GREYS, GREY_PROBABILITIES

    @staticmethod
    def eps_fn(x_t, t):
        """E[eps | x_t]: the posterior mean of x_0 in closed form."""
        values = GREYS.double() / 127.5 - 1.0
        share = abar(SCHEDULE, t)
        distance = (x_t[..., None] - share.sqrt()[..., None] * values).square()
        weights = torch.softmax(GREY_PROBABILITIES.log() - distance / (2 * (1 - share[..., None])), -1)
        return (x_t - share.sqrt() * (weights * values).sum(-1)) / (1 - share).sqrt()


class GaussianWorld:
    """Pixels iid N(0.1, 0.3^2), rounded to levels; the eps is the best for the Gaussian itself."""

    mean, variance = 0.1, 0.09
    levels = torch.arange(256)
    edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 127.5 - 1.0
    probabilities = torch.tensor(stats.norm.cdf(edges, 0.1, 0.3)).diff()
    probabilities = probabilities / probabilities.sum()

    @classmethod
    def eps_fn(cls, x_t, t):
        share = abar(SCHEDULE, t)
        return (1 - share).sqrt() / (share * cls.variance + 1 - share) * (x_t - share.sqrt() * cls.mean)


WORLDS = {"grey": GreyWorld, "gaussian": GaussianWorld}


def draw_images(world, n, seed):
    g = torch.Generator().manual_seed(seed)
    index = torch.multinomial(world.probabilities, n * math.prod(SHAPE), replacement=True, generator=g)
    return world.levels[index].reshape(n, *SHAPE).to(torch.uint8)


def design_of(estimator, n, seed, k=8, proposal=None):
    if estimator == "all":
        return full_design(T, n, 2)
    return stratified_design(torch.arange(n), seed, timestep_proposal(SCHEDULE) if proposal is None else proposal, k)


def noise_of(seed, ids, column):
    return counter_random.normal(seed, STREAM, ids, column, SHAPE, dtype=torch.float64)


def evaluate(world, images, design, seed):
    """What the job does with its shard of images: every evaluation."""
    denoiser, ids = FunctionDenoiser(world.eps_fn, SCHEDULE, SHAPE), torch.arange(len(images))
    return elbo(denoiser, images, ids, design, seed, BetaTilde(), batch_size=min(design.t.numel(), 3200))


def pilot_proposal(world):
    images, design = draw_images(world, 64, 99), design_of("stratified", 64, 99, 16)
    found = evaluate(world, images, design, 99)
    return importance_proposal(SCHEDULE, design.t.reshape(-1), found.terms.reshape(-1))


def statistics(world, experiments, estimator, seed, proposal):
    """Of each experiment, which is a batch of images; ids and positions run on from one to the next."""
    images = torch.cat(experiments)
    design = design_of(estimator, len(images), seed, proposal=proposal if estimator == "importance" else None)
    replicates = evaluate(world, images, design, seed).replicates.split(len(experiments[0]))
    return [MeanStatistics.of(values, 1 if estimator == "all" else GROUP_SIZE) for values in replicates]


@pytest.fixture(scope="module")
def truth():
    """Expected ELBO (bits/dim) of a pixel of each level, by quadrature over the noise at every t."""
    z = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])

    def of(world):
        levels = world.levels.to(torch.uint8)
        rows = levels.repeat_interleave(len(z)).reshape(-1, 1, 1, 1)
        eps = z.repeat(len(levels)).reshape(-1, 1, 1, 1)
        total = prior_bpd(SCHEDULE, x_0_of(levels.reshape(-1, 1, 1, 1)))
        for step in range(T):
            t = torch.full((len(rows),), step)
            z_t = q_sample(SCHEDULE.at(t), x_0_of(rows), eps)
            terms = terms_of(SCHEDULE, rows, t, eps, world.eps_fn(z_t, t), BetaTilde())
            total = total + (terms.reshape(len(levels), -1) * density).sum(1)
        table = torch.zeros(256, dtype=torch.float64)
        table[world.levels] = total
        return table

    return {name: of(world) for name, world in WORLDS.items()}


def covers(variance, mean, target):
    return abs(mean - target) <= stats.t.ppf(0.975, variance.dof) * variance.standard_error


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", WORLDS)
def test_95_percent_intervals_cover_the_quadrature_value_92_to_98_percent_of_the_time(name, estimator, truth):
    """In 200 experiments: the one for given images with fixed images, the one for the population with fresh ones."""
    world, table, n = WORLDS[name], truth[name], 64
    proposal = pilot_proposal(world)
    fixed = draw_images(world, n, 0)
    of_fixed = float(table[fixed.long()].mean())
    of_population = float((world.probabilities * table[world.levels]).sum())
    given = population = 0
    errors = []
    for seed in range(8):
        for found in statistics(world, [fixed] * 25, estimator, seed, proposal):
            given += covers(found.given_images, found.mean, of_fixed)
            errors.append(found.mean - of_fixed)
        fresh = draw_images(world, 25 * n, 1000 + seed).split(n)
        for found in statistics(world, fresh, estimator, seed, proposal):
            population += covers(found.population, found.mean, of_population)
    assert 184 <= given <= 196
    assert 184 <= population <= 196
    error = torch.tensor(errors, dtype=torch.float64)
    assert abs(float(error.mean())) < 4 * float(error.std()) / 200**0.5  # unbiased


@pytest.mark.parametrize("name", WORLDS)
def test_the_data_sets_interval_covers_when_some_of_its_images_are_evaluated(name, truth):
    """The finite-population part: 48 of 96 images, in a fresh random order each time."""
    world, table = WORLDS[name], truth[name]
    images = draw_images(world, 96, 0)
    target, covered = float(table[images.long()].mean()), 0
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        experiments = [images[torch.randperm(96, generator=g)[:48]] for _ in range(25)]
        for found in statistics(world, experiments, "stratified", seed, None):
            covered += covers(found.data_set(96), found.mean, target)
    assert 184 <= covered <= 196


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_elbo_is_not_below_the_entropy(estimator):
    """Ho 2020, eq. 5: -log p <= ELBO, so the mean ELBO of any network is at least the images' entropy."""
    world, n = GreyWorld, 2000
    entropy = -float((GREY_PROBABILITIES * GREY_PROBABILITIES.log2()).sum())
    (found,) = statistics(world, [draw_images(world, n, 5)], estimator, 0, pilot_proposal(world))
    assert found.mean > entropy - 4 * found.population.standard_error


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 10**6))
def test_a_stratified_design_counts_every_t_as_often_as_its_probability(half, n, seed):
    proposal = timestep_proposal(SCHEDULE)
    design = stratified_design(torch.arange(n), seed, proposal, 2 * half)
    assert design.t.shape == (n, 2 * half + 2)
    assert bool(((design.t >= 0) & (design.t < T)).all())
    assert bool(((design.t == 0).sum(1) == 2).all())
    if n % GROUP_SIZE == 0:
        # a whole group is one systematic sample: each t comes floor or ceil of its expected number of times
        for replicate in range(2):
            t = design.t[:, design.replicate == replicate]
            count = torch.bincount(t[t > 0], minlength=T)[1:]
            assert bool(((count - n * half * proposal).abs() < (n // GROUP_SIZE) + 1e-9).all())


def test_a_design_depends_on_seed_and_position_only():
    proposal = timestep_proposal(SCHEDULE)
    whole = stratified_design(torch.arange(64), 4, proposal, 6)
    part = stratified_design(torch.arange(16, 48), 4, proposal, 6)
    assert torch.equal(whole.t[16:48], part.t)
    assert not torch.equal(whole.t, stratified_design(torch.arange(64), 5, proposal, 6).t)


def test_the_full_design_gives_the_terms_of_every_t():
    """Ho 2020, eq. 5, term by term: with M draws each t has weight 1/M and the sum is the ELBO."""
    images = draw_images(GreyWorld, 6, 1)
    design = full_design(T, 6, 3)
    found = evaluate(GreyWorld, images, design, 9)
    expected = prior_bpd(SCHEDULE, x_0_of(images))
    for column in range(3 * T):
        t = torch.full((6,), column % T)
        eps = noise_of(9, torch.arange(6), torch.full((6,), column))
        eps_pred = GreyWorld.eps_fn(q_sample(SCHEDULE.at(t), x_0_of(images), eps), t)
        expected = expected + terms_of(SCHEDULE, images, t, eps, eps_pred, BetaTilde()) / 3
    torch.testing.assert_close(found.replicates.mean(1), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.parts()[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde"])
@pytest.mark.parametrize("clip", [False, True])
def test_terms_of_a_batch_are_those_of_its_rows(sigma2, clip):
    """Ho 2020, eqs. 5, 12 and 13, at mixed t in one batch."""
    images = draw_images(GreyWorld, 8, 2)
    t = torch.tensor([0, 3, 24, 1, 0, 20, 7, 2])
    eps = noise_of(1, torch.arange(8), t)
    eps_pred = eps + 0.3 * noise_of(2, torch.arange(8), t)
    found = terms_of(SCHEDULE, images, t, eps, eps_pred, variance_named(sigma2), clip)
    for row in range(8):
        one = slice(row, row + 1)
        expected = terms_of(SCHEDULE, images[one], t[one], eps[one], eps_pred[one], variance_named(sigma2), clip)
        torch.testing.assert_close(found[one], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_timesteps", [2, 3, 20])
def test_the_step_to_an_snr_of_0_counts_as_the_longest_of_the_others(num_timesteps):
    process = DiscreteProcess.linear(num_timesteps, 0.01, 0.3).rescaled_to_zero_terminal_snr()
    proposal = timestep_proposal(process)
    others = (-process.log_snr.diff())[:-1].tolist()
    wanted = torch.tensor([*others, max(others, default=1.0)], dtype=torch.float64)
    torch.testing.assert_close(proposal, wanted / wanted.sum())


def test_importance_is_a_distribution_that_follows_the_kls_and_keeps_a_floor():
    """Nichol and Dhariwal 2021, eq. 18: in proportion to the root mean square."""
    plain = timestep_proposal(SCHEDULE)
    t = torch.arange(T).repeat(3)
    kl = torch.cat(
        [torch.zeros(1, dtype=torch.float64), plain * torch.where(torch.arange(1, T) < 10, 5.0, 1.0)]
    ).repeat(3)
    found = importance_proposal(SCHEDULE, t, kl)
    assert float(found.sum()) == pytest.approx(1.0)
    assert bool((found >= 0.2 * plain).all())
    ratio = (found / plain - 0.2) / 0.8
    assert float(ratio[0] / ratio[-1]) == pytest.approx(5.0, rel=1e-6)


def test_importance_survives_a_first_pass_that_missed_stretches():
    found = importance_proposal(SCHEDULE, torch.tensor([0, 1]), torch.tensor([3.0, 0.2], dtype=torch.float64))
    assert bool(found.isfinite().all())
    assert float(found.sum()) == pytest.approx(1.0)


@given(st.integers(2, 60), st.data())
@settings(max_examples=50, deadline=None)
def test_strata_hold_one_time_step_each(num_timesteps, data):
    k = data.draw(st.integers(1, num_timesteps - 1))
    proposal = timestep_proposal(DiscreteProcess.linear(num_timesteps, 0.01, 0.3))
    # One image to a group: its own strata, shifted by a number of its own.
    design = stratified_design(torch.arange(50) * GROUP_SIZE, 3, proposal, k, replicates=1)
    t = design.t[:, 1:]
    assert int(t.min()) >= 1
    assert int(t.max()) <= num_timesteps - 1
    upper = proposal.cumsum(0)
    lower = upper - proposal
    stratum = torch.arange(k).double() / k
    assert bool((upper[t - 1] >= stratum - 1e-9).all())
    assert bool((lower[t - 1] <= stratum + 1 / k + 1e-9).all())


def test_the_proposal_is_uniform_in_log_snr():
    """Kingma 2021, VDM, sec. 5.1: the probability of t is its share of the whole change of log-SNR."""
    schedule = DiscreteProcess.cosine(100)
    proposal = timestep_proposal(schedule)
    change = (schedule.snr[:-1] / schedule.snr[1:]).log()
    torch.testing.assert_close(proposal, change / (schedule.snr[0] / schedule.snr[-1]).log(), rtol=1e-9, atol=0)
    assert float(proposal.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_time_step_is_expected_as_often_as_it_is_weighted(k):
    n = 40_000
    proposal = timestep_proposal(DiscreteProcess.linear(12, 0.01, 0.3))
    t = stratified_design(torch.arange(n) * GROUP_SIZE, 1, proposal, k, replicates=1).t[:, 1:]
    frequency = torch.bincount(t.flatten(), minlength=12)[1:].double() / n
    expected = k * proposal
    assert bool(((frequency - expected).abs() < 4 * (expected / n) ** 0.5).all())


def test_importance_makes_the_estimate_tighter_than_uniform_time_steps_would():
    """The spread of a single image's estimate against that of T / K times K uniformly drawn KLs."""
    schedule, images = DiscreteProcess.linear(), torch.tensor([7, 90, 160, 250], dtype=torch.uint8).reshape(1, 1, 2, 2)
    images = images.expand(500, -1, -1, -1)
    ids, positions = torch.arange(500), torch.arange(500) * GROUP_SIZE
    spreads = []
    for proposal in (timestep_proposal(schedule), torch.full((999,), 1 / 999, dtype=torch.float64)):
        design = stratified_design(positions, 1, proposal, 8, replicates=1)
        _, _, kl_sum = elbo(toy(schedule, (1, 2, 2)), images, ids, design, 1, BetaTilde(), batch_size=500).parts()
        spreads.append(float(kl_sum.std()))
    assert spreads[0] < 0.5 * spreads[1]


@pytest.mark.parametrize("k", [0, 1, 3, 26])
def test_refusals(k):
    with pytest.raises(ConfigError, match=r"k: \d+ is not an even number in 2..24"):
        stratified_design(torch.arange(4), 0, timestep_proposal(SCHEDULE), k)
    with pytest.raises(ConfigError, match="draws: 0 is not >= 1"):
        full_design(T, 4, 0)
