"""The samplers that can be asked for, each one entry of `SAMPLERS`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args

from ddpm_core.denoiser import NetworkDenoiser
from ddpm_core.likelihood.bounds import settled_sigma2
from ddpm_core.process.base import Spacing
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import VARIANCES, variance_named
from ddpm_core.samplers.base import Sampler
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM
from ddpm_core.samplers.dpm_solver import DPMSolver
from ddpm_core.samplers.heun import Heun
from pipelines.cli.config import require
from pipelines.cli.errors import ConfigError
from pipelines.outputs.request import read_value
from pipelines.sampling.sampler_config import SamplerConfig
from pipelines.storage.location import Location

S = TypeVar("S", bound=Sampler)
Read = Callable[[str, Any], Any]
"""Takes the name of an option and its type; gives the value that a request has stored."""

_CONTINUOUS_DDPM_STEPS = 250


@dataclass(frozen=True)
class SamplerKind(Generic[S]):
    """How a job's fields, and a request's, become a sampler of the core.

    Attributes:
        sampler: The core's class.
        steps: How many a job takes that names no number: from T, which is None in continuous time.
        chosen: From the job's section `sampler`, the steps, and the model's denoiser. Raises a ConfigError that begins
            with the name of a field of the section.
        options: What of it a request stores, beside the steps. `eta` and `sigma2` are stored of every sampler, as null
            by those that have none.
        stored: From what a request has stored, and the steps.
        described: For a person, beside its name and steps.
        variant: What sets it apart from other kinds of the same class, by the names of the class's fields.
    """

    sampler: type[S]
    steps: Callable[[int | None], int]
    chosen: Callable[[SamplerConfig, int, NetworkDenoiser], S]
    options: Callable[[S], dict[str, Any]]
    stored: Callable[[Read, int], S]
    described: Callable[[S], str] = lambda sampler: ""
    variant: Mapping[str, Any] = field(default_factory=dict)

    def makes(self, sampler: Sampler) -> bool:
        """Whether it is of this kind."""
        return type(sampler) is self.sampler and all(
            getattr(sampler, name) == self.variant[name] for name in self.variant
        )


def _name_of_variance(sampler: DDPM) -> str:
    return next(name for name, variance in VARIANCES.items() if variance == sampler.variance)


def _at_most(steps: int) -> Callable[[int | None], int]:
    return lambda num_timesteps: min(steps, num_timesteps or steps)


def _spacing(config: SamplerConfig, denoiser: NetworkDenoiser, own: Spacing) -> Spacing:
    """What is asked for; else `own`, or time for a process that ends at SNR 0, which has no other."""
    if config.spacing != "auto":
        return config.spacing
    return own if denoiser.process.prior_signal > 0.0 else "time"


def _spaced(spacing: Spacing) -> dict[str, Any]:
    """As a request stores it: requests of before, which have none, are even in time."""
    return {} if spacing == "time" else {"spacing": spacing}


def _read_spacing(read: Read) -> Spacing:
    spacing: Spacing | None = read("spacing", Literal[*get_args(Spacing)] | None)
    return spacing or "time"


def _dpm_solver(order: Literal[2, 3], eta: Literal[0, 1], steps: int) -> SamplerKind[DPMSolver]:
    return SamplerKind(
        DPMSolver,
        steps=_at_most(steps),
        chosen=lambda config, steps, denoiser: DPMSolver(steps, order, eta, _spacing(config, denoiser, "log_snr")),
        options=lambda solver: _spaced(solver.spacing),
        stored=lambda read, steps: DPMSolver(steps, order, eta, _read_spacing(read)),
        variant={"order": order, "eta": eta},
    )


def _churn(heun: Heun) -> dict[str, Any]:
    """As a request stores it."""
    if not heun.churn:
        return {}
    interval = {} if heun.churn_interval[1] == math.inf else {"churn_interval": list(heun.churn_interval)}
    return {"churn": heun.churn, **interval, "churn_noise": heun.churn_noise}


def _stored_heun(read: Read, steps: int) -> Heun:
    churn, spacing = read("churn", float | None), _read_spacing(read)
    if churn is None:
        return Heun(steps, spacing)
    low, high = read("churn_interval", tuple[float, ...] | None) or (0.0, math.inf)
    return Heun(steps, spacing, churn, (low, high), read("churn_noise", float))


SAMPLERS: dict[str, SamplerKind[Any]] = {
    "ddpm": SamplerKind(
        DDPM,
        steps=lambda num_timesteps: num_timesteps or _CONTINUOUS_DDPM_STEPS,
        chosen=lambda config, steps, denoiser: DDPM(
            variance_named(settled_sigma2(config.sigma2, denoiser)), steps, _spacing(config, denoiser, "time")
        ),
        options=lambda ddpm: {"sigma2": _name_of_variance(ddpm), **_spaced(ddpm.spacing)},
        stored=lambda read, steps: DDPM(
            variance_named(read("sigma2", Literal[*VARIANCES])), steps, _read_spacing(read)
        ),
        described=lambda ddpm: f", σ² = {_name_of_variance(ddpm)}",
    ),
    "ddim": SamplerKind(
        DDIM,
        steps=_at_most(50),
        chosen=lambda config, steps, denoiser: DDIM(steps, config.eta, _spacing(config, denoiser, "time")),
        options=lambda ddim: {"eta": ddim.eta, **_spaced(ddim.spacing)},
        stored=lambda read, steps: DDIM(steps, read("eta", float), _read_spacing(read)),
        described=lambda ddim: f", η = {ddim.eta}",
    ),
    "dpmpp_2m": _dpm_solver(2, 0, 20),
    "dpmpp_3m": _dpm_solver(3, 0, 20),
    "dpmpp_2m_sde": _dpm_solver(2, 1, 30),
    "dpmpp_3m_sde": _dpm_solver(3, 1, 30),
    "heun": SamplerKind(
        Heun,
        steps=_at_most(10),
        chosen=lambda config, steps, denoiser: Heun(
            steps,
            _spacing(config, denoiser, "edm"),
            config.churn,
            config.churn_interval or (0.0, math.inf),
            config.churn_noise,
        ),
        options=lambda heun: {**_churn(heun), **_spaced(heun.spacing)},
        stored=_stored_heun,
        described=lambda heun: f", churn {heun.churn:g}" if heun.churn else "",
    ),
}


def sampler_asked(asked: SamplerConfig, denoiser: NetworkDenoiser) -> tuple[Sampler, int]:
    """The sampler of a job's section with a model, and its steps. Raises ConfigError where the model does not have so
    many, or another option does not fit it."""
    process, kind = denoiser.process, SAMPLERS[asked.name]
    num_timesteps = process.num_timesteps if isinstance(process, DiscreteProcess) else None
    if asked.steps is not None and num_timesteps is not None:
        rule = f"the model has {num_timesteps} diffusion steps; ask for at most as many"
        require(asked.steps <= num_timesteps, "sampler.steps", asked.steps, rule)
    steps = asked.steps or kind.steps(num_timesteps)
    try:
        sampler: Sampler = kind.chosen(asked, steps, denoiser)
        sampler.times(process)
    except ConfigError as error:
        raise ConfigError(f"sampler.{error}") from error
    return sampler, steps


def stored_sampler(stored: Mapping[str, Any], path: Location) -> tuple[Sampler, dict[str, Any]]:
    """The sampler of a request that lies at `path`, and what else the request has stored. Raises what `read_value`
    does."""

    def read(name: str, hint: Any) -> Any:
        return read_value(hint, stored.get(name), path, f"request.{name}")

    kind = SAMPLERS[read("sampler", Literal[*SAMPLERS])]
    sampler: Sampler = kind.stored(read, read("steps", int))
    options = {"sampler", *kind.options(sampler)}
    return sampler, {name: value for name, value in stored.items() if name not in options}


def name_of(sampler: Sampler) -> str:
    """The sampler's name in `SAMPLERS`."""
    return next(name for name, kind in SAMPLERS.items() if kind.makes(sampler))


def described(sampler: Sampler, steps: int) -> str:
    """For a person."""
    name = name_of(sampler)
    spacing: Spacing = getattr(sampler, "spacing", "time")
    spaced = "" if spacing == "time" else f", spacing {spacing}"
    return f"{name}, {steps:,} steps{SAMPLERS[name].described(sampler)}{spaced}"
