"""Every solver, and what tests ask of them all."""

from collections.abc import Callable

import torch

from ddpm_core.process.base import Process, Spacing
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.samplers.base import Sampler
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM
from ddpm_core.samplers.dpm_solver import DPMSolver
from ddpm_core.samplers.heun import Heun

MakeSampler = Callable[[int, Spacing], Sampler]
DETERMINISTIC: dict[str, MakeSampler] = {
    "ddim": lambda steps, spacing: DDIM(steps, spacing=spacing),
    "2m": lambda steps, spacing: DPMSolver(steps, 2, spacing=spacing),
    "3m": lambda steps, spacing: DPMSolver(steps, 3, spacing=spacing),
    "heun": lambda steps, spacing: Heun(steps, spacing),
}
STOCHASTIC: dict[str, MakeSampler] = {
    "ddpm": lambda steps, spacing: DDPM(steps=steps, spacing=spacing),
    "ddim, eta 0.5": lambda steps, spacing: DDIM(steps, 0.5, spacing),
    "2m sde": lambda steps, spacing: DPMSolver(steps, 2, 1, spacing),
    "3m sde": lambda steps, spacing: DPMSolver(steps, 3, 1, spacing),
    "heun, churn": lambda steps, spacing: Heun(steps, spacing, churn=10.0),
}
EVERY: dict[str, MakeSampler] = DETERMINISTIC | STOCHASTIC
CONTINUOUS: dict[str, Process] = {
    "vdm": ContinuousProcess.linear(-8.0, 6.0),
    "edm": ContinuousProcess.edm(0.02, 20.0),
}
PROCESSES: dict[str, Process] = CONTINUOUS | {
    "linear": DiscreteProcess.linear(100),
    "cosine": DiscreteProcess.cosine(100),
    "exploding": DiscreteProcess.from_alpha_sigma([1.0] * 100, torch.logspace(-2, 1.5, 100, dtype=torch.float64)),
    "zero terminal": DiscreteProcess.cosine(100).rescaled_to_zero_terminal_snr(),
}
