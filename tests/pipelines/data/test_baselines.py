"""Bits/dim without a model: independent pixels, lossless coders."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipelines.data import baselines
from pipelines.data.baselines import coded_bpd, histogram_bpd, level_counts, training_baselines
from pipelines.data.dataset import PreparedDataset
from pipelines.data.hold_out import HoldOut


def test_the_histogram_by_hand() -> None:
    """Krichevsky and Trofimov 1981: (count + 1/2) / (n + 256/2), place by place."""
    counts = np.zeros((2, 256), np.uint32)
    counts[0, 7], counts[1, 0], counts[1, 255] = 4, 1, 3
    images = np.array([[[[7], [255]]], [[[8], [0]]]], np.uint8)
    expected = [-np.log2([4.5 / 132, 3.5 / 132]).mean(), -np.log2([0.5 / 132, 1.5 / 132]).mean()]
    assert histogram_bpd(counts, images) == pytest.approx(expected)


def test_every_image_counts_each_place_once(make_dataset: Callable[..., PreparedDataset]) -> None:
    data = make_dataset(100, (8, 8, 2))
    counts = level_counts(data)
    assert counts.shape == (128, 256)
    assert (counts.sum(axis=1) == 100).all()
    _, images, _ = data.read_images(0, 100)
    assert counts[5].tolist() == np.bincount(images.reshape(100, -1)[:, 5], minlength=256).tolist()


def test_on_independent_pixels_it_meets_their_entropy() -> None:
    """Uniform levels: 8 bits/dim, and a little for what the counts do not know."""
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (2, 60_000, 1, 2, 1), np.uint8)
    counts = np.stack([np.bincount(train[:, 0, place, 0], minlength=256) for place in range(2)]).astype(np.uint32)
    assert 8.0 <= histogram_bpd(counts, test).mean() < 8.01


def test_a_coders_bits_are_those_of_its_files() -> None:
    images = np.stack([np.zeros((8, 8, 3), np.uint8), np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)])
    for coder, options in (("png", {"optimize": True}), ("webp", {"lossless": True, "quality": 100, "method": 6})):
        sink = io.BytesIO()
        Image.fromarray(images[1]).save(sink, coder, **options)
        flat, noise = coded_bpd(images, coder)
        assert noise == len(sink.getvalue()) * 8 / 192 > 8 > flat


def test_a_trainings_baselines_are_of_the_validated_images_and_of_the_trained_ones(
    make_dataset: Callable[..., PreparedDataset],
) -> None:
    train, validation = make_dataset(100, (8, 8, 1)), make_dataset(90, (8, 8, 1), name="validation")
    ids = np.arange(70)  # read in two parts
    _, images, _ = validation.read_images(0, 70)
    assert training_baselines(train, HoldOut(100), validation, ids) == pytest.approx(
        {
            "png": coded_bpd(images, "png").mean(),
            "independent_pixels": histogram_bpd(level_counts(train), images).mean(),
        }
    )
    held_out = HoldOut(100, 20)
    rows, _ = train.read_rows(held_out.ids)
    counts = level_counts(train, hold_out=held_out)
    assert (counts.sum(axis=1) == 95).all()
    assert training_baselines(train, held_out, train, held_out.ids)["independent_pixels"] == pytest.approx(
        histogram_bpd(counts, rows).mean()
    )


def test_baselines_of_large_images_stay_small(
    make_dataset: Callable[..., PreparedDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count takes 1 KiB for each value of an image: of larger ones than the limit there is none."""
    train = make_dataset(10, (8, 8, 1))
    monkeypatch.setattr(baselines, "_MAX_PLACES", 64)
    assert set(training_baselines(train, HoldOut(10), train, np.arange(10))) == {"png", "independent_pixels"}
    monkeypatch.setattr(baselines, "_MAX_PLACES", 63)
    assert set(training_baselines(train, HoldOut(10), train, np.arange(10))) == {"png"}
