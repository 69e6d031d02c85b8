"""Which objectives there are, with which times, for which denoisers; the rest is refused in one line."""

from dataclasses import replace

import pytest
import torch

from ddpm_core.config import UNetConfig
from ddpm_core.errors import ConfigError
from ddpm_core.objectives import LOSSES, TIMES, objective_named
from ddpm_core.objectives.learned_variance import Hybrid, LearnedVlb
from ddpm_core.objectives.times import ImportanceTimes, LogNormalTimes, SteppedTimes, UniformTimes
from ddpm_core.objectives.vdm import VdmBound
from ddpm_core.objectives.weighted import ContinuousWeightedError, WeightedError
from ddpm_core.parameterizations import denoiser_named
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess

NETWORK = UNetConfig(
    image_size=4, in_channels=1, base_channels=8, channel_multipliers=(1,), num_res_blocks=1,
    attention_resolutions=(), dropout=0.0, num_groups=4,
)  # fmt: skip
TABLE = DiscreteProcess.linear(12, 0.01, 0.3)
PLAIN = denoiser_named("eps").build(NETWORK, TABLE)
LEARNING = denoiser_named("v").build(replace(NETWORK, learned_variance=True), TABLE)
VDM = denoiser_named("residual_eps").build(NETWORK, ContinuousProcess.linear())
LEARNED_GAMMA = denoiser_named("residual_eps").build(NETWORK, ContinuousProcess.learned())
ZERO_TERMINAL = denoiser_named("v").build(NETWORK, TABLE.rescaled_to_zero_terminal_snr())
X_0 = denoiser_named("x_0").build(NETWORK, TABLE)
V_VDM = denoiser_named("v").build(NETWORK, ContinuousProcess.linear())
EDM = denoiser_named("edm").build(NETWORK, ContinuousProcess.edm())
EDM_TABLE = denoiser_named("edm").build(NETWORK, TABLE)


@pytest.mark.parametrize(
    ("name", "denoiser", "arguments", "kind", "times", "even"),
    [
        ("simple", PLAIN, {}, WeightedError, UniformTimes, False),
        ("simple", PLAIN, {"times": "importance"}, WeightedError, ImportanceTimes, False),
        ("simple", PLAIN, {"times": "even"}, WeightedError, UniformTimes, True),
        ("vlb", PLAIN, {}, WeightedError, UniformTimes, False),
        ("min_snr", PLAIN, {}, WeightedError, UniformTimes, False),
        ("simple", EDM_TABLE, {}, WeightedError, UniformTimes, False),
        ("vlb", LEARNING, {}, LearnedVlb, ImportanceTimes, False),
        ("vlb", LEARNING, {"times": "uniform"}, LearnedVlb, UniformTimes, False),
        ("hybrid", LEARNING, {}, Hybrid, UniformTimes, False),
        ("vlb", VDM, {}, VdmBound, UniformTimes, True),
        ("min_snr", ZERO_TERMINAL, {}, WeightedError, UniformTimes, False),
        ("simple", ZERO_TERMINAL, {}, WeightedError, UniformTimes, False),
        ("vlb", X_0, {}, WeightedError, UniformTimes, False),
        ("vlb", LEARNED_GAMMA, {}, VdmBound, UniformTimes, True),
        ("vlb", VDM, {"times": "uniform"}, VdmBound, UniformTimes, False),
        ("vlb", VDM, {"vlb_timesteps": 50}, VdmBound, SteppedTimes, True),
        ("simple", VDM, {}, ContinuousWeightedError, UniformTimes, True),
        ("min_snr", V_VDM, {}, ContinuousWeightedError, UniformTimes, True),
        ("simple", EDM, {}, ContinuousWeightedError, LogNormalTimes, False),
        ("vlb", EDM, {}, VdmBound, UniformTimes, True),
    ],
)
def test_what_there_is(name, denoiser, arguments, kind, times, even):
    objective = objective_named(name, denoiser, **arguments)
    assert isinstance(objective, kind)
    assert isinstance(objective.times, times)
    assert objective.even is even
    assert objective.remembers is (times is ImportanceTimes)
    g = torch.Generator().manual_seed(0)
    x_0, eps = torch.rand(2, 6, 1, 4, 4, generator=g) * 2 - 1
    found = objective(denoiser, x_0, torch.rand(6, generator=g, dtype=torch.float64), eps)
    assert found.rows.shape == found.values.shape == found.time.shape == (6,)
    assert bool(found.rows.isfinite().all())
    found.rows.mean().backward()
    # Parameters of the denoiser are not those of the objective: an optimiser or a checkpoint must not hold them twice.
    assert not list(objective.parameters())


@pytest.mark.parametrize(
    ("name", "denoiser", "arguments", "match"),
    [
        ("l2", PLAIN, {}, r"^loss: 'l2' is not one of"),
        ("hybrid", PLAIN, {}, r"^loss: 'hybrid' trains variances, which the network does not predict"),
        ("hybrid", VDM, {}, r"^loss: 'hybrid' trains variances"),
        ("simple", LEARNING, {}, r"^loss: 'simple' does not train the variances"),
        ("min_snr", LEARNING, {}, r"^loss: 'min_snr' does not train the variances"),
        ("min_snr", PLAIN, {"gamma": 0.0}, r"^gamma: 0\.0 is not > 0"),
        ("min_snr", VDM, {"gamma": -1.0}, r"^gamma: -1\.0 is not > 0"),
        ("vlb", PLAIN, {"vlb_timesteps": 10}, r"^vlb_timesteps: 10 needs loss vlb"),
        ("simple", LEARNED_GAMMA, {}, r"^loss: 'simple' does not train gamma\(u\)"),
        ("simple", VDM, {"vlb_timesteps": 10}, r"^vlb_timesteps: 10 needs loss vlb"),
        ("vlb", VDM, {"vlb_timesteps": 0}, r"^vlb_timesteps: 0 is not >= 1"),
        ("vlb", VDM, {"times": "importance"}, r"^times: 'importance' remembers each time step"),
        ("vlb", VDM, {"times": "log_normal"}, r"^times: 'log_normal' is EDM's"),
        ("vlb", EDM, {"times": "log_normal"}, r"^times: 'log_normal' is EDM's"),
        ("simple", EDM_TABLE, {"times": "log_normal"}, r"^times: 'log_normal' is EDM's"),
        ("simple", PLAIN, {"times": "log_normal"}, r"^times: 'log_normal' is EDM's"),
        ("simple", PLAIN, {"times": "often"}, r"^times: 'often' is not one of"),
    ],
)
def test_what_does_not_fit_is_refused(name, denoiser, arguments, match):
    with pytest.raises(ConfigError, match=match) as refused:
        objective_named(name, denoiser, **arguments)
    assert "\n" not in str(refused.value)


def test_all_names_are_spoken_of():
    assert LOSSES == ("simple", "vlb", "min_snr", "hybrid")
    assert TIMES == ("auto", "uniform", "even", "importance", "log_normal")
