"""Scoring through the job's own code path: the reference values, batches, and the network's calls."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.sample_runs import save_tiny_model

from ddpm_core.estimators import decoder_variances, full_design, replicate_values, stratified_design
from ddpm_core.likelihood import elbo_terms, prior_bpd, timestep_proposal, x_0_of
from ddpm_core.model import load_model
from ddpm_core.process.discrete import DiscreteProcess
from pipelines.evaluation import terms as terms_module
from pipelines.evaluation.shard import term_columns
from pipelines.evaluation.terms import evaluate_images

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "ddpm_reference.json").read_text())
REQUEST = {"seed": 3, "sigma2": "beta_tilde", "dtype": "float32", "batch_size": 24}


def toy_model(schedule: DiscreteProcess) -> Any:
    """The reference's network: 0.9 x + 0.1 sin(t)."""

    def eps_fn(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.9 * x_t + 0.1 * torch.sin(t.double())[:, None, None, None]

    return SimpleNamespace(schedule=schedule, device=torch.device("cpu"), eps_fn=lambda dtype: eps_fn)


@pytest.mark.parametrize("case", range(len(REFERENCE["elbo"])))
def test_the_reference_values_through_the_jobs_code_path(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ho 2020, eqs. 5, 12 and 13, with the reference's noise in the place of the job's."""
    expected = REFERENCE["elbo"][case]
    schedule = DiscreteProcess.from_betas(expected["betas"])
    eps = torch.tensor(REFERENCE["eps"], dtype=torch.float64)  # [T, n, C, H, W]
    images = torch.tensor(REFERENCE["x_0"], dtype=torch.uint8).permute(0, 2, 3, 1)
    monkeypatch.setattr(terms_module, "evaluation_noise", lambda seed, ids, column, shape: eps[column, ids])
    design = full_design(len(eps), len(images), 1)
    request = {**REQUEST, "sigma2": expected["sigma2"], "batch_size": 5}
    scores = evaluate_images(toy_model(schedule), images.numpy(), torch.arange(len(images)), design, request)
    prior = prior_bpd(schedule, x_0_of(images.permute(0, 3, 1, 2)))
    columns = term_columns(expected["sigma2"], design, prior, scores)
    suffix = "_clipped" if expected["clip_denoised"] else ""
    name = f"{expected['sigma2']}{suffix}"
    found = torch.tensor(columns[f"term_{name}"].to_pylist(), dtype=torch.float64)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 0.0}
    torch.testing.assert_close(found, torch.tensor(expected["terms"], dtype=torch.float64), **close)
    torch.testing.assert_close(prior, torch.tensor(expected["prior"], dtype=torch.float64), **close)
    total = torch.tensor(columns[f"bits_per_dim_{name}"])
    torch.testing.assert_close(total, torch.tensor(expected["total"], dtype=torch.float64), **close)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    save_tiny_model(tmp_path)
    return load_model(tmp_path)


def images_of(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def test_every_t_gives_what_elbo_terms_gives(model: Any) -> None:
    """The exact sum over t (Ho 2020, eq. 5), with a real network and M = 2 draws."""
    images, ids = images_of(5), torch.tensor([3, 9, 4, 100, 0])
    design = full_design(20, 5, 2)
    scores = evaluate_images(model, images.numpy(), ids, design, REQUEST)
    pixels = images.permute(0, 3, 1, 2)
    found = replicate_values(design, prior_bpd(model.schedule, x_0_of(pixels)), scores["term"]).mean(1)
    expected = elbo_terms(model.schedule, model.eps_fn(), pixels, ids, 3, draws=2).total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_size_of_batches_moves_last_bits_only_and_every_call_has_one_shape(model: Any) -> None:
    images, ids = images_of(6).numpy(), torch.arange(6)
    design = stratified_design(torch.arange(6), 3, timestep_proposal(model.denoiser.process), 8)
    shapes = []

    def watched(dtype: str) -> Any:
        def eps_fn(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(x_t.shape))
            return model.eps_fn(dtype)(x_t, t)

        return eps_fn

    watching = SimpleNamespace(schedule=model.schedule, device=model.device, eps_fn=watched)
    one = evaluate_images(watching, images, ids, design, REQUEST)
    assert shapes == [(24, 1, 8, 8)] * 3  # 60 evaluations
    other = evaluate_images(model, images, ids, design, {**REQUEST, "batch_size": 7})
    assert one["decoder"].shape == (6, 2, len(decoder_variances(model.schedule)))
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=1e-4, atol=1e-6)


def test_the_decoder_under_its_own_variance_is_the_term(model: Any) -> None:
    design = full_design(20, 4, 2)
    for index, sigma2 in enumerate(("beta", "beta_tilde")):
        request = {**REQUEST, "sigma2": sigma2}
        scores = evaluate_images(model, images_of(4).numpy(), torch.arange(4), design, request)
        torch.testing.assert_close(scores["decoder"][:, :, index], scores["term"][:, [0, 20]], rtol=1e-12, atol=0)
