"""The forward process: what the noise does to an image up to a time, and between two times.

Shapes: x_0 (the image), z_t, eps [B, C, H, W] in model range; a time is one number per row, [B], of the process's own
time axis. Coefficients are float64 [B, 1, 1, 1] and are rounded to the images' precision where they meet them.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

Images = Float[Tensor, "B C H W"]
Coefficient = Float64[Tensor, "B 1 1 1"]
Time = Int64[Tensor, " B"] | Float64[Tensor, " B"]
Spacing = Literal["time", "log_snr", "quadratic", "edm"]
"""Grids of times by name. Their points are evenly spaced in

- time: the process's own time, t or u (Song 2021, DDIM, app. D.2, linear)
- log_snr: ln(alpha^2 / sigma^2) (Lu 2022, DPM-Solver)
- quadratic: the root of the time, so they lie closer near the image (Song 2021, DDIM, app. D.2)
- edm: (sigma / alpha)^(1/7) (Karras 2022, eq. 5 with rho = 7)
"""
EDM_RHO = 7.0


def factor(coefficient: Tensor, like: Tensor) -> Tensor:
    """A coefficient as it multiplies `like`: on its device, in float64 for float64 and in float32 for every other
    dtype (an alpha rounded to half is 1 for the first steps)."""
    return coefficient.to(device=like.device, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


@dataclass(frozen=True)
class Marginal:
    """q(z_t | x_0) = N(alpha x_0, sigma^2 I) at the times of a batch; log_snr = ln(alpha^2 / sigma^2) (Kingma 2021,
    VDM, eq. 2). Each float64 [B, 1, 1, 1]."""

    alpha: Coefficient
    sigma: Coefficient
    log_snr: Coefficient

    def to(self, device: torch.device | str) -> "Marginal":
        """On another device."""
        return Marginal(self.alpha.to(device), self.sigma.to(device), self.log_snr.to(device))

    def __getitem__(self, rows: slice | Tensor) -> "Marginal":
        return Marginal(self.alpha[rows], self.sigma[rows], self.log_snr[rows])


@dataclass(frozen=True)
class Gaussian:
    """N(mean, variance I): mean [B, C, H, W], variance [B, 1, 1, 1]."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Step:
    """Between z_t, `now`, and the less noisy z_s, `then`: q(z_t | z_s) = N(alpha z_s, variance I) and its posterior.

    Attributes:
        time: t of each row.
        time_then: s of each row.
        now: At t.
        then: At s; after the last step of discrete time the data themselves, alpha = 1 and sigma = 0.
        alpha: alpha_t / alpha_s (Kingma 2021, VDM, app. A.1); sqrt(1 - beta_t) of DDPM.
        variance: sigma_t^2 - alpha^2 sigma_s^2; beta_t of DDPM.
        unit_variance: Of z_s given z_t where the data have variance 1, `variance` times (alpha_s^2 + sigma_s^2) /
            (alpha_t^2 + sigma_t^2); beta_t of DDPM, too (Ho 2020, sec. 3.2).
        posterior_variance: Of q(z_s | z_t, x_0) (Ho 2020, eq. 7); 0 where s is the data.
        posterior_variance_clipped: The same, but of the step from the first time to the data that of the step before,
            in units of the image, so that the decoder's density exists (Nichol and Dhariwal 2021, sec. 3.1).
        posterior_coef_x_0: Factor of x_0 in the posterior's mean.
        posterior_coef_z: Factor of z_t in the posterior's mean.
        coef_eps: Factor of eps in the posterior's mean, where x_0 is expressed in z_t and eps (Ho 2020, eq. 11).
    """

    time: Time
    time_then: Time
    now: Marginal
    then: Marginal
    alpha: Coefficient
    variance: Coefficient
    unit_variance: Coefficient
    posterior_variance: Coefficient
    posterior_variance_clipped: Coefficient
    posterior_coef_x_0: Coefficient
    posterior_coef_z: Coefficient
    coef_eps: Coefficient

    @classmethod
    def between(cls, time: Time, time_then: Time, now: Marginal, then: Marginal) -> "Step":
        """The step between any two marginals (Kingma 2021, VDM, app. A.1 and A.2).

        The variance is sigma_t^2 (1 - SNR_t / SNR_s), which does not cancel where the two are close. Two marginals do
        not know the step before, so the clipped posterior variance is the posterior variance itself.
        """
        alpha = now.alpha / then.alpha
        share = -torch.expm1(now.log_snr - then.log_snr)
        variance = now.sigma.square() * share
        total, total_before = (m.alpha.square() + m.sigma.square() for m in (now, then))
        posterior_variance = then.sigma.square() * share
        return cls(
            time=time,
            time_then=time_then,
            now=now,
            then=then,
            alpha=alpha,
            variance=variance,
            unit_variance=variance * total_before / total,
            posterior_variance=posterior_variance,
            posterior_variance_clipped=posterior_variance,
            posterior_coef_x_0=then.alpha * share,
            posterior_coef_z=alpha * then.sigma.square() / now.sigma.square(),
            coef_eps=now.sigma * share / alpha,
        )

    def posterior(self, z_t: Images, x_0: Images) -> Gaussian:
        """q(z_s | z_t, x_0) (Ho 2020, eqs. 6-7; Kingma 2021, VDM, app. A.2)."""
        mean = factor(self.posterior_coef_x_0, z_t) * x_0 + factor(self.posterior_coef_z, z_t) * z_t
        return Gaussian(mean, factor(self.posterior_variance, z_t))

    def mean_from_eps(self, z_t: Images, eps: Images) -> Images:
        """The posterior's mean at the x_0 that z_t contains besides `eps` (Ho 2020, eq. 11).

        Through eps, not x_0: at small alpha_t, x_0 is large and its rounding would enter the mean.
        """
        return z_t / factor(self.alpha, z_t) - factor(self.coef_eps, z_t) * eps

    def to(self, device: torch.device | str) -> "Step":
        """On another device."""
        return self._map(lambda value: value.to(device))

    def __getitem__(self, rows: slice | Tensor) -> "Step":
        """Some rows of the batch."""
        return self._map(lambda value: value[rows])

    def _map(self, change: Any) -> "Step":
        return Step(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


@runtime_checkable
class Process(Protocol):
    """The noise schedule and its time axis: alpha and sigma with strictly falling SNR, from the data to the noise."""

    @property
    def prior_variance(self) -> float:
        """V of p(z_T) = N(0, V I): what data of variance 1 have at the noisiest time, alpha^2 + sigma^2; 1 for a
        variance-preserving process."""
        ...

    @property
    def prior_signal(self) -> float:
        """The data's part of V, alpha^2 / V."""
        ...

    def at(self, time: Time) -> Marginal:
        """q(z_t | x_0) of each row. Raises ConfigError for a time that the process does not have."""
        ...

    def step(self, now: Time, then: Time) -> Step:
        """From each row's `now` to its less noisy `then`. Raises ConfigError for times that the process lacks."""
        ...

    def conditioning(self, time: Time) -> Tensor:
        """What a network's time embedding is given for each row, [B]: numbers between 0 and about 1000."""
        ...

    def grid(self, num_times: int, spacing: Spacing = "time") -> Time:
        """`num_times` times, the noisiest first, see `Spacing`. Raises ConfigError for a grid that it cannot give."""
        ...

    def noisier(self, time: Time, times: float) -> Time:
        """The noisiest time of the process at which sigma / alpha is at most `times` (>= 1) what it is at `time`."""
        ...

    def after(self, times: Time) -> Time:
        """Where the steps from `times` (noisiest first) lead: the next of them, and the data after the last."""
        ...

    def noise_counters(self, times: Time) -> list[int]:
        """What a sampler's noise is keyed by beside seed and id: of the starting noise, then of each time's step."""
        ...

    def to_config(self) -> dict[str, Any]:
        """A JSON-able description, from which `ddpm_core.process.process_from_config` makes the same process."""
        ...


def q_sample(marginal: Marginal, x_0: Images, eps: Images) -> Images:
    """z_t = alpha x_0 + sigma eps (Ho 2020, eq. 4)."""
    return factor(marginal.alpha, x_0) * x_0 + factor(marginal.sigma, x_0) * eps
