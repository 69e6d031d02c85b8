"""Memorisation: Mann and Whitney's share by hand, DeLong's variance, and copies among samples."""

import numpy as np
import pytest
from scipy import stats

from ddpm_core.errors import ConfigError
from ddpm_core.sets.memorisation import alarm, closer, near, nearest_ratios
from ddpm_core.sets.neighbours import Neighbours


def test_closer_by_hand_with_ties():
    found = closer(np.array([1.0, 2.0, 5.0]), np.array([2.0, 3.0]))
    assert found.value == pytest.approx((1 + 1 + 0.5 + 1 + 0 + 0) / 6)


def test_closer_is_mann_and_whitneys_statistic_1947():
    rng = np.random.default_rng(0)
    samples, held_out = rng.random(80), rng.random(50) + 0.1
    expected = stats.mannwhitneyu(held_out, samples).statistic / (80 * 50)
    assert closer(samples, held_out).value == pytest.approx(expected, rel=1e-12)


def test_the_standard_error_at_equal_distributions():
    """(n + m + 1) / (12 n m), on average."""
    rng = np.random.default_rng(0)
    found = [closer(rng.random(60), rng.random(40)).standard_error ** 2 for _ in range(300)]
    assert np.mean(found) == pytest.approx(101 / (12 * 60 * 40), rel=0.03)


def test_near_counts_up_to_the_quantile():
    held_out = np.arange(1.0, 200.0)  # 199 of them: the quantile is at place 2
    assert near(np.array([1.0, 2.0, 2.5, 9.0]), held_out).value == 0.5
    assert near(np.array([0.5, 1.0, 1.5, 9.0]), np.arange(1.0, 10.0)).value == 0.5  # the first of few


def test_images_like_the_held_out_ones_are_near_with_the_quantiles_probability():
    rng = np.random.default_rng(0)
    found = [near(rng.random(100), rng.random(149)).value for _ in range(300)]
    assert np.mean(found) == pytest.approx(0.01, abs=4 * np.std(found) / np.sqrt(300))


@pytest.mark.parametrize(("copied", "noise", "by_distance", "by_ratio"), [
    (0.0, 0.0, False, False),
    (0.2, 0.01, True, True),
    (0.5, 0.3, False, True),
])  # fmt: skip
def test_copies_raise_the_alarm_and_new_images_do_not(copied, noise, by_distance, by_ratio):
    """Every other image lies among many like it; copies of the others with noise are still farther than these."""
    rng = np.random.default_rng(0)
    sparse = np.arange(500) % 2 == 1
    scales = np.where(sparse, 1.0, 0.1).astype(np.float32)[:, None]
    train, held_out, samples = (scales * rng.standard_normal((500, 16)).astype(np.float32) for _ in range(3))
    chosen = rng.random(500) < copied
    copies = train[rng.choice(np.flatnonzero(sparse), chosen.sum())]
    samples[chosen] = copies + noise * rng.standard_normal(copies.shape).astype(np.float32)
    lists = []
    for queries in (samples, held_out):
        found = Neighbours(queries, 2)
        found.add(np.arange(500), train)
        lists.append(found.distances)
    assert alarm(near(*(distances[:, 0] for distances in lists))) == by_distance
    assert alarm(near(*map(nearest_ratios, lists))) == by_ratio


def test_ratios():
    found = nearest_ratios(np.array([[1.0, 4.0], [0.0, 2.0], [0.0, 0.0]]))
    assert found.tolist() == [0.25, 0.0, 1.0]


def test_too_few_images():
    for function in (closer, near):
        with pytest.raises(ConfigError, match="images: 1 samples and 5 held out"):
            function(np.ones(1), np.ones(5))
