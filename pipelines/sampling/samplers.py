"""The samplers that can be asked for, each one entry of `SAMPLERS`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from ddpm_core.process.variances import VARIANCES, variance_named
from ddpm_core.samplers.base import Sampler
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM
from pipelines.cli.errors import ConfigError
from pipelines.sampling.config import SampleConfig

S = TypeVar("S", bound=Sampler)
Read = Callable[[str, Any], Any]
"""Takes the name of an option and its type; gives the value that a request has stored."""

_DEFAULT_DDIM_STEPS = 50


@dataclass(frozen=True)
class SamplerKind(Generic[S]):
    """How a job's fields, and a request's, become a sampler of the core.

    Attributes:
        sampler: The core's class.
        steps: From `steps` as it was asked for, None where it was not, and T: the calls of the network for an image.
            Raises ConfigError.
        chosen: From the job's fields and the steps.
        options: What of it a request stores, beside the steps. `eta` and `sigma2` are stored of every sampler, as null
            by those that have none.
        stored: From what a request has stored, and the steps.
        described: For a person.
    """

    sampler: type[S]
    steps: Callable[[int | None, int], int]
    chosen: Callable[[SampleConfig, int], S]
    options: Callable[[S], dict[str, Any]]
    stored: Callable[[Read, int], S]
    described: Callable[[S, int], str]


def _all_steps(asked: int | None, num_timesteps: int) -> int:
    if asked not in (None, num_timesteps):
        raise ConfigError(f"steps = {asked}: ddpm takes all {num_timesteps}; leave it out, or use --sampler ddim")
    return num_timesteps


def _name_of_variance(sampler: DDPM) -> str:
    return next(name for name, variance in VARIANCES.items() if variance == sampler.variance)


SAMPLERS: dict[str, SamplerKind[Any]] = {
    "ddpm": SamplerKind(
        DDPM,
        steps=_all_steps,
        chosen=lambda config, steps: DDPM(variance_named(config.sigma2)),
        options=lambda ddpm: {"sigma2": _name_of_variance(ddpm)},
        stored=lambda read, steps: DDPM(variance_named(read("sigma2", Literal["beta", "beta_tilde"]))),
        described=lambda ddpm, steps: "ddpm",
    ),
    "ddim": SamplerKind(
        DDIM,
        steps=lambda asked, num_timesteps: asked or min(_DEFAULT_DDIM_STEPS, num_timesteps),
        chosen=lambda config, steps: DDIM(steps, config.eta),
        options=lambda ddim: {"eta": ddim.eta},
        stored=lambda read, steps: DDIM(steps, read("eta", float)),
        described=lambda ddim, steps: f"ddim, {steps} steps, η = {ddim.eta}",
    ),
}


def name_of(sampler: Sampler) -> str:
    """The sampler's name in `SAMPLERS`."""
    return next(name for name, kind in SAMPLERS.items() if type(sampler) is kind.sampler)
