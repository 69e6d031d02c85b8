"""Finding a model by what a user calls it: a directory, a training run, or a name in MLflow's registry."""

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_core.model import CONFIG_FILE, WEIGHTS_FILE, model_id_of
from pipelines.cli.errors import DDPMError, ModelError
from pipelines.models.checkpoints import COMMIT, Checkpoint, CheckpointStore
from pipelines.models.kept import FoundModel, is_registry_reference, read_files, stored_model
from pipelines.storage.location import Location
from pipelines.tracking.champion import Validation
from pipelines.tracking.client import mlflow_client, reason, sqlite_path
from pipelines.tracking.tracker import resolve_tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

_REFERENCE = re.compile(r"models:/[^/@]+([@/][^/@]+)?|runs:/[^/]+(/.+)?")


def find_model(reference: str, tracking_uri: str | None, root: Path, field: str = "model") -> FoundModel:
    """Look a model up and read it.

    Args:
        reference: A directory or s3:// prefix that holds a model, is a checkpoint of a training, or a training's
            run directory (its newest intact checkpoint is taken); `models:/NAME@ALIAS`, `models:/NAME/VERSION`,
            `models:/NAME/latest`, `models:/MODEL_ID`, `runs:/RUN_ID` (the newest model of the run) or
            `runs:/RUN_ID/PATH`.
        tracking_uri: Of MLflow, see `pipelines.tracking.tracker.resolve_tracking_uri`.
        root: Directory of the local MLflow database.
        field: Whose value the reference is, for messages.

    Raises:
        ModelError: There is no such model, or MLflow does not answer.
        StorageError: The directory cannot be read.
    """
    if is_registry_reference(reference):
        return _from_mlflow(reference, resolve_tracking_uri(tracking_uri, root), field)
    directory, run = Location.parse(reference), None
    if not (directory / WEIGHTS_FILE).exists():
        checkpoint = _checkpoint(directory)
        if checkpoint is None:
            raise ModelError(
                f"{field} = {reference}: holds neither a model ({CONFIG_FILE}, {WEIGHTS_FILE}) nor the checkpoints "
                "of a training; check the spelling, or name a registered model as models:/NAME@champion"
            )
        directory = checkpoint.model
    if re.search(r"/checkpoints/step-\d+/model$", directory.uri):
        run = directory.parent.parent.parent
    files = read_files(directory)
    model_id = model_id_of(files)
    score = _score_in(run, model_id) if run else None
    return FoundModel(reference, directory.uri, (run or directory).name, model_id, None, files, score)


def _checkpoint(directory: Location) -> Checkpoint | None:
    """The checkpoint that a directory is, else the newest intact one of the run that it is."""
    match = re.fullmatch(r"step-(\d{8,})", directory.name)
    if match and (directory / COMMIT).exists():
        checkpoint = CheckpointStore(directory.parent).load(int(match[1]))
        checkpoint.verify()
        return checkpoint
    return CheckpointStore.open(directory.uri).newest()


def _score_in(run: Location, model_id: str) -> str | None:
    """The validation that the result of a training records, if it is that of this model."""
    path = run / "result.json"
    try:
        result = path.read_json() if path.exists() else {}
        found = Validation.of_result(result["validation"]) if result.get("model_id") == model_id else None
    except (DDPMError, ValueError, KeyError, TypeError, AttributeError):  # another's file, or a damaged one
        return None
    return str(found) if found else None


def model_for(kept: Location, reference: str, tracking_uri: str | None, root: Path, field: str = "model") -> FoundModel:
    """The model of an output that keeps a copy in `kept`, see `find_model`.

    One named in MLflow is looked up once: an alias that has moved since changes nothing of an output begun before.
    """
    stored = stored_model(kept)
    if stored is not None and stored.reference == reference and is_registry_reference(reference):
        return stored
    return find_model(reference, tracking_uri, root, field)


def _from_mlflow(reference: str, tracking_uri: str, field: str) -> FoundModel:
    if not _REFERENCE.fullmatch(reference):
        raise ModelError(
            f"{field} = {reference}: is none of models:/NAME@ALIAS, models:/NAME/VERSION, models:/MODEL_ID, "
            "runs:/RUN_ID"
        )
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        raise ModelError(
            f"{field} = {reference}: there is no MLflow database at {database}; set MLFLOW_TRACKING_URI, or train first"
        )
    try:
        client = mlflow_client(tracking_uri)
        import mlflow.artifacts

        uri, name, run_id, score = _resolve(client, reference, field)
        with tempfile.TemporaryDirectory(prefix="ddpm-model-") as scratch:
            local = mlflow.artifacts.download_artifacts(uri, dst_path=scratch, tracking_uri=tracking_uri)
            files = read_files(Location.parse(local))
    except DDPMError:
        raise
    except Exception as error:  # MLflow passes on what its database's and its artifact store's libraries raise
        raise ModelError(
            f"{field} = {reference}: MLflow does not give it ({reason(error)}); check name and server"
        ) from error
    return FoundModel(reference, uri, name, model_id_of(files), run_id, files, score)


def _resolve(client: "MlflowClient", reference: str, field: str) -> tuple[str, str, str | None, str | None]:
    """(immutable URI, name, id of the run that made it, score) of a models:/ or runs:/ reference."""
    if match := re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/([^/@]+))", reference):
        version: Any
        if match[2]:
            version = client.get_model_version_by_alias(match[1], match[2])
        elif match[3] == "latest":
            versions = client.search_model_versions(f"name='{match[1]}'")
            if not versions:
                raise ModelError(f"{field} = {reference}: no version of {match[1]} is registered; train one first")
            version = max(versions, key=lambda found: int(found.version))
        else:
            version = client.get_model_version(match[1], match[3])
        validation = Validation.of_tags(version.tags)
        score = str(validation) if validation else None
        return f"models:/{version.name}/{version.version}", version.name, version.run_id, score
    if match := re.fullmatch(r"models:/([^/@]+)", reference):
        logged = client.get_logged_model(match[1])
        return reference, logged.name, logged.source_run_id, None
    if match := re.fullmatch(r"runs:/([^/]+)", reference):
        outputs = client.get_run(match[1]).outputs
        models = outputs.model_outputs if outputs else []
        if not models:
            raise ModelError(f"{field} = {reference}: the run has no model (yet); see its page for its state")
        newest = max(models, key=lambda output: output.step)
        return f"models:/{newest.model_id}", client.get_logged_model(newest.model_id).name, match[1], None
    run_id, path = reference.removeprefix("runs:/").split("/", 1)
    return reference, path.rsplit("/", 1)[-1], run_id, None
