"""The moving average of Ho 2020, app. B, with warm-up."""

import pytest
import torch
from torch import nn

from ddpm_core.ema import EMA
from ddpm_core.errors import ConfigError, ModelError


def linear(value):
    module = nn.Linear(2, 2)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)
    return module


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_by_hand(warmup):
    module = linear(1.0)
    ema, expected = EMA(dict(module.named_parameters()), 0.9, warmup), 1.0
    for step, value in enumerate([2.0, -1.0, 5.0, 0.5]):
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(value)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        expected = decay * expected + (1 - decay) * value
        assert float(ema.state_dict()["weight"][0, 0]) == pytest.approx(expected, rel=1e-6)


def test_warmup_ends_at_the_decay():
    ema = EMA(dict(linear(0.0).named_parameters()), 0.99, warmup=True)
    decays = [ema.decay_at(step) for step in range(2000)]
    assert decays[0] == pytest.approx(0.1)
    assert decays == sorted(decays)
    assert decays[-1] == 0.99


def test_shadows_are_float32_copies():
    module = linear(1.0).to(torch.bfloat16)
    ema = EMA(dict(module.named_parameters()), 0.999, warmup=False)
    with torch.no_grad():
        module.weight.fill_(2.0)
    assert float(ema.state_dict()["weight"][0, 0]) == 1.0
    ema.update(0)
    # A step of 0.001 from 1.0 would be lost in bfloat16.
    assert float(ema.state_dict()["weight"][0, 0]) == pytest.approx(1.001, rel=1e-6)


def test_state_round_trip_and_copy():
    module = linear(1.0)
    ema = EMA(dict(module.named_parameters()), 0.5, warmup=False)
    with torch.no_grad():
        module.bias.fill_(3.0)
    ema.update(0)
    saved = {k: v.clone() for k, v in ema.state_dict().items()}
    other = EMA(dict(linear(7.0).named_parameters()), 0.5, warmup=False)
    other.load_state_dict(saved)
    target = linear(0.0)
    other.copy_to(dict(target.named_parameters()))
    assert torch.equal(target.bias, torch.full((2,), 2.0))
    assert torch.equal(target.weight, torch.ones(2, 2))


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)}])
def test_a_foreign_state_is_refused(state):
    with pytest.raises(ModelError, match="bias"):
        EMA(dict(linear(0.0).named_parameters()), 0.5).load_state_dict(state)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_bad_decay_is_refused(decay):
    with pytest.raises(ConfigError, match=r"ema\.decay"):
        EMA(dict(linear(0.0).named_parameters()), decay)
