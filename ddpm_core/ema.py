"""Exponential moving average of a network's parameters, in float32."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddpm_core.errors import ConfigError, ModelError


class EMA:
    """shadow <- d shadow + (1 - d) parameter after every step (Ho 2020, app. B: d = 0.9999).

    With `warmup`, d = min(decay, (1 + step) / (10 + step)), so that a short run is not dominated by
    its initial weights. `weights`: the parameters by name, see `NetworkDenoiser.named_weights`.
    Raises ConfigError unless 0 <= decay < 1.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"ema.decay: {decay} is not in [0, 1); DDPM uses 0.9999")
        self.decay = decay
        self.warmup = warmup
        self._parameters = {name: p.detach() for name, p in weights.items()}
        self._shadow = {name: p.to(torch.float32, copy=True) for name, p in self._parameters.items()}

    def decay_at(self, step: int) -> float:
        """The decay that `update(step)` uses; `step` counts from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move every shadow towards its parameter; call once after optimizer step number `step`."""
        parameters = [p.to(torch.float32) for p in self._parameters.values()]
        torch._foreach_lerp_(list(self._shadow.values()), parameters, 1.0 - self.decay_at(step))

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters by name: the live tensors, which the next `update` changes."""
        return dict(self._shadow)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over averages saved before. Raises ModelError if names or shapes differ."""
        expected = {name: tuple(tensor.shape) for name, tensor in self._shadow.items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if different:
            name = different[0]
            raise ModelError(
                f"EMA state: {name} has shape {found.get(name)}, the network {expected.get(name)} "
                f"({len(different)} such parameters); resume with the network that was trained"
            )
        for name, shadow in self._shadow.items():
            shadow.copy_(state[name])

    @torch.no_grad()
    def copy_to(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Overwrite parameters of the same names with the averages."""
        for name, parameter in weights.items():
            parameter.copy_(self._shadow[name])
