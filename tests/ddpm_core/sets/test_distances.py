"""Fréchet and kernel distance: closed forms, other implementations, and the bias that the limit is free of."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_mmd
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from ddpm_core.errors import ConfigError
from ddpm_core.sets.distances import frechet_distance, frechet_estimates, kernel_distance
from ddpm_core.sets.moments import Moments


def normal(mean: np.ndarray, covariance: np.ndarray, count: int = 100) -> Moments:
    return Moments(count, mean, covariance * (count - 1))


def rows(count: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, d)) * scale + shift


def test_frechet_distance_of_commuting_covariances_dowson_and_landau_1982():
    turn, _ = np.linalg.qr(rows(5, 5, 0))
    a, b = np.array([4.0, 1.0, 9.0, 0.25, 0.0]), np.array([1.0, 1.0, 16.0, 0.0, 0.0])
    means = rows(2, 5, 1)
    expected = np.square(means[0] - means[1]).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    found = frechet_distance(normal(means[0], turn * a @ turn.T), normal(means[1], turn * b @ turn.T))
    assert found == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("count", [3, 10, 100])
def test_a_set_is_at_distance_0_from_itself_also_with_fewer_rows_than_dimensions(count):
    moments = Moments.of(rows(count, 20, 0))
    assert 0.0 <= frechet_distance(moments, moments) < 1e-10 * np.trace(moments.covariance)


def test_the_distance_is_symmetric():
    a, b = Moments.of(rows(30, 20, 0)), Moments.of(rows(15, 20, 1, 2.0))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_as_torchmetrics_and_torch_fidelity_compute_them():
    x, y = rows(300, 16, 0), rows(200, 16, 1, 0.8, 0.3)
    a, b = Moments.of(x), Moments.of(y)
    found = frechet_distance(a, b)
    tensors = [torch.from_numpy(part) for part in (a.mean, a.covariance, b.mean, b.covariance)]
    assert found == pytest.approx(float(_compute_fid(*tensors)), rel=1e-5)
    statistics = [{"mu": part.mean, "sigma": part.covariance} for part in (a, b)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(theirs, rel=1e-5)
    x, y = x[:200], y[:200]  # theirs take sets of one size
    assert kernel_distance(x, y) == pytest.approx(float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y))), rel=1e-5)
    kernel = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1.0}
    assert kernel_distance(x, y) == pytest.approx(float(kernel_mmd(x, y, kid_kernel="poly", **kernel)), rel=1e-5)


def test_kernel_distance_by_its_definition_over_several_blocks(monkeypatch):
    monkeypatch.setattr("ddpm_core.sets.distances._BLOCK", 7)
    x, y = rows(20, 4, 0), rows(9, 4, 1, 1.0, 0.5)

    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p @ q.T / 4 + 1) ** 3

    within = [(kernel(p, p).sum() - np.trace(kernel(p, p))) / (len(p) * (len(p) - 1)) for p in (x, y)]
    assert kernel_distance(x, y) == pytest.approx(sum(within) - 2 * kernel(x, y).mean(), rel=1e-12)


def test_fd_is_biased_by_the_number_of_rows_while_its_limit_and_kid_are_not():
    """Chong and Forsyth 2020; Bińkowski 2018: 40 pairs of sets from equal distributions, d = 8."""
    d, repetitions = 8, 40
    bias = {}
    for count in (80, 160):
        found = []
        for seed in range(repetitions):
            x, y = rows(count, d, 2 * seed), rows(count, d, 2 * seed + 1)
            estimates = frechet_estimates(*([Moments.of(side[g::4]) for g in range(4)] for side in (x, y)))
            found.append([estimates[0].value, estimates[1].value, kernel_distance(x, y)])
        bias[count] = np.mean(found, axis=0), np.std(found, axis=0) / np.sqrt(repetitions)
    assert bias[80][0][0] / bias[160][0][0] == pytest.approx(2.0, rel=0.1)  # as 1/n
    for mean, error in bias.values():
        assert mean[0] > 20 * error[0]
        assert abs(mean[1]) < 3 * error[1]
        assert abs(mean[2]) < 3 * error[2]


def test_what_is_refused():
    a, b = Moments.of(rows(9, 3, 0)), Moments.of(rows(9, 4, 0))
    with pytest.raises(ConfigError, match="of 3 and 4 dimensions"):
        frechet_distance(a, b)
    with pytest.raises(ConfigError, match="of 3 and 4 dimensions"):
        kernel_distance(rows(9, 3, 0), rows(9, 4, 0))
    with pytest.raises(ConfigError, match="images: 1 is not >= 2"):
        kernel_distance(rows(9, 3, 0), rows(1, 3, 0))
    with pytest.raises(ConfigError, match="groups: 2 and 3 are not equally many"):
        frechet_estimates([a] * 2, [a] * 3)
