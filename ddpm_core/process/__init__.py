"""The forward process, its time axis and its posterior; `PROCESSES` names the kinds that a model may have."""

from collections.abc import Callable, Mapping
from typing import Any

from ddpm_core.errors import ConfigError
from ddpm_core.process.base import Process
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess, discrete

PROCESSES: dict[str, Callable[..., Process]] = {
    "linear": DiscreteProcess.linear,
    "cosine": DiscreteProcess.cosine,
    "table": DiscreteProcess.from_betas,
    "alpha_sigma": DiscreteProcess.from_alpha_sigma,
    "gamma_linear": ContinuousProcess.linear,
    "gamma_learned": ContinuousProcess.learned,
}
# Those with variances of steps, beta, whose alpha may be rescaled to end at 0.
_RESCALABLE = ("linear", "cosine", "table")


def process_from_config(config: Mapping[str, Any]) -> Process:
    """The process that `to_config` described, weights apart. Raises ConfigError for anything else."""
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in PROCESSES:
        raise ConfigError(f"schedule.name: {name!r} is not one of {sorted(PROCESSES)}")
    rescaled = arguments.pop("zero_terminal_snr", False) if name in _RESCALABLE else False
    if type(rescaled) is not bool:
        raise ConfigError(f"schedule.zero_terminal_snr: {rescaled!r:.100} is not true or false")
    try:
        process = PROCESSES[name](**arguments)
        return discrete(process).rescaled_to_zero_terminal_snr() if rescaled else process
    except TypeError as error:
        raise ConfigError(f"schedule: {error}; give the fields of a {name} schedule") from None
