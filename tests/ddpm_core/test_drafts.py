"""What a later sampler needs of the core, in a draft that touches nothing else: a second-order multistep sampler (Lu
2022, DPM-Solver++)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.denoisers import FunctionDenoiser

from ddpm_core.config import UNetConfig
from ddpm_core.denoiser import Prediction
from ddpm_core.process.base import Process, Step, factor
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.samplers.base import sample
from ddpm_core.samplers.ddim import DDIM

NETWORK = UNetConfig(
    image_size=4, in_channels=1, base_channels=8, channel_multipliers=(1,), num_res_blocks=1,
    attention_resolutions=(), dropout=0.0, num_groups=4,
)  # fmt: skip
VARIANCE_EXPLODING = DiscreteProcess.from_alpha_sigma([1.0] * 400, torch.logspace(-2, 1, 400, dtype=torch.float64))


@dataclass(frozen=True)
class Multistep2:
    """DPM-Solver++ 2M in lambda = ln(alpha / sigma) (Lu 2022, alg. 2)."""

    steps: int

    def times(self, process: Process) -> torch.Tensor:
        return process.grid(self.steps, "log_snr")

    def step(
        self, step: Step, z: torch.Tensor, prediction: Prediction, noise: Callable[[], torch.Tensor] | None, memory: Any
    ) -> tuple[torch.Tensor, Any]:
        h = (step.then.log_snr - step.now.log_snr) / 2.0
        x_0 = prediction.x_0
        if memory is not None and math.isfinite(float(h)):
            before, width = memory
            r = float(width / h)
            x_0 = x_0 + (x_0 - before) / (2.0 * r)
        ratio = factor(step.then.sigma / step.now.sigma, z)
        return ratio * z - factor(step.then.alpha * torch.expm1(-h), z) * x_0, (prediction.x_0, h)


@pytest.mark.parametrize("process", [DiscreteProcess.cosine(4000), VARIANCE_EXPLODING], ids=["preserving", "exploding"])
def test_a_multistep_sampler_is_of_second_order_where_ddim_is_of_first(process: DiscreteProcess) -> None:
    """Data N(m, s^2): the exact flow maps z_T to z_0 by their standard deviations; errors fall as h^order."""
    mean, variance = 0.3, 0.25

    def eps(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        now = process.at(t)
        total = now.alpha.square() * variance + now.sigma.square()
        return now.sigma / total * (z_t.double() - now.alpha * mean)

    # Between two inner times: the last step, to the image, has no finite h.
    def error(sampler: Any, count: int) -> float:
        times = process.grid(count, "log_snr")
        times = times[(process.log_snr[times] < 5.0) & (process.log_snr[times] > -4.0)]
        steps, denoiser = process.step(times[:-1], times[1:]), FunctionDenoiser(eps, process, (1, 1, 1))
        z, memory = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1), None
        start, end = process.at(times[:1]), process.at(times[-1:])
        spread = [(m.alpha.square() * variance + m.sigma.square()).sqrt() for m in (start, end)]
        exact = end.alpha * mean + (z - start.alpha * mean) * spread[1] / spread[0]
        for k in range(len(times) - 1):
            prediction = denoiser(z, times[k : k + 1].expand(len(z)))
            z, memory = sampler.step(steps[k : k + 1], z, prediction, None, memory)
        return float((z - exact).abs().max())

    order = {
        type(sampler).__name__: math.log2(error(sampler, 40) / error(sampler, 80))
        for sampler in (DDIM(eta=0.0), Multistep2(0))
    }
    assert order["DDIM"] == pytest.approx(1.0, abs=0.3)
    assert order["Multistep2"] == pytest.approx(2.0, abs=0.4)
    whole = sample(FunctionDenoiser(eps, process, (1, 1, 1)), Multistep2(20), torch.arange(2000), 0, clip_x_0=False)
    assert float(whole.mean()) == pytest.approx(mean, abs=0.05)
    assert float(whole.std()) == pytest.approx(variance**0.5, rel=0.1)
