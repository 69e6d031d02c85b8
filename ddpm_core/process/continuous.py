"""Continuous time: q(z | x_0) at any log-SNR between two ends (Kingma 2021, VDM, sec. 3)."""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from ddpm_core.errors import ConfigError
from ddpm_core.process.base import EDM_RHO, Marginal, Process, Spacing, Step
from ddpm_core.process.gamma import GammaSchedule, LearnedGamma, LinearGamma

Gammas = Float64[Tensor, " B"]
Family = Literal["preserving", "exploding"]
# Of the position between the ends that the network is told, as far as discrete time usually goes.
_CONDITIONING_SCALE = 1000.0


class ContinuousProcess(nn.Module):
    """q(z | x_0) for every gamma in [gamma_0, gamma_1]. **A time is gamma = -log SNR itself**: marginals and bounds do
    not depend on the schedule gamma(u), which only says where training draws and samplers step.

    Attributes:
        schedule: gamma(u) over u in [0, 1], perhaps with parameters.
        family: "preserving": alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma) (Kingma 2021, VDM, eq. 4);
            "exploding": alpha = 1, sigma^2 = e^gamma (Karras 2022, EDM).
    """

    def __init__(self, schedule: GammaSchedule, family: Family = "preserving") -> None:
        super().__init__()
        self.schedule, self.family = schedule, family

    @classmethod
    def linear(
        cls, gamma_min: float = -13.3, gamma_max: float = 5.0, family: Family = "preserving"
    ) -> "ContinuousProcess":
        """gamma linear in u. Raises ConfigError for ends that do not rise and for another family."""
        if family not in get_args(Family):
            raise ConfigError(f"schedule.family: {family!r} is not one of {list(get_args(Family))}")
        return cls(LinearGamma(gamma_min, gamma_max), family)

    @classmethod
    def learned(
        cls, gamma_min: float = -13.3, gamma_max: float = 5.0, learned_ends: bool = False
    ) -> "ContinuousProcess":
        """gamma(u) as a monotone network. Raises ConfigError for ends that do not rise."""
        return cls(LearnedGamma(gamma_min, gamma_max, learned_ends))

    @classmethod
    def edm(cls, sigma_min: float = 0.002, sigma_max: float = 80.0) -> "ContinuousProcess":
        """alpha = 1 and ln sigma linear in u (Karras 2022, EDM; the ends of its table 1). Raises ConfigError."""
        if not 0.0 < sigma_min < sigma_max < math.inf:
            raise ConfigError(
                f"schedule.sigma_min, sigma_max: {sigma_min}, {sigma_max} do not satisfy 0 < sigma_min < sigma_max; "
                "EDM uses 0.002 and 80"
            )
        return cls.linear(2.0 * math.log(sigma_min), 2.0 * math.log(sigma_max), "exploding")

    def to_config(self) -> dict[str, Any]:
        """See `Process`."""
        if isinstance(self.schedule, LearnedGamma):
            return {"name": "gamma_learned", **self.schedule.to_config()}
        family = {} if self.family == "preserving" else {"family": self.family}
        return {"name": "gamma_linear", **self.schedule.to_config(), **family}

    @property
    def ends(self) -> tuple[float, float]:
        """gamma_0, the least noisy time, and gamma_1, the noisiest."""
        low, high = self.schedule.ends()
        return low.item(), high.item()

    def marginal_at_end(self) -> Marginal:
        """q(z_1 | x_0), at gamma_1; each [1, 1, 1, 1], differentiable in a learned end."""
        return self.at(self.schedule.ends()[1][None])

    @property
    def prior_variance(self) -> float:
        """See `Process`."""
        return 1.0 if self.family == "preserving" else 1.0 + self.marginal_at_end().sigma.item() ** 2

    @property
    def prior_signal(self) -> float:
        """See `Process`."""
        return self.marginal_at_end().alpha.item() ** 2 / self.prior_variance

    def gamma(self, u: Float64[Tensor, " K"]) -> Gammas:
        """The times at places u in [0, 1] of the schedule."""
        gamma: Tensor = self.schedule(u)[0]
        return gamma

    def at(self, time: Gammas) -> Marginal:
        """q(z | x_0) at each gamma."""
        gamma = time.to(torch.float64)[:, None, None, None]
        if self.family == "exploding":
            return Marginal(torch.ones_like(gamma), (0.5 * gamma).exp(), -gamma)
        log_alpha, log_sigma = (0.5 * nn.functional.logsigmoid(sign * gamma) for sign in (-1.0, 1.0))
        return Marginal(log_alpha.exp(), log_sigma.exp(), -gamma)

    def step(self, now: Gammas, then: Gammas) -> Step:
        """From each row's gamma `now` to its smaller `then`. Raises ConfigError unless then < now (on the CPU)."""
        if now.device.type == "cpu" and bool((then >= now).any()):
            raise ConfigError(f"gamma: {then.tolist()} is not below {now.tolist()}; a step leads to less noise")
        return Step.between(now, then, self.at(now), self.at(then))

    def conditioning(self, time: Gammas) -> Tensor:
        """1000 (gamma - gamma_min) / (gamma_max - gamma_min), with the ends that the schedule began with."""
        low, high = self.schedule.gamma_min, self.schedule.gamma_max
        return (time - low) * (_CONDITIONING_SCALE / (high - low))

    def grid(self, num_times: int, spacing: Spacing = "time") -> Gammas:
        """K = `num_times` times at the places K/K, ..., 1/K of a path from gamma_0 to gamma_1, see `Spacing`; the steps
        from the last lead to gamma_0. Raises ConfigError unless K >= 1."""
        if num_times < 1:
            raise ConfigError(f"num_steps: {num_times} is not >= 1")
        places = torch.arange(num_times, 0, -1, dtype=torch.float64, device=self.device) / num_times
        if spacing in ("time", "quadratic"):
            return self.gamma(places if spacing == "time" else places.square())
        ends = self.schedule.ends(self.device)
        if spacing == "log_snr":
            return torch.lerp(*ends, places)
        low, high = ((end / (2.0 * EDM_RHO)).exp() for end in ends)
        return 2.0 * EDM_RHO * torch.lerp(low, high, places).log()

    def noisier(self, time: Gammas, times: float) -> Gammas:
        """See `Process`: gamma = 2 ln(sigma / alpha), at most gamma_1."""
        return (time + 2.0 * math.log(times)).clamp(max=self.ends[1])

    def after(self, times: Gammas) -> Gammas:
        """The next of the times; gamma_0 after the last."""
        return torch.cat([times[1:], self.schedule.ends(times.device)[0][None]])

    def noise_counters(self, times: Gammas) -> list[int]:
        """0, then the number of each step, from 1."""
        return list(range(len(times) + 1))

    @property
    def device(self) -> torch.device:
        """Where the schedule's parameters lie; the CPU where it has none."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))


def continuous(process: Process) -> ContinuousProcess:
    """The process, which must be one of continuous time. Raises ConfigError for a discrete one."""
    if not isinstance(process, ContinuousProcess):
        raise ConfigError(f"process: {type(process).__name__} has no continuous time, which this needs")
    return process
