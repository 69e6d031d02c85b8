"""Training objectives, one file for each kind; `objective_named` makes them."""

from collections.abc import Callable

from ddpm_core.denoiser import NetworkDenoiser
from ddpm_core.errors import ConfigError
from ddpm_core.objectives.base import Losses, Objective
from ddpm_core.objectives.learned_variance import Hybrid, LearnedVlb
from ddpm_core.objectives.times import ImportanceTimes, LogNormalTimes, SteppedTimes, Times, UniformTimes
from ddpm_core.objectives.vdm import VdmBound
from ddpm_core.objectives.weighted import fixed_objective
from ddpm_core.parameterizations import EdmDenoiser
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.gamma import LearnedGamma

LOSSES = ("simple", "vlb", "min_snr", "hybrid")
TIMES = ("auto", "uniform", "even", "importance", "log_normal")
__all__ = ["LOSSES", "TIMES", "Losses", "Objective", "objective_named"]


def objective_named(
    name: str,
    denoiser: NetworkDenoiser,
    gamma: float = 5.0,
    times: str = "auto",
    vlb_timesteps: int | None = None,
) -> Objective:
    """What to train a denoiser by.

    Args:
        name: One of `LOSSES`. simple: the squared error of the network's output; min_snr: Hang 2023, with `gamma`; vlb:
            the bound, of continuous time or of `vlb_timesteps` steps where the process is continuous (Kingma 2021),
            with the learned variances where the network predicts some (Nichol and Dhariwal 2021), else with sigma^2 =
            beta (Ho 2020); hybrid: simple for the mean and vlb for learned variances (Nichol and Dhariwal 2021).
        denoiser: What is trained.
        gamma: Of min_snr.
        times: One of `TIMES`. auto: log_normal for EDM's denoiser by simple, even for any other in continuous time,
            importance for vlb with learned variances, else uniform.
        vlb_timesteps: T of the bound; None: continuous time.

    Raises:
        ConfigError: There is no such objective, or it does not fit the denoiser or the times.
    """
    process, learns = denoiser.process, denoiser.learns_variance
    is_continuous = isinstance(process, ContinuousProcess)
    if name not in LOSSES:
        raise ConfigError(f"loss: {name!r} is not one of {sorted(LOSSES)}")
    if name == "hybrid" and not learns:
        raise ConfigError("loss: 'hybrid' trains variances, which the network does not predict; set learned_variance")
    if learns and name not in ("hybrid", "vlb"):
        raise ConfigError(f"loss: {name!r} does not train the variances that the network predicts; take hybrid or vlb")
    if vlb_timesteps is not None and not (is_continuous and name == "vlb"):
        raise ConfigError(f"vlb_timesteps: {vlb_timesteps} needs loss vlb in continuous time; leave it out")
    if isinstance(process, ContinuousProcess) and isinstance(process.schedule, LearnedGamma) and name != "vlb":
        raise ConfigError(f"loss: {name!r} does not train gamma(u); take vlb, or a linear gamma")
    drawn = _times(times, name, denoiser, vlb_timesteps)
    if isinstance(process, ContinuousProcess) and name == "vlb":
        return VdmBound(process, drawn)
    if name == "hybrid":
        return Hybrid(denoiser, drawn)
    return LearnedVlb(process, drawn) if learns else fixed_objective(name, denoiser, drawn, gamma)


def _times(times: str, name: str, denoiser: NetworkDenoiser, vlb_timesteps: int | None) -> Times:
    process, is_edm = denoiser.process, isinstance(denoiser, EdmDenoiser)
    if times not in TIMES:
        raise ConfigError(f"times: {times!r} is not one of {list(TIMES)}")
    if times == "auto":
        if isinstance(process, ContinuousProcess):
            times = "log_normal" if is_edm and name == "simple" else "even"
        else:
            times = "importance" if name == "vlb" and denoiser.learns_variance else "uniform"
    if isinstance(process, ContinuousProcess):
        if times == "importance":
            raise ConfigError("times: 'importance' remembers each time step, which continuous time has not; take even")
        if vlb_timesteps is not None and times in ("even", "uniform"):
            return SteppedTimes(process, vlb_timesteps, even=times == "even")
    if times == "log_normal" and not (is_edm and name == "simple" and isinstance(process, ContinuousProcess)):
        raise ConfigError("times: 'log_normal' is EDM's; it needs its denoiser, loss simple and continuous time")
    makers: dict[str, Callable[[], Times]] = {
        "uniform": lambda: UniformTimes(process),
        "even": lambda: UniformTimes(process, even=True),
        "importance": lambda: ImportanceTimes(process),
        "log_normal": lambda: LogNormalTimes(process),
    }
    return makers[times]()
