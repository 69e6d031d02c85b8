"""The evidence lower bound of each image, in bits per dimension (float64): one estimator for every kind of model.

-log p(x_0) <= L_T + sum over t = T-1..1 of L_{t} + L_0 (Ho 2020, eq. 5; code t is the paper's t - 1,
so the KL at index t >= 1 is the paper's L_{t-1} with its t one larger); in continuous time the sum is an integral
(Kingma 2021, VDM, eq. 11). Bits/dim = nats / (D ln 2). Images here are uint8 [B, C, H, W]; a number is always about
given reverse variances, a decoder and a number of time steps: `ddpm_core.likelihood.bounds` names them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ddpm_core import counter_random
from ddpm_core.denoiser import Denoiser, Labels, Prediction, check_label
from ddpm_core.likelihood.curves import decoder_variances
from ddpm_core.likelihood.decoder import PerImage, UInt8Images, decoder_bpd
from ddpm_core.likelihood.designs import STREAM, Design
from ddpm_core.likelihood.terms import (
    continuous_term_bpd,
    prior_bpd,
    reconstruction_bpd,
    squared_error,
    term_bpd,
    x_0_of,
)
from ddpm_core.process.base import Step, q_sample
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import discrete
from ddpm_core.process.variances import ReverseVariance


@dataclass(frozen=True)
class Elbo:
    """The evaluations of a design on B images, and the bound they estimate; on the CPU, float64, in bits/dim.

    Attributes:
        design: Of B images with E evaluations each.
        prior: L_T [B], exact.
        terms: [B, E]: L_0 at t = 0, else the KL at t; in continuous time see `continuous_term_bpd`.
        terms_clipped: The same with the predicted x_0 clamped to [-1, 1].
        eps_mse: [B, E], ||eps - eps_pred||^2 / D: from it the unclipped KL under any other variances follows.
        decoder_draws: [B, F, G], L_0 at the F evaluations with t = 0, of which every image has equally many, under each
            of the G `decoder_variances`; G = 1 of a softmax decoder.
    """

    design: Design
    prior: PerImage
    terms: Float64[Tensor, "B E"]
    terms_clipped: Float64[Tensor, "B E"]
    eps_mse: Float64[Tensor, "B E"]
    decoder_draws: Float64[Tensor, "B F G"]

    @property
    def replicates(self) -> Float64[Tensor, "B R"]:
        """Each replicate's unbiased estimate of the image's ELBO."""
        return self.design.replicate_values(self.prior, self.terms)

    def parts(self, clipped: bool = False) -> tuple[PerImage, PerImage, PerImage]:
        """(total, decoder, kl_sum) of each image: total = prior + decoder + kl_sum estimates the ELBO, decoder L_0 and
        kl_sum the sum of the KLs."""
        first = self.design.first
        weighted = self.design.weight * (self.terms_clipped if clipped else self.terms)
        decoder, kl_sum = (weighted * first).sum(1), (weighted * ~first).sum(1)
        return self.prior + decoder + kl_sum, decoder, kl_sum


@torch.inference_mode()
def elbo(
    denoiser: Denoiser,
    levels: UInt8Images,
    ids: Int64[Tensor, " B"],
    design: Design,
    seed: int,
    variance: ReverseVariance,
    batch_size: int = 64,
    label: Labels | None = None,
    on_images: Callable[[float], None] = lambda images: None,
) -> Elbo:
    """Every evaluation of the design (Ho 2020, eqs. 5, 12 and 13; Kingma 2021, VDM, eqs. 11 and 17-19).

    The denoiser sees `batch_size` evaluations at a time, image by image, its z_t in float64; the last batch is filled
    up with evaluations that are thrown away, so every call has one shape. The noise of an image's n-th evaluation is a
    function of (seed, id, n), so two models compared with one seed meet the same noise.

    `levels`, `ids`: on the denoiser's device. `variance`: of discrete time; in continuous time the bound has none.
    `label`: what the denoiser is told of each image; None: nothing. `on_images` is told how many images' worth of
    evaluations is done. Raises ConfigError for variances or labels that do not fit.
    """
    check_label(denoiser, label)
    process = denoiser.process
    in_steps = None if isinstance(process, ContinuousProcess) else discrete(process)
    if in_steps is not None:
        variance.check(in_steps)
    variances = None if in_steps is None or in_steps.decoder == "softmax" else decoder_variances(in_steps)
    device, shape = levels.device, denoiser.image_shape
    num_images, num_columns = design.t.shape
    total = num_images * num_columns
    times, is_first = design.t.reshape(-1).to(device), design.first.to(device)
    columns: dict[str, list[Tensor]] = {"terms": [], "terms_clipped": [], "eps_mse": []}
    decoder = [torch.empty(0, 1 if variances is None else len(variances), dtype=torch.float64)]
    for start in range(0, total, batch_size):
        at = torch.arange(start, start + batch_size, device=device) % total
        image, column, t = at // num_columns, at % num_columns, times[at]
        eps = counter_random.normal(seed, STREAM, ids[image], column, shape, dtype=torch.float64)
        batch, first = levels[image], is_first[column]
        step = None if in_steps is None else in_steps.step(t, t - 1)
        z_t = q_sample(process.at(t) if step is None else step.now, x_0_of(batch), eps)
        prediction = denoiser(z_t, t, None if label is None else label[image])
        for name, each in (("terms", prediction), ("terms_clipped", prediction.clipped())):
            if step is not None and in_steps is not None:
                scored = term_bpd(step, batch, eps, each, variance, in_steps.decoder)
            else:
                scored = continuous_term_bpd(process, first, batch, eps, each)
            columns[name].append(scored[: total - start].cpu())
        columns["eps_mse"].append(squared_error(eps, prediction.eps)[: total - start].cpu())
        rows = first[: total - start].nonzero()[:, 0]
        if len(rows):
            decoder.append(_decoder_draws(batch[rows], prediction[rows], step and step[rows], variances).cpu())
        on_images(min(start + batch_size, total) / num_columns)
    scored_columns = {name: torch.cat(values).reshape(num_images, num_columns) for name, values in columns.items()}
    return Elbo(
        design,
        prior_bpd(process, x_0_of(levels)).cpu(),
        decoder_draws=torch.cat(decoder).reshape(num_images, int(design.first.sum()), -1),
        **scored_columns,
    )


def _decoder_draws(
    levels: UInt8Images, prediction: Prediction, step: Step | None, variances: Tensor | None
) -> Float64[Tensor, "n G"]:
    """L_0 under each of the `variances`, or the softmax decoder's."""
    if step is None or variances is None:
        return reconstruction_bpd(levels, prediction)[:, None]
    mean = prediction.posterior_mean(step)
    return torch.stack([decoder_bpd(levels, mean, float(sigma2) ** 0.5) for sigma2 in variances], 1)
