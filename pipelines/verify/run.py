"""Checking a training run from its bytes: its checkpoints, their ledgers and models, and its result."""

from collections.abc import Mapping
from typing import Any

from ddpm_core.kind import kind_of
from ddpm_core.model import CONFIG_FILE, WEIGHTS_FILE, model_from_bytes, model_id_of
from pipelines.cli.console import plus_minus
from pipelines.cli.errors import CheckpointError, DDPMError, LedgerError, ModelError
from pipelines.data.ledger import Ledger
from pipelines.models.checkpoints import COMMIT, FILES, Checkpoint, CheckpointStore
from pipelines.storage.location import Location
from pipelines.training.ledger_report import check_ledger, used_in_words
from pipelines.training.run_directory import CONFIG, RESULT, read_result


def check_run(run: Location) -> tuple[list[tuple[str, str]], list[str]]:
    """Read every committed checkpoint of a run, finished or not, and its result, and compare.

    Returns:
        (name, value) rows for a summary, and one line for everything that is off.

    Raises:
        StorageError: Something cannot be read now, which says nothing about the run.
    """
    store, problems = CheckpointStore.open(run.uri), list[str]()
    found: dict[int, Checkpoint] = {}
    for step in store.steps():
        try:
            found[step] = store.load(step)
            problems += _check_checkpoint(found[step])
        except CheckpointError as error:
            problems.append(str(error))
    for checkpoint in found.values():
        if checkpoint.state["dataset"].get("id") != found[max(found)].state["dataset"].get("id"):
            problems.append(f"{checkpoint.location / COMMIT}: is of another data set than the newest checkpoint")
    result, wanted = None, None
    try:
        result = read_result(run)
        wanted = (run / CONFIG).read_json()["train"]["steps"]
    except DDPMError as error:
        problems.append(str(error))
    except (KeyError, TypeError):
        problems.append(f"{run / CONFIG}: is not the configuration of a training")
    if result is not None:
        problems += _check_result(run, result, found)
    return _rows(run, found, result, wanted), problems


def _check_checkpoint(checkpoint: Checkpoint) -> list[str]:
    """One line for each file that is not as committed, for a model of another id or that cannot be loaded, and for a
    ledger that is off."""
    at, state, problems = checkpoint.location, checkpoint.state, list[str]()
    problems += [f"{at / COMMIT}: does not name {name}" for name in FILES if name not in state["files"]]
    content: dict[str, bytes] = {}
    for name in state["files"]:
        try:
            data = checkpoint.read(name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if name.startswith("model/") or name == "ledger.parquet":  # all else may be large
            content[name] = data
    if {f"model/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)} <= content.keys():
        files = {name.removeprefix("model/"): data for name, data in content.items()}
        model_id = model_id_of(files)
        if model_id != state.get("model_id"):
            problems.append(
                f"{checkpoint.model}: is model {model_id[:12]}, {COMMIT} says {state.get('model_id')!s:.12}"
            )
        try:
            model_from_bytes(files, where=str(checkpoint.model))
        except ModelError as error:
            problems.append(str(error))
    if "ledger.parquet" in content:
        try:
            check_ledger(Ledger.from_bytes(content["ledger.parquet"]), checkpoint)
        except (LedgerError, CheckpointError) as error:
            problems.append(f"{at}: {error}")
    return problems


def _check_result(run: Location, result: Mapping[str, Any], found: Mapping[int, Checkpoint]) -> list[str]:
    """What result.json says against the checkpoint that it is about; the run may have been moved since."""
    path, step = run / RESULT, result["step"]
    if step not in found:
        return [f"{path}: is of step {step}, of which there is no checkpoint"]
    checkpoint, problems = found[step], list[str]()
    recorded = {
        "model_id": checkpoint.state.get("model_id"),
        "dataset_id": checkpoint.state["dataset"].get("id"),
    }
    problems += [
        f"{path}: {name} = {result[name]}: the checkpoint of step {step} has {value}"
        for name, value in recorded.items()
        if result[name] != value
    ]
    model = f"checkpoints/{checkpoint.location.name}/model"
    if not result["model"].endswith(f"/{model}"):
        problems.append(f"{path}: model = {result['model']}: is not {model} of this run")
    grid = run / "grids" / Location(result["grid"]).name
    if not grid.exists():
        problems.append(f"{grid}: is missing")
    return problems


def _rows(
    run: Location, found: Mapping[int, Checkpoint], result: Mapping[str, Any] | None, wanted: int | None
) -> list[tuple[str, str]]:
    if not found:
        return [("state", "begun; no checkpoint is saved yet")]
    newest = found[max(found)]
    files = [entry for checkpoint in found.values() for entry in checkpoint.state["files"].values()]
    size = sum(entry["bytes"] for entry in files) / 2**20
    steps = ", ".join(f"{step:,}" for step in found)
    state = f"finished: {newest.step:,} steps"
    if result is None or result["step"] != newest.step or newest.step != wanted:
        of = f" of {wanted:,}" if wanted else ""
        state = f"unfinished: {newest.step:,}{of} steps are saved; the same training command goes on from there"
    rows = [
        (
            "checked",
            f"{len(found)} checkpoint(s) (step {steps}) with their ledgers, {len(files)} files, {size:,.1f} MiB",
        ),
        ("state", state),
        ("model", f"{newest.state.get('model_id')} ({newest.model}, step {newest.step}){_kind(newest)}"),
        ("trained on", f"data set {newest.state['dataset'].get('id')} ({newest.state['dataset'].get('uri')})"),
        ("ledger", _used(newest)),
        ("code", str(newest.state.get("code_version"))),
    ]
    if result is not None and (scores := result["validation"]):
        rows.append(("validation", f"{plus_minus(scores.get('total'), scores.get('standard_error'))} bits/dim"))
    return rows


def _kind(newest: Checkpoint) -> str:
    """Of the newest model, where it can be loaded."""
    try:
        files = {name: newest.read(f"model/{name}") for name in (CONFIG_FILE, WEIGHTS_FILE)}
        return f", {kind_of(model_from_bytes(files).config)}"
    except (CheckpointError, ModelError, KeyError):
        return ""


def _used(newest: Checkpoint) -> str:
    """What the newest ledger proves."""
    try:
        ledger = Ledger.from_bytes(newest.read("ledger.parquet"))
        epochs = check_ledger(ledger, newest)
    except (CheckpointError, LedgerError, KeyError):
        return "is not right"
    finished = ledger.total() // epochs.length
    return f"{used_in_words(ledger, epochs)}; {finished} finished epoch(s) of {epochs.length:,} rows"
