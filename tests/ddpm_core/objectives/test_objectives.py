"""Which objectives fit which denoisers."""

import pytest

from ddpm_core.config import UNetConfig
from ddpm_core.denoiser import NetworkDenoiser
from ddpm_core.errors import ConfigError
from ddpm_core.objectives import objective_named
from ddpm_core.objectives.learned_variance import Hybrid, LearnedVlb
from ddpm_core.objectives.times import ImportanceTimes, LogNormalTimes, SteppedTimes, UniformTimes
from ddpm_core.objectives.vdm import VdmBound
from ddpm_core.objectives.weighted import ContinuousWeightedError, WeightedError
from ddpm_core.parameterizations import DENOISERS
from ddpm_core.process.base import Process
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess

LINEAR, COSINE = DiscreteProcess.linear(20, 0.01, 0.3), DiscreteProcess.cosine(20)
GAMMA, LEARNED, EDM = ContinuousProcess.linear(), ContinuousProcess.learned(), ContinuousProcess.edm()


def denoiser(kind: str, process: Process, learned_variance: bool = False) -> NetworkDenoiser:
    network = UNetConfig(
        image_size=4, in_channels=1, base_channels=4, channel_multipliers=(1,), num_res_blocks=1,
        attention_resolutions=(), dropout=0.0, num_groups=1, learned_variance=learned_variance,
    )  # fmt: skip
    return DENOISERS[kind].build(network, process)


@pytest.mark.parametrize(
    ("kind", "process", "learned_variance", "loss", "objective", "times", "even"),
    [
        ("eps", LINEAR, False, "simple", WeightedError, UniformTimes, False),
        ("v", LINEAR.rescaled_to_zero_terminal_snr(), False, "min_snr", WeightedError, UniformTimes, False),
        ("x_0", COSINE, False, "vlb", WeightedError, UniformTimes, False),
        ("eps", COSINE, True, "hybrid", Hybrid, UniformTimes, False),
        ("v", COSINE, True, "vlb", LearnedVlb, ImportanceTimes, False),
        ("residual_eps", GAMMA, False, "vlb", VdmBound, UniformTimes, True),
        ("residual_eps", LEARNED, False, "vlb", VdmBound, UniformTimes, True),
        ("v", GAMMA, False, "simple", ContinuousWeightedError, UniformTimes, True),
        ("edm", EDM, False, "simple", ContinuousWeightedError, LogNormalTimes, False),
        ("edm", EDM, False, "vlb", VdmBound, UniformTimes, True),
    ],
)
def test_each_kind_has_its_objective_and_its_times(
    kind: str, process: Process, learned_variance: bool, loss: str, objective: type, times: type, even: bool
) -> None:
    found = objective_named(loss, denoiser(kind, process, learned_variance))
    assert (type(found), type(found.times), found.even) == (objective, times, even)
    assert found.remembers == (times is ImportanceTimes)
    assert [name for name, _ in found.named_parameters()] == []  # a schedule's parameters are the denoiser's


def test_a_bound_of_t_steps_is_trained_at_its_steps() -> None:
    found = objective_named("vlb", denoiser("residual_eps", GAMMA), vlb_timesteps=100)
    assert isinstance(found.times, SteppedTimes)
    assert found.even


@pytest.mark.parametrize(
    ("kind", "process", "learned_variance", "fields", "match"),
    [
        ("eps", LINEAR, False, {"name": "hybrid"}, "loss: 'hybrid' trains variances"),
        ("eps", LINEAR, True, {"name": "simple"}, "does not train the variances"),
        (
            "eps",
            LINEAR,
            False,
            {"name": "vlb", "vlb_timesteps": 9},
            "vlb_timesteps: 9 needs loss vlb in continuous time",
        ),
        ("residual_eps", GAMMA, False, {"name": "vlb", "vlb_timesteps": 0}, "vlb_timesteps: 0 is not >= 1"),
        ("residual_eps", GAMMA, False, {"name": "vlb", "times": "importance"}, "continuous time has not"),
        ("residual_eps", GAMMA, False, {"name": "simple", "times": "log_normal"}, "'log_normal' is EDM's"),
        ("residual_eps", LEARNED, False, {"name": "simple"}, "does not train gamma"),
        ("eps", LINEAR, False, {"name": "simple", "times": "often"}, "times: 'often'"),
    ],
)
def test_what_does_not_fit_is_refused(
    kind: str, process: Process, learned_variance: bool, fields: dict[str, object], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        objective_named(denoiser=denoiser(kind, process, learned_variance), **fields)  # type: ignore[arg-type]
