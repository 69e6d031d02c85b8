"""The noise schedule: float64 coefficient tables of the forward process and its posterior.

Code t is the table index 0..T-1 (a paper's t minus 1); `alphas_cumprod_prev[0]` is 1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ddpm_core.config import MAX_TIMESTEPS
from ddpm_core.errors import ConfigError

Table = Float64[Tensor, " T"]


def check_timesteps(t: Tensor, num_timesteps: int) -> None:
    """Raise ConfigError where a time step is outside 0..T-1 (on the CPU; on a GPU the indexing itself
    stops the program, and reading `t` here would make every step wait for the device)."""
    if t.device.type != "cpu" or t.numel() == 0:
        return
    low, high = int(t.min()), int(t.max())
    if low < 0 or high >= num_timesteps:
        raise ConfigError(f"t: values {low}..{high} are not in 0..{num_timesteps - 1}; use the table index")


def gather_table(table: Tensor, t: Int64[Tensor, " B"], like: Tensor) -> Tensor:
    """table[t] as a [B, 1, ..., 1] factor for `like`, on its device, in float64 or float32, never half."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = table.to(device=like.device, dtype=dtype).index_select(0, t.to(like.device))
    return values.reshape(-1, *(1,) * (like.dim() - 1))


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) for T steps (Ho 2020, eq. 2).

    Make one with `linear`, `cosine` or `from_betas`. All tables are float64 [T] on the CPU:

    - `betas`, `alphas` = 1 - beta, `sqrt_alphas`, `alphas_cumprod` (Ho 2020, eq. 4), `alphas_cumprod_prev`
    - `sqrt_alphas_cumprod`, `sqrt_one_minus_alphas_cumprod`: the factors of x_0 and eps in x_t
    - `snr` = abar / (1 - abar), `log_snr` (Kingma 2021, eq. 2)
    - `posterior_variance`, `posterior_mean_coef_x0`, `posterior_mean_coef_xt`: q(x_{t-1} | x_t, x_0)
      (Ho 2020, eqs. 6-7); the variance at t = 0 is 0
    - `reverse_mean_coef_eps` = beta / sqrt(alpha (1 - abar)): the factor of eps in the reverse mean
      (Ho 2020, eq. 11)
    """

    betas: Table
    config: Mapping[str, Any]
    alphas: Table = field(init=False)
    alphas_cumprod: Table = field(init=False)
    alphas_cumprod_prev: Table = field(init=False)
    sqrt_alphas: Table = field(init=False)
    sqrt_alphas_cumprod: Table = field(init=False)
    sqrt_one_minus_alphas_cumprod: Table = field(init=False)
    snr: Table = field(init=False)
    log_snr: Table = field(init=False)
    posterior_variance: Table = field(init=False)
    posterior_mean_coef_x0: Table = field(init=False)
    posterior_mean_coef_xt: Table = field(init=False)
    reverse_mean_coef_eps: Table = field(init=False)
    _device_tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        betas = self.betas
        _check_betas(betas)
        alphas = 1.0 - betas
        abar = alphas.cumprod(0)
        abar_prev = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        tables = {
            "alphas": alphas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": abar_prev,
            "sqrt_alphas": alphas.sqrt(),
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1.0 - abar).sqrt(),
            "snr": abar / (1.0 - abar),
            "log_snr": abar.log() - (1.0 - abar).log(),
            "posterior_variance": betas * (1.0 - abar_prev) / (1.0 - abar),
            "posterior_mean_coef_x0": abar_prev.sqrt() * betas / (1.0 - abar),
            "posterior_mean_coef_xt": alphas.sqrt() * (1.0 - abar_prev) / (1.0 - abar),
            "reverse_mean_coef_eps": betas / (alphas * (1.0 - abar)).sqrt(),
        }
        for name, table in tables.items():
            object.__setattr__(self, name, table)

    @classmethod
    def linear(cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "NoiseSchedule":
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
        return cls(torch.tensor(betas, dtype=torch.float64), config)

    @classmethod
    def cosine(cls, num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> "NoiseSchedule":
        """abar(u) = cos^2((u + s) / (1 + s) pi / 2), beta <= max_beta (Nichol and Dhariwal 2021, eq. 17)."""
        _check_num_timesteps(num_timesteps)

        def abar(u: float) -> float:
            return math.cos((u + s) / (1.0 + s) * math.pi / 2.0) ** 2

        betas = [
            min(1.0 - abar((i + 1) / num_timesteps) / abar(i / num_timesteps), max_beta) for i in range(num_timesteps)
        ]
        config = {"name": "cosine", "num_timesteps": num_timesteps, "s": s, "max_beta": max_beta}
        return cls(torch.tensor(betas, dtype=torch.float64), config)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Float[Tensor, " T"]) -> "NoiseSchedule":
        """Any table of betas in (0, 1). Raises ConfigError for another value or an empty table."""
        table = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach().clone()
        return cls(table, {"name": "table", "betas": table.tolist()})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule that `to_config` described, table for table. Raises ConfigError for anything else."""
        makers: dict[Any, Callable[..., NoiseSchedule]] = {
            "linear": cls.linear,
            "cosine": cls.cosine,
            "table": cls.from_betas,
        }
        arguments = dict(config)
        name = arguments.pop("name", None)
        if name not in makers:
            raise ConfigError(f"schedule.name: {name!r} is not one of {sorted(makers)}")
        try:
            return makers[name](**arguments)
        except TypeError as error:
            raise ConfigError(f"schedule: {error}; give the fields of a {name} schedule") from None

    def to_config(self) -> dict[str, Any]:
        """A JSON-able description from which `from_config` rebuilds the same tables."""
        return dict(self.config)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.betas.shape[0]

    def gather(self, name: str, t: Int64[Tensor, " B"], like: Tensor) -> Tensor:
        """Table `name` at `t` as a [B, 1, ..., 1] factor for `like`: on its device, float64 for float64
        and float32 for every other dtype (an abar cast to half is 1 for the first steps).

        The table is copied to a device once and kept. Raises ConfigError for a t outside 0..T-1.
        """
        check_timesteps(t, self.num_timesteps)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (name, like.device, dtype)
        table = self._device_tables.get(key)
        if table is None:
            table = getattr(self, name).to(device=like.device, dtype=dtype)
            self._device_tables[key] = table
        return gather_table(table, t, like)


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
