"""The forward process's fields, what the network predicts of it, and the process that they make."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ddpm_core.config import MAX_TIMESTEPS
from pipelines.cli.config import require

if TYPE_CHECKING:
    from ddpm_core.process.continuous import ContinuousProcess
    from ddpm_core.process.discrete import DiscreteProcess

# sigma = e^(gamma / 2), and |gamma| is at most 80.
_SIGMAS, _GAMMA = (1e-17, 1e17), 80.0


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process."""

    schedule: Literal["linear", "cosine", "gamma_linear", "gamma_learned", "edm"] = "linear"
    """T steps: linear, betas from beta_start to beta_end (Ho et al. 2020), or cosine (Nichol & Dhariwal 2021).
    Continuous time: γ = -ln SNR from gamma_min to gamma_max, linear in t (gamma_linear) or a monotone network of t that
    is trained with the rest (gamma_learned; both Kingma et al. 2021), or σ from sigma_min to sigma_max beside the
    unscaled image (edm; Karras et al. 2022)."""
    num_timesteps: int = 1000
    """T, the number of diffusion steps of linear and cosine."""
    beta_start: float = 1e-4
    """First beta of the linear schedule."""
    beta_end: float = 0.02
    """Last beta of the linear schedule."""
    betas: tuple[float, ...] | None = None
    """A table of betas, each in (0, 1); when given it replaces the schedule and num_timesteps."""
    zero_terminal_snr: bool = False
    """Rescale linear, cosine or betas so that the last step is noise alone (Lin et al. 2024)."""
    gamma_min: float = -13.3
    """γ next to the data, where the learned one begins if learned_ends."""
    gamma_max: float = 5.0
    """γ at the noise, where the learned one begins if learned_ends."""
    learned_ends: bool = False
    """Train both ends of gamma_learned too, by the bound."""
    sigma_min: float = 0.002
    """Least σ of edm, in units of an image whose values are in [-1, 1]."""
    sigma_max: float = 80.0
    """Largest σ of edm."""
    prediction: Literal["eps", "x_0", "v", "residual_eps", "edm"] = "eps"
    """What the network predicts: eps, the noise; x_0, the image; v = α eps - σ x_0 (Salimans & Ho 2022); residual_eps,
    eps - z_t (Kingma et al. 2021); edm, the image after Karras's preconditioning (2022)."""

    def __post_init__(self) -> None:
        steps_hold = 2 <= self.num_timesteps <= MAX_TIMESTEPS
        require(steps_hold, "diffusion.num_timesteps", self.num_timesteps, f"must be in 2..{MAX_TIMESTEPS}")
        for name in ("beta_start", "beta_end"):
            require(0 < getattr(self, name) < 1, f"diffusion.{name}", getattr(self, name), "must be in (0, 1)")
        require(self.beta_start <= self.beta_end, "diffusion.beta_start", self.beta_start, "must not exceed beta_end")
        if self.betas is not None:
            rule = f"must not be given with schedule {self.schedule}, which has none"
            require(self.schedule in ("linear", "cosine"), "diffusion.betas", self.betas, rule)
            require(len(self.betas) >= 2, "diffusion.betas", self.betas, "must hold at least 2 numbers")
            for index, beta in enumerate(self.betas):
                require(0 < beta < 1, f"diffusion.betas[{index}]", beta, "must be in (0, 1)")
        for name in ("gamma_min", "gamma_max"):
            value = getattr(self, name)
            require(abs(value) <= _GAMMA, f"diffusion.{name}", value, f"must be in {-_GAMMA:.0f}..{_GAMMA:.0f}")
        for name in ("sigma_min", "sigma_max"):
            value, (least, most) = getattr(self, name), _SIGMAS
            require(least <= value <= most, f"diffusion.{name}", value, f"must be in {least}..{most}")
        for name, other in (("gamma_min", "gamma_max"), ("sigma_min", "sigma_max")):
            rule = f"must be below {other} = {getattr(self, other)}"
            require(getattr(self, name) < getattr(self, other), f"diffusion.{name}", getattr(self, name), rule)
        learns_ends = not self.learned_ends or self.schedule == "gamma_learned"
        rule = f"must be false with schedule {self.schedule}; gamma_learned has ends to learn"
        require(learns_ends, "diffusion.learned_ends", self.learned_ends, rule)
        if self.zero_terminal_snr:
            rule = f"must be false with schedule {self.schedule}, which has no table; lower its SNR by gamma_max"
            if self.schedule == "edm":
                rule = rule.replace("gamma_max", "sigma_max")
            require(not self.is_continuous, "diffusion.zero_terminal_snr", True, rule)
            rule = (
                "must be x_0 or v with zero_terminal_snr: where z_t is noise alone, the noise says nothing of the image"
            )
            require(self.prediction in ("x_0", "v"), "diffusion.prediction", self.prediction, rule)

    @property
    def is_continuous(self) -> bool:
        """Whether it has continuous time instead of a table of betas."""
        return self.schedule in ("gamma_linear", "gamma_learned", "edm")

    @property
    def table_length(self) -> int | None:
        """T of the table that results; None in continuous time."""
        if self.is_continuous:
            return None
        return self.num_timesteps if self.betas is None else len(self.betas)

    def process(self) -> "DiscreteProcess | ContinuousProcess":
        """The process with its tables, or with new parameters of its γ."""
        # here: fields are checked and --help is shown without torch
        from ddpm_core.process.continuous import ContinuousProcess
        from ddpm_core.process.discrete import DiscreteProcess

        if self.schedule == "gamma_linear":
            return ContinuousProcess.linear(self.gamma_min, self.gamma_max)
        if self.schedule == "gamma_learned":
            return ContinuousProcess.learned(self.gamma_min, self.gamma_max, self.learned_ends)
        if self.schedule == "edm":
            return ContinuousProcess.edm(self.sigma_min, self.sigma_max)
        if self.betas is not None:
            table = DiscreteProcess.from_betas(self.betas)
        elif self.schedule == "cosine":
            table = DiscreteProcess.cosine(self.num_timesteps)
        else:
            table = DiscreteProcess.linear(self.num_timesteps, self.beta_start, self.beta_end)
        return table.rescaled_to_zero_terminal_snr() if self.zero_terminal_snr else table
