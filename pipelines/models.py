"""Finding a model by what a user calls it: a directory, a training run, or a name in MLflow's registry."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_core.errors import DDPMError, ModelError
from ddpm_core.model import CONFIG_FILE, WEIGHTS_FILE, Model, model_from_bytes, model_id_of
from pipelines.storage import Location
from pipelines.tracking.champion import Validation
from pipelines.tracking.client import mlflow_client, reason, sqlite_path
from pipelines.tracking.tracker import resolve_tracking_uri
from pipelines.training.checkpoint import COMMIT, Checkpoint, CheckpointStore

if TYPE_CHECKING:
    from mlflow import MlflowClient

SOURCE_FILE = "source.json"
_REFERENCE = re.compile(r"models:/[^/@]+([@/][^/@]+)?|runs:/[^/]+(/.+)?")


@dataclass(frozen=True)
class FoundModel:
    """A model's two files and where they came from.

    Attributes:
        reference: What the user wrote.
        uri: What it stood for when it was looked up: an alias's version, a run's newest checkpoint.
        name: Registered name, name of the training run, or of the directory.
        model_id: Hash of the files; for a model that does not change, the one lasting name.
        run_id: The MLflow run that made it, where the registry knows.
        files: Content of config.json and ema.safetensors.
        score: Its validation at the end of its training, for a person; None where that is not on record.
    """

    reference: str
    uri: str
    name: str
    model_id: str
    run_id: str | None
    files: dict[str, bytes]
    score: str | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """Where it came from: everything but the files and the score."""
        return {name: getattr(self, name) for name in ("reference", "uri", "name", "model_id", "run_id")}

    def described(self, step: int | None) -> str:
        """What is used, in a line: the immutable URI, training step, bits/dim and id."""
        meant = "" if self.uri == self.reference else f"{self.reference}, "
        trained = "step unknown" if step is None else f"step {step:,}"
        return f"{self.uri} ({meant}{trained}, {self.score or 'bits/dim not on record'}, id {self.model_id[:12]})"

    def keep(self, directory: Location) -> None:
        """Write the files and, last, where they came from, as `stored_model` reads it, unless they are there."""
        stored = stored_model(directory)
        if stored is not None and stored.model_id == self.model_id:
            return
        for name, content in self.files.items():
            (directory / name).write_bytes(content)
        score = {} if self.score is None else {"score": self.score}
        (directory / SOURCE_FILE).write_json(self.origin | score)


def stored_model(directory: Location) -> FoundModel | None:
    """The model that `FoundModel.keep` wrote to `directory`, None if it did not get to its end.

    Raises:
        ModelError: The files are not the ones that were stored.
    """
    if not (directory / SOURCE_FILE).exists():
        return None
    origin = directory / SOURCE_FILE
    try:
        found = FoundModel(**origin.read_json(), files=_read(directory))
    except TypeError as error:
        raise ModelError(f"{origin}: does not say where a model came from ({error}); restore it") from error
    if model_id_of(found.files) != found.model_id:
        raise ModelError(f"{directory}: is not the model {found.model_id[:12]} that was stored; restore it")
    return found


def is_registry_reference(reference: str) -> bool:
    """Whether MLflow, and not a file system, knows what this stands for."""
    return reference.startswith(("models:/", "runs:/"))


def source_of(found: FoundModel) -> Location | None:
    """The directory that a model was read from; None for one that MLflow keeps."""
    return None if is_registry_reference(found.uri) else Location.parse(found.uri)


def find_model(reference: str, tracking_uri: str | None, root: Path) -> FoundModel:
    """Look a model up and read it.

    Args:
        reference: A directory or s3:// prefix that holds a model, is a checkpoint of a training, or a training's
            run directory (its newest intact checkpoint is taken); `models:/NAME@ALIAS`, `models:/NAME/VERSION`,
            `models:/NAME/latest`, `models:/MODEL_ID`, `runs:/RUN_ID` (the newest model of the run) or
            `runs:/RUN_ID/PATH`.
        tracking_uri: Of MLflow, see `pipelines.tracking.tracker.resolve_tracking_uri`.
        root: Directory of the local MLflow database.

    Raises:
        ModelError: There is no such model, or MLflow does not answer.
        StorageError: The directory cannot be read.
    """
    if is_registry_reference(reference):
        return _from_mlflow(reference, resolve_tracking_uri(tracking_uri, root))
    directory, run = Location.parse(reference), None
    if not (directory / WEIGHTS_FILE).exists():
        checkpoint = _checkpoint(directory)
        if checkpoint is None:
            raise ModelError(
                f"model = {reference}: holds neither a model ({CONFIG_FILE}, {WEIGHTS_FILE}) nor the checkpoints "
                "of a training; check the spelling, or name a registered model as models:/NAME@champion"
            )
        directory = checkpoint.model
    if re.search(r"/checkpoints/step-\d+/model$", directory.uri):
        run = directory.parent.parent.parent
    files = _read(directory)
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


def model_for(kept: Location, reference: str, tracking_uri: str | None, root: Path) -> FoundModel:
    """The model of an output that keeps a copy in `kept`, see `find_model`.

    One named in MLflow is looked up once: an alias that has moved since changes nothing of an output begun before.
    """
    stored = stored_model(kept)
    if stored is not None and stored.reference == reference and is_registry_reference(reference):
        return stored
    return find_model(reference, tracking_uri, root)


def load_kept(kept: Location, model_id: str, device: str) -> Model:
    """The model of an output, loaded from the copy that the output keeps.

    Raises:
        ModelError: It is another one, or not whole.
    """
    found = stored_model(kept)
    if found is None or found.model_id != model_id:
        raise ModelError(f"{kept}: is not the model {model_id[:12]} of the output; restore it, or delete the output")
    return model_from_bytes(found.files, device, where=found.uri)


def _read(directory: Location) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


def _from_mlflow(reference: str, tracking_uri: str) -> FoundModel:
    if not _REFERENCE.fullmatch(reference):
        raise ModelError(
            f"model = {reference}: is none of models:/NAME@ALIAS, models:/NAME/VERSION, models:/MODEL_ID, runs:/RUN_ID"
        )
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        raise ModelError(
            f"model = {reference}: there is no MLflow database at {database}; set MLFLOW_TRACKING_URI, or train first"
        )
    try:
        client = mlflow_client(tracking_uri)
        import mlflow.artifacts

        uri, name, run_id, score = _resolve(client, reference)
        with tempfile.TemporaryDirectory(prefix="ddpm-model-") as scratch:
            local = mlflow.artifacts.download_artifacts(uri, dst_path=scratch, tracking_uri=tracking_uri)
            files = _read(Location.parse(local))
    except DDPMError:
        raise
    except Exception as error:  # MLflow passes on what its database's and its artifact store's libraries raise
        raise ModelError(
            f"model = {reference}: MLflow does not give it ({reason(error)}); check name and server"
        ) from error
    return FoundModel(reference, uri, name, model_id_of(files), run_id, files, score)


def _resolve(client: "MlflowClient", reference: str) -> tuple[str, str, str | None, str | None]:
    """(immutable URI, name, id of the run that made it, score) of a models:/ or runs:/ reference."""
    if match := re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/([^/@]+))", reference):
        version: Any
        if match[2]:
            version = client.get_model_version_by_alias(match[1], match[2])
        elif match[3] == "latest":
            versions = client.search_model_versions(f"name='{match[1]}'")
            if not versions:
                raise ModelError(f"model = {reference}: no version of {match[1]} is registered; train one first")
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
            raise ModelError(f"model = {reference}: the run has no model (yet); see its page for its state")
        newest = max(models, key=lambda output: output.step)
        return f"models:/{newest.model_id}", client.get_logged_model(newest.model_id).name, match[1], None
    run_id, path = reference.removeprefix("runs:/").split("/", 1)
    return reference, path.rsplit("/", 1)[-1], run_id, None
