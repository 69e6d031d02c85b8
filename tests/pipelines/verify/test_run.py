"""Verification of training runs: whole ones pass, finished or not, and everything that is off is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs.model_files import model_files
from support.sample_runs import NETWORK, tiny_state

from ddpm_core.model import model_bytes, model_id_of
from ddpm_core.parameterizations import EpsDenoiser
from ddpm_core.process.discrete import DiscreteProcess
from pipelines.cli.errors import ConfigError, DataError
from pipelines.data.ledger import Ledger
from pipelines.models.checkpoints import CheckpointStore
from pipelines.storage.location import Location, json_bytes
from pipelines.verify.config import VerifyConfig
from pipelines.verify.job import verify

ROWS, BATCH, STEPS = 10, 4, 6
DATA = {"id": "d" * 64, "uri": "/data/images", "num_rows": ROWS}
NEWEST = "checkpoints/step-00000006"


def ledger_of(step: int) -> Ledger:
    used, ledger = np.arange(step * BATCH), Ledger()
    ledger.add(used // ROWS, used % ROWS)
    return ledger


def save(run: Path, step: int, ledger: Ledger | None = None, **changes: Any) -> str:
    """Commit a checkpoint as the training loop does; returns its model's id."""
    config = {"train": {"batch_size": BATCH}, "data": {}}
    provenance = {"step": step, "dataset": DATA, "config": config, "code_version": "1.2+src.abc"}
    model = model_bytes(tiny_state(step), EpsDenoiser.build(NETWORK, DiscreteProcess.linear(20)), provenance)
    files = {f"model/{name}": data for name, data in model.items()}
    files |= {"weights.safetensors": b"weights", "optimizer.safetensors": b"moments"}
    files["ledger.parquet"] = (ledger or ledger_of(step)).to_bytes()
    state = {**provenance, "model_id": model_id_of(model), "records": [], **changes}
    CheckpointStore.open(str(run)).save(step, files, state)
    return model_id_of(model)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with the checkpoints of steps 3 and 6."""
    at = tmp_path / "runs" / "digits"
    save(at, 3)
    model_id = save(at, STEPS)
    result = {
        "step": STEPS,
        "model": f"{at}/{NEWEST}/model",
        "model_id": model_id,
        "dataset_id": DATA["id"],
        "grid": f"{at}/grids/step-{STEPS:08d}.png",
        "validation": {"total": 5.25, "standard_error": 0.125},
        "parameters": 123,
    }
    place = Location.parse(at)
    (place / "result.json").write_json(result)
    (place / "grids" / f"step-{STEPS:08d}.png").write_bytes(b"png")
    (place / "config.json").write_json({"train": {"steps": STEPS}, "data": {}, "diffusion": {}, "network": {}})
    return at


def edit(path: Path, **changes: Any) -> None:
    path.write_bytes(json_bytes({**json.loads(path.read_bytes()), **changes}))


def test_a_finished_run_passes_and_its_lineage_is_told(run: Path, tmp_path: Path) -> None:
    result = verify(VerifyConfig(str(run)))
    rows = dict(result.rows)
    assert (result.title, result.problems) == (f"Training run {run}", [])
    result.require_no_problems()
    assert rows["checked"].startswith("2 checkpoint(s) (step 3, 6) with their ledgers, 10 files, ")
    assert rows["state"] == "finished: 6 steps"
    assert rows["model"].startswith(json.loads((run / "result.json").read_bytes())["model_id"])
    assert rows["model"].endswith("step 6), ε-prediction, linear T = 20")
    assert rows["trained on"].startswith(f"data set {'d' * 64} (/data/images)")
    assert rows["ledger"] == "24 rows used, each once in its epoch; 2 finished epoch(s) of 10 rows"
    assert rows["code"] == "1.2+src.abc"
    assert rows["validation"] == "5.2500 ± 0.1250 bits/dim"
    assert rows["verdict"] == "everything is right"
    shutil.move(run, tmp_path / "elsewhere")
    assert verify(VerifyConfig(str(tmp_path / "elsewhere"))).problems == [], "a run may be moved"


def test_a_model_that_is_as_committed_and_cannot_be_loaded_is_named(run: Path) -> None:
    """As one of a later version: every digest is right, its configuration says what this version does not know."""
    store = CheckpointStore.open(str(run))
    checkpoint = store.load(STEPS)
    files = {name: checkpoint.read(name) for name in checkpoint.state["files"]}
    model = model_files(lambda config: config.update(denoiser="score"))
    files |= {f"model/{name}": content for name, content in model.items()}
    store.save(STEPS, files, {**checkpoint.state, "model_id": model_id_of(model)})
    edit(run / "result.json", model_id=model_id_of(model))
    result = verify(VerifyConfig(str(run)))
    (problem,) = result.problems
    assert problem.startswith(f"{run}/{NEWEST}/model: does not describe a network of this version (")
    assert "'score'" in problem
    assert dict(result.rows)["model"].endswith("step 6)")


def test_an_unfinished_run_is_checked_as_far_as_it_goes(run: Path) -> None:
    (run / "result.json").unlink()
    edit(run / "config.json", train={"steps": 9})
    result = verify(VerifyConfig(str(run)))
    assert result.problems == []
    assert dict(result.rows)["state"].startswith("unfinished: 6 of 9 steps are saved; the same training command goes")
    (run / NEWEST / "weights.safetensors").write_bytes(b"Weights")
    (problem,) = verify(VerifyConfig(str(run))).problems
    assert f"{run}/{NEWEST}/weights.safetensors: holds 7 bytes that are not the 7 bytes committed" in problem
    shutil.rmtree(run / "checkpoints")
    result = verify(VerifyConfig(str(run)))
    assert (result.problems, dict(result.rows)["state"]) == ([], "begun; no checkpoint is saved yet")


def test_a_finished_run_that_goes_on_is_unfinished(run: Path) -> None:
    save(run, 9)
    edit(run / "config.json", train={"steps": 12})
    result = verify(VerifyConfig(str(run)))
    assert (result.problems, dict(result.rows)["state"][:27]) == ([], "unfinished: 9 of 12 steps a")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lacking_a_row(step: int) -> Ledger:
    ledger = ledger_of(step)
    ledger._used[1].discard(3)
    return ledger


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "optimizer": (lambda run: flip_a_bit(run / NEWEST / "optimizer.safetensors"), r"optimizer\.safetensors: holds 7"),
    "old model": (
        lambda run: flip_a_bit(run / "checkpoints/step-00000003/model/ema.safetensors"),
        r"step-00000003/model/ema\.safetensors: holds",
    ),
    "file lost": (lambda run: (run / NEWEST / "weights.safetensors").unlink(), r"weights\.safetensors: is missing"),
    "commit": (lambda run: (run / NEWEST / "state.json").write_bytes(b"{"), r"state\.json: is not JSON"),
    "ledger bytes": (lambda run: flip_a_bit(run / NEWEST / "ledger.parquet"), r"ledger\.parquet: holds"),
    "row never used": (
        lambda run: save(run, STEPS, lacking_a_row(STEPS)),
        r"step-00000006: epoch 1 used 9 distinct rows \(ids up to 9\); 10 of the 10 were due",
    ),
    "steps without rows": (lambda run: save(run, STEPS, ledger_of(5)), r"step-00000006: epoch 2 used|the ledger holds"),
    "model id": (lambda run: save(run, STEPS, model_id="e" * 64), r"model: is model \w{12}, state\.json says e{12}$"),
    "file not named": (
        lambda run: edit(run / NEWEST / "state.json", files={}),
        r"state\.json: does not name model/ema\.safetensors",
    ),
    "other data set": (
        lambda run: save(run, STEPS, dataset={**DATA, "id": "e" * 64}),
        r"step-00000003/state\.json: is of another data set than the newest checkpoint",
    ),
    "result that is none": (lambda run: (run / "result.json").write_bytes(b"[]"), "is not the result of a training"),
    "result cut off": (lambda run: (run / "result.json").write_bytes(b"{"), r"result\.json: is not JSON"),
    "result's model id": (
        lambda run: edit(run / "result.json", model_id="e" * 64),
        r"result\.json: model_id = e{64}: the checkpoint of step 6 has \w{64}",
    ),
    "result's data": (
        lambda run: edit(run / "result.json", dataset_id="x"),
        r"dataset_id = x: the checkpoint .* d{64}",
    ),
    "result's model": (
        lambda run: edit(run / "result.json", model=f"{run}/checkpoints/step-00000003/model"),
        r"step-00000003/model: is not checkpoints/step-00000006/model of this run",
    ),
    "result's step": (lambda run: edit(run / "result.json", step=5), "is of step 5, of which there is no checkpoint"),
    "grid lost": (lambda run: (run / "grids/step-00000006.png").unlink(), r"grids/step-00000006\.png: is missing"),
    "config": (lambda run: (run / "config.json").write_bytes(b"[]"), r"config\.json: is not the configuration of a"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_ends_in_exit_code_1(run: Path, damage: str) -> None:
    make, says = DAMAGES[damage]
    make(run)
    result = verify(VerifyConfig(str(run)))
    assert len(result.problems) >= 1
    assert any(re.search(says, problem) for problem in result.problems), result.problems
    with pytest.raises(
        DataError, match=r"^Training run .*: \d+ thing\(s\) wrong, .*; restore it from a copy, or delete"
    ):
        result.require_no_problems()
    assert dict(result.rows)["verdict"] == f"{len(result.problems)} problem(s)"


def test_a_run_in_an_object_store_is_checked_too(run: Path, s3_prefix: str) -> None:
    Location.parse(s3_prefix).upload_directory(run)
    assert verify(VerifyConfig(s3_prefix)).problems == []
    (Location.parse(s3_prefix) / NEWEST / "weights.safetensors").write_bytes(b"Weights")
    (problem,) = verify(VerifyConfig(s3_prefix)).problems
    assert problem.startswith(f"{s3_prefix}/{NEWEST}/weights.safetensors: holds 7 bytes")


def test_no_step_of_a_run_is_made_again(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"recompute = 0\.5: .* is a training run; leave it out"):
        verify(VerifyConfig(str(run), recompute=0.5))


def test_what_only_looks_like_a_run_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": []}')
    with pytest.raises(DataError, match="no finished output"):
        verify(VerifyConfig(str(tmp_path)))
