"""Classification by likelihood (Li 2023, eq. 7) in a world whose posterior is known."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from support.denoisers import ClassWorld, GreyWorld

from ddpm_core.denoiser import Labels, Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.bounds import bound_of
from ddpm_core.likelihood.classify import Classification, Effort, classify
from ddpm_core.likelihood.designs import continuous_design
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.ode import ode_bpd
from ddpm_core.process.base import Images, Time
from ddpm_core.process.continuous import ContinuousProcess

PROCESS = ContinuousProcess.linear(-13.3, 6.0)
LEVELS = [60, 128, 200]
WORLD = ClassWorld(
    PROCESS,
    [GreyWorld(LEVELS, [0.6, 0.3, 0.1]), GreyWorld(LEVELS, [0.2, 0.5, 0.3]), GreyWorld(LEVELS, [0.1, 0.3, 0.6])],
    [0.5, 0.3, 0.2],
)
LOG_PRIOR = torch.tensor(WORLD.prior, dtype=torch.float64).log()


def classified(levels: torch.Tensor, effort: Effort, k: int = 16, seed: int = 0, first: int = 0) -> Classification:
    ids = torch.arange(first, first + len(levels))
    return classify(
        bound_of(WORLD), levels, ids, ids, torch.arange(3), LOG_PRIOR,
        lambda positions, seed: continuous_design(positions, seed, PROCESS, k, 1), effort, seed, batch_size=2048,
    )  # fmt: skip


def test_the_conditional_bound_is_the_conditional_entropy_and_the_null_class_s_that_of_the_mixture() -> None:
    """H(x | c) <= H(x) = H(x | c) + I(x; c): with the best denoiser both bounds are met."""
    levels, label = WORLD.images(1024, seed=3)
    ids = torch.arange(len(levels))
    design = continuous_design(ids, 1, PROCESS, 64)
    bound = bound_of(WORLD)
    surprise = torch.stack([world.surprise(levels) for world in WORLD.classes], 1)
    of_class = surprise[ids, label]
    mixture = -((LOG_PRIOR - 4 * math.log(2.0) * surprise).logsumexp(1)) / (4 * math.log(2.0))
    for given, exact in ((label, of_class), (None, mixture)):
        found = elbo(WORLD, levels, ids, design, 1, bound.variance, 4096, label=given)
        error = found.parts()[0] - exact
        # The times of a group are spread evenly together: 64 groups of 16.
        by_group = error.reshape(-1, 16).mean(1)
        assert float(by_group.mean()) == pytest.approx(0.0, abs=4 * float(by_group.std()) / 8 + 2e-3)
    assert float(of_class.mean()) < float(mixture.mean())


def test_the_classifier_reaches_the_bayes_error_and_its_posterior_is_calibrated() -> None:
    levels, label = WORLD.images(600, seed=5)
    found, exact = classified(levels, Effort(24)), WORLD.posterior(levels)
    n = len(levels)
    # Of the draws alone, the posterior is off by as much as its logits are.
    bayes = 1.0 - exact.amax(1)
    wrong = (found.predicted != label).double()
    assert float(wrong.mean()) == pytest.approx(float(bayes.mean()), abs=4 * float(wrong.std()) / n**0.5)
    confidence = found.posterior.amax(1)
    for low, high in ((0.3, 0.6), (0.6, 0.75), (0.75, 1.0)):
        chosen = (confidence >= low) & (confidence < high)
        hits, m = 1.0 - wrong[chosen], int(chosen.sum())
        assert m > 50
        assert float(hits.mean()) == pytest.approx(float(confidence[chosen].mean()), abs=4 * 0.5 / m**0.5)


@pytest.mark.parametrize("rounds", [2, 4, 8])
def test_the_margin_s_error_is_that_of_the_margin(rounds: int) -> None:
    """In units of their errors, the margins' deviations from the exact ones have a mean square of about 1."""
    levels, _ = WORLD.images(320, seed=6)
    found, odds = classified(levels, Effort(rounds), k=6), WORLD.posterior(levels).log()
    best = found.predicted
    second = found.posterior.scatter(1, best[:, None], -1.0).argmax(1)
    rows = torch.arange(len(levels))
    pull = (found.margin - (odds[rows, best] - odds[rows, second])) / found.margin_error
    # Of 4 pixels few draws see the few times that tell the classes apart: before they are many, tails are heavy.
    most, tails = {2: (2.0, 0.1), 4: (1.6, 0.08), 8: (1.3, 0.04)}[rounds]
    assert 0.5 < float(pull.square().mean().sqrt()) < most
    assert float((pull.abs() > 3).double().mean()) < tails


def test_a_model_that_gives_no_number_has_no_posterior() -> None:
    levels, _ = WORLD.images(4, seed=1)
    ids = torch.arange(4)

    @dataclass
    class Broken(ClassWorld):
        def __call__(self, z_t: Images, time: Time, label: Labels | None = None) -> Prediction:
            found = super().__call__(z_t, time, label)
            return replace(found, held=torch.where((label == 1)[:, None, None, None], math.nan, found.held))

    broken = Broken(PROCESS, WORLD.classes, WORLD.prior)
    found = classify(
        bound_of(broken), levels, ids, ids, torch.arange(3), LOG_PRIOR,
        lambda positions, seed: continuous_design(positions, seed, PROCESS, 4, 1), Effort(3, 2.0), 0,
    )  # fmt: skip
    assert bool(found.posterior.isnan().all())


def test_giving_up_classes_costs_less_and_decides_as_well() -> None:
    shares = ([0.9, 0.08, 0.02], [0.05, 0.9, 0.05], [0.02, 0.08, 0.9], [0.4, 0.2, 0.4])
    apart = [GreyWorld(LEVELS, each, (1, 6, 6)) for each in shares]
    world = ClassWorld(PROCESS, apart, [0.25] * 4)
    levels, label = world.images(64, seed=2)
    ids = torch.arange(64)

    def found(effort: Effort) -> Classification:
        return classify(
            bound_of(world), levels, ids, ids, torch.arange(4), torch.full((4,), 0.25).double().log(),
            lambda positions, seed: continuous_design(positions, seed, PROCESS, 6, 1), effort, 0, batch_size=512,
        )  # fmt: skip

    fixed, adaptive = found(Effort(8)), found(Effort(8, 3.0))
    assert bool((fixed.evaluations == 4 * 8 * 7).all())
    assert float(fixed.evaluations.double().mean()) > 1.5 * float(adaptive.evaluations.double().mean())
    assert float((fixed.predicted == label).double().mean()) > 0.95
    assert int((adaptive.predicted != fixed.predicted).sum()) <= 1
    torch.testing.assert_close(adaptive.posterior.sum(1), torch.ones(64, dtype=torch.float64))


def test_an_image_s_classification_depends_on_its_id_and_place_alone() -> None:
    levels, _ = WORLD.images(32, seed=9)
    whole, part = classified(levels, Effort(4, 2.0)), classified(levels[16:], Effort(4, 2.0), first=16)
    torch.testing.assert_close(whole.posterior[16:], part.posterior, rtol=1e-9, atol=1e-12)
    assert torch.equal(whole.evaluations[16:], part.evaluations)
    assert not torch.equal(whole.posterior, classified(levels, Effort(4, 2.0), seed=1).posterior)


def test_a_subset_of_the_classes_with_its_prior() -> None:
    levels, _ = WORLD.images(16, seed=4)
    ids = torch.arange(16)

    def of(classes: list[int], prior: list[float], rounds: int = 2) -> Classification:
        return classify(
            bound_of(WORLD), levels, ids, ids, torch.tensor(classes), torch.tensor(prior, dtype=torch.float64).log(),
            lambda positions, seed: continuous_design(positions, seed, PROCESS, 8, 1), Effort(rounds), 0,
        )  # fmt: skip

    two, three = of([0, 2], [0.5, 0.5]), of([0, 1, 2], [0.2, 0.6, 0.2])
    torch.testing.assert_close(two.posterior, torch.nn.functional.normalize(three.posterior[:, [0, 2]], p=1, dim=1))
    # Of the best class the bound of `elbo` itself, on the same noise.
    designs = [continuous_design(ids, seed, PROCESS, 8, 1) for seed in (0, 1 << 33)]
    plain = [
        elbo(WORLD, levels, ids, design, seed, bound_of(WORLD).variance, label=ids * 0).parts()[0]
        for design, seed in zip(designs, (0, 1 << 33), strict=True)
    ]
    torch.testing.assert_close(two.bits_per_dim[:, 0], (plain[0] + plain[1]) / 2)
    with pytest.raises(ConfigError, match="two or more"):
        of([1], [1.0])
    for rounds, separation in ((1, None), (2, 0.0), (2, math.inf)):
        with pytest.raises(ConfigError):
            Effort(rounds, separation)


def test_the_flow_s_likelihood_is_told_the_label_too() -> None:
    """p(x | c) by the ODE of each class, as the ODE of a world with that class alone has it."""
    levels, _ = WORLD.images(4, seed=8)
    ids = torch.arange(4)
    for c, world in enumerate(WORLD.classes):
        alone = ode_bpd(world.denoiser(PROCESS), levels, ids, 0, 16, 2)
        told = ode_bpd(WORLD, levels, ids, 0, 16, 2, label=torch.full((4,), c))
        torch.testing.assert_close(told.bits_per_dim, alone.bits_per_dim)
    untold = ode_bpd(WORLD, levels, ids, 0, 16, 2)
    torch.testing.assert_close(
        untold.bits_per_dim, ode_bpd(WORLD, levels, ids, 0, 16, 2, label=ids * 0 - 1).bits_per_dim
    )
    assert not torch.allclose(told.bits_per_dim, untold.bits_per_dim)
