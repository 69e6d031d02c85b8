"""Scoring images: the ELBO's terms of every evaluation, as a request asks for them."""

import torch
from jaxtyping import Int64
from torch import Tensor

from ddpm_core.likelihood.designs import Design
from ddpm_core.likelihood.elbo import Elbo, elbo
from ddpm_core.model import Model
from ddpm_core.process.variances import variance_named
from pipelines.cluster.precision import PRECISION_OF
from pipelines.data.dataset import UInt8s
from pipelines.evaluation.request import EvaluateRequest
from pipelines.outputs.progress import made


def levels_of(images: UInt8s) -> Tensor:
    """uint8 [n, H, W, C] as a tensor [n, C, H, W]."""
    return torch.tensor(images).permute(0, 3, 1, 2).contiguous()


def evaluate_images(
    model: Model, images: UInt8s, ids: Int64[Tensor, " n"], design: Design, request: EvaluateRequest
) -> Elbo:
    """Every evaluation of the design; tells how many images are made.

    Args:
        model: On the device that computes.
        images: uint8 [n, H, W, C].
        ids: int64 [n].
        design: Of n images with E evaluations each.
        request: Its seed, variances, precision and batch size are taken.
    """
    denoiser = model.denoiser.in_precision(PRECISION_OF[request.dtype])
    levels, variance = levels_of(images).to(denoiser.device), variance_named(request.sigma2)
    ids = ids.to(denoiser.device)
    return elbo(denoiser, levels, ids, design, request.seed, variance, request.batch_size, on_images=made)
