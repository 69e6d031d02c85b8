"""Processes of T steps: float64 coefficient tables of the forward process and its posterior.

Code t is the table index 0..T-1 (a paper's t minus 1); what comes before t = 0 is the image itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ddpm_core.config import MAX_TIMESTEPS
from ddpm_core.errors import ConfigError
from ddpm_core.process.base import EDM_RHO, Marginal, Process, Spacing, Step

Table = Float64[Tensor, " T"]
Timesteps = Int64[Tensor, " B"]
Decoder = Literal["gaussian", "softmax"]
# The columns of `_marginals`, and those of `_steps` by the field of a `Step` that each is.
_MARGINAL = ("alpha", "sigma", "log_snr")
_STEP = {
    "alpha": "step_alpha",
    "variance": "step_variance",
    "unit_variance": "unit_variance",
    "posterior_variance": "posterior_variance",
    "posterior_variance_clipped": "posterior_variance_clipped",
    "posterior_coef_x_0": "posterior_coef_x_0",
    "posterior_coef_z": "posterior_coef_z",
    "coef_eps": "coef_eps",
}


@dataclass(frozen=True, eq=False)
class DiscreteProcess:
    """q(z_t | x_0) = N(alpha_t x_0, sigma_t^2 I) at T times, its SNR strictly falling (Kingma 2021, VDM, eq. 1).

    Make one with `linear`, `cosine`, `from_betas` or `from_alpha_sigma`. All tables are float64 [T] on the CPU; of
    DDPM, where sigma^2 = 1 - alpha^2 and alpha^2 is the product of 1 - beta, they are (Ho 2020, eqs. 4, 7 and 11):

    - `alpha2` = alpha^2 (abar), `sigma2` = sigma^2, their roots `alpha` and `sigma`, `snr`, `log_snr`
    - of the step from t - 1 to t: `step_alpha2` (1 - beta), `step_alpha`, `step_variance` (beta)
    - of the step back: `unit_variance`, for data of variance 1 (beta); `posterior_variance`, which is 0 at t = 0;
      `posterior_variance_clipped`, where that is the value at t = 1; `posterior_coef_x_0` and `posterior_coef_z`;
      `coef_eps` = beta / sqrt((1 - beta) sigma^2)

    `decoder`: what L_0 is about, see `ddpm_core.likelihood.decoder`; of a table made from a continuous process softmax.
    """

    alpha2: Table
    sigma2: Table
    step_alpha2: Table
    step_variance: Table
    config: Mapping[str, Any]
    decoder: Decoder = "gaussian"
    alpha: Table = field(init=False)
    sigma: Table = field(init=False)
    snr: Table = field(init=False)
    log_snr: Table = field(init=False)
    step_alpha: Table = field(init=False)
    unit_variance: Table = field(init=False)
    posterior_variance: Table = field(init=False)
    posterior_variance_clipped: Table = field(init=False)
    posterior_coef_x_0: Table = field(init=False)
    posterior_coef_z: Table = field(init=False)
    coef_eps: Table = field(init=False)
    prior_variance: float = field(init=False)
    prior_signal: float = field(init=False)
    _on_device: dict[tuple[str, torch.device], Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        alpha2, sigma2, step_alpha2, step_variance = self.alpha2, self.sigma2, self.step_alpha2, self.step_variance
        alpha2_before = torch.cat([torch.ones(1, dtype=torch.float64), alpha2[:-1]])
        sigma2_before = torch.cat([torch.zeros(1, dtype=torch.float64), sigma2[:-1]])
        # Both exactly 1 where sigma^2 was computed as 1 - alpha^2: the tables of betas are not changed by them.
        total = alpha2 + sigma2
        total_before = torch.cat([torch.ones(1, dtype=torch.float64), total[:-1]])
        posterior_variance = step_variance * sigma2_before / sigma2
        tables: dict[str, Any] = {
            "alpha": alpha2.sqrt(),
            "sigma": sigma2.sqrt(),
            "snr": alpha2 / sigma2,
            "log_snr": alpha2.log() - sigma2.log(),
            "step_alpha": step_alpha2.sqrt(),
            "unit_variance": step_variance * total_before / total,
            "posterior_variance": posterior_variance,
            # At t = 1 it is one of z_0, which is the image times about the root of total[0].
            "posterior_variance_clipped": torch.cat([posterior_variance[1:2] / total[0], posterior_variance[1:]]),
            "posterior_coef_x_0": alpha2_before.sqrt() * step_variance / sigma2,
            "posterior_coef_z": step_alpha2.sqrt() * sigma2_before / sigma2,
            "coef_eps": step_variance / (step_alpha2 * sigma2).sqrt(),
            "prior_variance": float(total[-1]),
            "prior_signal": float(alpha2[-1] / total[-1]),
        }
        if len(alpha2) == 1:  # there is no step before: `variances.BetaTilde` refuses such a process
            tables["posterior_variance_clipped"] = posterior_variance
        for name, table in tables.items():
            object.__setattr__(self, name, table)

    @classmethod
    def linear(cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "DiscreteProcess":
        """Betas evenly spaced from `beta_start` to `beta_end` (Ho 2020, sec. 4)."""
        _check_num_timesteps(num_timesteps)
        step = (beta_end - beta_start) / max(num_timesteps - 1, 1)
        betas = [beta_start + step * i for i in range(num_timesteps - 1)] + [beta_end]
        config = {
            "name": "linear",
            "num_timesteps": num_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        return cls._of_betas(torch.tensor(betas, dtype=torch.float64), config)

    @classmethod
    def cosine(cls, num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> "DiscreteProcess":
        """abar(u) = cos^2((u + s) / (1 + s) pi / 2), beta <= max_beta (Nichol and Dhariwal 2021, eq. 17)."""
        _check_num_timesteps(num_timesteps)

        def abar(u: float) -> float:
            return math.cos((u + s) / (1.0 + s) * math.pi / 2.0) ** 2

        betas = [
            min(1.0 - abar((i + 1) / num_timesteps) / abar(i / num_timesteps), max_beta) for i in range(num_timesteps)
        ]
        config = {"name": "cosine", "num_timesteps": num_timesteps, "s": s, "max_beta": max_beta}
        return cls._of_betas(torch.tensor(betas, dtype=torch.float64), config)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Float[Tensor, " T"]) -> "DiscreteProcess":
        """Any table of betas in (0, 1). Raises ConfigError for another value or an empty table."""
        table = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach().clone()
        return cls._of_betas(table, {"name": "table", "betas": table.tolist()})

    @classmethod
    def _of_betas(cls, betas: Table, config: Mapping[str, Any]) -> "DiscreteProcess":
        _check_betas(betas)
        step_alpha2 = 1.0 - betas
        alpha2 = step_alpha2.cumprod(0)
        return cls(alpha2, 1.0 - alpha2, step_alpha2, betas, config)

    @classmethod
    def from_alpha_sigma(
        cls, alpha: Sequence[float] | Float[Tensor, " T"], sigma: Sequence[float] | Float[Tensor, " T"]
    ) -> "DiscreteProcess":
        """Any tables of alpha > 0 and sigma > 0 whose SNR strictly falls, not only variance-preserving ones: with
        alpha = 1 and growing sigma the variance explodes (Song 2021, score SDE, sec. 3.4). Raises ConfigError."""
        tables = {
            name: torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
            for name, values in (("alpha", alpha), ("sigma", sigma))
        }
        _check_alpha_sigma(**tables)
        config = {"name": "alpha_sigma", "alpha": tables["alpha"].tolist(), "sigma": tables["sigma"].tolist()}
        return cls._of_squares(tables["alpha"].square(), tables["sigma"].square(), config)

    @classmethod
    def _of_squares(
        cls, alpha2: Table, sigma2: Table, config: Mapping[str, Any], decoder: Decoder = "gaussian"
    ) -> "DiscreteProcess":
        alpha2_before = torch.cat([torch.ones(1, dtype=torch.float64), alpha2[:-1]])
        # The data's SNR is infinite. sigma^2 (1 - SNR_t / SNR_s), which does not cancel where the two are close.
        log_snr = torch.cat([torch.full((1,), math.inf, dtype=torch.float64), alpha2.log() - sigma2.log()])
        step_variance = sigma2 * -torch.expm1(log_snr.diff())
        return cls(alpha2, sigma2, alpha2 / alpha2_before, step_variance, config, decoder)

    @classmethod
    def of_marginals(cls, marginal: Marginal, decoder: Decoder) -> "DiscreteProcess":
        """Those of some times of another process, the least noisy first: a process of its own, whose steps lead from
        each time to the one before."""
        alpha2, sigma2 = (value.detach().cpu().square()[:, 0, 0, 0] for value in (marginal.alpha, marginal.sigma))
        return cls._of_squares(alpha2, sigma2, {}, decoder)

    def rescaled_to_zero_terminal_snr(self) -> "DiscreteProcess":
        """The same with alpha shifted and scaled so that the last is 0 and the first unchanged, sigma^2 = 1 - alpha^2
        (Lin 2024, alg. 1). Nothing of the image is left at T - 1, so eps says nothing of it there: it takes a denoiser
        that predicts x_0 or v. Raises ConfigError for one time step."""
        if self.num_timesteps < 2:
            raise ConfigError("schedule.zero_terminal_snr: needs num_timesteps >= 2; raise it")
        first, last = self.alpha[0], self.alpha[-1]
        alpha2 = ((self.alpha - last) * (first / (first - last))).square()
        step_alpha2 = torch.cat([alpha2[:1], alpha2[1:] / alpha2[:-1]])
        config = {**self.config, "zero_terminal_snr": True}
        return type(self)(alpha2, 1.0 - alpha2, step_alpha2, 1.0 - step_alpha2, config)

    def to_config(self) -> dict[str, Any]:
        """See `Process`."""
        return dict(self.config)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.alpha2.shape[0]

    @property
    def timesteps(self) -> Timesteps:
        """0..T-1."""
        return torch.arange(self.num_timesteps)

    def at(self, time: Timesteps) -> Marginal:
        """q(z_t | x_0) of each row; tables are copied to a device once and kept. Raises ConfigError for a t outside
        0..T-1."""
        check_timesteps(time, self.num_timesteps)
        return self._marginal(time)

    def step(self, now: Timesteps, then: Timesteps) -> Step:
        """From t = `now` to any s = `then` < t; s = -1 is the image itself. On the CPU, see
        `check_timesteps`, raises ConfigError unless -1 <= s < t < T.

        Between neighbours the coefficients are those of the tables, which a schedule of betas gives exactly.
        """
        check_timesteps(now, self.num_timesteps)
        if now.device.type == "cpu" and bool(((then < -1) | (then >= now)).any()):
            raise ConfigError(f"s, t: {then.tolist()}, {now.tolist()} do not satisfy -1 <= s < t < T")
        general = Step.between(now, then, self._marginal(now), self._marginal(then))
        table = self._gather("_steps", now)
        near = (then == now - 1).reshape(-1, 1, 1, 1)
        exact = {
            name: torch.where(near, column, getattr(general, name))
            for name, column in zip(_STEP, table.split(1, 1), strict=True)
        }
        return Step(now, then, general.now, general.then, **exact)

    def draw(self, uniforms: Float64[Tensor, " B"]) -> Timesteps:
        """t uniform in 0..T-1 (Ho 2020, alg. 1)."""
        return (uniforms * self.num_timesteps).long()

    def conditioning(self, time: Timesteps) -> Timesteps:
        """t itself."""
        return time

    def grid(self, num_times: int, spacing: Spacing = "time") -> Int64[Tensor, " K"]:
        """K decreasing time steps over 0..T-1, both ends included (T-1 alone for K = 1), see `Spacing`.

        Where consecutive integers are already further apart than the others, each is taken, and the rest is as even
        over the rest as integers allow. Raises ConfigError unless 1 <= K <= T, and for a spacing by the SNR of a
        process that ends at SNR 0.
        """
        if not 1 <= num_times <= self.num_timesteps:
            raise ConfigError(f"num_steps: {num_times} is not in 1..{self.num_timesteps}, the model's time steps")
        last = self.num_timesteps - 1
        if spacing in ("log_snr", "edm") and self.prior_signal == 0.0:
            raise ConfigError(f"spacing: {spacing!r} needs a process that ends above SNR 0; take 'time' or 'quadratic'")
        if num_times == 1:
            return torch.tensor([last])
        if spacing == "time":
            increasing = [(i * last * 2 + num_times - 1) // (2 * (num_times - 1)) for i in range(num_times)]
        else:
            position = {
                "log_snr": lambda: -self.log_snr,
                "quadratic": lambda: self.timesteps.to(torch.float64).sqrt(),
                "edm": lambda: (self.log_snr / (-2.0 * EDM_RHO)).exp(),
            }[spacing]()
            increasing = _even_in(position, num_times - 1)
        return torch.tensor(increasing[::-1])

    def noisier(self, time: Timesteps, times: float) -> Timesteps:
        """See `Process`: a time of the table."""
        own = time.cpu()
        most = 2.0 * math.log(times) - self.log_snr[own]
        return torch.maximum(torch.searchsorted(-self.log_snr, most, right=True) - 1, own).to(time.device)

    def after(self, times: Timesteps) -> Timesteps:
        """The next of the times; -1, the image itself, after the last."""
        return torch.cat([times[1:], times.new_full((1,), -1)])

    def noise_counters(self, times: Timesteps) -> list[int]:
        """T, then each t."""
        return [self.num_timesteps, *times.tolist()]

    def _marginal(self, time: Timesteps) -> Marginal:
        return Marginal(*self._gather("_marginals", time + 1).split(1, 1))

    def _gather(self, table: str, rows: Timesteps) -> Float64[Tensor, "B K 1 1"]:
        key = (table, rows.device)
        if key not in self._on_device:
            self._on_device[key] = getattr(self, table).to(rows.device)
        return self._on_device[key].index_select(0, rows)[:, :, None, None]

    @property
    def _marginals(self) -> Float64[Tensor, "T1 3"]:
        """`_MARGINAL` at -1, the data, and at 0..T-1."""
        data = torch.tensor([[1.0, 0.0, math.inf]], dtype=torch.float64)
        return torch.cat([data, torch.stack([getattr(self, name) for name in _MARGINAL], 1)])

    @property
    def _steps(self) -> Float64[Tensor, "T 8"]:
        return torch.stack([getattr(self, name) for name in _STEP.values()], 1)


def discrete(process: Process) -> DiscreteProcess:
    """The process, which must be one of T steps. Raises ConfigError for a continuous one."""
    if not isinstance(process, DiscreteProcess):
        raise ConfigError(f"process: {type(process).__name__} has no table of time steps, which this needs")
    return process


def check_timesteps(t: Tensor, num_timesteps: int) -> None:
    """Raise ConfigError where a time step is outside 0..T-1 (on the CPU; on a GPU the indexing itself
    stops the program, and reading `t` here would make every step wait for the device)."""
    if t.device.type != "cpu" or t.numel() == 0:
        return
    low, high = int(t.min()), int(t.max())
    if low < 0 or high >= num_timesteps:
        raise ConfigError(f"t: values {low}..{high} are not in 0..{num_timesteps - 1}; use the table index")


def _even_in(position: Table, num_steps: int) -> list[int]:
    """N + 1 increasing indices from 0 to the last for N = `num_steps`, even in the rising `position` of each index."""
    last = len(position) - 1
    gaps = position.diff().numpy()
    # The k widest gaps get one step each and the others N - k between them, for the least k that leaves none over one.
    widest = np.sort(gaps)[::-1]
    rest = widest[::-1].cumsum()[::-1]
    left = num_steps - np.arange(last)
    k = int(np.argmax(left * widest <= rest))
    places = np.concatenate([[0.0], np.minimum(gaps * (left[k] / rest[k]), 1.0).cumsum()])
    points = np.interp(np.arange(num_steps) * (places[-1] / num_steps), places, np.arange(last + 1.0))
    # Points are at least 1 apart; a limit just off the half keeps rounding errors from joining two at exact halves.
    return [*np.floor(points + 0.499).astype(int).tolist(), last]


def _check_num_timesteps(num_timesteps: int) -> None:
    if not 1 <= num_timesteps <= MAX_TIMESTEPS:
        raise ConfigError(f"schedule.num_timesteps: {num_timesteps} is not in 1..{MAX_TIMESTEPS}; DDPM uses 1000")


def _check_betas(betas: Tensor) -> None:
    if betas.dim() != 1 or betas.numel() == 0:
        raise ConfigError(f"schedule.betas: shape {tuple(betas.shape)} is not [T] with T >= 1; give a list")
    bad = ~((betas > 0.0) & (betas < 1.0))
    if bool(bad.any()):
        index = int(bad.nonzero()[0, 0])
        raise ConfigError(f"schedule.betas[{index}]: {float(betas[index])} is not in (0, 1); correct it")


def _check_alpha_sigma(alpha: Tensor, sigma: Tensor) -> None:
    if alpha.dim() != 1 or alpha.numel() == 0 or alpha.shape != sigma.shape:
        shapes = f"{tuple(alpha.shape)} and {tuple(sigma.shape)}"
        raise ConfigError(
            f"schedule.alpha, schedule.sigma: shapes {shapes} are not both [T] with T >= 1; give two lists"
        )
    for name, table in (("alpha", alpha), ("sigma", sigma)):
        bad = ~((table >= 1e-100) & (table <= 1e100))
        if bool(bad.any()):
            index = int(bad.nonzero()[0, 0])
            raise ConfigError(f"schedule.{name}[{index}]: {float(table[index])} is not in 1e-100..1e100; correct it")
    rising = (alpha.square().log() - sigma.square().log()).diff() >= 0
    if bool(rising.any()):
        index = int(rising.nonzero()[0, 0]) + 1
        raise ConfigError(
            f"schedule.alpha[{index}] / schedule.sigma[{index}]: {float(alpha[index] / sigma[index])} is not below the "
            "one before it; give tables whose signal-to-noise ratio strictly falls"
        )
