"""The evidence lower bound of each image, term by term, in bits per dimension (float64).

-log p(x_0) <= L_T + sum over t = T-1..1 of L_{t} + L_0 (Ho 2020, eq. 5; code t is the paper's t - 1,
so the KL at index t >= 1 is the paper's L_{t-1} with its t one larger). Bits/dim = nats / (D ln 2).
Images here are uint8 [B, C, H, W]; a number is always about given reverse variances, so it is
reported together with them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ddpm_core import counter_random
from ddpm_core.denoiser import Denoiser, Labels, Prediction
from ddpm_core.likelihood.curves import decoder_variances
from ddpm_core.likelihood.decoder import PerImage, UInt8Images, bits_per_dim, decoder_bpd
from ddpm_core.likelihood.designs import STREAM, Design
from ddpm_core.objectives import eps_mse
from ddpm_core.process.base import Images, Process, Step, q_sample
from ddpm_core.process.discrete import discrete
from ddpm_core.process.variances import ReverseVariance


@dataclass(frozen=True)
class Elbo:
    """The evaluations of a design on B images, and the bound they estimate; on the CPU, float64, in bits/dim.

    Attributes:
        design: Of B images with E evaluations each.
        prior: L_T [B], exact.
        terms: [B, E]: L_0 at t = 0, else the KL at t.
        terms_clipped: The same with the predicted x_0 clamped to [-1, 1].
        eps_mse: [B, E], ||eps - eps_pred||^2 / D: from it the unclipped KL under any other variances follows.
        decoder_draws: [B, F, G], L_0 at the F evaluations with t = 0, of which every image has equally many, under each
            of the G `decoder_variances`.
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
        first = self.design.t == 0
        weighted = self.design.weight * (self.terms_clipped if clipped else self.terms)
        decoder, kl_sum = (weighted * first).sum(1), (weighted * ~first).sum(1)
        return self.prior + decoder + kl_sum, decoder, kl_sum


def x_0_of(levels: UInt8Images) -> Float64[Tensor, "B C H W"]:
    """x_0 = k / 127.5 - 1 in float64."""
    return levels.to(torch.float64) / 127.5 - 1.0


def prior_bpd(process: Process, x_0: Images) -> PerImage:
    """L_T = KL(q(z_T | x_0) || N(0, V I)) = 1/2 sum[r x_0^2 - r - ln(1 - r)] (Ho 2020, eq. 5), where r = alpha^2 / V is
    the process's `prior_signal` and V = alpha^2 + sigma^2 its `prior_variance`."""
    r = process.prior_signal
    return bits_per_dim(0.5 * (r * x_0.to(torch.float64).square() - r - math.log1p(-r)))


def kl_bpd(step: Step, x_0: Images, eps: Images, prediction: Prediction, variance: Tensor) -> PerImage:
    """KL(q(z_s | z_t, x_0) || N(mu_theta, variance I)) of each row's step (Ho 2020, eqs. 5, 8 and 12).

    D/2 [ln(sigma^2 / beta_tilde) - 1 + beta_tilde / sigma^2] + ||mu_tilde - mu_theta||^2 / (2 sigma^2), where
    mu_tilde - mu_theta is `coef_eps` times the error of eps, or `posterior_coef_x_0` times that of x_0: whichever the
    prediction holds. `variance`: [B, 1, 1, 1] or [B, C, H, W]. The step to the data has the decoder's term instead.
    """
    ratio = step.posterior_variance / variance
    if prediction.holds == "eps":
        difference = step.coef_eps * (eps - prediction.held)
    else:
        difference = step.posterior_coef_x_0 * (x_0 - prediction.held)
    return bits_per_dim(0.5 * (ratio - 1.0 - ratio.log()) + difference.square() / (2.0 * variance))


def term_bpd(
    step: Step, levels: UInt8Images, eps: Images, prediction: Prediction, variance: ReverseVariance
) -> PerImage:
    """The ELBO's term of each row: `decoder_bpd` at t = 0, else `kl_bpd`. All in float64."""
    term = torch.empty(len(levels), dtype=torch.float64, device=levels.device)
    first, later = (step.time == 0).nonzero()[:, 0], (step.time > 0).nonzero()[:, 0]
    sigma2 = variance.of(step, prediction)
    if len(first):
        mean = prediction[first].posterior_mean(step[first])
        term[first] = decoder_bpd(levels[first], mean, sigma2[first].sqrt())
    if len(later):
        term[later] = kl_bpd(step[later], x_0_of(levels[later]), eps[later], prediction[later], sigma2[later])
    return term


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
    """Every evaluation of the design (Ho 2020, eqs. 5, 12 and 13).

    The denoiser sees `batch_size` evaluations at a time, image by image, its z_t in float64; the last batch is filled
    up with evaluations that are thrown away, so every call has one shape. The noise of an image's n-th evaluation is a
    function of (seed, id, n), so two models compared with one seed meet the same noise.

    `levels`, `ids`: on the denoiser's device. `on_images` is told how many images' worth of evaluations is done.
    Raises ConfigError for a process without time steps and for variances that do not fit it.
    """
    process = discrete(denoiser.process)
    variance.check(process)
    device, shape = levels.device, denoiser.image_shape
    num_images, num_columns = design.t.shape
    total = num_images * num_columns
    times = design.t.reshape(-1).to(device)
    columns: dict[str, list[Tensor]] = {"terms": [], "terms_clipped": [], "eps_mse": []}
    variances = decoder_variances(process)
    decoder = [torch.empty(0, len(variances), dtype=torch.float64)]
    for start in range(0, total, batch_size):
        at = torch.arange(start, start + batch_size, device=device) % total
        image, column, t = at // num_columns, at % num_columns, times[at]
        eps = counter_random.normal(seed, STREAM, ids[image], column, shape, dtype=torch.float64)
        batch = levels[image]
        step = process.step(t, t - 1)
        z_t = q_sample(step.now, x_0_of(batch), eps)
        prediction = denoiser(z_t, t, None if label is None else label[image])
        found = {
            "terms": term_bpd(step, batch, eps, prediction, variance),
            "terms_clipped": term_bpd(step, batch, eps, prediction.clipped(), variance),
            "eps_mse": eps_mse(eps, prediction.eps),
        }
        first = (t[: total - start] == 0).nonzero()[:, 0]
        if len(first):
            mean = prediction[first].posterior_mean(step[first])
            draws = [decoder_bpd(batch[first], mean, float(sigma2) ** 0.5) for sigma2 in variances]
            decoder.append(torch.stack(draws, 1).cpu())
        for name, values in found.items():
            columns[name].append(values[: total - start].cpu())
        on_images(min(start + batch_size, total) / num_columns)
    scored = {name: torch.cat(values).reshape(num_images, num_columns) for name, values in columns.items()}
    num_first = int((design.t[0] == 0).sum())
    return Elbo(
        design,
        prior_bpd(process, x_0_of(levels)).cpu(),
        decoder_draws=torch.cat(decoder).reshape(num_images, num_first, len(variances)),
        **scored,
    )
