"""The evaluation job with labels: one set of rows whoever computes it, verified from them, and what MLflow gets."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient
from support.evaluate_runs import ROWS, tiny_evaluation
from support.model_kinds import KINDS

from pipelines.cluster.actor_pool import ActorPool
from pipelines.cluster.config import GpuClusterConfig
from pipelines.data.dataset import PreparedDataset
from pipelines.evaluation.config import ClassifierConfig, EvaluateConfig
from pipelines.evaluation.job import evaluate
from pipelines.outputs.manifest import MANIFEST
from pipelines.storage.location import Location
from pipelines.verify.config import VerifyConfig
from pipelines.verify.job import verify

FIELDS: dict[str, Any] = {
    "labels": "both",
    "by_label": True,
    "classify": True,
    "classifier": ClassifierConfig(prior="0.5,0.3,0.2", timesteps_per_round=4, rounds=3),
}


@pytest.fixture
def made(
    make_dataset: Callable[..., PreparedDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> EvaluateConfig:
    """By this process, of a VDM with three classes."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = make_dataset(ROWS, labels=[None if index == 5 else index % 3 for index in range(ROWS)])
    KINDS["vdm, labels"].save(tmp_path / "model", scale=0.2)
    config = tiny_evaluation(tmp_path, data, cluster=GpuClusterConfig(), **FIELDS)
    with monkeypatch.context() as patch:
        patch.setattr(ActorPool, "unless_small", lambda pool, flops: None)
        evaluate(config)
    return config


def manifest_of(config: EvaluateConfig) -> dict[str, Any]:
    return json.loads((Path(config.output) / MANIFEST).read_text())


def test_rows_report_records_and_verification_agree(made: EvaluateConfig, tmp_path: Path) -> None:
    rows, manifest = pd.read_parquet(Path(made.output) / "terms"), manifest_of(made)
    means, found = manifest["results"]["means"], manifest["results"]["classification"]
    assert manifest["request"]["labels"] == "both"
    assert manifest["request"]["classifier"]["prior"] == pytest.approx([0.5, 0.3, 0.2])

    # MLflow
    client = MlflowClient(f"sqlite:///{made.root}/mlflow.db")
    experiment = client.get_experiment_by_name("model/eval").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`ddpm.output` = '{made.output}'")
    metrics, known = run.data.metrics, rows[rows["label"].notna()]
    assert metrics["bits_per_dim/given_label.continuous"] == pytest.approx(
        rows["bits_per_dim_given_label_continuous"].mean()
    )
    assert metrics["bpd/given_label"] == metrics["bits_per_dim/given_label.continuous"]
    assert metrics["bpd/bound"] == pytest.approx(rows["bits_per_dim_continuous"].mean())
    difference = metrics["bpd/bound"] - metrics["bits_per_dim/given_label.continuous"]
    assert metrics["tells/bpd"] == pytest.approx(difference)
    assert metrics["tells/low"] < metrics["tells/bpd"] < metrics["tells/high"]
    accuracy = (known["label"] == known["predicted"]).mean()
    assert metrics["class/accuracy"] == pytest.approx(accuracy) == found["accuracy"]["mean"]
    assert metrics["class/evaluations"] == pytest.approx(rows["class_evaluations"].mean())
    of_label = rows["bits_per_dim_given_label_continuous"][rows["label"] == 2].mean()
    assert metrics["label/2"] == pytest.approx(of_label)
    bars = [name for name in metrics if not name.startswith("eval_by_")]
    assert len({name[:7] for name in bars}) == len(bars)  # MLflow cuts the titles of charts
    files = {file.path for file in client.list_artifacts(run.info.run_id, "report")}
    assert {f"report/{name}" for name in ("confusion.png", "calibration.png", "by_label.csv")} <= files
    assert f"**accuracy {accuracy:.2%} (95%: " in run.data.tags["mlflow.note.content"]

    # the report
    page = (Path(made.output) / "report" / "index.html").read_text()
    assert page.count("<svg") == 5
    for text in (
        "bits/dim given the label, continuous time, softmax decoder",
        "bits/dim that the label tells",
        f"accuracy {accuracy:.2%} (95%: ",
        "prior: 0 0.5, 1 0.3, 2 0.2",
        "<td>no label</td><td>1</td>",
    ):
        assert text in page
    summary = dict(evaluate(made).rows)
    assert summary["labels"].startswith(f"tell {means['label_tells.continuous']['mean']:.4f} ± ")
    assert summary["classes"].startswith(f"accuracy {accuracy:.2%} ")

    # verification, which finds what the rows do not give
    assert verify(VerifyConfig(made.output)).problems == []
    copy = tmp_path / "copy"
    Location.parse(copy).upload_directory(made.output)
    changed = json.loads((copy / MANIFEST).read_text())
    changed["results"]["classification"]["confusion"][0][1] += 1
    changed["results"]["means"]["label_tells.continuous"]["mean"] += 1e-6
    (copy / MANIFEST).write_text(json.dumps(changed))
    problems = [problem.split(": ")[1] for problem in verify(VerifyConfig(str(copy))).problems]
    assert problems == [f"{name} is not what the rows give" for name in ("label_tells.continuous", "classification")]


@pytest.mark.ray
def test_two_actors_make_the_same_rows_and_verification_makes_them_again(
    made: EvaluateConfig, ray_cluster: None, tmp_path: Path
) -> None:
    two = replace(made, output=str(tmp_path / "two"), cluster=GpuClusterConfig(num_workers=2))
    evaluate(two)
    digests = [[shard["sha256"] for shard in manifest_of(config)["shards"]] for config in (made, two)]
    assert digests[0] == digests[1]
    again = verify(VerifyConfig(made.output, recompute=1.0))
    assert again.problems == []
    assert dict(again.rows)["made again"].startswith("5 shard(s), 5 bit-equal")
