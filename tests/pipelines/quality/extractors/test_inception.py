"""The Inception network: against torch-fidelity's own use of it, and what is no such file."""

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from support.extractors import asked_for, images_of, kept_and_loaded
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from pipelines.cli.errors import ConfigError, ModelError, StorageError
from pipelines.quality.extractors import inception
from pipelines.quality.extractors.request import FID_SHA256

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Random weights that keep the size of activations from layer to layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        network = FeatureExtractorInceptionV3("fid", ["2048"], empty)
    generator = torch.Generator().manual_seed(0)
    state: Weights = network.state_dict()
    for value in state.values():
        if value.dim() == 4:
            value.normal_(std=(2.0 / value[0].numel()) ** 0.5, generator=generator)
    return dict(state)


@pytest.fixture(scope="module")
def folder(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights as torch and as safetensors write them."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(weights, folder / "w.pth")
    (folder / "w.safetensors").write_bytes(save(weights))
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> torch.nn.Module:
    """torch-fidelity's extractor, as torch-fidelity reads the file."""
    network: torch.nn.Module = FeatureExtractorInceptionV3("fid", ["2048"], str(folder / "w.pth"))
    return network


@pytest.mark.parametrize(("name", "channels"), [("w.pth", 3), ("w.safetensors", 1)])
def test_features_are_those_of_torch_fidelity(
    name: str, channels: int, folder: Path, reference: torch.nn.Module, tmp_path: Path
) -> None:
    shape = 20, 33, channels
    asked = asked_for(f"inception:{folder / name}", shape, tmp_path, any_weights=True)
    images = images_of(2, shape)
    found = kept_and_loaded(asked, tmp_path)(images)
    colour = torch.from_numpy(images.repeat(3 // channels, axis=3)).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        expected = reference(colour)[0].numpy()
    assert (found.shape, asked.request.num_features) == ((2, 2048), 2048)
    assert np.abs(expected).mean() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    repeated = "channel repeated three times, " if channels == 1 else ""
    assert asked.request.preprocessing == (
        f"{repeated}bilinear to 299 x 299 as TensorFlow 1 has it (not antialiased), (level - 128) / 128"
    )


def test_only_the_weights_of_the_fid_make_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = f"inception:{folder / 'w.pth'}"
    refusal = r"w.pth: its sha256 begins with [0-9a-f]{12}, that of the FID's network with 6726825d0af5; "
    with pytest.raises(ModelError, match=refusal):
        asked_for(features, (8, 8, 3), tmp_path)
    request = asked_for(features, (8, 8, 3), tmp_path, any_weights=True).request
    assert request.sha256 is not None
    assert (request.name, request.kind, request.is_fid) == (f"inception_{request.sha256[:8]}", "inception", False)
    monkeypatch.setattr("pipelines.quality.extractors.asking.File.sha256", FID_SHA256)
    request = asked_for(features, (8, 8, 3), tmp_path).request
    assert (request.name, request.kind, request.is_fid) == ("inception", "inception", True)


class Runs:
    """An object whose unpickling would call a function."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (open, ("ran", "w"))


def of_torch(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        (of_torch({"fc.weight": Runs()}), "is no file of weights, or holds objects that could run code; refused"),
        (pickle.dumps(Runs()), "is no file of weights, or holds objects that could run code; refused"),
        (b"", "cannot be read as weights ("),
        (b"\x50\x00\x00\x00\x00\x00\x00\x00{not json", "cannot be read as weights ("),
        (of_torch({})[:-40], "cannot be read as weights ("),
        (of_torch([torch.zeros(2)]), "is no state_dict, tensors by name; save the network's state_dict()"),
        (of_torch({"epoch": 3}), "is no state_dict, tensors by name"),
        (of_torch({"fc.weight": torch.zeros(2)}), "is not of torch-fidelity's Inception network ("),
    ],
)
def test_what_is_no_file_of_its_weights_is_refused_and_never_run(
    content: bytes, refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ModelError, match=f"w.pth: {re.escape(refusal)}") as raised:
        asked_for(f"inception:{tmp_path / 'w.pth'}", (8, 8, 3), tmp_path, any_weights=True)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("channels", [2, 4])
def test_images_that_are_neither_grey_nor_rgb_are_refused(channels: int, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the images have {channels} channels, and it takes grey or RGB images"):
        asked_for(f"inception:{folder / 'w.pth'}", (8, 8, channels), tmp_path, any_weights=True)


def test_a_missing_file_and_a_missing_package_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=re.escape("must name the network's weights (weights-inception-2015-12-05-")):
        asked_for("inception:", (8, 8, 3), tmp_path)
    with pytest.raises(StorageError, match=r"none.pth: cannot read: does not exist"):
        asked_for(f"inception:{tmp_path / 'none.pth'}", (8, 8, 3), tmp_path)
    monkeypatch.setattr(inception.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("needs torch-fidelity; pip install 'ddpm-pipeline[inception]'")):
        asked_for("inception:w.pth", (8, 8, 3), tmp_path)
