"""Classification by likelihood (Li 2023, eq. 7) in a world whose posterior is known."""

import math

import pytest
import torch
from support.denoisers import ClassWorld, GreyWorld

from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.bounds import bound_of
from ddpm_core.likelihood.classify import Classification, Effort, classify
from ddpm_core.likelihood.designs import continuous_design
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.ode import ode_bpd
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
        lambda positions, seed: continuous_design(positions, seed, PROCESS, k), effort, seed, batch_size=2048,
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
    # The margin's error is that of the margin: in units of it, deviations are of order one.
    odds = exact.log()
    order = found.posterior.topk(2, 1).indices
    true_margin = (odds.gather(1, order[:, :1]) - odds.gather(1, order[:, 1:]))[:, 0]
    pull = (found.margin - true_margin) / found.margin_error
    assert 0.3 < float(pull.square().mean().sqrt()) < 1.5


def test_giving_up_classes_costs_less_and_decides_as_well() -> None:
    shares = ([0.9, 0.08, 0.02], [0.05, 0.9, 0.05], [0.02, 0.08, 0.9], [0.4, 0.2, 0.4])
    apart = [GreyWorld(LEVELS, each, (1, 6, 6)) for each in shares]
    world = ClassWorld(PROCESS, apart, [0.25] * 4)
    levels, label = world.images(64, seed=2)
    ids = torch.arange(64)

    def found(effort: Effort) -> Classification:
        return classify(
            bound_of(world), levels, ids, ids, torch.arange(4), torch.full((4,), 0.25).double().log(),
            lambda positions, seed: continuous_design(positions, seed, PROCESS, 6), effort, 0, batch_size=512,
        )  # fmt: skip

    fixed, adaptive = found(Effort(8)), found(Effort(8, 3.0))
    assert bool((fixed.evaluations == 4 * 8 * 8).all())
    assert float(fixed.evaluations.double().mean()) > 2 * float(adaptive.evaluations.double().mean())
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
            lambda positions, seed: continuous_design(positions, seed, PROCESS, 8), Effort(rounds), 0,
        )  # fmt: skip

    two, three = of([0, 2], [0.5, 0.5]), of([0, 1, 2], [0.2, 0.6, 0.2])
    torch.testing.assert_close(two.posterior, torch.nn.functional.normalize(three.posterior[:, [0, 2]], p=1, dim=1))
    # Of the best class the bound of `elbo` itself, on the same noise.
    plain = elbo(WORLD, levels, ids, continuous_design(ids, 0, PROCESS, 8), 0, bound_of(WORLD).variance, label=ids * 0)
    torch.testing.assert_close(of([0, 2], [0.5, 0.5], 1).bits_per_dim[:, 0], plain.parts()[0])
    with pytest.raises(ConfigError, match="two or more"):
        of([1], [1.0])
    for rounds, separation in ((0, None), (2, 0.0), (2, math.inf)):
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
