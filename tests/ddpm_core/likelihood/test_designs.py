"""Unbiased designs, what follows from stored eps errors, and the coverage of the intervals in closed-form worlds."""

import math

import pytest
import torch
from ddpm_core.sampling import ddim_timesteps
from ddpm_core.schedule import NoiseSchedule
from ddpm_core.uncertainty import MeanStatistics
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ddpm_core import estimators as es
from ddpm_core import likelihood as lk
from ddpm_core.errors import ConfigError

SCHEDULE = NoiseSchedule.cosine(25)
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
        abar = SCHEDULE.gather("alphas_cumprod", t, x_t)
        distance = (x_t[..., None] - abar.sqrt()[..., None] * values).square()
        weights = torch.softmax(GREY_PROBABILITIES.log() - distance / (2 * (1 - abar[..., None])), -1)
        return (x_t - abar.sqrt() * (weights * values).sum(-1)) / (1 - abar).sqrt()


class GaussianWorld:
    """Pixels iid N(0.1, 0.3^2), rounded to levels; the eps is the best for the Gaussian itself."""

    mean, variance = 0.1, 0.09
    levels = torch.arange(256)
    edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 127.5 - 1.0
    probabilities = torch.tensor(stats.norm.cdf(edges, 0.1, 0.3)).diff()
    probabilities = probabilities / probabilities.sum()

    @classmethod
    def eps_fn(cls, x_t, t):
        abar = SCHEDULE.gather("alphas_cumprod", t, x_t)
        return (1 - abar).sqrt() / (abar * cls.variance + 1 - abar) * (x_t - abar.sqrt() * cls.mean)


WORLDS = {"grey": GreyWorld, "gaussian": GaussianWorld}


def draw_images(world, n, seed):
    g = torch.Generator().manual_seed(seed)
    index = torch.multinomial(world.probabilities, n * math.prod(SHAPE), replacement=True, generator=g)
    return world.levels[index].reshape(n, *SHAPE).to(torch.uint8)


def design_of(estimator, n, seed, k=8, proposal=None):
    if estimator == "all":
        return es.full_design(T, n, 2)
    return es.stratified_design(
        torch.arange(n), seed, lk.timestep_proposal(SCHEDULE) if proposal is None else proposal, k
    )


def evaluate(world, images, design, seed, sigma2="beta_tilde"):
    """What the job does with its shard of images: scores [B, E] of every evaluation."""
    n, columns = design.t.shape
    rows = torch.arange(n).repeat_interleave(columns)
    column, t = torch.arange(columns).repeat(n), design.t.reshape(-1)
    eps = es.evaluation_noise(seed, rows, column, SHAPE)
    abar = SCHEDULE.gather("alphas_cumprod", t, eps)
    x_t = abar.sqrt() * lk.x_0_of(images[rows]) + (1 - abar).sqrt() * eps
    return es.score(SCHEDULE, images[rows], t, eps, world.eps_fn(x_t, t), sigma2)


def pilot_proposal(world):
    images, design = draw_images(world, 64, 99), design_of("stratified", 64, 99, 16)
    scores = evaluate(world, images, design, 99)
    return es.importance_proposal(SCHEDULE, design.t.reshape(-1), scores.term)


def statistics(world, images, estimator, seed, proposal):
    design = design_of(estimator, len(images), seed, proposal=proposal if estimator == "importance" else None)
    terms = evaluate(world, images, design, seed).term.reshape(design.t.shape)
    values = es.replicate_values(design, lk.prior_bpd(SCHEDULE, lk.x_0_of(images)), terms)
    return MeanStatistics.of(values, 1 if estimator == "all" else es.GROUP_SIZE)


@pytest.fixture(scope="module")
def truth():
    """Expected ELBO (bits/dim) of a pixel of each level, by quadrature over the noise at every t."""
    z = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])

    def of(world):
        levels = world.levels.to(torch.uint8)
        rows = levels.repeat_interleave(len(z)).reshape(-1, 1, 1, 1)
        eps = z.repeat(len(levels)).reshape(-1, 1, 1, 1)
        total = lk.prior_bpd(SCHEDULE, lk.x_0_of(levels.reshape(-1, 1, 1, 1)))
        for step in range(T):
            t = torch.full((len(rows),), step)
            abar = SCHEDULE.alphas_cumprod[step]
            x_t = abar.sqrt() * lk.x_0_of(rows) + (1 - abar).sqrt() * eps
            terms = es.score(SCHEDULE, rows, t, eps, world.eps_fn(x_t, t), "beta_tilde").term
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
    """Over 200 seeds: the one for given images with fixed images, the one for the population with fresh ones."""
    world, table, n = WORLDS[name], truth[name], 64
    proposal = pilot_proposal(world)
    fixed = draw_images(world, n, 0)
    of_fixed = float(table[fixed.long()].mean())
    of_population = float((world.probabilities * table[world.levels]).sum())
    given = population = 0
    errors = []
    for seed in range(200):
        found = statistics(world, fixed, estimator, seed, proposal)
        given += covers(found.given_images, found.mean, of_fixed)
        errors.append(found.mean - of_fixed)
        found = statistics(world, draw_images(world, n, 1000 + seed), estimator, seed, proposal)
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
    for seed in range(200):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(seed))[:48]
        found = statistics(world, images[order], "stratified", seed, None)
        covered += covers(found.data_set(96), found.mean, target)
    assert 184 <= covered <= 196


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_elbo_is_not_below_the_entropy(estimator):
    """Ho 2020, eq. 5: -log p <= ELBO, so the mean ELBO of any network is at least the images' entropy."""
    world, n = GreyWorld, 2000
    entropy = -float((GREY_PROBABILITIES * GREY_PROBABILITIES.log2()).sum())
    found = statistics(world, draw_images(world, n, 5), estimator, 0, pilot_proposal(world))
    assert found.mean > entropy - 4 * found.population.standard_error


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 10**6))
def test_a_stratified_design_counts_every_t_as_often_as_its_probability(half, n, seed):
    proposal = lk.timestep_proposal(SCHEDULE)
    design = es.stratified_design(torch.arange(n), seed, proposal, 2 * half)
    assert design.t.shape == (n, 2 * half + 2)
    assert bool(((design.t >= 0) & (design.t < T)).all())
    assert bool(((design.t == 0).sum(1) == 2).all())
    if n % es.GROUP_SIZE == 0:
        # a whole group is one systematic sample: each t comes floor or ceil of its expected number of times
        for replicate in range(2):
            t = design.t[:, design.replicate == replicate]
            count = torch.bincount(t[t > 0], minlength=T)[1:]
            assert bool(((count - n * half * proposal).abs() < (n // es.GROUP_SIZE) + 1e-9).all())


def test_a_design_depends_on_seed_and_position_only():
    proposal = lk.timestep_proposal(SCHEDULE)
    whole = es.stratified_design(torch.arange(64), 4, proposal, 6)
    part = es.stratified_design(torch.arange(16, 48), 4, proposal, 6)
    assert torch.equal(whole.t[16:48], part.t)
    assert not torch.equal(whole.t, es.stratified_design(torch.arange(64), 5, proposal, 6).t)


def test_the_full_design_gives_the_terms_of_elbo_terms():
    """Ho 2020, eq. 5, term by term: with M draws each t has weight 1/M and the sum is elbo_terms' total."""
    images, ids = draw_images(GreyWorld, 6, 1), torch.arange(6)
    design = es.full_design(T, 6, 3)
    scores = evaluate(GreyWorld, images, design, 9)
    values = es.replicate_values(design, lk.prior_bpd(SCHEDULE, lk.x_0_of(images)), scores.term.reshape(6, -1))
    same = lk.elbo_terms(SCHEDULE, GreyWorld.eps_fn, images, ids, 9, draws=3, network_dtype=torch.float64)
    torch.testing.assert_close(values.mean(1), same.total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde"])
@pytest.mark.parametrize("clip", [False, True])
def test_score_is_term_bpd_row_by_row(sigma2, clip):
    """Ho 2020, eqs. 5, 12 and 13, at mixed t in one batch."""
    images = draw_images(GreyWorld, 8, 2)
    t = torch.tensor([0, 3, 24, 1, 0, 20, 7, 2])
    eps = es.evaluation_noise(1, torch.arange(8), t, SHAPE)
    eps_pred = eps + 0.3 * es.evaluation_noise(2, torch.arange(8), t, SHAPE)
    found = es.score(SCHEDULE, images, t, eps, eps_pred, sigma2)
    for row in range(8):
        one = slice(row, row + 1)
        expected = lk.term_bpd(SCHEDULE, images[one], int(t[row]), eps[one], eps_pred[one], sigma2, clip)
        torch.testing.assert_close((found.term_clipped if clip else found.term)[one], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sigma2", ["beta", "beta_tilde", "optimal"])
def test_the_kl_under_any_variances_follows_from_the_eps_error(sigma2):
    """Ho 2020, eq. 12, with its constant; 'optimal' as Bao 2022 has it."""
    if sigma2 == "optimal":
        sigma2 = lk.optimal_sigma2(SCHEDULE, torch.linspace(0.9, 0.1, T))
    images, t = draw_images(GreyWorld, 5, 3), torch.tensor([1, 4, 10, 20, 24])
    eps = es.evaluation_noise(1, torch.arange(5), t, SHAPE)
    eps_pred = eps + 0.3 * es.evaluation_noise(2, torch.arange(5), t, SHAPE)
    expected = es.score(SCHEDULE, images, t, eps, eps_pred, sigma2)
    torch.testing.assert_close(es.kl_from_eps_mse(SCHEDULE, t, expected.eps_mse, sigma2), expected.term)


@pytest.mark.parametrize("k", [2, 5, 10, 25])
def test_a_sub_sequences_elbo_follows_from_the_eps_errors(k):
    """Kingma 2021, VDM, eq. 14, against the same model with the sub-sequence's own schedule, evaluated directly."""
    steps = ddim_timesteps(T, k)
    abar = SCHEDULE.alphas_cumprod[steps]
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    short = NoiseSchedule.from_betas(1 - abar / before)
    # The decoder keeps the variance it has in the full sequence: nothing else would follow from what is stored.
    sigma2 = torch.cat([SCHEDULE.posterior_variance[1:2], short.posterior_variance[1:]])
    images = draw_images(GreyWorld, 4, 3)
    design = es.full_design(T, 4, 1)
    scores = evaluate(GreyWorld, images, design, 3)
    terms, mse = scores.term.reshape(4, T), scores.eps_mse.reshape(4, T)
    found = terms[:, 0] + es.subsequence_kl(SCHEDULE, steps, design.t, mse).sum(1)
    expected = torch.zeros(4, dtype=torch.float64)
    for index, step in enumerate(steps):
        eps = es.evaluation_noise(3, torch.arange(4), torch.full((4,), step), SHAPE)
        x_t = abar[index].sqrt() * lk.x_0_of(images) + (1 - abar[index]).sqrt() * eps
        eps_pred = GreyWorld.eps_fn(x_t, torch.full((4,), step))
        expected += lk.term_bpd(short, images, index, eps, eps_pred, sigma2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_importance_is_a_distribution_that_follows_the_kls_and_keeps_a_floor():
    """Nichol and Dhariwal 2021, eq. 18: in proportion to the root mean square."""
    plain = lk.timestep_proposal(SCHEDULE)
    t = torch.arange(T).repeat(3)
    kl = torch.cat(
        [torch.zeros(1, dtype=torch.float64), plain * torch.where(torch.arange(1, T) < 10, 5.0, 1.0)]
    ).repeat(3)
    found = es.importance_proposal(SCHEDULE, t, kl)
    assert float(found.sum()) == pytest.approx(1.0)
    assert bool((found >= 0.2 * plain).all())
    ratio = (found / plain - 0.2) / 0.8
    assert float(ratio[0] / ratio[-1]) == pytest.approx(5.0, rel=1e-6)


def test_importance_survives_a_first_pass_that_missed_stretches():
    found = es.importance_proposal(SCHEDULE, torch.tensor([0, 1]), torch.tensor([3.0, 0.2], dtype=torch.float64))
    assert bool(found.isfinite().all())
    assert float(found.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("k", [0, 1, 3, 26])
def test_refusals(k):
    with pytest.raises(ConfigError, match=r"k: \d+ is not an even number in 2..24"):
        es.stratified_design(torch.arange(4), 0, lk.timestep_proposal(SCHEDULE), k)
    with pytest.raises(ConfigError, match="draws: 0 is not >= 1"):
        es.full_design(T, 4, 0)
