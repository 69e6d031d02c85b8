"""The histogram baseline and the importance of time steps."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sample_runs import save_tiny_model

from ddpm_core.likelihood import timestep_proposal
from ddpm_core.model import load_model
from pipelines.data.dataset import PreparedDataset
from pipelines.evaluation.first_pass import _counts, histogram_bpd, measured_proposal


def test_the_histogram_by_hand() -> None:
    """Krichevsky and Trofimov 1981: (count + 1/2) / (n + 256/2), place by place."""
    counts = np.zeros((2, 256), np.uint32)
    counts[0, 7], counts[1, 0], counts[1, 255] = 4, 1, 3
    images = np.array([[[[7], [255]]], [[[8], [0]]]], np.uint8)
    expected = [-np.log2([4.5 / 132, 3.5 / 132]).mean(), -np.log2([0.5 / 132, 1.5 / 132]).mean()]
    assert histogram_bpd(counts, images) == pytest.approx(expected)


def test_every_image_counts_each_place_once(make_dataset: Callable[..., PreparedDataset]) -> None:
    data = make_dataset(100, (8, 8, 2))
    counts = _counts(data)
    assert counts.shape == (128, 256)
    assert (counts.sum(axis=1) == 100).all()
    _, images, _ = data.read_images(0, 100)
    assert counts[5].tolist() == np.bincount(images.reshape(100, -1)[:, 5], minlength=256).tolist()
    assert _counts(None).shape == (0, 256)


def test_on_independent_pixels_it_meets_their_entropy() -> None:
    """Uniform levels: 8 bits/dim, and a little for what the counts do not know."""
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (2, 60_000, 1, 2, 1), np.uint8)
    counts = np.stack([np.bincount(train[:, 0, place, 0], minlength=256) for place in range(2)]).astype(np.uint32)
    assert 8.0 <= histogram_bpd(counts, test).mean() < 8.01


def test_the_measured_proposal_is_a_distribution_of_its_own(
    make_dataset: Callable[..., PreparedDataset], tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "model")
    model = load_model(tmp_path / "model")
    request = {"seed": 3, "sigma2": "beta_tilde", "dtype": "float32", "batch_size": 64, "estimator": "importance"}
    found = measured_proposal(model, make_dataset(70), request)
    plain = timestep_proposal(model.schedule).numpy()
    assert found.shape == (19,)
    assert found.sum() == pytest.approx(1.0)
    assert (found >= 0.2 * plain).all()
    assert np.abs(found - plain).max() > 0.01
    assert (found == measured_proposal(model, make_dataset(70, name="again"), request)).all()
