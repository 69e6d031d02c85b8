"""Heun's method for the flow in sigma / alpha, with churn (Karras 2022, EDM, algs. 1 and 2)."""

import math
from dataclasses import dataclass

import torch

from ddpm_core.errors import ConfigError
from ddpm_core.process.base import Images, Marginal, Process, Spacing, Step, Time, factor
from ddpm_core.samplers.base import Noise, Predictor, reached

# Never more new noise than there is already (Karras 2022, alg. 2).
_MOST = math.sqrt(2.0) - 1.0


@dataclass(frozen=True)
class Heun:
    """The trapezoid of d y / d sbar = eps in y = z / alpha and sbar = sigma / alpha; two calls of the denoiser a step,
    one where the step leads to the data, or comes from SNR 0, where sbar is infinite.

    Attributes:
        steps: K.
        spacing: Of the times.
        churn: S_churn: before a step noise is added up to sbar (1 + min(S_churn / K, sqrt(2) - 1)), or to the noisiest
            time of the process that is not beyond it; so the noise added is exactly that between two of its times. None
            before the step to the data. 0 adds none at all.
        churn_interval: [S_min, S_max], the sbar at which that is done.
        churn_noise: S_noise, the deviation of that noise.
    """

    steps: int = 20
    spacing: Spacing = "edm"
    churn: float = 0.0
    churn_interval: tuple[float, float] = (0.0, math.inf)
    churn_noise: float = 1.0

    @property
    def is_deterministic(self) -> bool:
        """See `Sampler`."""
        return self.churn == 0.0

    def times(self, process: Process) -> Time:
        """See `Sampler`. Raises ConfigError for churn out of its range."""
        low, high = self.churn_interval
        if not (0.0 <= self.churn < math.inf and 0.0 <= low <= high and 0.0 < self.churn_noise < math.inf):
            raise ConfigError(
                f"churn, churn_interval, churn_noise: {self.churn}, {list(self.churn_interval)}, {self.churn_noise} do "
                "not satisfy 0 <= churn, 0 <= low <= high and 0 < noise"
            )
        return process.grid(self.steps, self.spacing)

    def calls(self, process: Process) -> Time:
        """See `Sampler`."""
        times = self.times(process)
        ended = reached(process, times)
        begun = torch.cat([*(self._begin(process, time[None]) for time in times[: len(ended)]), times[len(ended) :]])
        alone = int(process.prior_signal == 0.0)
        pairs = torch.stack([begun[alone : len(ended)], ended[alone:]], 1).flatten()
        return torch.cat([begun[:alone], pairs, begun[max(alone, len(ended)) :]])

    def step(
        self, step: Step, z: Images, denoise: Predictor, noise: Noise | None, memory: bool | None
    ) -> tuple[Images, bool]:
        """See `Sampler`."""
        process, time, now, then = denoise.process, step.time, step.now, step.then
        if self.churn and noise is not None:
            time = self._begin(process, time)
            if bool((time > step.time).all()):
                raised = process.step(time, step.time)
                spread = self.churn_noise * raised.variance.sqrt()
                z, now = factor(raised.alpha, z) * z + factor(spread, z) * noise(), raised.now
        prediction = denoise(z, time)
        z_s = factor(then.alpha, z) * prediction.x_0 + factor(then.sigma, z) * prediction.eps
        if noise is not None and (memory or process.prior_signal > 0.0):
            half = (then.sigma - then.alpha * _sbar(now)) / 2.0
            z_s = z_s + factor(half, z) * (denoise(z_s, step.time_then).eps - prediction.eps)
        return z_s, True

    def _begin(self, process: Process, time: Time) -> Time:
        """To where noise is added before the step from `time` [1]."""
        low, high = self.churn_interval
        if not self.churn or not low <= float(_sbar(process.at(time))) <= high:
            return time
        return process.noisier(time, 1.0 + min(self.churn / self.steps, _MOST))


def _sbar(marginal: Marginal) -> torch.Tensor:
    return marginal.sigma / marginal.alpha
