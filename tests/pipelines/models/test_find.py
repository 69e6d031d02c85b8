"""Finding a model: in a directory, in a training run, in MLflow's registry."""

from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from support.sample_runs import save_tiny_model

from pipelines.cli.errors import CheckpointError, ModelError, StorageError
from pipelines.models.checkpoints import COMMIT, CheckpointStore
from pipelines.models.find import find_model
from pipelines.storage.location import Location
from pipelines.tracking.client import configure_mlflow, sqlite_uri
from pipelines.tracking.registry import register_model

configure_mlflow()


def test_a_directory_and_an_object_store(tmp_path: Path, s3_prefix: str) -> None:
    model_id = save_tiny_model(tmp_path / "flowers")
    found = find_model(str(tmp_path / "flowers"), None, tmp_path)
    assert (found.model_id, found.name, found.uri) == (model_id, "flowers", str(tmp_path / "flowers"))
    Location.parse(s3_prefix).upload_directory(tmp_path / "flowers")
    assert find_model(s3_prefix, None, tmp_path).model_id == model_id


def test_the_newest_intact_checkpoint_of_a_run(tmp_path: Path) -> None:
    store, ids = CheckpointStore.open(str(tmp_path / "runs" / "flowers")), {}
    for step in (10, 20):
        ids[step] = save_tiny_model(tmp_path / "saved", weights_seed=step)
        files = {f"model/{file.name}": file.read_bytes() for file in (tmp_path / "saved").iterdir()}
        store.save(step, files, {"dataset": {"id": "d"}, "config": {}})
    found = find_model(str(tmp_path / "runs" / "flowers"), None, tmp_path)
    assert (found.model_id, found.name) == (ids[20], "flowers")
    assert find_model(found.uri, None, tmp_path).name == "flowers", "by the checkpoint's own path too"
    (store.directory(20) / "model" / "ema.safetensors").write_bytes(b"damaged")
    assert find_model(str(tmp_path / "runs" / "flowers"), None, tmp_path).model_id == ids[10]


def test_a_checkpoint_directory_is_a_model(tmp_path: Path, s3_prefix: str) -> None:
    """Of any step, not only the newest; with the validation that the run's result records for the last one."""
    for place in (str(tmp_path / "runs" / "flowers"), f"{s3_prefix}/flowers"):
        store, ids = CheckpointStore.open(place), {}
        for step in (10, 20):
            ids[step] = save_tiny_model(tmp_path / "saved", weights_seed=step)
            files = {f"model/{file.name}": file.read_bytes() for file in (tmp_path / "saved").iterdir()}
            store.save(step, files, {"dataset": {"id": "d"}, "config": {}})
        scores = {"total": 4.5, "standard_error": 0.25, "num_images": 9, "sigma2": "beta", "dataset_id": "d"}
        (store.location.parent / "result.json").write_json({"model_id": ids[20], "validation": scores})
        for step in (10, 20):
            found = find_model(store.directory(step).uri, None, tmp_path)
            assert (found.model_id, found.name) == (ids[step], "flowers")
            assert found.uri == store.directory(step).uri + "/model"
        assert found.score == "4.5000 ± 0.2500 bits/dim (9 validation images, σ² = beta)"
        assert find_model(place, None, tmp_path).score == found.score
        assert find_model(store.directory(10).uri, None, tmp_path).score is None
        assert found.described(20).startswith(
            f"{found.uri} ({store.directory(20).uri}, step 20, 4.5000 ± 0.2500 bits/dim"
        )
        (store.directory(20) / "model/config.json").write_bytes(b"{}")
        with pytest.raises(CheckpointError, match=r"config\.json: holds 2 bytes that are not"):
            find_model(store.directory(20).uri, None, tmp_path)
        (store.directory(10) / COMMIT).delete()
        with pytest.raises(ModelError, match="holds neither a model"):
            find_model(store.directory(10).uri, None, tmp_path)


def test_a_score_that_cannot_be_read_is_not_on_record(tmp_path: Path) -> None:
    store = CheckpointStore.open(str(tmp_path / "flowers"))
    model_id = save_tiny_model(tmp_path / "saved")
    files = {f"model/{file.name}": file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    store.save(10, files, {"dataset": {"id": "d"}, "config": {}})
    for content in (
        "{",
        "[]",
        "{}",
        f'{{"model_id": "{model_id}"}}',
        f'{{"model_id": "{model_id}", "validation": [1]}}',
    ):
        (tmp_path / "flowers" / "result.json").write_text(content)
        assert "step unknown, bits/dim not on record, id " in find_model(
            str(tmp_path / "flowers"), None, tmp_path
        ).described(None)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[str]]:
    """(tracking URI, run id, model ids of the versions 1 and 2 of `flowers`; champion is 1)."""
    root = tmp_path_factory.mktemp("why?x=1 & 100%25 #a")
    uri, patch = sqlite_uri(root / "mlflow.db"), pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    client, ids = MlflowClient(), []
    run = client.create_run(client.create_experiment("flowers", artifact_location=(root / "artifacts").as_uri()))
    for step in (10, 20):
        ids.append(save_tiny_model(root / f"model-{step}", weights_seed=step))
        scores = {"total": 3 + step, "standard_error": 0.5, "num_images": 9, "sigma2": "beta", "dataset_id": "d"}
        payload = {"uri": "unused", "name": "flowers", "model_id": ids[-1], "step": step, "validation": scores}
        register_model(client, run.info.run_id, run.info.experiment_id, payload, root / f"model-{step}")
    mlflow.set_tracking_uri(None)
    patch.undo()
    return uri, run.info.run_id, ids


@pytest.mark.parametrize(
    ("reference", "resolved", "index"),
    [
        ("models:/flowers@champion", "models:/flowers/1", 0),
        ("models:/flowers/1", "models:/flowers/1", 0),
        ("models:/flowers/2", "models:/flowers/2", 1),
        ("models:/flowers/latest", "models:/flowers/2", 1),
        ("runs:/{run}", "models:/m-", 1),
    ],
)
def test_names_in_mlflow_are_resolved_to_what_does_not_change(
    registry: tuple[str, str, list[str]], tmp_path: Path, reference: str, resolved: str, index: int
) -> None:
    uri, run_id, ids = registry
    found = find_model(reference.format(run=run_id), uri, tmp_path)
    assert found.uri.startswith(resolved)
    assert (found.model_id, found.run_id) == (ids[index], run_id)
    if resolved.startswith("models:/flowers"):
        assert found.score == f"{(13, 23)[index]:.4f} ± 0.5000 bits/dim (9 validation images, σ² = beta)"
        assert f"step {(10, 20)[index]}, {found.score}, id {ids[index][:12]})" in found.described((10, 20)[index])
    assert find_model(found.uri, uri, tmp_path).model_id == ids[index]


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("models:/weeds@champion", "MLflow does not give it"),
        ("models:/flowers@best", "MLflow does not give it"),
        ("models:/flowers/9", "MLflow does not give it"),
        ("models:/weeds/latest", "no version of weeds is registered"),
        ("models:/flowers/1/2", "is none of"),
        ("runs:/0123456789abcdef0123456789abcdef", "MLflow does not give it"),
    ],
)
def test_what_mlflow_does_not_know_is_one_line(
    registry: tuple[str, str, list[str]], tmp_path: Path, reference: str, reason: str
) -> None:
    with pytest.raises(ModelError, match=rf"^model = {reference}: {reason}[^\n]*$"):
        find_model(reference, registry[0], tmp_path)


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither a model .* nor the checkpoints"):
        find_model(str(tmp_path / "nowhere"), None, tmp_path)
    with pytest.raises(ModelError, match=r"there is no MLflow database at .*train first"):
        find_model("models:/flowers@champion", None, tmp_path)
    assert list(tmp_path.iterdir()) == [], "looking does not make a database"
    (tmp_path / "ema.safetensors").write_bytes(b"")
    with pytest.raises(StorageError, match=r"config\.json"):
        find_model(str(tmp_path), None, tmp_path)
