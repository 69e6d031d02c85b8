"""Scoring images: the network on batches of one shape, and the ELBO's terms of every evaluation."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from ddpm_core.diffusion import q_sample
from ddpm_core.estimators import Design, decoder_terms, decoder_variances, evaluation_noise, score
from ddpm_core.likelihood import x_0_of
from ddpm_core.model import Model
from pipelines.data.dataset import UInt8s
from pipelines.outputs.progress import made


@torch.inference_mode()
def evaluate_images(
    model: Model, images: UInt8s, ids: Int64[Tensor, " n"], design: Design, request: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Every evaluation of the design.

    The network sees `batch_size` evaluations at a time, image by image; the last batch is filled up with evaluations
    that are thrown away, so every call has one shape.

    Args:
        model: On the device that computes.
        images: uint8 [n, H, W, C].
        ids: int64 [n].
        design: Of n images with E evaluations each.
        request: `seed`, `sigma2`, `dtype`, `batch_size`.

    Returns:
        On the CPU, float64 [n, E]: `eps_mse`, `term`, `term_clipped` (see `Scores`); [n, F, G]: `decoder`, L_0 at the F
        evaluations with t = 0, of which every image has equally many, under each of `decoder_variances`.
    """
    device, schedule, eps_fn = model.device, model.schedule, model.eps_fn(request["dtype"])
    levels = torch.tensor(images).permute(0, 3, 1, 2).contiguous().to(device)
    shape = (levels.shape[1], levels.shape[2], levels.shape[3])
    num_images, num_columns = design.t.shape
    total, size = num_images * num_columns, request["batch_size"]
    times, ids = design.t.reshape(-1).to(device), ids.to(device)
    parts: dict[str, list[Tensor]] = {}
    decoder: list[Tensor] = []
    variances = decoder_variances(schedule)
    for start in range(0, total, size):
        at = torch.arange(start, start + size, device=device) % total
        image, column, t = at // num_columns, at % num_columns, times[at]
        eps = evaluation_noise(request["seed"], ids[image], column, shape)
        batch = levels[image]
        eps_pred = eps_fn(q_sample(schedule, x_0_of(batch), t, eps), t)
        scores = score(schedule, batch, t, eps, eps_pred, request["sigma2"])
        found = {"eps_mse": scores.eps_mse, "term": scores.term, "term_clipped": scores.term_clipped}
        first = (t[: total - start] == 0).nonzero()[:, 0]
        if len(first):
            noise_there = eps[first], eps_pred[first].double()
            decoder.append(decoder_terms(schedule, batch[first], *noise_there, variances).cpu())
        for name, values in found.items():
            parts.setdefault(name, []).append(values[: total - start].cpu())
        made(min(start + size, total) / num_columns)
    scored = {name: torch.cat(values).reshape(num_images, num_columns) for name, values in parts.items()}
    return {**scored, "decoder": torch.cat(decoder).reshape(num_images, -1, len(variances))}
