"""The bound of continuous time as a loss (Kingma 2021, VDM)."""

import torch
from jaxtyping import Float
from torch import Tensor

from ddpm_core.denoiser import Denoise, Labels
from ddpm_core.images import to_levels
from ddpm_core.likelihood.decoder import softmax_nll_nats
from ddpm_core.likelihood.terms import prior_nats, squared_error
from ddpm_core.objectives.base import Losses, Objective
from ddpm_core.objectives.times import SteppedTimes, Times
from ddpm_core.process.base import Images, Time, factor, q_sample
from ddpm_core.process.continuous import ContinuousProcess, continuous
from ddpm_core.process.gamma import LearnedGamma


class VdmBound(Objective):
    """1/2 (gamma_1 - gamma_0) ||eps - eps_pred||^2 at gamma uniform between the ends, in nats per dimension: the
    diffusion loss (Kingma 2021, VDM, eqs. 17-19). Under `SteppedTimes` it is the loss of T steps.

    Where the ends are learned, the prior's and the reconstruction's terms belong to the loss, too (eq. 11). The
    interior of a learned gamma(u), of which the continuous bound is independent, learns by the variance of the loss,
    see `LearnedGamma`; of T steps the bound depends on it, and it learns by the bound as all others do.
    """

    def __init__(self, process: ContinuousProcess, times: Times) -> None:
        super().__init__(process, times)

    def forward(
        self, denoise: Denoise, x_0: Images, uniforms: Tensor, eps: Images, label: Labels | None = None
    ) -> Losses:
        """See `Objective`."""
        losses = super().forward(denoise, x_0, uniforms, eps, label)
        schedule = continuous(self.process).schedule
        if not isinstance(schedule, LearnedGamma):
            return losses
        learns_by_variance = not isinstance(self.times, SteppedTimes)
        schedule.row_factor = 2.0 * losses.rows.detach().to(torch.float64) if learns_by_variance else None
        if not schedule.learned_ends:
            return losses
        return Losses(losses.rows + self._ends(x_0, eps), losses.time, losses.values)

    def at(
        self, denoise: Denoise, x_0: Images, time: Time, eps: Images, label: Labels | None = None
    ) -> Float[Tensor, " B"]:
        """See `Objective`."""
        process = continuous(self.process)
        low, high = process.schedule.ends(time.device)
        prediction = denoise(q_sample(process.at(time), x_0, eps), time, label)
        return 0.5 * (high - low) * squared_error(eps, prediction.eps)

    def _ends(self, x_0: Images, eps: Images) -> Tensor:
        """What the ends cost: prior and reconstruction, [B], nats per dimension; z_0 takes the noise that z_t had."""
        process = continuous(self.process)
        first, last = process.at(process.schedule.ends(x_0.device)[0][None]), process.marginal_at_end()
        xbar = x_0 + factor(first.sigma / first.alpha, x_0) * eps
        reconstruction = softmax_nll_nats(to_levels(x_0), xbar.to(torch.float64), first.log_snr)
        alpha2, sigma2 = (value.square() for value in (last.alpha, last.sigma))
        prior = prior_nats(alpha2 / (alpha2 + sigma2), x_0)
        return (prior + reconstruction).flatten(1).mean(1).to(torch.float32)
