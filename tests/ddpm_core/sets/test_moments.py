"""Moments: their definition, Chan, Golub and LeVeque's (1983) merge, and bits that no number of threads changes."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_core.errors import ConfigError
from ddpm_core.sets.moments import Moments


def features(rows: int, seed: int = 0, d: int = 3, offset: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, d)) * [1.0, 3.0, 0.1] + offset


def assert_close(found: Moments, expected: Moments, scale: float = 1.0) -> None:
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-9, atol=1e-9 * scale)


def test_of_features_are_their_mean_and_covariance():
    x = features(50)
    found = Moments.of(x)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-12)
    assert (found.m2 == found.m2.T).all()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 10**6), st.sampled_from([0.0, 1e4]))
def test_any_partition_merges_to_the_moments_of_all(sizes, seed, offset):
    x = features(sum(sizes) + 1, seed, offset=offset)
    pieces = [Moments.of(part) for part in np.split(x, np.cumsum(sizes))]
    assert_close(functools.reduce(Moments.merged, pieces), Moments.of(x), 1.0 + offset)
    assert_close(functools.reduce(Moments.merged, reversed(pieces)), Moments.of(x), 1.0 + offset)


def test_one_order_of_merges_gives_one_result_bit_for_bit_with_any_number_of_threads():
    pieces = np.split(np.random.default_rng(0).standard_normal((400, 64)), 8)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(functools.reduce(Moments.merged, map(Moments.of, pieces)))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert (found[0].mean == found[1].mean).all()
    assert (found[0].m2 == found[1].m2).all()


def test_nothing_merged_with_something_is_this():
    some = Moments.of(features(5))
    for merged in (Moments.empty(3).merged(some), some.merged(Moments.of(np.zeros((0, 3))))):
        assert_close(merged, some)


def test_one_row_has_no_covariance_and_infinity_no_moments():
    with pytest.raises(ConfigError, match="images: 1 is not >= 2"):
        _ = Moments.of(features(1)).covariance
    x = features(4)
    x[2, 1] = np.inf
    with pytest.raises(ConfigError, match="features: those of row 2"):
        Moments.of(x)
