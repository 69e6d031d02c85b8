"""What follows from the stored rows: equal to plain aggregates of the Parquet and to direct evaluations."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.denoisers import FunctionDenoiser
from support.evaluate_runs import ROWS, in_process, tiny_evaluation
from support.sample_runs import save_tiny_model

from ddpm_core.likelihood.curves import decoder_variances, optimal_variance
from ddpm_core.likelihood.designs import full_design
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import GivenVariance
from pipelines.cli.errors import ModelError
from pipelines.data.dataset import PreparedDataset
from pipelines.data.hold_out import HoldOut
from pipelines.evaluation import first_pass
from pipelines.evaluation.config import OdeConfig
from pipelines.evaluation.inputs import Inputs, request_of
from pipelines.evaluation.publish import calibration_notes
from pipelines.models.find import find_model
from pipelines.models.used import UsedModel
from pipelines.storage.location import Location


@pytest.fixture
def data(make_dataset: Callable[..., PreparedDataset]) -> PreparedDataset:
    return make_dataset(ROWS)


@pytest.mark.parametrize("estimator", ["all", "stratified", "importance"])
def test_every_mean_is_the_aggregate_of_the_rows(tmp_path: Path, data: PreparedDataset, estimator: Any) -> None:
    found, rows, _ = in_process(tiny_evaluation(tmp_path, data, estimator=estimator), data)
    means = {name: value["mean"] for name, value in found.summary["means"].items()}
    for name in ("bits_per_dim", "L_0", "L_t_sum"):
        for suffix in ("", "_clipped"):
            column = f"{name}_beta_tilde{suffix}"
            key = f"{name}.beta_tilde{suffix.replace('_', '.')}"
            assert means[key] == pytest.approx(rows[column].mean(), abs=1e-9)
    assert means["L_T"] == pytest.approx(rows["L_T"].mean(), abs=1e-9)
    for name in ("png", "webp", "histogram"):
        assert means[f"bits_per_dim.{name}"] == pytest.approx(rows[f"{name}_bits_per_dim"].mean(), abs=1e-9)
    # The row's own parts: L_T + sum(weight * term).
    by_hand = [row.L_T + np.dot(row.weight, row.term_beta_tilde) for row in rows.itertuples()]
    assert by_hand == pytest.approx(rows["bits_per_dim_beta_tilde"].to_numpy(), abs=1e-12)
    assert rows["id"].tolist() == list(range(ROWS))
    flat_t, flat_mse = np.concatenate(rows["t"].to_list()), np.concatenate(rows["eps_mse"].to_list())
    curve = found.curve
    assert curve.t is not None
    assert curve.t.tolist() == sorted(set(flat_t))
    assert curve.eps_mse[3] == pytest.approx(flat_mse[flat_t == curve.t[3]].mean(), abs=1e-12)
    per_image = {"all": 40, "stratified": 10, "importance": 10}[estimator]
    assert found.summary["network_evaluations"] == ROWS * per_image
    assert found.summary["network_evaluations_of_full_sum"] == ROWS * 20


def test_the_intervals_are_students(tmp_path: Path, data: PreparedDataset) -> None:
    """With every t and two draws: by hand from the two replicates."""
    found, rows, _ = in_process(tiny_evaluation(tmp_path, data, estimator="all"), data)
    values = np.array(
        [
            [
                row.L_T + 2 * np.dot(row.weight[row.replicate == r], row.term_beta_tilde[row.replicate == r])
                for r in (0, 1)
            ]
            for row in rows.itertuples()
        ]
    )
    mean, errors = values.mean(), (values[:, 0] - values[:, 1]) ** 2 / 4
    monte_carlo = errors.sum() / ROWS**2
    half = stats.t.ppf(0.975, ROWS) * monte_carlo**0.5
    got = found.summary["means"]["bits_per_dim.beta_tilde"]
    assert got["given_images"] == pytest.approx([mean - half, mean + half], abs=1e-9)
    assert got["data_set"] == got["given_images"]
    spread = values.mean(1).var(ddof=1) / ROWS  # of the images' values, with what the draws add to it
    width = got["population"][1] - got["mean"]
    assert stats.t.ppf(0.975, 1e9) * spread**0.5 < width < stats.t.ppf(0.975, ROWS - 1) * spread**0.5 * 1.01


def test_the_other_variances_equal_a_direct_evaluation(tmp_path: Path, data: PreparedDataset) -> None:
    """Ho 2020, eq. 12: sigma^2 = beta from rows that were scored under beta_tilde."""
    config = tiny_evaluation(tmp_path, data, estimator="all")
    found, _, _ = in_process(config, data)
    direct, _, _ = in_process(replace(config, sigma2="beta", output=str(tmp_path / "beta")), data)
    for name in ("bits_per_dim.beta", "bits_per_dim.beta_tilde", "bits_per_dim.optimal"):
        for kind in ("mean", "given_images", "population"):
            expected = direct.summary["means"][name][kind]
            assert found.summary["means"][name][kind] == pytest.approx(expected, rel=1e-9)


def test_the_optimal_variances_equal_a_direct_evaluation_with_the_other_halfs_table(
    tmp_path: Path, data: PreparedDataset
) -> None:
    """Bao 2022: each half of the images under the optimum of the other half, both ways."""
    found, rows, model = in_process(tiny_evaluation(tmp_path, data, estimator="all"), data)
    _, images, _ = data.read_images(0, ROWS)
    pixels = torch.tensor(images).permute(0, 3, 1, 2)
    mse = np.stack(rows["eps_mse"].to_list()).reshape(ROWS, 2, 20).mean(1)
    decoder = np.stack(rows["L_0_draws"].to_list()).reshape(ROWS, 2, -1).mean(1)
    half = np.arange(ROWS) % 2
    values = np.empty(ROWS)
    for mine in (0, 1):
        optimal = optimal_variance(model.denoiser.process, torch.tensor(mse[half != mine].mean(0)))
        optimal.table[0] = decoder_variances(model.denoiser.process)[decoder[half != mine].sum(0).argmin()]
        ids = torch.tensor(np.flatnonzero(half == mine))
        values[half == mine] = elbo(
            model.denoiser, pixels[ids], ids, full_design(20, len(ids), 2), 3, optimal
        ).replicates.mean(1)
    assert found.summary["means"]["bits_per_dim.optimal"]["mean"] == pytest.approx(values.mean(), rel=1e-5)
    best = found.summary["means"]["bits_per_dim.optimal"]["mean"]
    assert best < min(found.summary["means"][f"bits_per_dim.{name}"]["mean"] for name in ("beta", "beta_tilde"))


def test_a_sub_sequences_prediction_equals_a_direct_evaluation(tmp_path: Path, data: PreparedDataset) -> None:
    """Kingma 2021, VDM, eq. 14: K = 10 of T = 20 steps, exactly with every t, within its interval with some of them."""
    config = tiny_evaluation(tmp_path, data, estimator="all")
    found, _, model = in_process(config, data)
    process = model.denoiser.process
    steps = process.grid(10).flip(0)
    abar = process.alpha2[steps]
    short = DiscreteProcess.from_betas(1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]]))
    sigma2 = GivenVariance(torch.cat([process.posterior_variance[1:2], short.posterior_variance[1:]]))
    _, images, _ = data.read_images(0, ROWS)
    pixels = torch.tensor(images).permute(0, 3, 1, 2)
    denoiser = FunctionDenoiser(lambda z_t, t: model.denoiser(z_t, steps[t]).eps, short)
    direct = elbo(
        denoiser, pixels, torch.arange(ROWS), full_design(10, ROWS, 8), seed=11, variance=sigma2
    ).replicates.mean(1)
    got = found.summary["means"]["bits_per_dim.steps_10.beta_tilde"]
    # Two Monte-Carlo estimates of the same images with different noise: 2 and 8 draws.
    tolerance = 2 * (got["given_images"][1] - got["mean"])
    assert got["mean"] == pytest.approx(float(direct.mean()), abs=tolerance)
    some, _, _ = in_process(replace(config, estimator="stratified", output=str(tmp_path / "some")), data)
    got = some.summary["means"]["bits_per_dim.steps_10.beta_tilde"]
    assert got["mean"] == pytest.approx(float(direct.mean()), abs=2 * (got["given_images"][1] - got["mean"]))
    assert "bits_per_dim.steps_25.beta_tilde" not in found.summary["means"], "the model has 20 steps"


def test_a_part_of_the_images_is_the_same_part_whatever_the_seed(tmp_path: Path, data: PreparedDataset) -> None:
    config = tiny_evaluation(tmp_path, data, num_images=33)
    found, rows, _ = in_process(config, data)
    _, other, _ = in_process(replace(config, seed=4, output=str(tmp_path / "other")), data)
    assert len(rows) == 33
    assert len(set(rows["id"])) == 33
    assert rows["id"].tolist() == other["id"].tolist() != sorted(rows["id"])
    assert (rows["bits_per_dim_beta_tilde"].to_numpy() != other["bits_per_dim_beta_tilde"].to_numpy()).all()
    got = found.summary["means"]["bits_per_dim.beta_tilde"]
    widths = [got[kind][1] - got["mean"] for kind in ("given_images", "data_set", "population")]
    assert widths == sorted(widths)
    _, images, _ = data.read_images(0, ROWS)
    again, _ = data.read_rows(rows["id"].to_numpy())
    assert (again == images[rows["id"]]).all()


def test_a_model_that_overflows_is_named_and_no_number_of_it_is_kept(tmp_path: Path, data: PreparedDataset) -> None:
    save_tiny_model(tmp_path / "model", scale=1e30)
    with pytest.raises(ModelError, match=r"no finite bits/dim .* for 16 of 16 images \(first ids 0, 1, 2\)"):
        in_process(tiny_evaluation(tmp_path, data), data)


def test_only_the_rows_that_the_training_held_out_are_evaluated(tmp_path: Path, data: PreparedDataset) -> None:
    hold_out, config = HoldOut(ROWS, 3), tiny_evaluation(tmp_path, data)
    found, rows, model = in_process(config, data, hold_out)
    assert rows["id"].tolist() == hold_out.ids.tolist()
    assert (found.summary["num_images"], found.summary["data_set_size"]) == (23, 23)
    request = request_of(
        config, Inputs(UsedModel(find_model(config.model, None, tmp_path), model), data, data, hold_out)
    )
    notes = calibration_notes(request, found.summary, model.denoiser.process)
    assert "All the rows that the training held out of the data set, in its order." in notes
    # the histogram that they are compared with has not seen them either
    counts = first_pass.read_first_pass(Location.parse(config.output), 0)
    assert (counts.sum(axis=1) == hold_out.num_trained).all()
    some = replace(config, num_images=10, output=str(tmp_path / "some"))
    found, rows, _ = in_process(some, data, hold_out)
    assert set(rows["id"]) < set(hold_out.ids.tolist())
    assert len(rows) == 10
    assert found.summary["data_set_size"] == 23


def test_the_ode_is_scored_for_the_first_images_only(tmp_path: Path, data: PreparedDataset) -> None:
    config = tiny_evaluation(tmp_path, data, num_images=20, ode=OdeConfig(num_images=3, steps=8, probes=2))
    found, rows, _ = in_process(config, data)
    assert rows["ode_bits_per_dim"].notna().tolist() == [True] * 3 + [False] * 17
    assert found.summary["means"]["ode.bits_per_dim"]["num_images"] == 3
    assert found.summary["means"]["ode.bits_per_dim"]["mean"] == pytest.approx(rows["ode_bits_per_dim"].mean())
    assert (rows["ode_step_error"].dropna() > 0).all()


def test_full_design_of_one_draw_has_no_monte_carlo_error(tmp_path: Path, data: PreparedDataset) -> None:
    found, _, _ = in_process(tiny_evaluation(tmp_path, data, estimator="all", draws=1), data)
    got = found.summary["means"]["bits_per_dim.beta_tilde"]
    assert (got["given_images"], got["data_set"]) == (None, None)
    assert got["population"] is not None
    assert full_design(20, 2, 1).num_replicates == 1
