"""Which times training draws, and what each then counts."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from ddpm_core.errors import ConfigError
from ddpm_core.process.base import Process, Time
from ddpm_core.process.continuous import ContinuousProcess, continuous
from ddpm_core.process.discrete import discrete

Uniforms = Float64[Tensor, " B"]
# Of importance: the losses remembered of each t, and what is left to uniform times (Nichol and Dhariwal 2021, sec.
# 3.3).
HISTORY = 10
_UNIFORM = 0.001


class Times(nn.Module, ABC):
    """Times from uniform numbers, with weights under which the mean loss is that of times uniform in t or gamma.

    Attributes:
        even: See `Objective`.
        remembers: See `Objective`.
    """

    even = False
    remembers = False

    @abstractmethod
    def draw(self, uniforms: Uniforms) -> tuple[Time, Tensor | None]:
        """Times [B] from `uniforms` in [0, 1), and weights [B]; None: all are 1."""

    def observe(self, time: Time, values: Float[Tensor, " N"]) -> None:
        """See `Objective.observe`."""


class UniformTimes(Times):
    """Uniform in the process's own time; over a learned gamma(u) it is u, weighted by d gamma / du."""

    def __init__(self, process: Process, even: bool = False) -> None:
        super().__init__()
        self.even = even
        self._process = (process,)

    def draw(self, uniforms: Uniforms) -> tuple[Time, Tensor | None]:
        """See `Times`."""
        (process,) = self._process
        if isinstance(process, ContinuousProcess):
            gamma, slope = process.schedule(uniforms)
            return gamma, slope
        return discrete(process).draw(uniforms), None


class SteppedTimes(Times):
    """gamma(i / T), i uniform in 1..T, weighted for the bound of T steps: T (e^(gamma_i - gamma_{i-1}) - 1) / (gamma_1
    - gamma_0) instead of 1 (Kingma 2021, VDM, eqs. 13-14)."""

    def __init__(self, process: ContinuousProcess, num_timesteps: int, even: bool = True) -> None:
        super().__init__()
        if num_timesteps < 1:
            raise ConfigError(f"vlb_timesteps: {num_timesteps} is not >= 1")
        self.even = even
        self._process, self._steps = (process,), num_timesteps

    def draw(self, uniforms: Uniforms) -> tuple[Time, Tensor | None]:
        """See `Times`."""
        (process,), steps = self._process, self._steps
        index = (uniforms * steps).floor()
        (gamma, _), (before, _) = (process.schedule((index + offset) / steps) for offset in (1.0, 0.0))
        low, high = process.schedule.ends(uniforms.device)
        return gamma, steps * torch.expm1(gamma - before) / (high - low)


class LogNormalTimes(Times):
    """ln(sigma / alpha), which is gamma / 2, from the normal distribution of Karras 2022, table 1, kept between the
    ends of the process. What is drawn more often is to count more, so there are no weights."""

    mean, deviation = -1.2, 1.2

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = (continuous(process),)

    def draw(self, uniforms: Uniforms) -> tuple[Time, Tensor | None]:
        """See `Times`."""
        low, high = self._process[0].ends
        # u = 0 would be the normal distribution's minus infinity, which the ends take back.
        gamma = 2.0 * (self.mean + self.deviation * torch.special.ndtri(uniforms))
        return gamma.clamp(low, high), None


class ImportanceTimes(Times):
    """t with probability p_t in proportion to the root mean square of its last 10 losses, once all t have 10, mixed
    with 0.001 of the uniform distribution; weight 1 / (T p_t) (Nichol and Dhariwal 2021, sec. 3.3).

    The losses, `history` float64 [T, 10] with the newest last and `count` int64 [T], are the state that checkpoints
    keep.
    """

    remembers = True

    def __init__(self, process: Process) -> None:
        super().__init__()
        num_timesteps = discrete(process).num_timesteps
        self.history: Tensor
        self.count: Tensor
        self.register_buffer("history", torch.zeros(num_timesteps, HISTORY, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(num_timesteps, dtype=torch.int64))

    @property
    def probabilities(self) -> Float64[Tensor, " T"]:
        """p_t."""
        size = len(self.count)
        uniform = torch.full_like(self.history[:, 0], 1.0 / size)
        level = self.history.square().mean(1).sqrt()
        total = level.sum()
        known = (self.count == HISTORY).all() & (total > 0.0) & total.isfinite()
        share = torch.where(known, level / torch.where(known, total, 1.0), uniform)
        return (1.0 - _UNIFORM) * share + _UNIFORM * uniform

    def draw(self, uniforms: Uniforms) -> tuple[Time, Tensor | None]:
        """See `Times`."""
        p = self.probabilities
        edges = p.cumsum(0)[:-1]  # without the last, so that rounding cannot lead past it
        time = torch.searchsorted(edges, uniforms, right=True)
        return time, (1.0 / (len(p) * p))[time].to(torch.float32)

    def observe(self, time: Time, values: Float[Tensor, " N"]) -> None:
        """See `Objective.observe`."""
        seen, row, number = torch.unique(time, return_inverse=True, return_counts=True)
        order = row.argsort(stable=True)
        rank = torch.empty_like(row)  # of each loss among those of its t
        rank[order] = torch.arange(len(row), device=row.device) - (number.cumsum(0) - number)[row[order]]
        kept = (torch.arange(HISTORY, device=row.device) + number[:, None]).clamp(max=HISTORY - 1)
        self.history[seen] = self.history[seen].gather(1, kept)
        place = HISTORY - number[row] + rank
        new = place >= 0
        self.history[time[new], place[new]] = values[new].to(torch.float64)
        self.count[seen] = (self.count[seen] + number).clamp(max=HISTORY)
