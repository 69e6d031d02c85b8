"""DPM-Solver++ (Lu 2022, DPM-Solver++): multistep exponential integrators in lambda = ln(alpha / sigma).

With h = lambda_s - lambda_t > 0 the flow (eta = 0) and the reverse diffusion (eta = 1) lead to

    z_s = (sigma_s / sigma_t) e^(-eta h) z_t + alpha_s integral_0^h c e^(-c (h - u)) x_0(lambda_t + u) du
          + sigma_s sqrt(1 - e^(-2 eta h)) noise,   c = 1 + eta

(Lu 2022, eqs. 9 and 18). x_0 is taken to be the polynomial in lambda through the predictions of this step and of those
before it. With H = c h its powers (u / h)^n integrate to w_0 = 1 - e^-H, w_1 = 1 - w_0 / H and w_2 = 1 - 2 w_1 / H. The
second order has w_0 / 2 in place of w_1, as the paper's 2M has (alg. 2): the difference is of the order of its error.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddpm_core.errors import ConfigError
from ddpm_core.process.base import Images, Process, Spacing, Step, Time, factor
from ddpm_core.samplers.base import Noise, Predictor, reached

Known = tuple[tuple[Images, Tensor], ...]
"""The predicted x_0 of the steps before and their h, the last first."""


@dataclass(frozen=True)
class DPMSolver:
    """2M and 3M, and their SDE variants.

    Attributes:
        steps: K.
        order: 2 takes one earlier prediction, 3 takes two. The first steps take what there is; the step to the data,
            where lambda is infinite, takes none. 3 with eta = 0 calls the denoiser once more, at the end of the first
            step, which makes that step one of second order: after one of first order the whole would be of second.
        eta: 0 solves the flow; 1 the reverse diffusion, whose first order is DDPM with beta_tilde.
        spacing: Of the times.
    """

    steps: int = 20
    order: Literal[2, 3] = 2
    eta: Literal[0, 1] = 0
    spacing: Spacing = "log_snr"

    @property
    def is_deterministic(self) -> bool:
        """See `Sampler`."""
        return self.eta == 0

    def times(self, process: Process) -> Time:
        """See `Sampler`. Raises ConfigError for another order or eta."""
        if self.order not in (2, 3) or self.eta not in (0, 1):
            raise ConfigError(f"order, eta: {self.order}, {self.eta} are not 2 or 3, and 0 or 1")
        return process.grid(self.steps, self.spacing)

    def calls(self, process: Process) -> Time:
        """See `Sampler`."""
        times = self.times(process)
        return torch.cat([times[:1], reached(process, times)[:1], times[1:]]) if self._starts_twice else times

    @property
    def _starts_twice(self) -> bool:
        return self.order == 3 and self.eta == 0

    def step(
        self, step: Step, z: Images, denoise: Predictor, noise: Noise | None, memory: Known | None
    ) -> tuple[Images, Known]:
        """See `Sampler`."""
        x_0, h, known = denoise(z, step.time).x_0, (step.then.log_snr - step.now.log_snr) / 2.0, memory or ()
        first, second, third = (factor(step.then.alpha * w, z) for w in self.weights((1 + self.eta) * h))
        ratio = step.then.sigma / step.now.sigma
        z_s = factor(ratio * (-h).exp() if self.eta else ratio, z) * z + first * x_0
        if noise is None:
            return z_s, known
        if self.eta:
            z_s = z_s + factor(step.then.sigma * (-torch.expm1(-2.0 * h)).sqrt(), z) * noise()
        if not known and self._starts_twice:
            z_s = z_s + first / 2.0 * (denoise(z_s, step.time_then).x_0 - x_0)
        elif len(known) == 1:
            ((before, width),) = known
            z_s = z_s + first / 2.0 * factor(h / width, z) * (x_0 - before)
        elif len(known) == 2:
            (before, width), (further, wide) = known
            # Newton's divided differences of x_0 over u / h, at 0, -width / h and -(width + wide) / h.
            slope = factor(h / width, z) * (x_0 - before)
            bend = factor(h / (width + wide), z) * (slope - factor(h / wide, z) * (before - further))
            z_s = z_s + second * (slope + factor(width / h, z) * bend) + third * bend
        return z_s, ((x_0, h), *known)[: self.order - 1]

    @staticmethod
    def weights(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """w_0, w_1 and w_2 of H."""
        first = -torch.expm1(-h)
        second = 1.0 - first / h
        return first, second, 1.0 - 2.0 * second / h
