"""Scoring through the job's own code path: the reference values, batches, and the network's calls."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.denoisers import FunctionDenoiser
from support.evaluate_runs import evaluate_request
from support.sample_runs import save_tiny_model

from ddpm_core import counter_random
from ddpm_core.likelihood.bounds import Bound, bound_of
from ddpm_core.likelihood.curves import decoder_variances
from ddpm_core.likelihood.designs import full_design, stratified_design, timestep_proposal
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.model import load_model
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import BetaTilde
from pipelines.evaluation.shard import term_columns
from pipelines.evaluation.terms import bound_for, evaluate_images

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "ddpm_reference.json").read_text())
REQUEST = evaluate_request()


def toy_bound(process: DiscreteProcess, image_shape: tuple[int, int, int], sigma2: str) -> Bound:
    """The reference's network: 0.9 x + 0.1 sin(t)."""

    def eps(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.9 * z_t + 0.1 * torch.sin(t.double())[:, None, None, None]

    return bound_of(FunctionDenoiser(eps, process, image_shape), sigma2)


@pytest.mark.parametrize("case", range(len(REFERENCE["elbo"])))
def test_the_reference_values_through_the_jobs_code_path(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ho 2020, eqs. 5, 12 and 13, with the reference's noise in the place of the job's."""
    expected = REFERENCE["elbo"][case]
    process = DiscreteProcess.from_betas(expected["betas"])
    eps = torch.tensor(REFERENCE["eps"], dtype=torch.float64)  # [T, n, C, H, W]
    images = torch.tensor(REFERENCE["x_0"], dtype=torch.uint8).permute(0, 2, 3, 1)
    monkeypatch.setattr(counter_random, "normal", lambda seed, stream, ids, column, shape, dtype: eps[column, ids])
    design = full_design(len(eps), len(images), 1)
    request = replace(REQUEST, batch_size=5)
    bound = toy_bound(process, tuple(eps.shape[2:]), expected["sigma2"])
    evaluated = evaluate_images(bound, images.numpy(), torch.arange(len(images)), design, request)
    columns = term_columns(expected["sigma2"], evaluated)
    suffix = "_clipped" if expected["clip_denoised"] else ""
    name = f"{expected['sigma2']}{suffix}"
    found = torch.tensor(columns[f"term_{name}"].to_pylist(), dtype=torch.float64)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 0.0}
    torch.testing.assert_close(found, torch.tensor(expected["terms"], dtype=torch.float64), **close)
    torch.testing.assert_close(evaluated.prior, torch.tensor(expected["prior"], dtype=torch.float64), **close)
    total = torch.tensor(columns[f"bits_per_dim_{name}"])
    torch.testing.assert_close(total, torch.tensor(expected["total"], dtype=torch.float64), **close)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    save_tiny_model(tmp_path)
    return load_model(tmp_path)


def images_of(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def test_every_t_is_summed_for_every_image(model: Any) -> None:
    """The exact sum over t (Ho 2020, eq. 5), with a real network and M = 2 draws."""
    images, ids = images_of(5), torch.tensor([3, 9, 4, 100, 0])
    design = full_design(20, 5, 2)
    found = evaluate_images(bound_for(REQUEST, model), images.numpy(), ids, design, REQUEST).replicates.mean(1)
    pixels = images.permute(0, 3, 1, 2)
    for row in range(5):  # one image, one call
        alone = full_design(20, 1, 2)
        single = elbo(model.denoiser, pixels[row : row + 1], ids[row : row + 1], alone, 3, BetaTilde(), batch_size=40)
        expected = single.prior + (alone.weight * single.terms).sum(1)
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-5, atol=0)


def test_the_size_of_batches_moves_last_bits_only_and_every_call_has_one_shape(model: Any) -> None:
    images, ids = images_of(6).numpy(), torch.arange(6)
    design = stratified_design(torch.arange(6), 3, timestep_proposal(model.denoiser.process), 8)
    shapes = []

    def watched(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(z_t.shape))
        return model.denoiser(z_t, t).eps

    one = evaluate_images(bound_of(FunctionDenoiser(watched, model.denoiser.process)), images, ids, design, REQUEST)
    assert shapes == [(24, 1, 8, 8)] * 3  # 60 evaluations
    other = evaluate_images(bound_for(REQUEST, model), images, ids, design, replace(REQUEST, batch_size=7))
    assert one.decoder_draws.shape == (6, 2, len(decoder_variances(model.denoiser.process)))
    for name in ("prior", "terms", "terms_clipped", "eps_mse", "decoder_draws"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-6)


def test_the_decoder_under_its_own_variance_is_the_term(model: Any) -> None:
    design = full_design(20, 4, 2)
    for index, sigma2 in enumerate(("beta", "beta_tilde")):
        bound = bound_for(evaluate_request(sigma2=sigma2), model)
        found = evaluate_images(bound, images_of(4).numpy(), torch.arange(4), design, REQUEST)
        torch.testing.assert_close(found.decoder_draws[:, :, index], found.terms[:, [0, 20]], rtol=1e-12, atol=0)
