"""gamma(u) = -log SNR over u in [0, 1]: the noise schedule of continuous time (Kingma 2021, VDM, secs. 3.2 and 5.1)."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor, nn

from ddpm_core.errors import ConfigError

Numbers = Float64[Tensor, "*S"]
# Beyond it alpha or sigma is 0 in float32.
_LIMIT = 80.0
_WIDTH = 1024


class GammaSchedule(nn.Module, ABC):
    """gamma(u) = gamma_0 + (gamma_1 - gamma_0) s(u), s rising from s(0) = 0 to s(1) = 1; everything in float64.

    `gamma_min`, `gamma_max`: the ends, or what learned ones begin with; gamma_min < gamma_max, both in -80..80.
    """

    def __init__(self, gamma_min: float, gamma_max: float) -> None:
        super().__init__()
        for name, value in (("gamma_min", gamma_min), ("gamma_max", gamma_max)):
            if not isinstance(value, int | float) or not -_LIMIT <= value <= _LIMIT:
                raise ConfigError(f"schedule.{name}: {value!r:.100} is not in -{_LIMIT:.0f}..{_LIMIT:.0f}; correct it")
        if not gamma_min < gamma_max:
            raise ConfigError(
                f"schedule.gamma_min: {gamma_min} is not below gamma_max = {gamma_max}; VDM has -13.3 and 5"
            )
        self.gamma_min, self.gamma_max = float(gamma_min), float(gamma_max)

    def ends(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """gamma_0 and gamma_1, float64 []."""
        # Not torch.tensor, which makes the host wait for a GPU.
        low, high = (
            torch.full((), end, dtype=torch.float64, device=device) for end in (self.gamma_min, self.gamma_max)
        )
        return low, high

    def check_rises(self) -> None:
        """Raise ConfigError unless gamma rises, which weights from a file need not make it do."""
        low, high = self.ends()
        s, _ = self.shape(torch.linspace(0.0, 1.0, 17, dtype=torch.float64, device=low.device))
        if not -_LIMIT <= float(low) < float(high) <= _LIMIT or not bool((s.diff() > 0.0).all()):
            raise ConfigError(
                f"schedule: gamma does not rise from {float(low):.4g} to {float(high):.4g}, both in "
                f"-{_LIMIT:.0f}..{_LIMIT:.0f}, with these weights; take another model"
            )

    @abstractmethod
    def shape(self, u: Numbers) -> tuple[Numbers, Numbers]:
        """s(u) and its derivative ds/du."""

    def forward(self, u: Numbers) -> tuple[Numbers, Numbers]:
        """gamma(u) and ds/du of it; times gamma_1 - gamma_0 the latter is gamma's derivative."""
        low, high = self.ends(u.device)
        s, slope = self.shape(u)
        return torch.lerp(low, high, s), slope

    def to_config(self) -> dict[str, Any]:
        """What makes the same schedule again, its weights apart."""
        return {"gamma_min": self.gamma_min, "gamma_max": self.gamma_max}


class LinearGamma(GammaSchedule):
    """s(u) = u: uniform in log-SNR (Kingma 2021, VDM, app. H: the fixed schedule)."""

    def shape(self, u: Numbers) -> tuple[Numbers, Numbers]:
        """See `GammaSchedule`."""
        return u, torch.ones_like(u)


class LearnedGamma(GammaSchedule):
    """s(u) = (f(u) - f(0)) / (f(1) - f(0)) of the monotone network f(u) = w_1 u + w_3 (2 sigmoid(w_2 (2u - 1) + b_2) -
    1) / width with weights |w| (Kingma 2021, VDM, app. H).

    The published network is not pinned and its ends drift; here gamma_0 and gamma_1 are numbers of their own, fixed or,
    with `learned_ends`, parameters. f has no bias of its own because s would not depend on it.

    The continuous-time bound depends on the ends alone, so s is to minimise the variance of its estimate (app. I.2):
    of a row's loss L the gradient that reaches s is that of L^2, 2 L dL/ds, which costs no second backward pass. While
    `row_factor` [B] is set, what flows back through `forward`, called with the rows' u [B], is multiplied by it.
    """

    def __init__(self, gamma_min: float, gamma_max: float, learned_ends: bool = False) -> None:
        super().__init__(gamma_min, gamma_max)
        if type(learned_ends) is not bool:
            raise ConfigError(f"schedule.learned_ends: {learned_ends!r:.100} is not true or false")
        self.learned_ends = learned_ends
        self.row_factor: Tensor | None = None
        self.weight_1 = nn.Parameter(torch.ones(1))
        self.weight_2 = nn.Parameter(torch.randn(_WIDTH))
        self.bias_2 = nn.Parameter(torch.randn(_WIDTH))
        self.weight_3 = nn.Parameter(torch.randn(_WIDTH))
        if learned_ends:
            self.low, self.high = (nn.Parameter(torch.tensor(end)) for end in (self.gamma_min, self.gamma_max))

    def ends(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """See `GammaSchedule`."""
        if not self.learned_ends:
            return super().ends(device)
        return self.low.to(torch.float64), self.high.to(torch.float64)

    def shape(self, u: Numbers) -> tuple[Numbers, Numbers]:
        """See `GammaSchedule`."""
        # In one call, so that f(0) and f(1) are the same bits as those of a u of 0 and 1, on any device.
        ends = torch.arange(2, dtype=torch.float64, device=u.device)
        value, slope = self._network(torch.cat([u.reshape(-1), ends]))
        first, total = value[-2], value[-1] - value[-2]
        s, slope = (column.reshape(u.shape) for column in ((value[:-2] - first) / total, slope[:-2] / total))
        if s.requires_grad:
            s.register_hook(self._scale)
            slope.register_hook(self._scale)
        return s, slope

    def _network(self, u: Numbers) -> tuple[Numbers, Numbers]:
        """f(u) and df/du."""
        weight_1, weight_2, weight_3 = (
            w.to(torch.float64).abs() for w in (self.weight_1, self.weight_2, self.weight_3)
        )
        inner = (2.0 * u - 1.0)[..., None] * weight_2 + self.bias_2.to(torch.float64)
        # 2 sigmoid(a) - 1 = tanh(a / 2); its derivative, which 1 - tanh^2 would cancel, is 2 sigmoid(a) sigmoid(-a).
        value = weight_1 * u + ((inner / 2.0).tanh() * weight_3).mean(-1)
        bend = 2.0 * (F.logsigmoid(inner) + F.logsigmoid(-inner)).exp()
        slope = weight_1 + (bend * (2.0 * weight_2 * weight_3)).mean(-1)
        return value, slope

    def _scale(self, gradient: Tensor) -> Tensor | None:
        return None if self.row_factor is None else gradient * self.row_factor

    def to_config(self) -> dict[str, Any]:
        """See `GammaSchedule`."""
        return {**super().to_config(), "learned_ends": self.learned_ends}
