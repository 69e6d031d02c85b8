"""Evaluations of models of every kind: each bound's own numbers, and what else follows from its rows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.evaluate_runs import ROWS, in_process, tiny_evaluation
from support.model_kinds import KINDS

from ddpm_core.likelihood.bounds import Bound, bound_of
from ddpm_core.likelihood.designs import full_design
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.ode import ode_bpd
from ddpm_core.process.continuous import continuous
from pipelines.data.dataset import PreparedDataset
from pipelines.evaluation.config import EvaluateConfig, OdeConfig
from pipelines.evaluation.inputs import Inputs, request_of
from pipelines.evaluation.names import label_of
from pipelines.evaluation.publish import calibration_notes
from pipelines.models.find import find_model
from pipelines.models.used import UsedModel

BASELINES = {"bits_per_dim.png", "bits_per_dim.webp", "bits_per_dim.histogram"}


@pytest.fixture
def data(make_dataset: Callable[..., PreparedDataset]) -> PreparedDataset:
    return make_dataset(ROWS)


def evaluation_of(kind: str, root: Path, data: PreparedDataset, **fields: Any) -> EvaluateConfig:
    KINDS[kind].save(root / "model", scale=0.02)
    return tiny_evaluation(root, data, **fields)


def levels_of(data: PreparedDataset) -> torch.Tensor:
    return torch.tensor(data.read_images(0, ROWS)[1]).permute(0, 3, 1, 2)


def direct_elbo(bound: Bound, data: PreparedDataset) -> np.ndarray[Any, Any]:
    """Of every image, with every t and the job's noise."""
    assert bound.num_timesteps is not None
    design = full_design(bound.num_timesteps, ROWS, 2)
    found = elbo(bound.denoiser, levels_of(data), torch.arange(ROWS), design, 3, bound.variance, 24)
    return np.asarray(found.replicates.mean(1).numpy())


def half(measured: dict[str, Any]) -> float:
    """Of the Monte-Carlo interval."""
    return float(measured["given_images"][1] - measured["mean"])


def notes_of(config: EvaluateConfig, data: PreparedDataset, found: Any, model: Any) -> str:
    inputs = Inputs(UsedModel(find_model(config.model, None, Path(config.root)), model), data, data)
    return " ".join(calibration_notes(request_of(config, inputs), found.summary, model.denoiser.process))


@pytest.mark.parametrize("kind", ["vdm", "vdm, learned", "edm"])
@pytest.mark.parametrize("estimator", ["stratified", "importance"])
def test_continuous_time_is_the_aggregate_of_its_rows(
    tmp_path: Path, data: PreparedDataset, kind: str, estimator: Any
) -> None:
    config = evaluation_of(kind, tmp_path, data, estimator=estimator)
    found, rows, model = in_process(config, data)
    means = found.summary["means"]
    assert found.summary["headline"] == "bits_per_dim.continuous"
    assert found.summary["bound"] == {"num_timesteps": None, "decoder": "softmax"}
    assert label_of("bits_per_dim.continuous", found.summary) == "bits/dim, continuous time, softmax decoder"
    low, high = continuous(model.denoiser.process).ends
    gamma = np.stack(rows["gamma"].to_list())
    assert "t" not in rows
    assert gamma.dtype == np.float64
    assert ((gamma >= low) & (gamma <= high)).all()
    first = gamma == low
    assert (first.sum(1) == 2).all()
    for suffix, tail in (("", ""), ("_clipped", ".clipped")):
        term, weight = (np.stack(rows[name].to_list()) for name in (f"term_continuous{suffix}", "weight"))
        by_hand = rows["L_T"] + (weight * term).sum(1)
        assert by_hand.to_numpy() == pytest.approx(rows[f"bits_per_dim_continuous{suffix}"].to_numpy(), abs=1e-9)
        assert means[f"bits_per_dim.continuous{tail}"]["mean"] == pytest.approx(by_hand.mean(), abs=1e-9)
        assert means[f"L_0.continuous{tail}"]["mean"] == pytest.approx((weight * term * first).sum(1).mean(), abs=1e-9)
    mse = np.stack(rows["eps_mse"].to_list())
    term = np.stack(rows["term_continuous"].to_list())
    assert term[~first] == pytest.approx((high - low) / 2 / np.log(2) * mse[~first], rel=1e-9)
    assert (np.stack(rows["L_0_draws"].to_list()) == term[first].reshape(ROWS, 2)).all()
    # per unit of log-SNR, from the data to the noise
    assert found.curve.t is None
    assert found.curve.count.sum() == (~first).sum()
    assert found.curve.kl == pytest.approx(found.curve.eps_mse / (2 * np.log(2)), rel=1e-9)
    assert (np.diff(found.curve.log_snr) < 0).all()
    assert found.summary["network_evaluations_of_full_sum"] is None


def test_the_estimators_agree_and_fewer_steps_follow_from_continuous_time(
    tmp_path: Path, data: PreparedDataset
) -> None:
    """Kingma 2021, VDM, eqs. 13 and 17: against a direct evaluation of every step."""
    config = evaluation_of("vdm, learned", tmp_path, data, timesteps_per_image=32)
    found, _, model = in_process(config, data)
    by_importance, _, _ = in_process(replace(config, estimator="importance", output=str(tmp_path / "i")), data)
    a, b = (each.summary["means"]["bits_per_dim.continuous"] for each in (found, by_importance))
    assert a["mean"] == pytest.approx(b["mean"], abs=2 * (half(a) + half(b)))
    for k in (10, 50):
        direct, _, _ = in_process(
            replace(config, estimator="all", draws=2, num_timesteps=k, output=str(tmp_path / str(k))), data
        )
        name = f"bits_per_dim.steps_{k}"
        assert direct.summary["headline"] == name
        assert label_of(name, direct.summary) == label_of(name, found.summary) == f"bits/dim, T = {k}, softmax decoder"
        exact, predicted = (each.summary["means"][name] for each in (direct, found))
        assert predicted["mean"] == pytest.approx(exact["mean"], abs=2 * (half(exact) + half(predicted)))
        # every other variance belongs to another decoder, and a part of the steps has no sub-sequence of its own
        names = {other for other in direct.summary["means"] if other.startswith("bits_per_dim")}
        assert names == {name, f"{name}.clipped", *BASELINES}
    assert "bits_per_dim.steps_1000" in found.summary["means"]
    assert "In T steps: predicted from the same ε-errors" in notes_of(config, data, found, model)


def test_learned_variances_and_the_fixed_ones_that_follow(tmp_path: Path, data: PreparedDataset) -> None:
    config = evaluation_of("learned variances", tmp_path, data, estimator="all")
    found, rows, model = in_process(config, data)
    direct, _, _ = in_process(replace(config, sigma2="beta_tilde", output=str(tmp_path / "fixed")), data)
    assert (found.summary["headline"], direct.summary["headline"]) == (
        "bits_per_dim.learned",
        "bits_per_dim.beta_tilde",
    )
    means, fixed = found.summary["means"], direct.summary["means"]
    for name in ("beta", "beta_tilde", "optimal", "steps_10.beta_tilde"):
        assert means[f"bits_per_dim.{name}"]["mean"] == pytest.approx(fixed[f"bits_per_dim.{name}"]["mean"], rel=1e-6)
    assert not [name for name in means if "steps" in name and "learned" in name]
    for each, learned in ((found, True), (direct, False)):
        notes = notes_of(config, data, each, model)
        assert "In K steps: predicted from the same ε-errors" in notes
        assert ("Under learned σ² no other number of steps follows" in notes) == learned
    expected = direct_elbo(bound_of(model.denoiser, "learned"), data)
    assert rows["bits_per_dim_learned"].to_numpy() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["v", "learned variances"])
def test_a_part_of_the_steps_has_its_own_variances(tmp_path: Path, data: PreparedDataset, kind: str) -> None:
    """Learned ones between beta and beta_tilde of the sub-sequence itself (Nichol and Dhariwal 2021, sec. 4)."""
    config = evaluation_of(kind, tmp_path, data, estimator="all", num_timesteps=10)
    found, rows, model = in_process(config, data)
    sigma2 = "learned" if kind == "learned variances" else "beta_tilde"
    assert found.summary["headline"] == f"bits_per_dim.steps_10.{sigma2}"
    assert found.summary["bound"] == {"num_timesteps": 10, "decoder": "gaussian"}
    expected = direct_elbo(bound_of(model.denoiser, sigma2, 10), data)
    assert rows[f"bits_per_dim_steps_10_{sigma2}"].to_numpy() == pytest.approx(expected, rel=1e-6)
    direct, _, _ = in_process(replace(config, sigma2="beta", output=str(tmp_path / "beta")), data)
    for name in ("beta", "optimal"):
        means = [each.summary["means"][f"bits_per_dim.steps_10.{name}"]["mean"] for each in (found, direct)]
        assert means[0] == pytest.approx(means[1], rel=1e-6)
    assert "In K steps: predicted" not in notes_of(config, data, found, model)  # those follow of all T only
    label = label_of(f"bits_per_dim.steps_10.{sigma2}", found.summary)
    assert label == f"bits/dim, σ² = {'learned' if sigma2 == 'learned' else 'β̃'}, T = 10, discretised Gaussian"


def test_nothing_is_said_of_eps_where_the_snr_is_0(tmp_path: Path, data: PreparedDataset) -> None:
    config = evaluation_of("v, zero terminal SNR", tmp_path, data, estimator="all")
    found, rows, model = in_process(config, data)
    names = {name for name in found.summary["means"] if name.startswith("bits_per_dim")}
    assert names == {"bits_per_dim.beta_tilde", "bits_per_dim.beta_tilde.clipped", *BASELINES}
    assert np.isfinite(rows["bits_per_dim_beta_tilde"]).all()
    assert (rows["L_T"] == 0).all()
    assert "so other variances and fewer steps do not follow" in notes_of(config, data, found, model)
    assert list(found.curve.eps_mse_by_log_snr()) == sorted(found.curve.eps_mse_by_log_snr())


@pytest.mark.parametrize("kind", ["vdm, learned", "v"])
def test_the_ode_stands_beside_the_bound(tmp_path: Path, data: PreparedDataset, kind: str) -> None:
    config = evaluation_of(kind, tmp_path, data, num_images=20, ode=OdeConfig(num_images=2, steps=8, probes=2))
    found, rows, model = in_process(config, data)
    ids = torch.tensor(rows["id"].to_numpy()[:2])
    expected = ode_bpd(model.denoiser, levels_of(data)[ids], ids, 3, 8, 2)
    assert rows["ode_bits_per_dim"][:2].to_numpy() == pytest.approx(expected.bits_per_dim.numpy(), rel=1e-5)
    decoder = "uniform dequantisation" if kind == "v" else "softmax decoder"
    assert label_of("ode.bits_per_dim", found.summary) == f"ODE bits/dim, {decoder}"
    same = "with the same prior and the same softmax decoder of z_0"
    assert (same in notes_of(config, data, found, model)) == (kind != "v")


def test_curves_of_all_kinds_have_log_snr_in_common(tmp_path: Path, data: PreparedDataset) -> None:
    """Means of the evaluations whose log-SNR has the same whole part, by hand."""
    config = evaluation_of("eps", tmp_path, data)
    found, rows, model = in_process(config, data)
    t, mse = (np.concatenate(rows[name].to_list()) for name in ("t", "eps_mse"))
    by_hand = pd.Series(mse).groupby(np.floor(model.denoiser.process.log_snr.numpy()[t]).astype(int)).mean().to_dict()
    assert found.curve.eps_mse_by_log_snr() == pytest.approx(by_hand)
