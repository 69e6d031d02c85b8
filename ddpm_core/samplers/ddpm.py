"""Ancestral sampling (Ho 2020)."""

from dataclasses import dataclass, field

from ddpm_core.errors import ConfigError
from ddpm_core.process.base import Images, Process, Spacing, Step, Time, factor
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import discrete
from ddpm_core.process.variances import BetaTilde, ReverseVariance
from ddpm_core.samplers.base import Noise, Predictor


@dataclass(frozen=True)
class DDPM:
    """z_s = mu_theta + sigma noise from the noisiest time to the least noisy one, and mu_theta where that is the image
    itself (Ho 2020, alg. 2; Kingma 2021, VDM, app. A.4).

    Attributes:
        variance: sigma^2.
        steps: K, with the variances of those very steps (Nichol and Dhariwal 2021, sec. 4); None: all T of a discrete
            process.
        spacing: Of their times.
    """

    variance: ReverseVariance = field(default_factory=BetaTilde)
    steps: int | None = None
    spacing: Spacing = "time"

    @property
    def is_deterministic(self) -> bool:
        """See `Sampler`."""
        return False

    def times(self, process: Process) -> Time:
        """The K times. Raises ConfigError where the process does not have the variance, and for a number of steps that
        a discrete process does not have or that a continuous one needs."""
        self.variance.check(process)
        if isinstance(process, ContinuousProcess):
            if self.steps is None:
                raise ConfigError("steps: None says nothing in continuous time; give a number, such as 250")
            return process.grid(self.steps, self.spacing)
        return discrete(process).timesteps.flip(0) if self.steps is None else process.grid(self.steps, self.spacing)

    def calls(self, process: Process) -> Time:
        """See `Sampler`."""
        return self.times(process)

    def step(self, step: Step, z: Images, denoise: Predictor, noise: Noise | None, memory: None) -> tuple[Images, None]:
        """See `Sampler`."""
        prediction = denoise(z, step.time)
        mean = prediction.posterior_mean(step)
        if noise is None:
            return mean, None
        return mean + factor(self.variance.of(step, prediction).sqrt(), z) * noise(), None
