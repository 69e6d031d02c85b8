"""The training job on Ray: what it leaves, the same numbers on any number of workers, going on, stopping."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_tensors
from support.train_runs import (
    BATCH,
    ROWS,
    assert_each_row_once,
    changed,
    checkpoints,
    curve,
    final_state,
    ledger,
    mlflow_run,
    prepare_classes,
    run_directory,
    tiny,
)

from ddpm_core.model import load_model
from ddpm_core.process.continuous import continuous
from pipelines.cli.errors import ClusterError
from pipelines.cluster import gpus
from pipelines.data.dataset import PreparedDataset
from pipelines.data.epochs import Epochs, epochs_of
from pipelines.data.hold_out import HoldOut
from pipelines.data.stream import StreamPlan, read_here
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.inputs import hold_out_of
from pipelines.models.find import find_model
from pipelines.models.used import UsedModel
from pipelines.storage.location import Location
from pipelines.tracking.champion import Validation
from pipelines.training.checks import check
from pipelines.training.config import DataConfig, TrainConfig
from pipelines.training.driver import train
from pipelines.training.learner import Learner, build
from pipelines.training.network import NetworkConfig
from pipelines.training.noise_schedule import schedule_png
from pipelines.training.quality import Quality
from pipelines.training.ranks import ALONE
from pipelines.training.reports import Reports
from pipelines.verify.config import VerifyConfig
from pipelines.verify.job import verify

pytestmark = [pytest.mark.ray, pytest.mark.slow]
EVERY_STEP = list(range(1, 25))


@pytest.fixture(scope="module")
def one_worker(ray_cluster: None, training_root: Path) -> TrainConfig:
    """An uninterrupted training by one worker."""
    config = tiny(training_root, "one-worker")
    train(config)
    return config


def test_a_training_leaves_checkpoints_a_model_grids_and_its_record(one_worker: TrainConfig) -> None:
    run = run_directory(one_worker)
    assert checkpoints(one_worker).steps() == [18, 24]
    assert_each_row_once(one_worker)
    # Any of the three reports before (of steps 20, 18 and 15) may still be on its way when the run dies.
    records = checkpoints(one_worker).load(24).state["records"]
    assert {*range(13, 25)} <= {record["step"] for record in records if "train/loss" in record.get("values", ())}
    result = (run / "result.json").read_json()
    model = load_model(result["model"])
    assert model.model_id == result["model_id"]
    assert model.config["extra"]["config"] == one_worker.semantic()
    assert sum(parameter.numel() for parameter in model.denoiser.parameters()) == result["parameters"]
    assert (run / "grids").list() == ["step-00000012.png", "step-00000024.png"]
    assert Image.open(result["grid"]).size[0] > 60
    assert result["validation"]["num_images"] == 10
    assert 0 < result["validation"]["standard_error"] < result["validation"]["total"]
    assert result["validation"]["dataset_id"] != result["dataset_id"]
    assert set(result["validation"]["baselines"]) == {"png", "independent_pixels"}
    assert json.loads((run / "config.json").read_bytes())["train"]["steps"] == 24
    checked = verify(VerifyConfig(run.uri))
    assert (checked.problems, dict(checked.rows)["state"]) == ([], "finished: 24 steps")


def test_mlflow_has_every_step_once_and_everything_else(one_worker: TrainConfig) -> None:
    client, run = mlflow_run(one_worker)
    assert run.info.status == "FINISHED"
    assert "MLFLOW_TRACKING_URI" not in os.environ  # a later run of this process may have another database
    for key in ("train/loss", "train/loss_variance", "grad_norm", "learning_rate"):
        assert [step for step, _ in curve(one_worker, key)] == EVERY_STEP
    assert dict(curve(one_worker, "learning_rate"))[2] == pytest.approx(4e-4)
    assert [step for step, _ in curve(one_worker, "images_per_second")] == [5, 6, 10, 12, 15, 18, 20, 24]
    assert [step for step, _ in curve(one_worker, "first_batch_seconds")] == [1]
    assert curve(one_worker, "epoch")[-1] == (24, 24 * BATCH / ROWS)
    result = (run_directory(one_worker) / "result.json").read_json()
    scores = curve(one_worker, "validation/beta_tilde/bits_per_dim")
    assert [step for step, _ in scores] == [12, 24]
    assert scores[-1][1] == result["validation"]["total"]
    assert curve(one_worker, "validation/bits_per_dim") == scores, "what runs of every kind have"
    assert not {"gamma_0", "gamma_1"} & run.data.metrics.keys()
    assert not [item for item in client.list_artifacts(run.info.run_id, "images") if "samples" not in item.path]
    assert run.data.tags["ddpm.bound"] == "σ² = beta_tilde, T = 50, discretised Gaussian"
    kind = run.data.tags["ddpm.trained_as"]
    assert kind == "ε-prediction, linear T = 50, trained by L_simple"
    for words in (run.data.tags["ddpm.bound"], kind):
        assert words in run.data.tags["mlflow.note.content"]
    assert run.data.params["batch_size"] == str(BATCH)
    assert run.data.tags["ddpm.dataset_id"] == result["dataset_id"]
    assert any(key.startswith("system/node_0/") for key in run.data.metrics)
    assert len([item for item in client.list_artifacts(run.info.run_id, "images") if "samples" in item.path]) >= 2
    (version,) = client.search_model_versions("name = 'one-worker'")
    assert version.tags["ddpm.model_id"] == result["model_id"]
    assert version.tags["ddpm.champion"] == "version 1: the first of one-worker"
    assert version.tags["validation.dataset_id"] == result["validation"]["dataset_id"]
    found = find_model(str(run_directory(one_worker).path), None, Path(one_worker.root))
    assert found.score == str(Validation.of_tags(version.tags)), "what the directory and the registry say is the same"
    baselines = result["validation"]["baselines"]
    assert run.data.metrics["without_model/png"] == baselines["png"]
    assert f"PNG {baselines['png']:.4f}, independent pixels" in run.data.tags["mlflow.note.content"]


def test_images_of_any_size_are_enough(ray_cluster: None, make_dataset: Callable[..., PreparedDataset]) -> None:
    """Nothing is given but the images: the network follows their size, and one of 39 is held out and validated on."""
    data = make_dataset(39, (9, 6, 3), name="photos")
    root = Path(data.location.path).parent / "root"
    config = replace(tiny(root, "photos"), data=DataConfig(str(data.location.path)), network=NetworkConfig())
    config = replace(config, train=replace(config.train, steps=6))
    summary = train(config)
    run = run_directory(config)
    settled = json.loads((run / "config.json").read_bytes(), parse_constant=pytest.fail)
    assert (settled["data"]["validation"], settled["data"]["hold_out"]) == ("held-out", 20)
    assert settled["network"]["channel_multipliers"] == [1, 2]
    assert settled["network"]["attention_resolutions"] == [5]  # of 9 pixels, padded to 10
    (held_out,) = HoldOut(39, 20).ids.tolist()
    used = ledger(config)
    used.check(Epochs(HoldOut(39, 20)), 6, BATCH)
    assert [used.rows(epoch) for epoch in used.passes] == [38, 38, 20]
    assert all(held_out not in used.ids(epoch) for epoch in used.passes)
    # one image has no standard error, and JSON no infinity
    result = json.loads((run / "result.json").read_bytes(), parse_constant=pytest.fail)
    assert (result["validation"]["num_images"], result["validation"]["standard_error"]) == (1, None)
    assert "± n/a (standard error" in dict(summary.rows)["bits/dim"]
    assert dict(summary.rows)["bits/dim"].endswith("; σ² = beta_tilde, T = 50, discretised Gaussian)")
    assert dict(summary.rows)["objective"] == "ε-prediction, linear T = 50, trained by L_simple"
    assert not any("standard_error" in key for key in mlflow_run(config)[1].data.metrics)
    assert verify(VerifyConfig(run.uri)).problems == []
    final = UsedModel(find_model(result["model"], None, root), load_model(result["model"]))
    assert final.model.config["extra"]["config"]["data"]["hold_out"] == 20
    evaluation = EvaluateConfig(result["model"], str(data.location.path), str(root / "evaluation"))
    assert hold_out_of(replace(evaluation, held_out=True), final, data) == HoldOut(39, 20)


def test_a_vdm_tells_its_bound_and_shows_its_schedule(ray_cluster: None, training_root: Path) -> None:
    diffusion = {"schedule": "gamma_learned", "learned_ends": True, "prediction": "residual_eps"}
    config = tiny(training_root, "vdm", diffusion=diffusion, train={"loss": "vlb", "steps": 12})
    rows = dict(train(config).rows)
    client, run = mlflow_run(config)
    result = (run_directory(config) / "result.json").read_json()
    kind = "residual ε-prediction, continuous time, learned γ with learned ends, trained by L_vlb"
    bound = "continuous time, softmax decoder"
    assert rows["objective"] == run.data.tags["ddpm.trained_as"] == kind
    assert rows["bits/dim"].endswith(f"; {bound})")
    assert run.data.tags["ddpm.bound"] == bound
    assert re.fullmatch(r"L_T [\d.]+ \+ diffusion [\d.]+ \+ L_0 [\d.]+", rows["terms"])
    scores = result["validation"]
    assert scores["sigma2"] == "continuous"
    assert 0 < scores["standard_error"] < scores["total"]
    assert {name for name in run.data.metrics if name.startswith("validation/")} == {
        "validation/bits_per_dim",
        "validation/continuous/bits_per_dim",
        "validation/continuous/bits_per_dim_standard_error",
        *(f"validation/continuous/terms/{name}" for name in ("prior", "diffusion", "decoder")),
    }
    assert run.data.metrics["validation/continuous/terms/diffusion"] == scores["diffusion"]
    process = load_model(result["model"]).denoiser.process
    assert (run.data.metrics["gamma_0"], run.data.metrics["gamma_1"]) == continuous(process).ends
    assert Path(result["noise_schedule"]).read_bytes() == schedule_png(continuous(process))
    (picture,) = client.list_artifacts(run.info.run_id, "noise_schedules")
    assert f"path={picture.path}&" in run.data.tags["mlflow.note.content"]
    assert [item for item in client.list_artifacts(run.info.run_id, "images") if "noise_schedule" in item.path]
    assert verify(VerifyConfig(run_directory(config).uri)).problems == []


def test_two_workers_train_on_the_same_rows_to_the_same_losses(
    two_workers: TrainConfig, one_worker: TrainConfig
) -> None:
    assert checkpoints(two_workers).load(24).state["world_size"] == 2
    assert ledger(two_workers).to_bytes() == ledger(one_worker).to_bytes()
    ours, theirs = curve(two_workers), curve(one_worker)
    assert [step for step, _ in ours] == EVERY_STEP
    np.testing.assert_allclose([loss for _, loss in ours], [loss for _, loss in theirs], rtol=1e-4)
    np.testing.assert_allclose(ours[0][1], theirs[0][1], rtol=1e-6)  # before rounding has been trained on
    spreads = [curve(config, "train/loss_variance")[0][1] for config in (two_workers, one_worker)]
    np.testing.assert_allclose(spreads[0], spreads[1], rtol=1e-5)


def test_two_workers_measure_the_quality_that_one_does(two_workers: TrainConfig, tmp_path: Path) -> None:
    run = run_directory(two_workers)
    result = (run / "result.json").read_json()
    measured = result["quality"]
    name = f"quality/fd_limit.random_conv_64.{measured['stamp']}"
    assert curve(two_workers, name) == [(24, measured["numbers"]["fd_limit"]["value"])]
    model, dataset = load_model(result["model"]).denoiser, PreparedDataset.open(two_workers.data.validation)
    reports, place = Reports(0, lambda report: None), Location(str(tmp_path))
    alone = Quality(
        place, dataset, two_workers, HoldOut(dataset.num_rows), lambda: model, torch.device("cpu"), ALONE, reports
    )
    alone.observe(24)
    found = alone.result()
    assert found is not None
    for number in ("fd", "fd_limit", "kid"):
        assert measured["numbers"][number] == pytest.approx(found["numbers"][number], rel=1e-3), number
    stored = [pq.read_table((directory / "quality/reference.parquet").path) for directory in (run, place)]
    assert stored[0]["id"] == stored[1]["id"]
    np.testing.assert_allclose(*(table["feature"].combine_chunks().flatten().to_numpy() for table in stored), rtol=1e-5)


def test_what_two_workers_remember_of_the_losses_one_worker_goes_on_with(
    ray_cluster: None, training_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times by importance (Nichol & Dhariwal 2021, sec. 3.3), against a learner that all rows pass through."""
    config = tiny(
        training_root,
        "resized",
        num_workers=2,
        data={"validation": None, "hold_out": 0},
        network={"learned_variance": True},
        diffusion={"schedule": "cosine", "num_timesteps": 3},
        train={"steps": 10, "loss": "vlb"},
        validation={"timesteps_per_image": 2},
        checkpoint={"every_steps": 10},
        grid={"num_images": 1, "sampler_steps": 1},
    )
    train(config)
    more = changed(config, train={"steps": 13}, cluster={"num_workers": 1})
    train(more)
    assert "resumed at step 10 on 1 worker(s)" in capsys.readouterr().err
    dataset = PreparedDataset.open(config.data.train)
    plan = StreamPlan.of(dataset, config.seed, BATCH, 13, 1 << 20)
    alone = Learner(lambda: build(config, dataset.image_shape), more, torch.device("cpu"))
    losses, drawn = [], {}
    for batch in read_here(plan, dataset, 0, 1, 0):
        losses.append(float(alone.step(batch).loss))
        drawn[batch.step + 1] = {name: value.clone() for name, value in alone.objective.state_dict().items()}
    np.testing.assert_allclose([loss for _, loss in curve(more)], losses, rtol=1e-4)
    for step in (10, 13):
        kept = load_tensors(checkpoints(more).load(step).read("objective.safetensors"))
        assert kept["times.count"].tolist() == [10, 10, 10]
        torch.testing.assert_close(kept, drawn[step], rtol=1e-4, atol=0)


def test_two_workers_with_balanced_classes_and_one_that_goes_on_tell_the_rows_what_one_alone_does(
    ray_cluster: None, training_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels, null classes and repeats are functions of step and row: the losses are those of a learner on its own."""
    data = prepare_classes(training_root, "classes", {"bag": 30, "coat": 18, "shirt": 7})
    config = tiny(
        training_root,
        "labels-resized",
        num_workers=2,
        data={"train": data, "validation": "held-out", "hold_out": 5, "balance_classes": True},
        network={"num_classes": "auto", "attention_resolutions": (8,)},
        train={"steps": 8, "label_dropout": 0.3},
        checkpoint={"every_steps": 8},
        validation={"every_steps": 100},
        grid={"every_steps": 100, "num_images": 7, "sampler_steps": 2},
    )
    train(config)
    more = changed(config, train={"steps": 11}, cluster={"num_workers": 1})
    summary = train(more)
    said = capsys.readouterr().err
    assert "classes: 3 (bag, coat, shirt)" in said
    assert "resumed at step 8 on 1 worker(s)" in said
    dataset = PreparedDataset.open(data)
    epochs, settled = epochs_of(dataset, 5, True), changed(more, network={"num_classes": 3})
    plan = StreamPlan.of(dataset, config.seed, BATCH, 11, 1 << 20, 5, balanced=True, labelled=True)
    alone = Learner(lambda: build(settled, dataset.image_shape), settled, torch.device("cpu"))
    losses = [float(alone.step(batch).loss) for batch in read_here(plan, dataset, 0, 1, 0)]
    np.testing.assert_allclose([loss for _, loss in curve(more)], losses, rtol=1e-4)
    used = ledger(more)
    used.check(epochs, 11, BATCH)
    rows = dict(summary.rows)
    assert rows["ledger"].startswith(f"{11 * BATCH} rows used, {used.repeats(epochs)} of them repeats")
    assert "given the label" in rows["bits/dim"]
    _, run = mlflow_run(more)
    assert run.data.metrics["repeated_rows"] == used.repeats(epochs)
    assert "validation/given_label.beta_tilde/bits_per_dim" in run.data.metrics
    assert load_model(checkpoints(more).load(11).model.path).label_names == ("bag", "coat", "shirt")


def test_a_run_goes_on_past_a_corrupt_checkpoint_when_steps_are_raised_and_then_rests(
    ray_cluster: None, training_root: Path, one_worker: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(training_root, "continued", train={"steps": 12}))
    damaged = Path((checkpoints(one_worker).location.parent.parent / "continued").path) / "checkpoints/step-00000012"
    weights = damaged / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    config = tiny(training_root, "continued")
    capsys.readouterr()
    train(config)
    shown = capsys.readouterr().err
    assert "checkpoint of step 12 is corrupt and passed over: " in shown
    assert "resumed at step 6 on 1 worker(s)" in shown
    assert final_state(config) == final_state(one_worker)
    assert curve(config) == curve(one_worker)

    kept = training_root / "runs/continued/checkpoints"
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    summary = train(config)
    assert summary.title == "continued: nothing to do"
    rows = dict(summary.rows)
    assert rows["champion"] == "version 1 (models:/continued@champion)"  # of 12 steps, and too close to call
    assert re.fullmatch(r"PNG [\d.]+, independent pixels [\d.]+ \(the same images without a model\)", rows["baselines"])
    assert {
        path: path.stat().st_mtime_ns for path in (training_root / "runs/continued/checkpoints").rglob("*")
    } == before
    assert curve(config) == curve(one_worker)


def test_records_that_never_reached_the_spool_come_from_the_last_checkpoint(
    one_worker: TrainConfig, tmp_path: Path
) -> None:
    config = replace(one_worker, root=str(tmp_path))
    ignored = shutil.ignore_patterns("tracking")  # as if a full disk had refused all of it
    shutil.copytree(run_directory(one_worker).path, run_directory(config).path, ignore=ignored)
    assert train(config).title == "one-worker: nothing to do"
    records = checkpoints(one_worker).load(24).state["records"]
    kept = {record["step"] for record in records if "train/loss" in record.get("values", ())}
    assert curve(config) == [(step, loss) for step, loss in curve(one_worker) if step in kept]


def test_a_run_goes_on_where_it_was_begun_unless_told(
    two_workers: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` asks no cluster then; what was begun on GPUs is refused where there are none."""
    monkeypatch.setattr(gpus, "_chosen", lambda *_: pytest.fail("asked"))
    assert check(two_workers).job.config.cluster.gpus_per_worker == 0
    run = Path(run_directory(two_workers).path)
    moved = run.with_name("on-gpus")
    shutil.copytree(run, moved)
    stored = json.loads((moved / "config.json").read_text())
    stored["cluster"]["gpus_per_worker"] = 1.0
    (moved / "config.json").write_text(json.dumps(stored))
    longer = changed(two_workers, name="on-gpus", train={"steps": 30})
    with pytest.raises(ClusterError, match=r"^cluster\.gpus_per_worker = 1\.0: no machine of the cluster has 1 GPU"):
        check(longer)
    on_cpus = replace(longer, cluster=replace(longer.cluster, gpus_per_worker=0))
    assert check(on_cpus).job.config.cluster.gpus == 0
