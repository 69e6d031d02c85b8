"""Variances of the reverse steps p(z_s | z_t) = N(mu, sigma^2 I) (Ho 2020, sec. 3.2)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from ddpm_core.errors import ConfigError
from ddpm_core.process.base import Process, Step
from ddpm_core.process.discrete import DiscreteProcess, discrete

if TYPE_CHECKING:
    from ddpm_core.denoiser import Prediction

# Of a variance that a network predicts: what any float32 is off by, squared and divided by it, is still a float64.
_LARGEST_LOG = 500.0


@runtime_checkable
class ReverseVariance(Protocol):
    """Which sigma^2 the reverse steps have."""

    def check(self, process: Process) -> None:
        """Raise ConfigError where the process does not have this variance."""
        ...

    def of(self, step: Step, prediction: "Prediction | None" = None) -> Tensor:
        """sigma^2 of each row, float64 [B, 1, 1, 1], or of each value, [B, C, H, W], where the network predicts it."""
        ...


@dataclass(frozen=True)
class Beta:
    """What is right for data of variance 1: the step's own, beta_t, of a variance-preserving process."""

    def check(self, process: Process) -> None:
        """Every process of discrete time has it."""
        _refuse_continuous("beta", process)

    def of(self, step: Step, prediction: "Prediction | None" = None) -> Tensor:
        """See `ReverseVariance`."""
        return step.unit_variance


@dataclass(frozen=True)
class BetaTilde:
    """The posterior's variance, right for data that are a single point; at t = 0, where it is 0 and would leave the
    decoder without a density, its value at t = 1."""

    def check(self, process: Process) -> None:
        """See `ReverseVariance`."""
        if isinstance(process, DiscreteProcess) and process.num_timesteps < 2:
            raise ConfigError("sigma2: 'beta_tilde' needs num_timesteps >= 2 (index 0 takes index 1's value)")

    def of(self, step: Step, prediction: "Prediction | None" = None) -> Tensor:
        """See `ReverseVariance`."""
        return step.posterior_variance_clipped


@dataclass(frozen=True)
class Learned:
    """Between the two, pixel by pixel as the network predicts: ln sigma^2 = f ln beta + (1 - f) ln beta_tilde (Nichol
    and Dhariwal 2021, eq. 15), both those of the very step, whichever times it is between."""

    def check(self, process: Process) -> None:
        """See `ReverseVariance`."""
        _refuse_continuous("learned", process)
        BetaTilde().check(process)

    def of(self, step: Step, prediction: "Prediction | None" = None) -> Tensor:
        """See `ReverseVariance`. Raises ConfigError for a prediction without a fraction."""
        if prediction is None or prediction.variance_fraction is None:
            raise ConfigError("sigma2: 'learned' needs a model that predicts its variances; take beta or beta_tilde")
        fraction = prediction.variance_fraction
        high, low = step.unit_variance.log(), step.posterior_variance_clipped.log()
        return (fraction * high + (1.0 - fraction) * low).clamp(-_LARGEST_LOG, _LARGEST_LOG).exp()


@dataclass(frozen=True, eq=False)
class GivenVariance:
    """One positive variance for each time step: `table` float64 [T]."""

    table: Float64[Tensor, " T"]

    def check(self, process: Process) -> None:
        """See `ReverseVariance`."""
        table, num_timesteps = self.table, discrete(process).num_timesteps
        if table.shape != (num_timesteps,) or not bool(((table > 0) & table.isfinite()).all()):
            raise ConfigError(
                f"sigma2: a table of shape {tuple(table.shape)} is not [{num_timesteps}] positive finite numbers; give "
                "one variance for each time step"
            )

    def of(self, step: Step, prediction: "Prediction | None" = None) -> Tensor:
        """See `ReverseVariance`."""
        table = self.table.to(device=step.time.device, dtype=torch.float64)
        return table.index_select(0, step.time)[:, None, None, None]


VARIANCES: dict[str, ReverseVariance] = {"beta": Beta(), "beta_tilde": BetaTilde(), "learned": Learned()}


def variance_named(name: str) -> ReverseVariance:
    """One of `VARIANCES`. Raises ConfigError for another name."""
    if name not in VARIANCES:
        raise ConfigError(f"sigma2: {name!r} is not one of {sorted(VARIANCES)}")
    return VARIANCES[name]


def _refuse_continuous(name: str, process: Process) -> None:
    if not isinstance(process, DiscreteProcess):
        raise ConfigError(
            f"sigma2: {name!r} is no variance of a continuous process, whose steps have beta_tilde; take it"
        )


def variance_table(process: DiscreteProcess, variance: ReverseVariance) -> Float64[Tensor, " T"]:
    """sigma_t^2 of every t, on the CPU, for variances that depend on t only. Raises ConfigError."""
    variance.check(process)
    t = process.timesteps
    return variance.of(process.step(t, t - 1))[:, 0, 0, 0]
