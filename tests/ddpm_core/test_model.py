"""The model on disk: exact round trip, stable identity, refusals."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from ddpm_core.ema import EMA
from ddpm_core.errors import ModelError
from ddpm_core.model import load_model, model_bytes, model_from_bytes, model_id_of, save_model
from ddpm_core.schedule import NoiseSchedule
from ddpm_core.unet import UNet, UNetConfig

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
def unet():
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return unet


@pytest.fixture
def saved(unet, tmp_path):
    model_id = save_model(tmp_path / "m", EMA(unet, 0.9).state_dict(), CONFIG, NoiseSchedule.cosine(30), EXTRA)
    return tmp_path / "m", model_id


def test_round_trip(unet, saved):
    directory, model_id = saved
    model = load_model(directory)
    x, t = torch.randn(2, 1, 8, 12), torch.tensor([0, 29])
    assert torch.equal(model.unet(x, t), unet.eval()(x, t))
    assert not model.unet.training
    assert not any(p.requires_grad for p in model.unet.parameters())
    assert torch.equal(model.schedule.betas, NoiseSchedule.cosine(30).betas)
    assert model.config["extra"] == EXTRA
    assert model.model_id == model_id
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "ema.safetensors"]
    assert load_file(directory / "ema.safetensors").keys() == dict(unet.named_parameters()).keys()


def test_the_same_content_has_the_same_id_in_any_order(unet, saved):
    _, model_id = saved
    state = EMA(unet, 0.9).state_dict()
    shuffled = {name: state[name] for name in reversed(list(state))}
    files = model_bytes(shuffled, CONFIG, NoiseSchedule.cosine(30), dict(reversed(EXTRA.items())))
    assert model_id_of(files) == model_id
    assert model_from_bytes(files).model_id == model_id
    assert model_id_of(model_bytes(state, CONFIG, NoiseSchedule.cosine(31), EXTRA)) != model_id
    state["conv_in.bias"] = state["conv_in.bias"] + 1e-6
    assert model_id_of(model_bytes(state, CONFIG, NoiseSchedule.cosine(30), EXTRA)) != model_id


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


def test_weights_of_another_network_are_refused(unet):
    wider = dataclasses.replace(CONFIG, base_channels=24)
    files = model_bytes(EMA(unet, 0.9).state_dict(), wider, NoiseSchedule.cosine(30), {})
    with pytest.raises(ModelError, match="network"):
        model_from_bytes(files)
