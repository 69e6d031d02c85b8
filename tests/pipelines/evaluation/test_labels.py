"""Evaluations of models with labels: the bound given the label and of the null class, and what becomes of labels."""

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

from ddpm_core.likelihood.bounds import bound_of
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.ode import ode_bpd
from pipelines.cli.errors import ConfigError, DataError
from pipelines.data.dataset import PreparedDataset
from pipelines.evaluation.config import ClassifierConfig, EvaluateConfig, OdeConfig
from pipelines.evaluation.inputs import Inputs, request_of
from pipelines.evaluation.names import label_of
from pipelines.evaluation.shard import design_of
from pipelines.evaluation.terms import levels_of
from pipelines.models.used import UsedModel
from pipelines.storage.location import Location
from pipelines.tracking.champion import comparable

LABELS = [None if index == 5 else index % 3 for index in range(ROWS)]


@pytest.fixture
def data(make_dataset: Callable[..., PreparedDataset]) -> PreparedDataset:
    """70 images in three classes; one has no label."""
    return make_dataset(ROWS, labels=LABELS)


def evaluation_of(kind: str, root: Path, data: PreparedDataset, **fields: Any) -> EvaluateConfig:
    KINDS[kind].save(root / "model", scale=0.2)
    return tiny_evaluation(root, data, **fields)


def used(config: EvaluateConfig) -> UsedModel:
    return UsedModel.read(Location.parse(config.output), config.model, None, Path(config.root))


@pytest.mark.parametrize("kind", ["eps, labels", "vdm, labels"])
def test_given_null_and_both_are_the_bounds_with_and_without_the_label(
    tmp_path: Path, data: PreparedDataset, kind: str
) -> None:
    """Each is the ELBO with that label; `both` has the numbers of the other two, and their paired difference."""
    config = evaluation_of(kind, tmp_path, data, labels="both")
    both, rows, model = in_process(config, data)
    own = "beta_tilde" if kind == "eps, labels" else "continuous"
    images, labels = data.read_rows(np.arange(ROWS))
    request = request_of(config, Inputs(used(config), data, data))
    bound, ids = bound_of(model.denoiser), torch.arange(ROWS)
    design = design_of(request, bound.denoiser.process, ids, None)
    told, untold = (
        elbo(bound.denoiser, levels_of(images), ids, design, 3, bound.variance, 24, label=label).replicates.mean(1)
        for label in (torch.tensor(labels), None)
    )
    given, null = f"bits_per_dim_given_label_{own}", f"bits_per_dim_{own}"
    assert rows[given].to_numpy() == pytest.approx(told.numpy(), rel=1e-6)
    assert rows[null].to_numpy() == pytest.approx(untold.numpy(), rel=1e-6)
    assert rows[given].iloc[5] == rows[null].iloc[5]  # the image without a label
    means = both.summary["means"]
    assert both.summary["headline"] == f"bits_per_dim.given_label.{own}"
    difference, far = means[f"label_tells.{own}"], means[both.summary["headline"]]
    assert difference["mean"] == pytest.approx((rows[null] - rows[given]).mean(), abs=1e-9)
    # the noise is common to both, so the difference is known better than either
    width = [found["given_images"][1] - found["mean"] for found in (difference, far)]
    assert width[0] < width[1]
    names = {"given": f"bits_per_dim.given_label.{own}", "null": f"bits_per_dim.{own}"}
    for labels_told, name in names.items():
        alone, _, _ = in_process(replace(config, labels=labels_told, output=str(tmp_path / labels_told)), data)
        assert alone.summary["headline"] == name
        assert alone.summary["means"][name]["mean"] == pytest.approx(means[name]["mean"], rel=1e-9)
        assert alone.summary["network_evaluations"] * 2 == both.summary["network_evaluations"]
        assert "label_tells" not in str(alone.summary)
    words = {name: label_of(name, both.summary).split(",")[0] for name in (*names.values(), f"label_tells.{own}")}
    assert list(words.values()) == [
        "bits/dim given the label",
        "bits/dim of the null class",
        "bits/dim that the label tells",
    ]
    assert not comparable(f"given_label.{own}", own)


def test_what_follows_is_given_the_label_too(tmp_path: Path, data: PreparedDataset) -> None:
    """The bound under other variances and in fewer steps, from the same rows, is named as what it is."""
    config = evaluation_of("eps, labels", tmp_path, data, estimator="all")
    found, _, _ = in_process(config, data)
    direct, _, _ = in_process(replace(config, sigma2="beta", output=str(tmp_path / "beta")), data)
    assert direct.summary["headline"] == "bits_per_dim.given_label.beta"
    for name in ("given_label.beta", "given_label.optimal", "given_label.steps_10.beta_tilde"):
        a, b = (each.summary["means"][f"bits_per_dim.{name}"]["mean"] for each in (found, direct))
        assert a == pytest.approx(b, rel=1e-6)
    unnamed = [name for name in found.summary["means"] if name.startswith("bits_per_dim") and "given" not in name]
    assert set(unnamed) == {f"bits_per_dim.{baseline}" for baseline in ("png", "webp", "histogram")}


@pytest.mark.parametrize("labels", ["given", "null"])
def test_the_ode_is_told_what_the_bound_is_told(tmp_path: Path, data: PreparedDataset, labels: Any) -> None:
    config = evaluation_of("vdm, labels", tmp_path, data, labels=labels, ode=OdeConfig(num_images=2, steps=4, probes=2))
    _, rows, model = in_process(config, data)
    images, of_rows = data.read_rows(np.arange(2))
    label = torch.tensor(of_rows) if labels == "given" else None
    expected = ode_bpd(model.denoiser, levels_of(images), torch.arange(2), 3, 4, 2, label)
    assert rows["ode_bits_per_dim"][:2].to_numpy() == pytest.approx(expected.bits_per_dim.numpy(), rel=1e-4)
    other = ode_bpd(model.denoiser, levels_of(images), torch.arange(2), 3, 4, 2, torch.tensor([2, 2]))
    assert (other.bits_per_dim != expected.bits_per_dim).all()


def test_auto_is_given_where_model_and_data_have_labels(
    tmp_path: Path, data: PreparedDataset, make_dataset: Callable[..., PreparedDataset]
) -> None:
    config = evaluation_of("eps, labels", tmp_path, data)
    without = make_dataset(ROWS, name="without")
    for dataset, expected in ((data, "given"), (without, "null")):
        assert request_of(config, Inputs(used(config), dataset, None)).labels == expected
    KINDS["eps"].save(tmp_path / "plain")
    plain = replace(config, model=str(tmp_path / "plain"))
    for labels in ("auto", "null"):
        request = request_of(replace(plain, labels=labels), Inputs(used(plain), data, None))
        assert request.labels is None
        assert "labels" not in request.to_json()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "plain", "labels": "given"}, "labels = 'given': the model was trained without labels"),
        ({"model": "plain", "labels": "both"}, "labels = 'both': the model was trained without labels"),
        ({"model": "plain", "classify": True}, "classify = True: the model was trained without labels"),
        ({"data": "without", "labels": "given"}, "has no labels, which labels = given needs"),
        ({"data": "many"}, "has the label 3, the model's classes are 0..2"),
        ({"data": "named"}, "calls class 0 'cat', the model '0'"),
        ({"classifier": ClassifierConfig("1,5")}, "classifier.classes = 5: is no class of the model, which has 0..2"),
        ({"classifier": ClassifierConfig("1,Bag")}, "classifier.classes = Bag: is no class of the model"),
        ({"classifier": ClassifierConfig("1")}, "classifier.classes = '1': must be two classes or more"),
        ({"classifier": ClassifierConfig("1,2,1")}, "classifier.classes = '1,2,1': must not name a class twice"),
        ({"classifier": ClassifierConfig(prior="0.5,0.5")}, "must have one number for each of 3 classes"),
        ({"classifier": ClassifierConfig(prior="0.5,0.5,0.5")}, "must sum to 1, not 1.5"),
        ({"classifier": ClassifierConfig(prior="1.5,-0.5,0")}, "must be above 0; leave a class out"),
        ({"classifier": ClassifierConfig(prior="0.5,nan,0.5")}, "must be above 0; leave a class out"),
        ({"classifier": ClassifierConfig(prior="even")}, "must be uniform, train_data, or numbers"),
        ({"classifier": ClassifierConfig(prior="train_data")}, "the training data are not known"),
        ({"classifier": ClassifierConfig(timesteps_per_round=20)}, "must be at most T - 1 = 19"),
    ],
)
def test_labels_that_there_are_not_are_refused(
    tmp_path: Path,
    data: PreparedDataset,
    make_dataset: Callable[..., PreparedDataset],
    fields: dict[str, Any],
    message: str,
) -> None:
    config = evaluation_of("eps, labels", tmp_path, data)
    KINDS["eps"].save(tmp_path / "plain")
    sets = {
        "without": lambda: make_dataset(20, name="without"),
        "many": lambda: make_dataset(20, name="many", labels=[3] * 20),
        "named": lambda: make_dataset(20, name="named", labels=[1] * 20, label_names=["cat", "dog", "cow"]),
    }
    data = sets[fields.pop("data")]() if "data" in fields else data
    if "model" in fields:
        fields["model"] = str(tmp_path / fields["model"])
    config = replace(config, **{"classify": "classifier" in fields, **fields})
    with pytest.raises((ConfigError, DataError)) as refusal:
        request_of(config, Inputs(used(config), data, None))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_priors_and_classes_are_settled(tmp_path: Path, data: PreparedDataset) -> None:
    """In the order of the classes' numbers, whichever they are given in; the training data's are shares of labels."""
    config = evaluation_of("eps, labels", tmp_path, data)

    def settled(**fields: Any) -> Any:
        asked = replace(config, classify=True, classifier=ClassifierConfig(**fields))
        return request_of(asked, Inputs(used(asked), data, data)).classifier

    assert settled().prior is None
    assert settled().log_prior == pytest.approx(np.log([1 / 3] * 3))
    of_two = settled(classes="2, 0", prior="0.9,0.1")
    assert (of_two.classes, of_two.prior) == ((0, 2), pytest.approx((0.1, 0.9)))
    counts = pd.Series(LABELS).value_counts().sort_index().to_numpy()
    assert settled(prior="train_data").prior == pytest.approx(counts / 69)
    assert settled(prior="0.333,0.333,0.333").prior == pytest.approx([1 / 3] * 3)
