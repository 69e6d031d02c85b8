"""The samplers that can be asked for, each one entry of `SAMPLERS`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from ddpm_core.denoiser import NetworkDenoiser
from ddpm_core.likelihood.bounds import settled_sigma2
from ddpm_core.process.variances import VARIANCES, variance_named
from ddpm_core.samplers.base import Sampler
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM
from pipelines.sampling.config import SampleConfig

S = TypeVar("S", bound=Sampler)
Read = Callable[[str, Any], Any]
"""Takes the name of an option and its type; gives the value that a request has stored."""

_DDIM_STEPS, _CONTINUOUS_DDPM_STEPS = 50, 250


@dataclass(frozen=True)
class SamplerKind(Generic[S]):
    """How a job's fields, and a request's, become a sampler of the core.

    Attributes:
        sampler: The core's class.
        steps: How many a job takes that names no number: from T, which is None in continuous time.
        chosen: From the job's fields, the steps, and the model's denoiser. Raises ConfigError.
        options: What of it a request stores, beside the steps. `eta` and `sigma2` are stored of every sampler, as null
            by those that have none.
        stored: From what a request has stored, and the steps.
        described: For a person.
    """

    sampler: type[S]
    steps: Callable[[int | None], int]
    chosen: Callable[[SampleConfig, int, NetworkDenoiser], S]
    options: Callable[[S], dict[str, Any]]
    stored: Callable[[Read, int], S]
    described: Callable[[S, int], str]


def _name_of_variance(sampler: DDPM) -> str:
    return next(name for name, variance in VARIANCES.items() if variance == sampler.variance)


SAMPLERS: dict[str, SamplerKind[Any]] = {
    "ddpm": SamplerKind(
        DDPM,
        steps=lambda num_timesteps: num_timesteps or _CONTINUOUS_DDPM_STEPS,
        chosen=lambda config, steps, denoiser: DDPM(variance_named(settled_sigma2(config.sigma2, denoiser)), steps),
        options=lambda ddpm: {"sigma2": _name_of_variance(ddpm)},
        stored=lambda read, steps: DDPM(variance_named(read("sigma2", Literal[*VARIANCES])), steps),
        described=lambda ddpm, steps: f"ddpm, {steps:,} steps, σ² = {_name_of_variance(ddpm)}",
    ),
    "ddim": SamplerKind(
        DDIM,
        steps=lambda num_timesteps: min(_DDIM_STEPS, num_timesteps or _DDIM_STEPS),
        chosen=lambda config, steps, denoiser: DDIM(steps, config.eta),
        options=lambda ddim: {"eta": ddim.eta},
        stored=lambda read, steps: DDIM(steps, read("eta", float)),
        described=lambda ddim, steps: f"ddim, {steps:,} steps, η = {ddim.eta}",
    ),
}


def name_of(sampler: Sampler) -> str:
    """The sampler's name in `SAMPLERS`."""
    return next(name for name, kind in SAMPLERS.items() if type(sampler) is kind.sampler)
