"""One spooled `model` record becomes an MLflow logged model and a version of a registered model.

Every step looks first whether it was already done, so a record replayed after a kill at any point
registers nothing twice. The model's own hash, the tag `ddpm.model_id`, is its identity.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_core.kind import kind_of
from pipelines.tracking.champion import MODEL_ID_TAG, Validation, settle_champion

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion


def register_model(
    client: "MlflowClient", run_id: str, experiment_id: str, payload: dict[str, Any], directory: Path
) -> tuple[str, str]:
    """Log the model in `directory` as an output of the run, register it, and settle who is champion.

    The newest version is `models:/<name>/latest`, which MLflow resolves itself ("latest" is a reserved
    alias).

    Args:
        client: Connected to the tracking server.
        run_id: The run that made the model.
        experiment_id: The run's experiment.
        payload: Of a `model` record, see `pipelines.tracking.spool`.
        directory: A local copy of the model's directory (ema.safetensors, config.json).

    Returns:
        Its MLflow model id, and which version is champion and why.
    """
    model_id = _log_model(client, run_id, experiment_id, payload, directory)
    _link_to_run(client, run_id, model_id, int(payload["step"]))
    kind = kind_of(json.loads((directory / "config.json").read_bytes()))
    version = _register(client, run_id, model_id, payload, kind)
    # MLflow's page of the model shows its registered versions from this tag.
    versions = json.dumps([{"name": payload["name"], "version": int(version.version)}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": versions})
    return model_id, settle_champion(client, version)


def find_logged_model(client: "MlflowClient", model_id: str) -> "LoggedModel | None":
    """The model with this hash that was logged first, in whatever experiment; None if there is none."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_logged_models(experiments, filter_string=f"tags.`{MODEL_ID_TAG}` = '{model_id}'")
    return min(found, key=lambda model: int(model.creation_timestamp), default=None)


def _log_model(
    client: "MlflowClient", run_id: str, experiment_id: str, payload: dict[str, Any], directory: Path
) -> str:
    found = client.search_logged_models(
        [experiment_id],
        filter_string=f"tags.`{MODEL_ID_TAG}` = '{payload['model_id']}' AND source_run_id = '{run_id}'",
    )
    if found:
        model = found[0]
    else:
        model = client.create_logged_model(
            experiment_id,
            name=re.sub(r"""[/:.%"']""", "-", f"{payload['name']}-step-{payload['step']}"),
            source_run_id=run_id,
            tags=_tags(payload),
            model_type="ddpm",
        )
    if str(model.status) != "READY":  # created now, or by an attempt that was killed before it was done
        with tempfile.TemporaryDirectory(prefix="ddpm-model-") as staging:
            _stage(directory, Path(staging), run_id, model.model_id)
            client.log_model_artifacts(model.model_id, staging)
        client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def _stage(directory: Path, staging: Path, run_id: str, model_id: str) -> None:
    """The model's files by reference, plus the MLmodel file by which MLflow knows a model directory."""
    from mlflow.models import Model

    for file in directory.iterdir():
        (staging / file.name).symlink_to(file.resolve())
    flavor = {"weights": "ema.safetensors", "config": "config.json", "loader": "ddpm_core"}
    Model(run_id=run_id, model_id=model_id, flavors={"ddpm": flavor}).save(str(staging / "MLmodel"))


def _link_to_run(client: "MlflowClient", run_id: str, model_id: str, step: int) -> None:
    from mlflow.entities import LoggedModelOutput

    outputs = client.get_run(run_id).outputs
    if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])


def _register(client: "MlflowClient", run_id: str, model_id: str, payload: dict[str, Any], kind: str) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    name = payload["name"]
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name='{name}' AND run_id='{run_id}'"):
        if version.tags.get(MODEL_ID_TAG) == payload["model_id"]:
            return version
    # The table of versions has no column for metrics, but one for the description.
    measured = Validation.of_result(payload.get("validation"))
    return client.create_model_version(
        name,
        source=f"models:/{model_id}",
        run_id=run_id,
        model_id=model_id,
        tags={**_tags(payload), **(measured.tags if measured else {})},
        description=f"step {payload['step']:,}" + (f", {measured}" if measured else "") + f"; {kind}",
    )


def _tags(payload: dict[str, Any]) -> dict[str, str]:
    tags = {**(payload.get("tags") or {}), MODEL_ID_TAG: payload["model_id"], "step": payload["step"]}
    return {name: str(value) for name, value in tags.items()}
