"""What a training objective is: the loss of each row of a batch, at times that it draws itself."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Float64
from torch import Tensor, nn

from ddpm_core.denoiser import Denoise, Labels
from ddpm_core.objectives.times import Times
from ddpm_core.process.base import Images, Process, Time


@dataclass(frozen=True)
class Losses:
    """Of the rows of a batch.

    Attributes:
        rows: [B], whose mean is minimised.
        time: [B], the times drawn.
        values: [B], without gradient: the losses as they would be under uniform times, before any weight.
    """

    rows: Float[Tensor, " B"]
    time: Time
    values: Float[Tensor, " B"]


class Objective(nn.Module, ABC):
    """The loss of each row, whose mean training minimises. Its `state_dict` is kept in checkpoints.

    Attributes:
        process: That of the denoiser which is trained.
        times: Which times are drawn.
    """

    def __init__(self, process: Process, times: Times) -> None:
        super().__init__()
        # In a tuple, as a process with parameters is the denoiser's module and not the objective's.
        self._process = (process,)
        self.times = times

    @property
    def process(self) -> Process:
        """See the class."""
        return self._process[0]

    @property
    def even(self) -> bool:
        """Whether `uniforms` are to be spread evenly over the global batch, frac(u + i / B) at its i-th place with one
        u for all (Kingma 2021, VDM, app. I.1), and not independent."""
        return self.times.even

    @property
    def remembers(self) -> bool:
        """Whether `observe` is to be told of every step."""
        return self.times.remembers

    def observe(self, time: Time, values: Float[Tensor, " N"]) -> None:
        """Learn from the global batch, in the order of its rows; the same on every rank."""
        self.times.observe(time, values)

    def forward(
        self, denoise: Denoise, x_0: Images, uniforms: Float64[Tensor, " B"], eps: Images, label: Labels | None = None
    ) -> Losses:
        """Each row's loss, from one call `denoise(z_t, time, label)` of the denoiser or what wraps it."""
        time, weight = self.times.draw(uniforms)
        values = self.at(denoise, x_0, time, eps, label)
        rows = values if weight is None else weight * values
        return Losses(rows, time, values.detach())

    @abstractmethod
    def at(
        self, denoise: Denoise, x_0: Images, time: Time, eps: Images, label: Labels | None = None
    ) -> Float[Tensor, " B"]:
        """The losses at given times, in nats per dimension where they are part of a bound."""
