"""The model on disk: exact round trip, stable identity, refusals."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from ddpm_core.config import UNetConfig
from ddpm_core.ema import EMA
from ddpm_core.errors import ModelError
from ddpm_core.model import load_model, model_bytes, model_from_bytes, model_id_of, save_model
from ddpm_core.parameterizations import EpsDenoiser
from ddpm_core.process.discrete import DiscreteProcess

CONFIG = UNetConfig(
    image_size=(8, 12),
    in_channels=1,
    base_channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_groups=8,
)
EXTRA = {"step": 1000, "dataset_id": "abc", "loss": 0.1 + 0.2}


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    denoiser = EpsDenoiser.build(CONFIG, DiscreteProcess.cosine(30))
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return denoiser


def averages(denoiser):
    return EMA(denoiser.named_weights(), 0.9).state_dict()


@pytest.fixture
def saved(denoiser, tmp_path):
    model_id = save_model(tmp_path / "m", averages(denoiser), denoiser, EXTRA)
    return tmp_path / "m", model_id


def test_round_trip(denoiser, saved):
    directory, model_id = saved
    model = load_model(directory)
    x, t = torch.randn(2, 1, 8, 12), torch.tensor([0, 29])
    assert torch.equal(model.denoiser(x, t).eps, denoiser.eval()(x, t).eps)
    assert not model.denoiser.training
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    assert torch.equal(model.denoiser.process.alpha2, DiscreteProcess.cosine(30).alpha2)
    assert model.config["extra"] == EXTRA
    assert model.model_id == model_id
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "ema.safetensors"]
    assert load_file(directory / "ema.safetensors").keys() == denoiser.named_weights().keys()


def test_the_same_content_has_the_same_id_in_any_order(denoiser, saved):
    _, model_id = saved
    state = averages(denoiser)
    shuffled = {name: state[name] for name in reversed(list(state))}
    files = model_bytes(shuffled, denoiser, dict(reversed(EXTRA.items())))
    assert model_id_of(files) == model_id
    assert model_from_bytes(files).model_id == model_id
    assert model_id_of(model_bytes(state, EpsDenoiser(denoiser.network, DiscreteProcess.cosine(31)), EXTRA)) != model_id
    state["conv_in.bias"] = state["conv_in.bias"] + 1e-6
    assert model_id_of(model_bytes(state, denoiser, EXTRA)) != model_id


@pytest.mark.parametrize("name", ["ema.safetensors", "config.json"])
def test_a_missing_file_is_refused(saved, name):
    (saved[0] / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_model(saved[0])


def test_one_altered_byte_of_the_weights_is_refused(saved):
    path = saved[0] / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"ema\.safetensors: altered"):
        load_model(saved[0])


def test_a_truncated_file_is_refused(saved):
    for name in ("ema.safetensors", "config.json"):
        path = saved[0] / name
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ModelError, match=name):
            load_model(saved[0])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"extra": {"step": 2}}, "altered"),
        ({"format": "other"}, "format"),
        ({"format_version": 99}, "99"),
    ],
)
def test_an_altered_or_unknown_config_is_refused(saved, change, match):
    path = saved[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=match):
        load_model(saved[0])


def test_weights_of_another_network_are_refused(denoiser):
    wider = EpsDenoiser.build(dataclasses.replace(CONFIG, base_channels=24), DiscreteProcess.cosine(30))
    files = model_bytes(averages(denoiser), wider, {})
    with pytest.raises(ModelError, match="network"):
        model_from_bytes(files)


def test_classes_have_the_names_that_the_training_added(tmp_path):
    assert load_of(tmp_path / "none", None, {}).label_names == ()
    assert load_of(tmp_path / "unnamed", 3, {}).label_names == ("0", "1", "2")
    names = ["cat", "dog", "7"]
    model = load_of(tmp_path / "named", 3, {"label_names": names})
    assert model.label_names == ("cat", "dog", "7")
    assert model.denoiser.num_classes == 3
    label = torch.tensor([0, -1])
    z = torch.randn(2, 1, 8, 12)
    assert not torch.equal(model.denoiser(z, torch.tensor([3, 3]), label).eps, model.denoiser(z, label * 0 + 3).eps)


def load_of(directory, num_classes, extra):
    torch.manual_seed(1)
    denoiser = EpsDenoiser.build(dataclasses.replace(CONFIG, num_classes=num_classes), DiscreteProcess.cosine(30))
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_model(directory, averages(denoiser), denoiser, extra)
    return load_model(directory)
