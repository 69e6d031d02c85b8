"""ONNX models as extractors: called as declared, and refused where file, declaration and images do not agree."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.extractors import asked_for, images_of, kept_and_loaded

from pipelines.cli.errors import ConfigError, ModelError, StorageError
from pipelines.quality.extractors.load import load_extractor
from pipelines.quality.extractors.onnx import prepared
from pipelines.quality.extractors.request import OnnxRequest
from pipelines.quality.resize import resize
from pipelines.storage.location import Location

FLOAT = TensorProto.FLOAT
WEIGHT = np.random.default_rng(3).normal(size=(5, 3, 3, 3)).astype(np.float32)


def save(path: Path, nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], **weights: Any) -> str:
    """A model of `nodes`; inputs and outputs by name, their type and shape."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
        [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("elsewhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=8), path)
    return f"onnx:{path}"


def convolution(path: Path, shape: tuple[Any, ...] = ("B", 3, "H", "W"), batch: Any = "B", keep: int = 1) -> str:
    """Five filters and their mean over places, [B, 5, 1, 1] or, with keep = 0, [B, 5]."""
    nodes = [
        helper.make_node("Conv", ["x", "weight"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["h"], ["y"], axes=[2, 3], keepdims=keep),
    ]
    features = (batch, 5, 1, 1) if keep else (batch, 5)
    return save(path, nodes, {"x": (FLOAT, shape)}, {"y": (FLOAT, features)}, weight=WEIGHT)


def of_torch(given: np.ndarray) -> np.ndarray:
    """What `convolution` computes, by another library."""
    import torch

    h = torch.nn.functional.conv2d(torch.from_numpy(given), torch.from_numpy(WEIGHT), padding=1)
    return h.mean((2, 3)).numpy()


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("batch", ["B", 1, 4])
def test_a_model_is_called_as_declared(keep: int, batch: Any, tmp_path: Path) -> None:
    features = convolution(tmp_path / "m.onnx", (batch, 3, "H", "W"), batch, keep)
    declared = {"size": (20, 24), "range": "-1..1", "mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 2.0)}
    asked = asked_for(features, (28, 28, 3), tmp_path, **declared)
    images = images_of(6, (28, 28, 3))
    x = resize(images, (20, 24)).astype(np.float64) / 127.5 - 1.0
    x = (x - [0.1, 0.2, 0.3]) / [0.5, 1.0, 2.0]
    expected = of_torch(x.transpose(0, 3, 1, 2).astype(np.float32))
    found = kept_and_loaded(asked, tmp_path / "kept")(images)
    assert (found.dtype, found.shape, asked.request.num_features) == (np.float32, (6, 5), 5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert asked.request.onnx == OnnxRequest((20, 24), 3, "-1..1", (0.1, 0.2, 0.3), (0.5, 1.0, 2.0), "x", "y")
    assert asked.request.preprocessing == (
        "resized to 20 x 24 (bicubic-antialias of Pillow), levels to -1..1, minus [0.1, 0.2, 0.3], over [0.5, 1.0, 2.0]"
    )


def test_grey_images_are_repeated_to_three_channels(tmp_path: Path) -> None:
    asked = asked_for(convolution(tmp_path / "m.onnx"), (8, 9, 1), tmp_path)
    images = images_of(3, (8, 9, 1))
    expected = of_torch((images.repeat(3, axis=3) / 255.0).transpose(0, 3, 1, 2).astype(np.float32))
    np.testing.assert_allclose(kept_and_loaded(asked, tmp_path)(images), expected, rtol=1e-4, atol=1e-5)
    assert asked.request.preprocessing == "channel repeated three times, levels to 0..1"


def test_the_size_that_the_file_fixes_needs_no_declaration(tmp_path: Path) -> None:
    features = convolution(tmp_path / "m.onnx", ("B", 3, 12, 10))
    for declared in ({}, {"size": [12, 10]}):
        request = asked_for(features, (28, 28, 3), tmp_path, **declared).request
        assert request.onnx is not None
        assert request.onnx.size == (12, 10)


@pytest.mark.parametrize(("name", "low", "high"), [("0..1", 0.0, 1.0), ("-1..1", -1.0, 1.0), ("0..255", 0.0, 255.0)])
def test_the_ends_of_each_range(name: Any, low: float, high: float) -> None:
    called = OnnxRequest((1, 2), 1, name, (), (), "x", "y")
    given = prepared(called, np.array([0, 255], np.uint8).reshape(1, 1, 2, 1))
    np.testing.assert_allclose(given, [[[[low, high]]]], rtol=1e-6)


def test_an_image_s_features_do_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    extract = kept_and_loaded(asked_for(convolution(tmp_path / "m.onnx"), (8, 8, 3), tmp_path), tmp_path)
    images, others = images_of(4, (8, 8, 3)), images_of(4, (8, 8, 3), seed=1)
    others[1] = images[1]
    np.testing.assert_array_equal(extract(images)[1], extract(others)[1])


@pytest.mark.parametrize(
    ("declared", "shape", "refusal"),
    [
        ({"size": [16]}, (28, 28, 3), "onnx.size = [16]: the model takes 12 x 10 pixels; leave it out"),
        ({"size": [12, 10, 3]}, (28, 28, 3), "onnx.size = [12, 10, 3]: must be [SIDE] or [HEIGHT, WIDTH]"),
        ({"mean": [0.5]}, (28, 28, 3), "onnx.mean = [0.5]: must have 3 numbers, one for each channel"),
        ({"std": [1.0, 0.0, 1.0]}, (28, 28, 3), "onnx.std = [1.0, 0.0, 1.0]: must be above 0"),
        ({"output": "z"}, (28, 28, 3), "m.onnx has the outputs y; name one of them"),
        ({}, (28, 28, 4), "the images have 4 channels, and the model takes 3"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused(
    declared: dict[str, Any], shape: tuple[int, int, int], refusal: str, tmp_path: Path
) -> None:
    features = convolution(tmp_path / "m.onnx", ("B", 3, 12, 10))
    with pytest.raises(ConfigError, match=re.escape(refusal)):
        asked_for(features, shape, tmp_path, **declared)


IMAGES = {"x": (FLOAT, ("B", 3, "H", "W"))}
RELU = helper.make_node("Relu", ["x"], ["y"])
MEAN = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)


@pytest.mark.parametrize(
    ("nodes", "inputs", "outputs", "refusal"),
    [
        ([MEAN], {"x": (TensorProto.DOUBLE, IMAGES["x"][1])}, {"y": (TensorProto.DOUBLE, ("B", 3))}, "its input x is"),
        (
            [RELU],
            {"x": (FLOAT, ("B", 3))},
            {"y": (FLOAT, ("B", 3))},
            "its input x is",
        ),
        ([RELU], IMAGES, {"y": (FLOAT, None)}, "and features are [B, d] or [B, d, 1, 1]"),
        (
            [helper.make_node("ReduceMean", ["x"], ["y"], axes=[0], keepdims=0)],
            IMAGES,
            {"y": (FLOAT, None)},
            "and features are [B, d] or [B, d, 1, 1]",
        ),
        (
            [
                MEAN,
                helper.make_node("ReduceMean", ["y"], ["m"], axes=[0]),
                helper.make_node("Sub", ["y", "m"], ["z"]),
            ],
            IMAGES,
            {"z": (FLOAT, ("B", 3))},
            "an image's features depend on the other images of its batch; export it for inference",
        ),
        (
            [
                helper.make_node("Sub", ["x", "x"], ["o"]),
                helper.make_node("Div", ["o", "o"], ["p"]),
                helper.make_node("ReduceMean", ["p"], ["y"], axes=[2, 3], keepdims=0),
            ],
            IMAGES,
            {"y": (FLOAT, ("B", 3))},
            "gives features that are NaN or infinite",
        ),
        (
            [MEAN, helper.make_node("Cast", ["y"], ["z"], to=TensorProto.INT64)],
            IMAGES,
            {"z": (TensorProto.INT64, ("B", 3))},
            "its output z is tensor(int64), and features are float32",
        ),
        (
            [helper.make_node("Mine", ["x"], ["y"], domain="elsewhere")],
            IMAGES,
            {"y": (FLOAT, ("B", 3))},
            "cannot be loaded as an ONNX model",
        ),
        (
            [helper.make_node("Add", ["x", "w"], ["s"]), helper.make_node("ReduceMean", ["s"], ["y"], axes=[2, 3])],
            IMAGES | {"w": (FLOAT, ("B", 3, "H", "W"))},
            {"y": (FLOAT, ("B", 3, 1, 1))},
            "has the inputs x, w; a model of one input, images, is needed",
        ),
        (
            [helper.make_node("Reshape", ["x", "to"], ["y"])],
            IMAGES,
            {"y": (FLOAT, ("B", 7))},
            "fails on images of (9, 9) pixels",
        ),
    ],
)
def test_a_model_that_is_no_extractor_is_refused(
    nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], refusal: str, tmp_path: Path
) -> None:
    features = save(tmp_path / "m.onnx", nodes, inputs, outputs, to=np.array([-1, 7], np.int64))
    with pytest.raises(ModelError, match=re.escape(refusal)):
        asked_for(features, (9, 9, 3), tmp_path)


def test_of_several_outputs_one_must_be_named(tmp_path: Path) -> None:
    nodes = [MEAN, helper.make_node("Relu", ["y"], ["z"])]
    features = save(tmp_path / "m.onnx", nodes, IMAGES, {"y": (FLOAT, ("B", 3)), "z": (FLOAT, ("B", 3))})
    with pytest.raises(ConfigError, match=r"onnx.output: .*m.onnx has the outputs y, z; name the one"):
        asked_for(features, (8, 8, 3), tmp_path)
    request = asked_for(features, (8, 8, 3), tmp_path, output="z").request
    assert request.onnx is not None
    assert request.onnx.output == "z"


def test_weights_in_other_files_are_refused(tmp_path: Path) -> None:
    features = convolution(tmp_path / "m.onnx")
    onnx.save(
        onnx.load(tmp_path / "m.onnx"),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    with pytest.raises(ModelError, match=r"m.onnx: has weights in other files; save it as one file"):
        asked_for(features, (8, 8, 3), tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04no model", b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"m.onnx: (is no ONNX model|cannot be loaded as an ONNX model)"):
        asked_for(f"onnx:{tmp_path / 'm.onnx'}", (8, 8, 3), tmp_path)


def test_a_missing_file_and_one_that_was_altered_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none.onnx: cannot read: does not exist"):
        asked_for(f"onnx:{tmp_path / 'none.onnx'}", (8, 8, 3), tmp_path)
    with pytest.raises(ConfigError, match=re.escape("features = 'onnx': must name an ONNX model, as onnx:FILE")):
        asked_for("onnx", (8, 8, 3), tmp_path)
    asked = asked_for(convolution(tmp_path / "m.onnx"), (8, 8, 3), tmp_path)
    kept_and_loaded(asked, tmp_path / "kept")
    (tmp_path / "kept" / "model.onnx").write_bytes(b"other")
    with pytest.raises(ModelError, match=r"kept/model.onnx: is not the file [0-9a-f]{12} of the output; restore it"):
        load_extractor(asked.request, Location.parse(tmp_path / "kept"), 1, "cpu")


def test_without_the_package_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("needs onnx; pip install 'ddpm-pipeline[onnx]'")):
        asked_for("onnx:m.onnx", (8, 8, 3), tmp_path)
