"""Configuration of the sampler: one section, in which every sampler finds its own fields."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from ddpm_core.config import MAX_TIMESTEPS
from pipelines.cli.config import require

OWN_FIELDS: dict[str, tuple[str, ...]] = {
    "ddpm": ("sigma2",),
    "ddim": ("eta",),
    **dict.fromkeys(("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde"), ()),
    "heun": ("churn", "churn_interval", "churn_noise"),
}
"""The fields of some samplers only, by the name of the sampler; the other samplers have to leave them alone."""
# Values beside its default that a field may have with a sampler that does not use it, as printed recipes of earlier
# versions hold them.
_UNUSED: dict[str, tuple[Any, ...]] = {"sigma2": ("beta", "beta_tilde")}
# Steps that a multistep sampler needs to reach its order.
_ORDERS = {"dpmpp_2m": 2, "dpmpp_2m_sde": 2, "dpmpp_3m": 3, "dpmpp_3m_sde": 3}


@dataclass(frozen=True)
class SamplerConfig:
    """What turns noise into images."""

    name: Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "heun"] = "ddpm"
    """ddpm: ancestral (Ho et al. 2020); ddim: deterministic, or with noise by `eta` (Song et al. 2021); dpmpp_2m and
    dpmpp_3m: DPM-Solver++ (Lu et al. 2022), multistep of second and third order, deterministic; dpmpp_2m_sde and
    dpmpp_3m_sde: the same with noise; heun: of second order with two evaluations a step (Karras et al. 2022),
    deterministic, or with noise by `churn`."""
    steps: int | None = None
    """At most the model's T; as many as asked for where its time is continuous. Null takes all T of ddpm, or 250 in
    continuous time, 50 of ddim, 20 of the dpmpp solvers, 30 of those with noise, and 10 of heun."""
    eta: float = 0.0
    """η of ddim, in [0, 1]: 0 is deterministic given the starting noise, 1 has ddpm's noise."""
    sigma2: Literal["auto", "beta", "beta_tilde", "learned"] = "auto"
    """Variance of ddpm's reverse steps. auto: learned where the model predicts it, else beta_tilde, which is the only
    one of continuous time."""
    spacing: Literal["auto", "time", "log_snr", "quadratic", "edm"] = "auto"
    """Where the steps lie: evenly in time, in log-SNR, in the root of time, or in (σ/α)^(1/7) (Karras et al. 2022).
    auto: time for ddpm and ddim, edm for heun, log_snr for the dpmpp solvers, but time if the model ends at SNR 0."""
    tolerance: float | None = None
    """In place of `steps`: the fewest for which half as many move a sample of 64 images by less than this (root mean
    square, of pixels from -1 to 1). For samplers that draw no noise."""
    churn: float = 0.0
    """S_churn of heun: before each step noise is added up to σ/α times 1 + min(churn / steps, 0.41)."""
    churn_interval: tuple[float, float] | None = None
    """[S_min, S_max] of heun: the noise levels σ/α at which it churns. Null: all."""
    churn_noise: float = 1.0
    """S_noise of heun: the deviation of the noise that it adds."""

    def __post_init__(self) -> None:
        least, steps = _ORDERS.get(self.name, 1), self.steps
        rule = "must be at least 1" if least == 1 else f"must be at least {least}, the order of {self.name}"
        require(steps is None or steps >= least, "sampler.steps", steps, rule)
        most = f"must be at most {MAX_TIMESTEPS:,}"
        require(steps is None or steps <= MAX_TIMESTEPS, "sampler.steps", steps, most)
        require(0 <= self.eta <= 1, "sampler.eta", self.eta, "must be in [0, 1]")
        require(0 <= self.churn < math.inf, "sampler.churn", self.churn, "must be finite and at least 0")
        low, high = self.churn_interval or (0.0, 1.0)
        rule = "must be two noise levels σ/α, 0 <= low < high, finite"
        require(0.0 <= low < high < math.inf, "sampler.churn_interval", self.churn_interval, rule)
        require(0 < self.churn_noise < math.inf, "sampler.churn_noise", self.churn_noise, "must be finite and above 0")
        for field in fields(self):
            users = [name for name, own in OWN_FIELDS.items() if field.name in own]
            value = getattr(self, field.name)
            unused = value in (field.default, *_UNUSED.get(field.name, ()))
            rule = f"is a parameter of --sampler.name {' or '.join(users)}"
            require(not users or self.name in users or unused, f"sampler.{field.name}", value, rule)
        for name in ("churn_interval", "churn_noise"):
            used = self.churn > 0 or getattr(self, name) == getattr(SamplerConfig, name)
            require(used, f"sampler.{name}", getattr(self, name), "does nothing without sampler.churn above 0")
        if self.tolerance is not None:
            require(0 < self.tolerance < math.inf, "sampler.tolerance", self.tolerance, "must be finite and above 0")
            require(steps is None, "sampler.steps", steps, "is found by sampler.tolerance; give one of them")
            rule = f"needs a sampler without noise, such as dpmpp_2m, not {self.name}"
            require(not self.draws_noise, "sampler.tolerance", self.tolerance, rule)

    @property
    def draws_noise(self) -> bool:
        """Whether its steps add noise."""
        return self.name in ("ddpm", "dpmpp_2m_sde", "dpmpp_3m_sde") or self.eta > 0 or self.churn > 0
