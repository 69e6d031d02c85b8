"""The DDIM family (Song 2021)."""

import itertools
from dataclasses import dataclass

import torch

from ddpm_core.errors import ConfigError
from ddpm_core.process.base import Images, Process, Spacing, Step, Time, factor
from ddpm_core.samplers.base import Noise, Predictor


@dataclass(frozen=True)
class DDIM:
    """z_s from q_sigma(z_s | z_t, x_0) = N(alpha_s x_0 + sqrt(sigma_s^2 - sigma^2) eps, sigma^2 I) on a sub-sequence
    of the times (Song 2021, DDIM, eqs. 7 and 12), with the predicted x_0 and eps.

    Attributes:
        steps: K, the denoiser's calls.
        eta: sigma^2 = eta^2 times the variance of q(z_s | z_t, x_0) (eq. 16). 0 is deterministic given the starting
            noise; 1 is DDPM on the sub-sequence, and on the full one equals `DDPM` with beta_tilde, noise for noise.
        spacing: Of the times.
        timesteps: The sub-sequence itself, increasing; `steps` and `spacing` are then ignored.
    """

    steps: int = 50
    eta: float = 0.0
    spacing: Spacing = "time"
    timesteps: tuple[int, ...] | None = None

    @property
    def is_deterministic(self) -> bool:
        """See `Sampler`."""
        return self.eta == 0.0

    def times(self, process: Process) -> Time:
        """The sub-sequence. Raises ConfigError unless it strictly increases and 0 <= eta <= 1."""
        if not 0.0 <= self.eta <= 1.0:
            raise ConfigError(f"eta: {self.eta} is not in [0, 1]; 0 is deterministic DDIM, 1 is DDPM")
        if self.timesteps is None:
            return process.grid(self.steps, self.spacing)
        if not self.timesteps or any(a >= b for a, b in itertools.pairwise(self.timesteps)):
            raise ConfigError("timesteps: not an increasing sub-sequence of the model's time steps")
        return torch.tensor(self.timesteps[::-1])

    def calls(self, process: Process) -> Time:
        """See `Sampler`."""
        return self.times(process)

    def step(self, step: Step, z: Images, denoise: Predictor, noise: Noise | None, memory: None) -> tuple[Images, None]:
        """See `Sampler`."""
        prediction = denoise(z, step.time)
        variance = self.eta**2 * step.posterior_variance
        direction = (step.then.sigma.square() - variance).clamp(min=0.0).sqrt()
        z_s = factor(step.then.alpha, z) * prediction.x_0 + factor(direction, z) * prediction.eps
        if noise is None or self.eta == 0.0:
            return z_s, None
        # The root of the rounded variance, not the rounded root: stored sample sets were made so.
        return z_s + factor(variance, z).sqrt() * noise(), None
