"""The forward process, its time axis and its posterior; `PROCESSES` names the kinds that a model may have."""

from collections.abc import Callable, Mapping
from typing import Any

from ddpm_core.errors import ConfigError
from ddpm_core.process.discrete import DiscreteProcess

PROCESSES: dict[str, Callable[..., DiscreteProcess]] = {
    "linear": DiscreteProcess.linear,
    "cosine": DiscreteProcess.cosine,
    "table": DiscreteProcess.from_betas,
    "alpha_sigma": DiscreteProcess.from_alpha_sigma,
}


def process_from_config(config: Mapping[str, Any]) -> DiscreteProcess:
    """The process that `to_config` described, table for table. Raises ConfigError for anything else."""
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in PROCESSES:
        raise ConfigError(f"schedule.name: {name!r} is not one of {sorted(PROCESSES)}")
    try:
        return PROCESSES[name](**arguments)
    except TypeError as error:
        raise ConfigError(f"schedule: {error}; give the fields of a {name} schedule") from None
