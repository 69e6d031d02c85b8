"""The network of fixed random weights: the shapes it takes, that it is the same everywhere, what it tells apart."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from ddpm_core.errors import ConfigError
from ddpm_core.networks.random_conv import RandomConv


def noise_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "num_features", "sha256"),
    [
        ((28, 28, 1), 64, "1d74d963fca1078c69e097ec69d5ee5e5e57d3a7db8a7a3c908e606cb79cf824"),
        ((28, 28, 1), 512, "e7c59ad084aa8e2e133928fcd336ce51cbe2fb8bdf929ed565f8694e8bcfe8a0"),
        ((32, 32, 3), 64, "656623232a338694d18eed0f3dafba2e9fa4e3dfb7c24e99b150743d91f88b89"),
        ((8, 8, 1), 64, "e003a6f2b393b05cbb3cfe0824fc366da2a6c2b19bfd506402b109a0ba62f952"),
    ],
)
def test_the_weights_are_the_same_everywhere(shape: tuple[int, int, int], num_features: int, sha256: str) -> None:
    assert RandomConv(shape, num_features).sha256() == sha256


@settings(max_examples=25)
@given(
    height=st.integers(4, 70),
    width=st.integers(4, 70),
    channels=st.integers(1, 4),
    num_features=st.sampled_from([64, 512]),
)
def test_any_shape_from_4_x_4_on_gives_finite_features(
    height: int, width: int, channels: int, num_features: int
) -> None:
    shape = height, width, channels
    features = RandomConv(shape, num_features)(noise_images(3, shape))
    assert features.shape == (3, num_features)
    assert features.isfinite().all()
    assert features[0].ne(features[1]).any()


@pytest.mark.parametrize("shape", [(3, 28, 1), (28, 3, 1), (28, 28, 0), (28, 28, 5)])
def test_other_shapes_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="image_shape: "):
        RandomConv(shape)


def test_other_numbers_of_features_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_features: 65 is not one of 64, 512"):
        RandomConv((28, 28, 1), 65)


def test_every_filter_has_its_norm() -> None:
    for layer in RandomConv((28, 28, 1)).layers:
        norms = layer.weight.flatten(1).norm(dim=1)
        assert (norms - 2.0**0.5).abs().max() < 1e-5


def test_the_first_layer_s_filters_say_little_of_the_brightness() -> None:
    shares = [layer.weight.flatten(1).sum(1).square().mean() for layer in RandomConv((28, 28, 4)).layers]
    assert shares[0] < 0.3 * shares[1]


def test_an_image_s_features_do_not_depend_on_its_neighbours() -> None:
    network = RandomConv((28, 28, 1))
    images, others = noise_images(8, (28, 28, 1)), noise_images(8, (28, 28, 1), seed=1)
    others[3] = images[3]
    assert torch.equal(network(images)[3], network(others)[3])


def test_the_negative_of_an_image_is_another_image() -> None:
    images = noise_images(4, (28, 28, 1))
    network = RandomConv((28, 28, 1))
    assert (network(images) - network(255 - images)).abs().mean() > 0.01


def moments(network: RandomConv, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features = network(torch.from_numpy(images)).double().numpy()
    return features.mean(0), np.cov(features, rowvar=False)


def frechet(network: RandomConv, images_a: np.ndarray, images_b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel 2017, eq. 6)."""
    (mean_a, cov_a), (mean_b, cov_b) = (moments(network, images) for images in (images_a, images_b))
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0.0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0.0)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """8 x 8 digits with their classes, in an order without structure."""
    loaded = load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.images))
    return (loaded.images[order] * 15.9375).astype(np.uint8)[..., None], loaded.target[order]


def blurred(images: np.ndarray) -> np.ndarray:
    padded = np.pad(images.astype(float), ((0, 0), (1, 1), (0, 0), (0, 0)), mode="edge")
    return ((padded[:, :-2] + 2.0 * padded[:, 1:-1] + padded[:, 2:]) / 4.0).astype(np.uint8)


def noised(images: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0.0, 15.0, images.shape)
    return (images + noise).clip(0.0, 255.0).astype(np.uint8)


def test_it_tells_changed_images_from_others_of_the_same_kind(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, classes = digits
    half, other, other_classes = images[:898], images[898:], classes[898:]
    network = RandomConv((8, 8, 1))
    same = frechet(network, half, other)
    changed = {
        "blurred": blurred(other),
        "noised": noised(other),
        "without zeros": other[other_classes != 0],
        "of less contrast": (other * 0.9).astype(np.uint8),
        "mirrored": other[:, :, ::-1].copy(),
        "a tenth of them, repeated": np.repeat(other[:90], 10, axis=0),
    }
    ratios = {name: frechet(network, half, images) / same for name, images in changed.items()}
    assert min(ratios.values()) > 1.5, ratios


@pytest.mark.parametrize(("num_features", "condition"), [(64, 1e4), (512, 1e6)])
def test_no_feature_is_dead_or_nearly_another(
    digits: tuple[np.ndarray, np.ndarray], num_features: int, condition: float
) -> None:
    _, covariance = moments(RandomConv((8, 8, 1), num_features), digits[0])
    deviations = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(deviations, deviations) - np.eye(num_features)
    assert deviations.min() > 0.05 * deviations.max()
    assert np.abs(correlation).max() < 0.99
    assert np.linalg.cond(covariance) < condition
