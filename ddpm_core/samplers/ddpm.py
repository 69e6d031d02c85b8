"""Ancestral sampling (Ho 2020)."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ddpm_core.denoiser import Prediction
from ddpm_core.process.base import Images, Process, Step, Time, factor
from ddpm_core.process.discrete import discrete
from ddpm_core.process.variances import BetaTilde, ReverseVariance


@dataclass(frozen=True)
class DDPM:
    """z_{t-1} = mu_theta + sigma_t noise for t = T-1..1, and mu_theta at t = 0 (Ho 2020, alg. 2).

    `variance`: sigma_t^2.
    """

    variance: ReverseVariance = field(default_factory=BetaTilde)

    def times(self, process: Process) -> Time:
        """All T. Raises ConfigError where the process does not have the variance."""
        self.variance.check(process)
        return discrete(process).timesteps.flip(0)

    def step(
        self, step: Step, z: Images, prediction: Prediction, noise: Callable[[], Images] | None, memory: None
    ) -> tuple[Images, None]:
        """See `Sampler`."""
        mean = prediction.posterior_mean(step)
        if noise is None:
            return mean, None
        return mean + factor(self.variance.of(step, prediction).sqrt(), z) * noise(), None
