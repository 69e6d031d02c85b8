"""Objectives of denoisers that predict their variances (Nichol and Dhariwal 2021, secs. 3.1 and 3.3)."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ddpm_core.denoiser import Denoise, Labels, NetworkDenoiser, Prediction
from ddpm_core.images import to_levels
from ddpm_core.likelihood.terms import term_bpd
from ddpm_core.objectives.base import Objective
from ddpm_core.objectives.times import Times
from ddpm_core.objectives.weighted import held_error, simple_weight
from ddpm_core.process.base import Images, Time, q_sample
from ddpm_core.process.discrete import discrete
from ddpm_core.process.variances import Learned


class LearnedVlb(Objective):
    """L_vlb: T times the ELBO's term at t, in nats per dimension, so that its mean over uniform t is their sum."""

    def at(
        self, denoise: Denoise, x_0: Images, time: Time, eps: Images, label: Labels | None = None
    ) -> Float[Tensor, " B"]:
        """See `Objective`."""
        return self.scored(denoise, x_0, time, eps, label)[1]

    def scored(
        self, denoise: Denoise, x_0: Images, time: Time, eps: Images, label: Labels | None, mean_learns: bool = True
    ) -> tuple[Prediction, Float[Tensor, " B"]]:
        """The prediction and its L_vlb, through which the mean gets no gradient unless it learns."""
        process = discrete(self.process)
        step = process.step(time, time - 1)
        prediction: Prediction = denoise(q_sample(step.now, x_0, eps), time, label)
        scored = prediction if mean_learns else replace(prediction, held=prediction.held.detach())
        term = term_bpd(step, to_levels(x_0), eps, scored, Learned())
        return prediction, (process.num_timesteps * math.log(2.0) * term).to(torch.float32)


class Hybrid(LearnedVlb):
    """L_simple + lambda L_vlb with lambda = 0.001, the mean detached in L_vlb, which thereby trains the variances alone
    (Nichol and Dhariwal 2021, eq. 16); L_vlb in nats per dimension."""

    weight = 0.001

    def __init__(self, denoiser: NetworkDenoiser, times: Times) -> None:
        process = discrete(denoiser.process)
        super().__init__(process, times)
        self.weights: Tensor
        self.register_buffer("weights", simple_weight(process, denoiser).to(torch.float32), persistent=False)

    def at(
        self, denoise: Denoise, x_0: Images, time: Time, eps: Images, label: Labels | None = None
    ) -> Float[Tensor, " B"]:
        """See `Objective`."""
        prediction, vlb = self.scored(denoise, x_0, time, eps, label, mean_learns=False)
        return self.weights[time] * held_error(prediction, x_0, eps) + self.weight * vlb
