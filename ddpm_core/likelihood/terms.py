"""The terms of the evidence lower bound, of one time each, in bits per dimension (float64).

Discrete time: L_T, the KL at t >= 1, L_0 at t = 0 (Ho 2020, eq. 5; code t is the paper's t - 1). Continuous time:
prior, diffusion per unit of gamma, reconstruction (Kingma 2021, VDM, eqs. 11 and 17-19).
"""

import math

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ddpm_core.denoiser import Prediction
from ddpm_core.likelihood.decoder import PerImage, UInt8Images, bits_per_dim, decoder_bpd, softmax_nll_nats
from ddpm_core.process.base import Images, Process, Step
from ddpm_core.process.continuous import continuous
from ddpm_core.process.discrete import Decoder
from ddpm_core.process.variances import ReverseVariance


def squared_error(target: Float[Tensor, "B C H W"], predicted: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """||target - predicted||^2 / D of each image (Ho 2020, eq. 14), in float32 at least."""
    dtype = torch.float64 if target.dtype == torch.float64 else torch.float32
    return (target.to(dtype) - predicted.to(dtype)).square().flatten(1).mean(1)


def x_0_of(levels: UInt8Images) -> Float64[Tensor, "B C H W"]:
    """x_0 = k / 127.5 - 1 in float64."""
    return levels.to(torch.float64) / 127.5 - 1.0


def prior_bpd(process: Process, x_0: Images) -> PerImage:
    """L_T = KL(q(z_T | x_0) || N(0, V I)) (Ho 2020, eq. 5), V being the process's `prior_variance`."""
    return bits_per_dim(prior_nats(process.prior_signal, x_0))


def prior_nats(signal: float | Tensor, x_0: Images) -> Float64[Tensor, "B C H W"]:
    """The same of every value, in nats: 1/2 [r x_0^2 - r - ln(1 - r)], where r = alpha^2 / V is `signal`, a number or
    a tensor that it is differentiated in."""
    log = math.log1p(-signal) if isinstance(signal, float) else torch.log1p(-signal)
    return 0.5 * (signal * x_0.to(torch.float64).square() - signal - log)


def reconstruction_bpd(levels: UInt8Images, prediction: Prediction) -> PerImage:
    """-log p(x | z_0) of the softmax decoder (Kingma 2021, VDM, eq. 8); the prediction tells z_0 and its marginal, and
    what it predicts is not asked."""
    now = prediction.marginal
    return bits_per_dim(softmax_nll_nats(levels, prediction.z.to(torch.float64) / now.alpha, now.log_snr))


def continuous_term_bpd(
    process: Process, first: Bool[Tensor, " B"], levels: UInt8Images, eps: Images, prediction: Prediction
) -> PerImage:
    """Where `first`, the reconstruction at gamma_0, else (gamma_1 - gamma_0) / 2 ||eps - eps_pred||^2, whose mean over
    gamma uniform between the ends is the diffusion term (Kingma 2021, VDM, eqs. 17-19)."""
    low, high = continuous(process).ends
    term = bits_per_dim(0.5 * (high - low) * (eps - prediction.eps).square())
    rows = first.nonzero()[:, 0]
    if len(rows):
        term[rows] = reconstruction_bpd(levels[rows], prediction[rows])
    return term


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
    step: Step,
    levels: UInt8Images,
    eps: Images,
    prediction: Prediction,
    variance: ReverseVariance,
    decoder: Decoder = "gaussian",
) -> PerImage:
    """The ELBO's term of each row of discrete time: at t = 0 `decoder_bpd` or, of a softmax decoder,
    `reconstruction_bpd`, else `kl_bpd`. All in float64."""
    term = torch.empty(len(levels), dtype=torch.float64, device=levels.device)
    first, later = (step.time == 0).nonzero()[:, 0], (step.time > 0).nonzero()[:, 0]
    sigma2 = variance.of(step, prediction)
    if len(first) and decoder == "softmax":
        term[first] = reconstruction_bpd(levels[first], prediction[first])
    elif len(first):
        mean = prediction[first].posterior_mean(step[first])
        term[first] = decoder_bpd(levels[first], mean, sigma2[first].sqrt())
    if len(later):
        term[later] = kl_bpd(step[later], x_0_of(levels[later]), eps[later], prediction[later], sigma2[later])
    return term
