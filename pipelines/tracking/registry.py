"""One spooled `model` record becomes an MLflow logged model and a version of a registered model.

Every step looks first whether it was already done, so a record replayed after a kill at any point
registers nothing twice. The model's own hash, the tag `ddpm.model_id`, is its identity.
"""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_core.errors import TrackingError
from pipelines.tracking.client import mlflow_client, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

MODEL_ID_TAG = "ddpm.model_id"
CHAMPION = "champion"
IMAGES_METRIC = "eval/num_images"


def register_model(
    client: "MlflowClient", run_id: str, experiment_id: str, payload: dict[str, Any], directory: Path
) -> str:
    """Log the model in `directory` as an output of the run, register it, and return its MLflow model id.

    The newest version is `models:/<name>/latest`, which MLflow resolves itself ("latest" is a reserved
    alias). The alias `champion` goes to the first version of a name and is moved only by its users.

    Args:
        client: Connected to the tracking server.
        run_id: The run that made the model.
        experiment_id: The run's experiment.
        payload: Of a `model` record, see `pipelines.tracking.spool`.
        directory: A local copy of the model's directory (ema.safetensors, config.json).
    """
    model_id = _log_model(client, run_id, experiment_id, payload, directory)
    _link_to_run(client, run_id, model_id, int(payload["step"]))
    version = _register(client, run_id, model_id, payload)
    # MLflow's page of the model shows its registered versions from this tag.
    versions = json.dumps([{"name": payload["name"], "version": int(version)}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": versions})
    if CHAMPION not in client.get_registered_model(payload["name"]).aliases:
        client.set_registered_model_alias(payload["name"], CHAMPION, version)
    return model_id


def find_logged_model(client: "MlflowClient", model_id: str) -> "LoggedModel | None":
    """The model with this hash that was logged first, in whatever experiment; None if there is none."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_logged_models(experiments, filter_string=f"tags.`{MODEL_ID_TAG}` = '{model_id}'")
    return min(found, key=lambda model: int(model.creation_timestamp), default=None)


def promote_if_better(
    tracking_uri: str,
    name: str,
    model_id: str,
    dataset_id: str,
    num_images: int,
    sigma2: str,
    intervals: Mapping[str, Sequence[float] | None],
) -> str:
    """Give the registered version of `model_id` the alias `champion` if its 95% interval is below the champion's.

    The champion's is that of its newest finished evaluation on the same data set under the same variances. If both
    have scored the same images, which equal numbers of the fixed order are, the intervals for given images are
    compared: the choice of images is common to both. Otherwise those for the data set.

    Args:
        tracking_uri: Of MLflow.
        name: Registered name of the model.
        model_id: Hash of the model.
        dataset_id: Content hash of the data set.
        num_images: How many of its images were evaluated.
        sigma2: Reverse variances of the number compared.
        intervals: Of the model: `given_images` and `data_set`, (low, high).

    Returns:
        What was done and why, for a person.

    Raises:
        TrackingError: The model is not registered, it or the champion has no such interval, or MLflow does not answer.
    """
    from mlflow.exceptions import MlflowException

    client = mlflow_client(tracking_uri)
    try:
        versions = client.search_model_versions(f"name='{name}'")
        mine = [version for version in versions if version.tags.get(MODEL_ID_TAG) == model_id]
        if not mine:
            raise TrackingError(f"promote: no version of {name!r} in MLflow is the model {model_id[:12]}; register it")
        champion = client.get_registered_model(name).aliases.get(CHAMPION)
        holder = next((version for version in versions if str(version.version) == str(champion)), None)
        if holder is not None:
            if holder.tags.get(MODEL_ID_TAG) == model_id:
                return f"version {holder.version} is the champion already"
            metrics = _measured(client, name, holder.tags.get(MODEL_ID_TAG, ""), dataset_id, sigma2)
            kind = "given_images" if metrics.get(IMAGES_METRIC) == num_images else "data_set"
            low, high = (metrics.get(f"{interval_metric(kind, sigma2)}.{end}") for end in ("low", "high"))
            interval = intervals[kind]
            if interval is None or low is None or high is None:
                raise TrackingError("promote: one draw tells no Monte-Carlo error; evaluate both with more --draws")
            if not interval[1] < low:
                mine_shown, other = (f"{a:.4f}..{b:.4f}" for a, b in (interval, (low, high)))
                return f"stays version {holder.version}: {mine_shown} is not below its {other}"
        newest = max(mine, key=lambda version: int(version.version))
        client.set_registered_model_alias(name, CHAMPION, newest.version)
        return f"now version {newest.version}" + (f", was {holder.version}" if holder else "")
    except MlflowException as error:
        raise TrackingError(f"promote: MLflow does not answer as needed ({reason(error)}); run it again") from error


def interval_metric(kind: str, sigma2: str) -> str:
    """Start of the names of the two metrics, `.low` and `.high`, that are a 95% interval of bits/dim."""
    return f"eval_ci/{kind}.{sigma2}"


def _measured(client: "MlflowClient", name: str, model_id: str, dataset_id: str, sigma2: str) -> Mapping[str, float]:
    """The metrics of the newest finished evaluation of a model on a data set under these variances."""
    experiment = client.get_experiment_by_name(f"{name}/eval")
    runs = client.search_runs(
        [experiment.experiment_id] if experiment else [],
        f"tags.`{MODEL_ID_TAG}` = '{model_id}' AND tags.`ddpm.dataset_id` = '{dataset_id}' "
        "AND attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
    )
    for run in runs:
        if f"{interval_metric('population', sigma2)}.low" in run.data.metrics:
            metrics: Mapping[str, float] = run.data.metrics
            return metrics
    raise TrackingError(
        f"promote: the champion of {name!r} has no evaluation on data set {dataset_id[:12]} with σ² = {sigma2}; "
        f"evaluate models:/{name}@{CHAMPION} the same way first"
    )


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


def _register(client: "MlflowClient", run_id: str, model_id: str, payload: dict[str, Any]) -> str:
    from mlflow.exceptions import MlflowException

    name = payload["name"]
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name='{name}' AND run_id='{run_id}'"):
        if version.tags.get(MODEL_ID_TAG) == payload["model_id"]:
            return str(version.version)
    # The table of versions has no column for metrics, but one for the description.
    measured = [f"{key} {value:.4g}" for key, value in (payload.get("metrics") or {}).items()]
    created = client.create_model_version(
        name,
        source=f"models:/{model_id}",
        run_id=run_id,
        model_id=model_id,
        tags=_tags(payload),
        description=", ".join([f"step {payload['step']}", *measured]),
    )
    return str(created.version)


def _tags(payload: dict[str, Any]) -> dict[str, str]:
    tags = {**(payload.get("tags") or {}), MODEL_ID_TAG: payload["model_id"], "step": payload["step"]}
    return {name: str(value) for name, value in tags.items()}
