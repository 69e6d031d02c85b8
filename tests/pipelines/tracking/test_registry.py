"""Model registration against a real database: complete, usable, and the same after any interruption."""

import json

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.tracking.client import configure_mlflow
from pipelines.tracking.registry import register_model

configure_mlflow()


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    root = tmp_path_factory.mktemp("mlflow")
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
    yield MlflowClient()
    mlflow.set_tracking_uri(None)
    patch.undo()


@pytest.fixture
def run(client, tmp_path):
    experiment = client.create_experiment(tmp_path.name, artifact_location=(tmp_path / "artifacts").as_uri())
    return client.create_run(experiment)


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"step": 100}')
    (directory / "ema.safetensors").write_bytes(bytes(range(256)))
    return directory


def payload(name, model_id="hash-1", step=100, **more):
    return {"uri": "unused", "name": name, "model_id": model_id, "step": step, **more}


def register(client, run, model, directory):
    return register_model(client, run.info.run_id, run.info.experiment_id, model, directory)


def inventory(client, run, name):
    """Everything that registration makes."""
    models = client.search_logged_models([run.info.experiment_id])
    return {
        "models": sorted((model.tags["ddpm.model_id"], str(model.status)) for model in models),
        "outputs": sorted(o.model_id for o in client.get_run(run.info.run_id).outputs.model_outputs),
        "versions": {v.version: v.tags["ddpm.model_id"] for v in client.search_model_versions(f"name='{name}'")},
        "aliases": {a: int(v) for a, v in client.get_registered_model(name).aliases.items()},
    }


def test_a_registered_model_can_be_found_downloaded_and_identified(client, run, directory, tmp_path):
    name = f"ddpm-{tmp_path.name}"
    model = payload(name, tags={"ddpm.config_hash": "ab"}, metrics={"eval/bits_per_dim": 3.25})
    model_id = register(client, run, model, directory)
    downloaded = mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=str(tmp_path / "got"))
    for file in directory.iterdir():
        assert (tmp_path / "got" / file.name).read_bytes() == file.read_bytes()
    flavors = mlflow.models.Model.load(downloaded).flavors
    assert flavors["ddpm"] == {"weights": "ema.safetensors", "config": "config.json", "loader": "ddpm_core"}
    version = client.get_model_version_by_alias(name, "champion")
    assert version.tags == {"ddpm.config_hash": "ab", "ddpm.model_id": "hash-1", "step": "100"}
    assert version.description == "step 100, eval/bits_per_dim 3.25"
    assert version.run_id == run.info.run_id
    logged = client.get_logged_model(model_id)
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": name, "version": version.version}]
    assert logged.source_run_id == run.info.run_id


def test_registering_again_changes_nothing(client, run, directory, tmp_path):
    name = f"ddpm-{tmp_path.name}"
    first = register(client, run, payload(name), directory)
    once = inventory(client, run, name)
    assert register(client, run, payload(name), directory) == first
    assert inventory(client, run, name) == once
    assert once["models"] == [("hash-1", "READY")]
    assert once["versions"] == {1: "hash-1"}


STEPS = [
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "log_outputs",
    "create_registered_model",
    "create_model_version",
    "set_logged_model_tags",
    "set_registered_model_alias",
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_at_any_step_registers_nothing_twice(client, run, directory, tmp_path, monkeypatch, step, moment):
    name = f"ddpm-{tmp_path.name}"
    real = getattr(MlflowClient, step)

    def killed(self, *args, **kwargs):
        if moment == "after":
            real(self, *args, **kwargs)
        raise KeyboardInterrupt(step)

    monkeypatch.setattr(MlflowClient, step, killed)
    with pytest.raises(KeyboardInterrupt, match=step):
        register(client, run, payload(name), directory)
    monkeypatch.undo()
    mlflow.set_tracking_uri(client.tracking_uri)
    model_id = register(client, run, payload(name), directory)
    assert inventory(client, run, name) == {
        "models": [("hash-1", "READY")],
        "outputs": [model_id],
        "versions": {1: "hash-1"},
        "aliases": {"champion": 1},
    }


def test_the_champion_is_moved_by_its_users_only(client, run, directory, tmp_path):
    name = f"ddpm-{tmp_path.name}"
    for step in (100, 200, 300):
        register(client, run, payload(name, f"hash-{step}", step), directory)
    found = inventory(client, run, name)
    assert found["versions"] == {1: "hash-100", 2: "hash-200", 3: "hash-300"}
    assert found["aliases"] == {"champion": 1}
    latest = mlflow.artifacts.download_artifacts(f"models:/{name}/latest", dst_path=str(tmp_path / "latest"))
    assert mlflow.models.Model.load(latest).model_id in found["outputs"]
    client.set_registered_model_alias(name, "champion", "2")
    register(client, run, payload(name, "hash-400", 400), directory)
    assert inventory(client, run, name)["aliases"] == {"champion": 2}


def test_a_refused_name_is_reported_as_mlflow_reports_it(client, run, directory):
    with pytest.raises(MlflowException) as caught:
        register(client, run, payload("a/b"), directory)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
