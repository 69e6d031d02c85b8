"""Guidance: a denoiser led away from what it, or a weaker one, predicts without the label."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from ddpm_core.denoiser import Denoiser, Labels, Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.process.base import Images, Marginal, Process, Time
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess


@dataclass(frozen=True)
class Guided:
    """eps = eps_0 + w (eps_c - eps_0): w = 0 is eps_0 alone, 1 the denoiser with its label, above 1 guided (Ho and
    Salimans 2021, eq. 6, whose w is this one minus 1). x_0 and v, being affine in eps, are combined likewise.

    Attributes:
        denoiser: Gives eps_c.
        scale: w.
        interval: (low, high) in noise levels sigma / alpha: where low < sigma / alpha <= high does not hold, the
            denoiser stands alone (Kynkaanniemi 2024, eq. 6). None: it guides everywhere.
        weaker: Gives eps_0 with the same label (Karras 2024, autoguidance, eq. 3). None: the denoiser does, without the
            label.

    With w = 0, with w = 1 and outside the interval one call of one network is made, and its prediction is returned as
    it is. Of two calls, variance_fraction is that of eps_c: only eps is led. Raises ConfigError for a w that is not
    finite, for an interval that is none, and for a denoiser without labels or a weaker one that does not fit
    (`check_weaker`).
    """

    denoiser: Denoiser
    scale: float
    interval: tuple[float, float] | None = None
    weaker: Denoiser | None = None

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_interval(self.interval)
        if self.weaker is not None:
            check_weaker(self.denoiser, self.weaker)
        elif self.denoiser.num_classes is None:
            raise ConfigError(f"scale: {self.scale} needs a model that was trained with labels, or a weaker model")

    @property
    def process(self) -> Process:
        """See `Denoiser`."""
        return self.denoiser.process

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """See `Denoiser`."""
        return self.denoiser.image_shape

    @property
    def num_classes(self) -> int | None:
        """See `Denoiser`."""
        return self.denoiser.num_classes

    def __call__(self, z_t: Images, time: Time, label: Labels | None = None) -> Prediction:
        """See `Denoiser`."""
        guided = None if self.interval is None else within(self.process.at(time), self.interval)
        if self.scale == 1.0 or not (guided is None or bool(guided.any())):
            return self.denoiser(z_t, time, label)
        if self.scale == 0.0 and (guided is None or bool(guided.all())):
            return self._without(z_t, time, label)
        told, untold = self.denoiser(z_t, time, label), self._without(z_t, time, label)
        before = untold.eps if told.holds == "eps" else untold.x_0
        led = before + self.scale * (told.held - before)
        if guided is not None:
            led = torch.where(guided.to(led.device)[:, None, None, None], led, told.held)
        return replace(told, held=led)

    def calls(self, times: Time) -> tuple[int, int]:
        """Of a sampler that asks at `times` [K] (`Sampler.calls`): how often the denoiser is called with the label, and
        how often something for eps_0."""
        num_times = len(times)
        inside = num_times if self.interval is None else int(within(self.process.at(times), self.interval).sum())
        if self.scale == 1.0:
            return num_times, 0
        return (num_times - inside, inside) if self.scale == 0.0 else (num_times, inside)

    def _without(self, z_t: Images, time: Time, label: Labels | None) -> Prediction:
        return self.denoiser(z_t, time) if self.weaker is None else self.weaker(z_t, time, label)


def within(marginal: Marginal, interval: tuple[float, float]) -> Bool[Tensor, " B"]:
    """Whether low < sigma / alpha <= high, of each row."""
    noise, alpha = marginal.sigma.flatten(), marginal.alpha.flatten()
    return (noise > interval[0] * alpha) & (noise <= interval[1] * alpha)  # alpha may be 0


def check_scale(scale: float, name: str = "scale") -> None:
    """Raise ConfigError unless w is a finite number."""
    if not abs(scale) < float("inf"):
        raise ConfigError(f"{name}: {scale} is not finite; 0 is unconditional, 1 conditional, above 1 guided")


def check_interval(interval: tuple[float, float] | None, name: str = "interval") -> None:
    """Raise ConfigError unless 0 <= low < high; high may be infinite."""
    if interval is not None and not 0.0 <= interval[0] < interval[1]:
        raise ConfigError(f"{name}: {list(interval)} does not hold 0 <= low < high, noise levels sigma / alpha")


def check_weaker(denoiser: Denoiser, weaker: Denoiser) -> None:
    """Raise ConfigError unless both are asked the same: images of one shape, as many classes, z_t of one process.

    Continuous processes may differ in what was learned of gamma: their time is gamma itself.
    """
    for name, own, other in (
        ("image shape", denoiser.image_shape, weaker.image_shape),
        ("number of classes", denoiser.num_classes, weaker.num_classes),
    ):
        if own != other:
            raise ConfigError(f"the weaker model's {name} is {other}, not {own}; take one of the same kind")
    if not _same_times(denoiser.process, weaker.process):
        raise ConfigError("the weaker model has another noise schedule; take one that was trained with the same")


def _same_times(process: Process, other: Process) -> bool:
    if isinstance(process, ContinuousProcess) and isinstance(other, ContinuousProcess):
        names = ("gamma_min", "gamma_max")
        ours, theirs = process.schedule.to_config(), other.schedule.to_config()
        return process.family == other.family and [ours[name] for name in names] == [theirs[name] for name in names]
    if isinstance(process, DiscreteProcess) and isinstance(other, DiscreteProcess):
        return torch.equal(process.alpha2, other.alpha2) and torch.equal(process.log_snr, other.log_snr)
    return False
