"""Which bound a number is about: reverse variances, decoder and number of time steps, under one name."""

from dataclasses import dataclass, replace

from jaxtyping import Shaped
from torch import Tensor, cat

from ddpm_core.denoiser import Denoiser, Labels, NetworkDenoiser, Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood import GIVEN_LABEL
from ddpm_core.process.base import Images, Time
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import Decoder, DiscreteProcess, discrete
from ddpm_core.process.variances import Learned, ReverseVariance, variance_named


@dataclass(frozen=True)
class Respaced:
    """A denoiser at some of its times only, as one of discrete time: index t stands for `times`[t].

    Whatever holds for a table of time steps, such as DDPM's bound and the variances of its steps, holds for it.
    """

    denoiser: Denoiser
    process: DiscreteProcess
    times: Shaped[Tensor, " T"]

    @classmethod
    def of(cls, denoiser: Denoiser, num_timesteps: int) -> "Respaced":
        """`num_timesteps` of a discrete process's time steps, evenly spaced with both ends; of a continuous one
        gamma_0, which the softmax decoder starts from, then as many steps. Raises ConfigError for more than there
        are."""
        process = denoiser.process
        noisiest_first = process.grid(num_timesteps)
        decoder: Decoder = "gaussian"
        if isinstance(process, ContinuousProcess):
            noisiest_first, decoder = cat([noisiest_first, process.after(noisiest_first[-1:])]), "softmax"
        times = noisiest_first.detach().flip(0)
        return cls(denoiser, DiscreteProcess.of_marginals(process.at(times), decoder), times)

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
        return self.denoiser(z_t, self.times.to(time.device)[time], label)


@dataclass(frozen=True)
class Bound:
    """What `ddpm_core.likelihood.elbo` estimates.

    Attributes:
        denoiser: The model as the bound sees it: itself, or `Respaced`.
        variance: Of the reverse steps; nothing in continuous time.
        name: beta, beta_tilde or learned, with steps_K. before it where those are K of the model's time steps;
            continuous, or steps_K, of a continuous process, whose steps have beta_tilde. given_label. before all of it
            where the denoiser is told each image's label.
        decoder: Of L_0.
        num_timesteps: T; None in continuous time.
    """

    denoiser: Denoiser
    variance: ReverseVariance
    name: str
    decoder: Decoder
    num_timesteps: int | None

    @property
    def given_label(self) -> "Bound":
        """The same of -log2 p(x | c) instead of -log2 p(x): another number, by its name too."""
        return replace(self, name=GIVEN_LABEL + self.name)


def settled_sigma2(sigma2: str, denoiser: Denoiser) -> str:
    """What `auto` stands for: learned where the network predicts variances, else beta_tilde.

    Raises ConfigError for variances that there are not.
    """
    learns_variance = isinstance(denoiser, NetworkDenoiser) and denoiser.learns_variance
    if sigma2 == "auto":
        return "learned" if learns_variance else "beta_tilde"
    variance = variance_named(sigma2)
    variance.check(denoiser.process)
    if isinstance(variance, Learned) and not learns_variance:
        raise ConfigError("sigma2: 'learned' needs a model that predicts its variances; take beta or beta_tilde")
    return sigma2


def bound_of(denoiser: Denoiser, sigma2: str = "auto", num_timesteps: int | None = None) -> Bound:
    """The bound of a model under `sigma2` (auto, beta, beta_tilde, learned) in `num_timesteps` steps; None: all of a
    discrete process, continuous time of any other.

    Raises ConfigError for variances or a number of steps that it does not have.
    """
    process = denoiser.process
    sigma2 = settled_sigma2(sigma2, denoiser)
    variance = variance_named(sigma2)
    if isinstance(process, ContinuousProcess):
        if num_timesteps is None:
            return Bound(denoiser, variance, "continuous", "softmax", None)
        return Bound(Respaced.of(denoiser, num_timesteps), variance, f"steps_{num_timesteps}", "softmax", num_timesteps)
    own = discrete(process).num_timesteps
    if num_timesteps is not None and num_timesteps > own:
        raise ConfigError(f"num_timesteps: {num_timesteps} is above the model's {own} time steps; take at most as many")
    if num_timesteps is None or num_timesteps == own:
        return Bound(denoiser, variance, sigma2, "gaussian", own)
    respaced = Respaced.of(denoiser, num_timesteps)
    variance.check(respaced.process)
    return Bound(respaced, variance, f"steps_{num_timesteps}.{sigma2}", "gaussian", num_timesteps)
