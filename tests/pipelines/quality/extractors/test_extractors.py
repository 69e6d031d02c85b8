"""From `--features` to features: what every extractor promises, and what is refused."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.extractors import asked_for, images_of

from ddpm_core.networks.random_conv import RandomConv
from pipelines.cli.errors import ConfigError, DataError, ModelError
from pipelines.outputs.request import Request, read_fields
from pipelines.quality.extractors.load import load_extractor
from pipelines.quality.extractors.request import ExtractorRequest, OnnxRequest
from pipelines.storage.location import Location

SHAPE = (28, 28, 1)


def test_bare_random_conv_is_the_one_of_64_features(tmp_path: Path) -> None:
    request = asked_for("random_conv", SHAPE, tmp_path).request
    assert request == asked_for("random_conv:64", SHAPE, tmp_path).request
    assert (request.name, request.num_features, request.kind) == ("random_conv_64", 64, "random_conv")
    assert request.sha256 == RandomConv(SHAPE, 64).sha256()


@pytest.mark.parametrize(
    ("features", "shape"),
    [("random_conv:64", (8, 8, 1)), ("random_conv:512", (9, 17, 4)), ("pixels", (5, 3, 2))],
)
def test_features_are_float32_and_the_image_s_own(features: str, shape: tuple[int, int, int], tmp_path: Path) -> None:
    asked = asked_for(features, shape, tmp_path)
    extract = load_extractor(asked.request, Location.parse(tmp_path), 1, "cpu")
    images, others = images_of(6, shape), images_of(6, shape, seed=1)
    others[2] = images[2]
    found = extract(images)
    assert (found.dtype, found.shape) == (np.float32, (6, asked.request.num_features))
    np.testing.assert_array_equal(found[2], extract(others)[2])
    np.testing.assert_array_equal(found, extract(images))


def test_pixels_are_levels_over_255_in_the_order_of_the_image(tmp_path: Path) -> None:
    request = asked_for("pixels", (2, 1, 3), tmp_path).request
    image = np.array([[[[0, 51, 102]], [[153, 204, 255]]]], np.uint8)
    found = load_extractor(request, Location.parse(tmp_path), 1, "cpu")(image)
    np.testing.assert_allclose(found, [[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]], rtol=1e-6)


def test_images_that_may_not_be_written_to_are_taken(tmp_path: Path) -> None:
    request = asked_for("random_conv", SHAPE, tmp_path).request
    images = images_of(2, SHAPE)
    images.flags.writeable = False
    assert load_extractor(request, Location.parse(tmp_path), 1, "cpu")(images).shape == (2, 64)


@pytest.mark.parametrize(
    ("features", "shape", "refusal"),
    [
        ("resnet", SHAPE, "features = 'resnet': must be one of random_conv, random_conv:512, pixels, inception:FILE"),
        ("random_conv:128", SHAPE, "features = 'random_conv:128': must be random_conv, random_conv:64 or"),
        ("random_conv", (3, 28, 1), "features = 'random_conv': the images have 3 x 28 pixels and 1 channels"),
        ("pixels:8", SHAPE, "features = 'pixels:8': takes nothing behind pixels; leave it out"),
    ],
)
def test_what_is_refused(features: str, shape: tuple[int, int, int], refusal: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(refusal)):
        asked_for(features, shape, tmp_path)


def test_random_weights_that_come_out_otherwise_are_refused(tmp_path: Path) -> None:
    request = replace(asked_for("random_conv", SHAPE, tmp_path).request, sha256="0" * 64)
    with pytest.raises(
        ModelError, match="random_conv_64: its weights come out as 1d74d963fca1 here, those of the outp"
    ):
        load_extractor(request, Location.parse(tmp_path), 1, "cpu")


ONNX = OnnxRequest((32, 32), 3, "0..1", (0.5, 0.5, 0.5), (), "x", "y")


@pytest.mark.parametrize("onnx", [None, ONNX])
def test_a_request_survives_json(onnx: OnnxRequest | None) -> None:
    request = ExtractorRequest("onnx" if onnx else "random_conv_64", "ab" * 32, 64, SHAPE, "as they are", onnx)
    stored = json.loads(json.dumps(_jsonable(request)))
    assert read_fields(ExtractorRequest, stored, Location.parse("manifest.json")) == request


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"name": "vgg"}, "must be of random_conv, pixels"),
        ({"image_shape": [28, 28]}, "must be [H, W, C]"),
        ({"num_features": 0}, "must be at least 1"),
        ({"sha256": None}, "must be there, but for pixels"),
        ({"name": "inception"}, "must be that of the FID's weights"),
    ],
)
def test_a_stored_request_that_cannot_be_one_is_refused(change: dict[str, Any], rule: str) -> None:
    stored = _jsonable(ExtractorRequest("random_conv_64", "ab" * 32, 64, SHAPE, "as they are")) | change
    with pytest.raises(DataError, match=re.escape(rule)):
        read_fields(ExtractorRequest, stored, Location.parse("manifest.json"))


def _jsonable(request: ExtractorRequest) -> dict[str, Any]:
    """As `Request.to_json` stores one that is a field of it."""

    @dataclass(frozen=True)
    class Whole(Request):
        extractor: ExtractorRequest

    stored: dict[str, Any] = Whole(request).to_json()["extractor"]
    return stored
