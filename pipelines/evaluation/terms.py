"""Scoring images: the ELBO's terms of every evaluation, as a request asks for them."""

from collections.abc import Callable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ddpm_core.denoiser import Labels
from ddpm_core.likelihood.bounds import Bound, bound_of
from ddpm_core.likelihood.classify import Classification, Effort, classify
from ddpm_core.likelihood.designs import Design, continuous_design, stratified_design, timestep_proposal
from ddpm_core.likelihood.elbo import Elbo, elbo
from ddpm_core.model import Model
from ddpm_core.process.base import Process
from ddpm_core.process.continuous import continuous
from ddpm_core.process.discrete import DiscreteProcess
from pipelines.cluster.precision import PRECISION_OF
from pipelines.data.dataset import UInt8s
from pipelines.evaluation.request import EvaluateRequest
from pipelines.outputs.progress import made


def levels_of(images: UInt8s) -> Tensor:
    """uint8 [n, H, W, C] as a tensor [n, C, H, W]."""
    return torch.tensor(images).permute(0, 3, 1, 2).contiguous()


def bound_for(request: EvaluateRequest, model: Model) -> Bound:
    """The bound that is asked for, of the model in the precision that is asked for. Raises ConfigError."""
    denoiser = model.denoiser.in_precision(PRECISION_OF[request.dtype])
    bound = bound_of(denoiser, request.sigma2, request.num_timesteps)
    return bound.given_label if request.told_labels else bound


def stratified_over(
    process: Process,
    positions: Int64[Tensor, " n"],
    seed: int,
    k: int,
    proposal: Float64[Tensor, " S"] | None = None,
    replicates: int = 2,
) -> Design:
    """L_0 and `k` other times of the images at `positions` of the order: spread evenly in log-SNR, or by a `proposal`
    as the first pass measures it. L_0 comes once in each of the `replicates`."""
    if not isinstance(process, DiscreteProcess):
        return continuous_design(positions, seed, continuous(process), k, replicates, proposal)
    over_t = timestep_proposal(process) if proposal is None else proposal
    return stratified_design(positions, seed, over_t, k, replicates)


def evaluate_images(
    bound: Bound,
    images: UInt8s,
    ids: Int64[Tensor, " n"],
    design: Design,
    request: EvaluateRequest,
    label: Labels | None = None,
    on_images: Callable[[float], None] = made,
) -> Elbo:
    """Every evaluation of the design.

    Args:
        bound: As of `bound_for`, of a model on the request's device.
        images: uint8 [n, H, W, C].
        ids: int64 [n].
        design: Of n images with E evaluations each.
        request: Its seed, device and batch size are taken.
        label: int64 [n], what the model is told of each image; None: nothing.
        on_images: Is told how many images are done.
    """
    levels, ids = levels_of(images).to(request.device), ids.to(request.device)
    label = None if label is None else label.to(request.device)
    seed, size = request.seed, request.batch_size
    return elbo(bound.denoiser, levels, ids, design, seed, bound.variance, size, label, on_images)


def classify_images(
    bound: Bound,
    images: UInt8s,
    ids: Int64[Tensor, " n"],
    positions: Int64[Tensor, " n"],
    request: EvaluateRequest,
    on_images: Callable[[float], None] = made,
) -> Classification:
    """Each image's bound under every class that the request's classifier has; arguments as of `evaluate_images`,
    `positions` int64 [n] being the images' places in the order."""
    asked, process = request.classifier, bound.denoiser.process
    assert asked is not None, "by the caller"
    return classify(
        bound,
        levels_of(images).to(request.device),
        ids.to(request.device),
        positions,
        torch.tensor(asked.classes),
        torch.tensor(asked.log_prior),
        lambda places, seed: stratified_over(process, places, seed, asked.timesteps_per_round, replicates=1),
        Effort(asked.rounds, asked.separation),
        request.seed,
        request.batch_size,
        on_images,
    )
