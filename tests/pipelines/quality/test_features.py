"""Features of a set: one row for each image, whatever the batches, and how they are read again."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from support.quality_runs import blobs, prepared

from pipelines.cli.errors import DataError
from pipelines.cluster.config import GpuClusterConfig
from pipelines.data.dataset import PreparedDataset
from pipelines.quality.extractors.asking import Asked
from pipelines.quality.extractors.request import ExtractorRequest
from pipelines.quality.feature_job import ensure_features, features_at
from pipelines.quality.features import FeatureRequest, FeatureShards
from pipelines.storage.location import Location

PIXELS = Asked(ExtractorRequest("pixels", None, 16, (4, 4, 1), "levels / 255"))


@pytest.fixture
def data(tmp_path: Path) -> PreparedDataset:
    return prepared(tmp_path / "data", blobs(50, 0), np.arange(50) % 3)


def request(data: PreparedDataset, **fields: object) -> FeatureRequest:
    values = {"extractor": PIXELS.request, "batch_size": 8, "shard_size": 20, "device": "cpu", **fields}
    return FeatureRequest(data.dataset_id, data.num_rows, **values)  # type: ignore[arg-type]


def test_every_image_has_its_features_digest_and_label(tmp_path: Path, data: PreparedDataset) -> None:
    store = Location.parse(tmp_path / "store")
    found = ensure_features(store, request(data), data, PIXELS, GpuClusterConfig(), "samples")
    _, images, labels = data.read_images(0, 50)
    expected = images.reshape(50, -1) / np.float32(255)
    blocks = list(found.read())
    assert [len(block.ids) for block in blocks] == [20, 20, 10]
    assert np.array_equal(np.concatenate([block.features for block in blocks]), expected)
    assert np.array_equal(found.labels, labels)
    assert found.read_digests()[7].tobytes() == hashlib.sha256(images[7].tobytes()).digest()
    rows = np.array([3, 4, 45])
    chosen = list(found.read(rows))  # the shard in the middle has none of them
    assert [block.ids.tolist() for block in chosen] == [[3, 4], [45]]
    assert np.array_equal(np.concatenate([block.features for block in chosen]), expected[rows])


def test_the_name_tells_the_request(tmp_path: Path, data: PreparedDataset) -> None:
    store = Location.parse(tmp_path)
    assert features_at(store, request(data)).name.startswith("pixels-")
    assert features_at(store, request(data)) != features_at(store, request(data, batch_size=9))


def test_features_that_are_not_finite_are_refused_with_their_ids(tmp_path: Path, data: PreparedDataset) -> None:
    def extract(images: np.ndarray) -> np.ndarray:
        features = np.zeros((len(images), 16), np.float32)
        features[images[:, 0, 0, 0] > 128, 3] = np.inf
        return features

    shards = FeatureShards(Location.parse(tmp_path / "out"), request(data), data, 1)
    bad = np.flatnonzero(data.read_images(20, 40)[1][:, 0, 0, 0] > 128) + 20
    assert len(bad)
    with pytest.raises(DataError, match=rf"NaN or infinite numbers for {len(bad)} of 20 images \(first ids {bad[0]}"):
        shards.compute(extract, 1)
