"""Classification by likelihood: each image's rows, and what is reported of them, counted again by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from support.evaluate_runs import ROWS, evaluate_request, in_process, tiny_evaluation
from support.model_kinds import KINDS

from ddpm_core.likelihood.bounds import bound_of
from ddpm_core.likelihood.elbo import elbo
from pipelines.cli.errors import ConfigError
from pipelines.data.dataset import PreparedDataset
from pipelines.evaluation.class_report import class_files, class_metrics, classification_of
from pipelines.evaluation.classified import class_rows, classification, share
from pipelines.evaluation.config import ClassifierConfig
from pipelines.evaluation.request import ClassifierRequest
from pipelines.evaluation.terms import levels_of, stratified_over

FEW = ClassifierConfig(timesteps_per_round=4, rounds=3, separation=3.0)


@pytest.fixture
def data(make_dataset: Callable[..., PreparedDataset]) -> PreparedDataset:
    """70 images in three classes; one has no label."""
    return make_dataset(ROWS, labels=[None if index == 5 else index % 3 for index in range(ROWS)])


@pytest.mark.parametrize("kind", ["eps, labels", "vdm, labels"])
def test_without_giving_up_every_class_has_its_bound_on_the_same_noise(
    tmp_path: Path, data: PreparedDataset, kind: str
) -> None:
    """argmax of -ELBO(x | c) + ln prior(c) (Li 2023, eq. 7), by hand from the bounds of two rounds."""
    KINDS[kind].save(tmp_path / "model", scale=0.2)
    asked = ClassifierConfig("0,2", "0.8,0.2", timesteps_per_round=4, rounds=2, separation=None)
    found, rows, model = in_process(tiny_evaluation(tmp_path, data, classify=True, classifier=asked), data)
    images, _ = data.read_rows(np.arange(ROWS))
    bound, ids = bound_of(model.denoiser), torch.arange(ROWS)

    def of_class(c: int, seed: int) -> torch.Tensor:
        design = stratified_over(bound.denoiser.process, ids, seed, 4, replicates=1)
        label = torch.full((ROWS,), c)
        levels = levels_of(images)
        return elbo(bound.denoiser, levels, ids, design, seed, bound.variance, 24, label=label).parts()[0]

    bits = torch.stack([(of_class(c, 3) + of_class(c, 3 + 2**33)) / 2 for c in (0, 2)], 1)
    assert np.stack(rows["class_bits_per_dim"].to_list()) == pytest.approx(bits.numpy(), rel=1e-6)
    nats = bits * (8 * 8 * math.log(2.0))
    posterior = torch.softmax(torch.tensor([0.8, 0.2]).double().log() - nats, 1)
    assert np.stack(rows["posterior"].to_list()) == pytest.approx(posterior.numpy(), abs=1e-3)
    assert rows["predicted"].tolist() == torch.tensor([0, 2])[posterior.argmax(1)].tolist()
    margin = (posterior.log()[:, 0] - posterior.log()[:, 1]).abs()
    assert rows["margin"].to_numpy() == pytest.approx(margin.numpy(), rel=1e-3, abs=1e-3)
    assert (rows["margin_error"] > 0).all()
    assert (rows["class_evaluations"] == 2 * 2 * (4 + 1)).all()
    assert found.summary["classification"]["evaluations"] == ROWS * 20


def test_giving_classes_up_takes_fewer_evaluations(tmp_path: Path, data: PreparedDataset) -> None:
    KINDS["vdm, labels"].save(tmp_path / "model", scale=0.2)
    config = tiny_evaluation(tmp_path, data, classify=True, classifier=replace(FEW, rounds=6))
    found, rows, _ = in_process(config, data)
    fixed, all_rows, _ = in_process(
        replace(config, output=str(tmp_path / "fixed"), classifier=replace(FEW, rounds=6, separation=None)), data
    )
    done, most = (each.summary["classification"]["evaluations"] for each in (found, fixed))
    assert most == found.summary["classification"]["evaluations_without_giving_up"] == ROWS * 6 * 3 * (4 + 1)
    assert done < most
    assert rows["class_evaluations"].sum() == done
    assert (rows["class_evaluations"] >= 3 * (4 + 2)).all()  # one round of all
    assert (rows["class_evaluations"] % 5 == 0).all()
    decided = rows["margin"] > 3.0 * rows["margin_error"]
    assert found.summary["classification"]["undecided"] == (~decided).sum()
    assert fixed.summary["classification"]["undecided"] is None
    # the image whose classes were all in the race to the end has met the same draws
    whole = (rows["class_evaluations"] == 6 * 15).to_numpy()
    assert whole.any()
    assert rows["margin"][whole].to_numpy() == pytest.approx(all_rows["margin"][whole].to_numpy(), rel=1e-6)


def test_the_report_counts_the_rows(tmp_path: Path, data: PreparedDataset) -> None:
    """Accuracy, confusion and calibration once more by pandas; the image without a label counts in none of them."""
    KINDS["eps, labels"].save(tmp_path / "model", scale=0.2)
    found, rows, _ = in_process(tiny_evaluation(tmp_path, data, classify=True, classifier=FEW), data)
    summary, rows = found.summary["classification"], rows.reset_index(drop=True)
    assert pd.isna(rows["label"][5])
    known = rows[rows["label"].notna()]
    confusion = pd.crosstab(known["label"], known["predicted"]).reindex(index=range(3), columns=range(3), fill_value=0)
    assert summary["confusion"] == confusion.to_numpy().tolist()
    right = known["label"] == known["predicted"]
    assert summary["accuracy"]["mean"] == pytest.approx(right.mean())
    assert summary["accuracy"]["num_images"] == sum(map(sum, summary["confusion"])) == ROWS - 1
    confidence = known["posterior"].map(max)
    bins = pd.DataFrame({"confidence": confidence, "right": right}).groupby((confidence * 10).astype(int).clip(upper=9))
    error = ((bins["right"].mean() - bins["confidence"].mean()).abs() * bins.size() / len(known)).sum()
    assert summary["ece"] == pytest.approx(error)
    assert [bar["accuracy"]["num_images"] for bar in summary["calibration"]] == bins.size().tolist()
    text = classification_of(found.summary)
    assert f"accuracy {right.mean():.2%} (95%: " in text
    assert "69 images of 3 classes" in text
    metrics = class_metrics(found.summary)
    assert metrics["class/low"] < metrics["class/accuracy"] < metrics["class/high"]
    assert metrics["class/saving"] == pytest.approx(ROWS * 45 / rows["class_evaluations"].sum())
    drawn = class_files(summary, ["T-shirt", "Shirt", "Coat"])
    assert set(drawn) == {f"{name}.{kind}" for name in ("confusion", "calibration") for kind in ("png", "svg")}
    assert b"T-shirt" in drawn["confusion.svg"]


def table(label: list[int | None], posterior: list[list[float]], predicted: list[int]) -> pa.Table:
    of_each = {"margin": 1.0, "margin_error": 0.1, "class_evaluations": 12}
    columns = {"label": pa.array(label, pa.int64()), "posterior": posterior, "predicted": predicted}
    return pa.table({**columns, **{name: [value] * len(label) for name, value in of_each.items()}})


def test_labels_outside_the_classes_count_for_the_effort_alone() -> None:
    asked = ClassifierRequest((2, 4), 4, 3, None)
    rows = class_rows(
        table([2, 4, 0, None, 4], [[0.9, 0.1], [0.3, 0.7], [0.5, 0.5], [0.2, 0.8], [0.6, 0.4]], [2, 4, 2, 4, 2])
    )
    found = classification([rows], asked)
    assert found["confusion"] == [[1, 0], [1, 1]]
    assert (found["accuracy"]["mean"], found["accuracy"]["num_images"]) == (pytest.approx(2 / 3), 3)
    assert [bar["confidence"] for bar in found["calibration"]] == pytest.approx([0.6, 0.7, 0.9])
    assert found["ece"] == pytest.approx((0.6 + 0.3 + 0.1) / 3)
    assert (found["evaluations"], found["evaluations_without_giving_up"]) == (60, 5 * 30)
    none = classification([class_rows(table([0], [[0.5, 0.5]], [2]))], asked)
    assert (none["accuracy"], none["ece"], none["calibration"]) == (None, None, [])
    summary = {"classification": none}
    assert classification_of(summary).startswith("no image has one of the 2 classes as its label")
    assert set(class_metrics(summary)) == {"class/evaluations", "class/saving"}


def test_the_interval_of_a_share_is_wilsons() -> None:
    """(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) (Wilson 1927)."""
    p, n, z = 0.9, 50, 1.959963984540054
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)]
    assert share(45, 50)["interval"] == pytest.approx(expected)


@pytest.mark.parametrize("fields", [{"classes": (1,)}, {"classes": (2, 1)}, {"prior": (0.5,)}, {"prior": (1.0, 0.0)}])
def test_a_stored_classifier_that_does_not_hold_together_is_refused(fields: dict[str, Any]) -> None:
    values = {"classes": (0, 1), "timesteps_per_round": 4, "rounds": 3, "separation": 2.0, **fields}
    with pytest.raises(ConfigError, match="must"):
        ClassifierRequest(**values)


def test_a_request_with_a_classifier_is_read_as_it_was_stored() -> None:
    from pipelines.evaluation.request import EvaluateRequest
    from pipelines.storage.location import Location

    asked = evaluate_request(labels="both", classifier=ClassifierRequest((0, 2), 4, 3, 2.5, (0.9, 0.1)))
    stored = asked.to_json()
    assert stored["classifier"]["classes"] == [0, 2]
    assert EvaluateRequest.from_json(stored, Location.parse("/out/manifest.json")) == asked
    assert {"labels", "classifier"}.isdisjoint(evaluate_request().to_json())
