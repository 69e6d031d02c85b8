"""The kernel distance with an interval: disjoint blocks of every row, dealt by the streams' names alone."""

import numpy as np
import pytest

from ddpm_core.counter_random import permutation
from ddpm_core.errors import ConfigError
from ddpm_core.sets.distances import kernel_distance, kernel_estimate, kernel_rows


def features(n: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(n).normal(size=(n, 3)) + shift).astype(np.float32)


def test_it_is_the_mean_of_ten_blocks_or_of_one_for_every_thousand_rows() -> None:
    """Bińkowski 2018, sec. 3."""
    for n, m, num_blocks in ((47, 60, 10), (12_400, 12_000, 12)):
        x, y = features(n), features(m, 0.3)
        found = kernel_estimate(x, y, "x", "y")
        of_blocks = [
            kernel_distance(
                x[permutation(0, "x", 0, n)[block::num_blocks]], y[permutation(0, "y", 0, m)[block::num_blocks]]
            )
            for block in range(num_blocks)
        ]
        assert found.value == pytest.approx(np.mean(of_blocks), rel=1e-9)
        assert found.standard_error == pytest.approx(np.std(of_blocks, ddof=1) / num_blocks**0.5, rel=1e-9)
        assert found.low < kernel_distance(x, y) < found.high


def test_too_few_rows_for_the_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="which a kernel distance needs"):
        kernel_estimate(features(19), features(60), "x", "y")
    assert kernel_estimate(features(20), features(60), "x", "y").value > -1.0


def test_fifty_thousand_rows_of_a_larger_set_are_looked_at() -> None:
    assert kernel_rows(49_999, "x").tolist() == list(range(49_999))
    rows = kernel_rows(60_000, "x")
    assert (len(np.unique(rows)), rows.min() >= 0, rows.max() < 60_000) == (50_000, True, True)
    assert (np.diff(rows) > 0).all()
    assert not np.array_equal(rows, kernel_rows(60_000, "y"))
