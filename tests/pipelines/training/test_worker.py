"""The worker's loop in this process, without Ray: what happens after which step, and what stops and resumes it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from support.board_in_memory import Entries

from ddpm_core.model import load_model
from ddpm_core.objectives import Losses
from pipelines.cli.errors import NonFiniteLossError
from pipelines.data.epochs import Epochs
from pipelines.data.hold_out import HoldOut
from pipelines.data.ledger import Ledger
from pipelines.data.stream import MicroBatch
from pipelines.models.checkpoints import CheckpointStore
from pipelines.storage.location import Location
from pipelines.tracking.tracker import TrackingReport
from pipelines.training import stop
from pipelines.training.config import (
    CheckpointConfig,
    DataConfig,
    GridConfig,
    OptimizationConfig,
    QualityConfig,
    TrainConfig,
    TrainJob,
    TrainTrackingConfig,
    ValidationConfig,
)
from pipelines.training.diffusion import DiffusionConfig
from pipelines.training.learner import Learner, StepResult
from pipelines.training.network import NetworkConfig
from pipelines.training.preemption import Preemption
from pipelines.training.ranks import Ranks
from pipelines.training.reports import Reports
from pipelines.training.summary import summarise
from pipelines.training.worker import Worker
from pipelines.verify.run import check_run

torch.set_num_threads(1)
BATCH, STEPS = 8, 12
CONFIG = TrainConfig(
    name="worker",
    data=DataConfig(validation="held-out", hold_out=10),
    network=NetworkConfig(8, (1, 2), 1, attention_resolutions=(4,), num_heads=1, num_groups=4, dropout=0.0),
    diffusion=DiffusionConfig(num_timesteps=20),
    precision="fp32",
    batch_size=BATCH,
    train=OptimizationConfig(steps=STEPS, learning_rate=1e-3, warmup_steps=3),
    checkpoint=CheckpointConfig(every_steps=5, keep=4),
    validation=ValidationConfig(every_steps=6, num_images=4, timesteps_per_image=2, batch_size=4),
    grid=GridConfig(every_steps=8, num_images=2, sampler_steps=2),
    tracking=TrainTrackingConfig(every_steps=3),
)

NO_TRACKING = TrackingReport(None, None, 0, 0, None, None)


class Run:
    """A run directory and its data; each `work` is one attempt of a single rank."""

    def __init__(self, directory: Path, data: str) -> None:
        self.location, self.data = Location.parse(directory / "runs/worker"), data
        self.reports: list[list[dict[str, Any]]] = []  # of the last attempt
        self.board = Entries()

    def work(
        self,
        config: TrainConfig = CONFIG,
        drained: Callable[[], bool] = lambda: False,
        on_report: Callable[[], None] = lambda: None,
    ) -> Worker:
        self.reports = []

        def send(report: dict[str, Any]) -> None:
            self.reports.append(json.loads(json.dumps(report))["records"])
            on_report()

        job = TrainJob(config, self.location.uri, self.data, self.data if config.data.validation else None, "version")
        device = torch.device("cpu")
        self.worker = Worker(job, Ranks(0, 1), device, Reports(0, send), Preemption(drained), self.board)
        self.worker.run()
        return self.worker

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore.open(self.location.uri)

    @property
    def losses(self) -> dict[int, float]:
        found = [record for report in self.reports for record in report if "train/loss" in record.get("values", ())]
        assert len({record["step"] for record in found}) == len(found)
        return {record["step"]: record["values"]["train/loss"] for record in found}

    @property
    def said(self) -> list[str]:
        return [record["message"] for report in self.reports for record in report if record["kind"] == "event"]

    def weights(self, step: int = STEPS) -> bytes:
        return self.store.load(step).read("weights.safetensors")


@pytest.fixture
def run(tmp_path: Path, make_dataset, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(stop, "POLL_S", 0.001)
    monkeypatch.setattr(stop, "_ANSWER_POLL_S", 0.001)
    return Run(tmp_path, make_dataset(num_rows=50).location.uri)


def names(report: list[dict[str, Any]]) -> list[str]:
    """What a report holds, in order; the steps of a collection as one."""
    shown: list[str] = []
    for record in report:
        values = record.get("values", {})
        name = next((key for key in ("train/loss", "epoch", "first_batch_seconds") if key in values), None)
        name = name or ("validation" if values else record.get("message", record.get("key")))
        shown += [name] if [name] != shown[-1:] else []
    return shown


def test_everything_happens_when_it_is_due_and_in_this_order(run: Run) -> None:
    worker = run.work()
    lines = [line for line in run.said if ": validation " in line]
    assert len(lines) == 2
    assert [names(report) for report in run.reports] == [
        [],
        ["first_batch_seconds"],
        ["train/loss", "epoch"],  # 3
        ["train/loss", "epoch"],  # 5: a checkpoint
        ["train/loss", "epoch", "step 6: validating"],
        ["validation", lines[0]],
        ["train/loss", "epoch", "step 8: sampling a grid"],
        ["samples"],
        ["train/loss", "epoch"],  # 9
        ["train/loss", "epoch"],  # 10: a checkpoint
        ["train/loss", "epoch", "step 12: validating"],
        ["validation", lines[1], "step 12: sampling a grid"],
        ["samples"],
        ["training finished: 12 steps of 8 images"],
    ]
    assert sorted(run.losses) == list(range(1, STEPS + 1))
    assert run.store.steps() == [5, 10, 12]
    assert (run.location / "grids").list() == ["step-00000008.png", "step-00000012.png"]
    assert (worker.done, worker.saved) == (STEPS, STEPS)


def test_the_result_names_what_the_run_has_left(run: Run) -> None:
    worker = run.work()
    result = (run.location / "result.json").read_json()
    checkpoint = run.store.load(STEPS)
    assert result.keys() == {"step", "model", "model_id", "dataset_id", "grid", "validation", "parameters"}
    assert (result["step"], result["model"]) == (STEPS, checkpoint.model.uri)
    assert result["model_id"] == checkpoint.state["model_id"]
    assert Location.parse(result["grid"]).exists()
    assert result["parameters"] == sum(weight.numel() for weight in worker.learner.denoiser.parameters())
    reported = [r["values"] for report in run.reports for r in report if "validation/beta_tilde/bits_per_dim" in str(r)]
    assert result["validation"]["total"] == reported[-1]["validation/beta_tilde/bits_per_dim"]
    assert result["validation"]["num_images"] == 4
    assert result["validation"]["dataset_id"] != result["dataset_id"]  # its held-out rows only
    assert set(result["validation"]["baselines"]) == {"png", "independent_pixels"}


def test_quality_is_measured_where_it_is_turned_on_and_changes_nothing_else(run: Run, make_dataset) -> None:
    """Also by a training that goes on, whose checkpoints know nothing of it."""
    run.data = make_dataset(num_rows=160, name="many").location.uri
    config = replace(CONFIG, data=DataConfig(validation="held-out", hold_out=2))
    run.work(config)
    plain, weights, losses = (run.location / "result.json").read_json(), run.weights(), run.losses
    assert not (run.location / "quality").exists()
    assert not [r for report in run.reports for r in report if "random_conv" in str(r)]
    for path in (run.location / "result.json", run.store.directory(STEPS) / "state.json"):
        path.delete()

    run.work(replace(config, quality=QualityConfig(num_images=80, every_steps=11, sampler_steps=1)))
    assert run.said[0] == "resumed at step 10 on 1 worker(s)"
    result = (run.location / "result.json").read_json()
    quality = result.pop("quality")
    assert (result, run.weights()) == (plain, weights)
    assert {step: run.losses[step] for step in (11, 12)} == {step: losses[step] for step in (11, 12)}
    assert (quality["num_samples"], quality["num_reference"]) == (80, 80)
    assert quality["reference_id"] == plain["validation"]["dataset_id"]
    measured = [r for report in run.reports for r in report if "quality/fd." in str(r)]
    assert [record["step"] for record in measured] == [11, 12]
    name = f"quality/fd_limit.random_conv_64.{quality['stamp']}"
    assert measured[-1]["values"][name] == quality["numbers"]["fd_limit"]["value"]
    assert len([line for line in run.said if line.endswith(": measuring the quality of samples")]) == 2
    assert (run.location / "quality").list() == ["reference.parquet"]
    job = TrainJob(config, run.location.uri, run.data, run.data, "version")
    told, before = (
        dict(summarise(job, each, NO_TRACKING, None, None).rows) for each in ({**plain, "quality": quality}, plain)
    )
    assert told.pop("quality").endswith("random_conv_64, 80 samples, 80 validation images")
    assert told == before


def test_a_checkpoint_holds_the_learner_the_ledger_the_origin_and_the_records(run: Run) -> None:
    run.work()
    checkpoint = run.store.load(STEPS)
    checkpoint.verify()
    assert sorted(checkpoint.state["files"]) == [
        "ledger.parquet", "model/config.json", "model/ema.safetensors", "optimizer.safetensors", "weights.safetensors",
    ]  # fmt: skip
    assert checkpoint.state.keys() == {
        "step", "dataset", "config", "code_version", "model_id", "world_size", "records", "format", "files",
    }  # fmt: skip
    Ledger.from_bytes(checkpoint.read("ledger.parquet")).check(Epochs(HoldOut(50, 10)), STEPS, BATCH)
    assert checkpoint.state["config"] == CONFIG.semantic()
    kept = {r["step"] for r in checkpoint.state["records"] if "train/loss" in r.get("values", ())}
    assert {11, 12} <= kept  # those since the checkpoint before, and those of the reports that may be lost


def test_a_training_that_was_asked_to_stop_saves_its_step_and_resumes_to_the_same_weights(run: Run) -> None:
    run.work()
    losses, weights = run.losses, run.weights()
    (run.location / "result.json").delete()
    for step in run.store.steps():
        (run.store.directory(step) / "state.json").delete()

    def ask_at_step_three() -> None:
        if len(run.reports) == 3:
            run.board.put("asked", "1")

    worker = run.work(on_report=ask_at_step_three)
    assert 3 <= worker.done == worker.saved < STEPS  # the watch sees the request some steps later
    assert run.board.get("saved") == str(worker.done)
    assert run.store.steps()[-1] == worker.done
    assert not (run.location / "result.json").exists()
    before = run.losses
    assert sorted(before) == list(range(1, worker.done + 1))

    run.board = Entries()
    run.work()
    assert run.said[0] == f"resumed at step {worker.done} on 1 worker(s)"
    assert before | run.losses == losses  # JSON keeps floats exactly
    assert run.weights() == weights


LABELLED = replace(
    CONFIG,
    data=replace(CONFIG.data, balance_classes=True),
    network=replace(CONFIG.network, num_classes=3),
    train=replace(CONFIG.train, label_dropout=0.3),
)


@pytest.fixture
def labelled(tmp_path: Path, make_dataset, monkeypatch: pytest.MonkeyPatch) -> Run:
    """50 rows of three classes, one of every ten without a label."""
    monkeypatch.setattr(stop, "POLL_S", 0.001)
    labels = [None if row % 10 == 3 else (0, 0, 0, 1, 1, 2)[row % 6] for row in range(50)]
    names = ("ankle boot", "bag", "coat")
    return Run(tmp_path, make_dataset(50, name="labelled", labels=labels, label_names=names).location.uri)


def watch_labels(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[int, int, int]]]:
    """What each step that is trained tells the network of its rows: (id, pass, label)."""
    told: dict[int, list[tuple[int, int, int]]] = {}
    step, losses = Learner.step, Learner._losses

    def watched_step(learner: Learner, batch: MicroBatch) -> StepResult:
        told[batch.step] = []
        return step(learner, batch)

    def watched_losses(learner: Learner, x_0: Any, uniforms: Any, ids: Any, passes: Any, label: Any = None) -> Losses:
        told[max(told)] += zip(ids.tolist(), passes.tolist(), label.tolist(), strict=True)
        return losses(learner, x_0, uniforms, ids, passes, label)

    monkeypatch.setattr(Learner, "step", watched_step)
    monkeypatch.setattr(Learner, "_losses", watched_losses)
    return told


def test_a_killed_training_with_labels_tells_every_row_the_same_again(
    labelled: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = watch_labels(monkeypatch)
    labelled.work(LABELLED)
    first, losses, weights = {step: list(rows) for step, rows in told.items()}, labelled.losses, labelled.weights()
    assert sorted(first) == list(range(STEPS))
    _, labels = labelled.worker.dataset.read_rows(np.arange(50))
    dropped = [label == -1 for rows in first.values() for row, _, label in rows if labels[row] >= 0]
    assert 0 < sum(dropped) < len(dropped)
    for path in (labelled.location / "result.json", labelled.store.directory(STEPS) / "state.json"):
        path.delete()
    told.clear()
    labelled.work(LABELLED)
    assert labelled.said[0] == "resumed at step 10 on 1 worker(s)"
    assert told == {step: first[step] for step in (10, 11)}
    assert {step: losses[step] for step in (11, 12)} == {step: labelled.losses[step] for step in (11, 12)}
    assert labelled.weights() == weights


def test_a_training_with_labels_leaves_their_names_its_repeats_and_a_bound_given_the_label(labelled: Run) -> None:
    worker = labelled.work(LABELLED)
    epochs = worker.rows._epochs
    assert (epochs.length, epochs.passes) == (68, 3)  # three classes of 21, 12 and 7 trained rows; 5 without a label
    checkpoint = labelled.store.load(STEPS)
    model = load_model(checkpoint.model.path)
    assert model.label_names == ("ankle boot", "bag", "coat")
    assert model.denoiser.num_classes == 3
    ledger = Ledger.from_bytes(checkpoint.read("ledger.parquet"))
    ledger.check(epochs, STEPS, BATCH)
    result = json.loads((labelled.location / "result.json").read_bytes())
    assert result["rows"] == {"used": STEPS * BATCH, "repeats": ledger.repeats(epochs)}
    assert result["validation"]["sigma2"] == "given_label.beta_tilde"
    (line,) = [line for line in labelled.said if line.startswith(f"step {STEPS}: validation ")]
    assert line.endswith("(4 images; given the label, σ² = beta_tilde, T = 20, discretised Gaussian)")
    rows, problems = check_run(labelled.location)
    assert [problem for problem in problems if "config" not in problem] == []
    assert f"{ledger.repeats(epochs)} of them repeats that balance the classes" in dict(rows)["ledger"]


UNVALIDATED = replace(CONFIG, data=DataConfig(validation=None, hold_out=0), grid=GridConfig(50, 1, 1))
IMPORTANCE = replace(
    UNVALIDATED,
    network=replace(CONFIG.network, learned_variance=True),
    diffusion=DiffusionConfig("cosine", 3),
    train=replace(CONFIG.train, loss="vlb"),
    validation=ValidationConfig(timesteps_per_image=2),
)
LEARNED = replace(
    UNVALIDATED,
    diffusion=DiffusionConfig("gamma_learned", learned_ends=True, prediction="residual_eps"),
    train=replace(CONFIG.train, loss="vlb"),
)


def test_a_killed_training_goes_on_with_the_losses_that_its_times_are_drawn_by(run: Run) -> None:
    """Importance sampling (Nichol & Dhariwal 2021, sec. 3.3): its history is one of the checkpoint's files."""
    run.work(IMPORTANCE)
    losses, weights = run.losses, run.weights()
    history = load(run.store.load(10).read("objective.safetensors"))
    assert history["times.count"].tolist() == [10, 10, 10]
    for path in (run.location / "result.json", run.store.directory(STEPS) / "state.json"):
        path.delete()
    run.work(IMPORTANCE)
    assert run.said[0] == "resumed at step 10 on 1 worker(s)"
    assert run.losses == losses | run.losses
    assert {step: losses[step] for step in (11, 12)} == {step: run.losses[step] for step in (11, 12)}
    assert run.weights() == weights

    def forgotten(self: Any, state: Any) -> None:
        """A resume that falls back to uniform times."""

    (run.location / "result.json").delete()
    (run.store.directory(STEPS) / "state.json").delete()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_core.objectives.base.Objective.load_state_dict", forgotten)
        run.work(IMPORTANCE)
    assert run.losses[11] != losses[11]


def poison_gradient(learner: Learner) -> Callable[[], None]:
    """Make one gradient infinite until what is returned is called."""
    (*_, weight) = learner.denoiser.parameters()
    return weight.register_hook(lambda gradient: gradient / 0).remove


def poison_output(learner: Learner) -> Callable[[], None]:
    """Have the network say of the variances (v), and of the noise, what no network should."""
    bias = learner.denoiser.network.conv_out.bias
    assert bias is not None
    bias.data.fill_(3e38)
    return lambda: None


@pytest.mark.parametrize("poison", [poison_gradient, poison_output])
@pytest.mark.parametrize("config", [CONFIG, IMPORTANCE, LEARNED], ids=["simple", "importance", "learned γ"])
def test_what_is_infinite_is_refused_and_nothing_after_the_last_checkpoint_is_kept(
    run: Run, config: TrainConfig, poison: Callable[[Learner], Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Learner.step

    def poisoned(learner: Learner, batch: MicroBatch) -> StepResult:
        undo = poison(learner) if batch.step == 6 else None
        result = step(learner, batch)
        if undo is not None:
            undo()
        return result

    monkeypatch.setattr(Learner, "step", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"^step \d+: loss = .*, gradient norm = (inf|nan); nothing after"):
        run.work(config)
    run.worker.checkpoints.wait()  # for the one of before
    assert run.store.steps() == [5]
    checkpoint = run.store.load(5)
    for name in checkpoint.state["files"]:
        if name.endswith(".safetensors"):
            assert all(value.isfinite().all() for value in load(checkpoint.read(name)).values()), name


def test_a_run_killed_before_its_result_measures_again_and_trains_nothing(run: Run) -> None:
    run.work()
    result, weights = (run.location / "result.json").read_bytes(), run.weights()
    (run.location / "result.json").delete()
    run.work()
    assert (run.location / "result.json").read_bytes() == result
    assert run.weights() == weights
    assert [names(report)[-1] for report in run.reports] == [
        f"resumed at step {STEPS} on 1 worker(s)",
        f"training finished: {STEPS} steps of {BATCH} images",
    ]


def test_a_drained_node_has_one_checkpoint_more_at_the_next_report(run: Run) -> None:
    run.work(drained=lambda: len(run.reports) > 2)  # reports: the start, the first batch, step 3
    assert run.store.steps() == [5, 6, 10, 12]


def test_without_validation_images_nothing_is_validated(run: Run) -> None:
    config = replace(CONFIG, data=DataConfig(validation=None, hold_out=0))
    run.work(config)
    assert (run.location / "result.json").read_json()["validation"] is None
    assert not any("validat" in line for line in run.said)
