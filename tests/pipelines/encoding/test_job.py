"""The encoding job: one encoding per request, whoever makes it, and what is told of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from mlflow import MlflowClient
from support.encode_runs import tiny_encoding
from support.sample_runs import save_tiny_model

from ddpm_core.model import load_model
from pipelines.cli.errors import ConfigError, RequestMismatchError
from pipelines.cluster.config import GpuClusterConfig
from pipelines.data.dataset import PreparedDataset
from pipelines.encoding.config import EncodeConfig
from pipelines.encoding.job import encode
from pipelines.encoding.kind import ENCODING, in_words
from pipelines.encoding.request import EncodeRequest
from pipelines.outputs.manifest import MANIFEST
from pipelines.storage.location import Location
from pipelines.verify.config import VerifyConfig
from pipelines.verify.job import verify


@pytest.fixture(autouse=True)
def no_cluster_or_server_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pipelines.cluster.connection.is_named", lambda address: False)


@pytest.fixture
def data(make_dataset: Callable[..., PreparedDataset]) -> PreparedDataset:
    return make_dataset(20)


def made(tmp_path: Path, data: PreparedDataset, **fields: Any) -> EncodeConfig:
    """An encoding that the job has made in this process."""
    config = tiny_encoding(tmp_path, data, **{"cluster": GpuClusterConfig(), **fields})
    encode(config)
    return config


def manifest_of(config: EncodeConfig) -> dict[str, Any]:
    return (Location.parse(config.output) / MANIFEST).read_json()


def test_the_round_trip_is_told_to_the_user_the_manifest_and_mlflow(tmp_path: Path, data: PreparedDataset) -> None:
    config = tiny_encoding(tmp_path, data, num_images=13, cluster=GpuClusterConfig())
    result = encode(config)
    manifest, rows = result.manifest, dict(result.rows)
    assert manifest == manifest_of(config)
    assert (manifest["num_rows"], manifest["noise_shape"]) == (13, [1, 8, 8])
    assert manifest["model"]["model_id"] == load_model(config.model).model_id
    assert not (Path(config.output) / "_work").exists()
    rms = pandas.read_parquet(f"{config.output}/data")["round_trip_rms"]
    found = manifest["round_trip"]
    assert found["mean_rms"] == pytest.approx(rms.mean())
    assert (found["median_rms"], found["worst_rms"]) == (rms.median(), rms.max())
    assert found["worst_id"] == int(np.argmax(rms))
    assert rows["round trip"] == in_words(found)
    client = MlflowClient(f"sqlite:///{config.root}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("model/encodings").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "encoding")
    assert {"sampler": "ddim", "steps": "5", "num_images": "13"}.items() <= run.data.params.items()
    for name in ("mean_rms", "median_rms", "worst_rms"):
        assert run.data.metrics[f"round_trip/{name}"] == found[name]
    assert run.data.tags["ddpm.dataset_id"] == data.dataset_id
    (input_,) = run.inputs.dataset_inputs
    assert [tag.value for tag in input_.tags] == ["encoding"]
    assert in_words(found) in run.data.tags["mlflow.note.content"]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "preview")] == ["preview/round_trip.png"]
    again = encode(config)
    assert (again.title, again.manifest) == ("Encoding, complete before", manifest)


@pytest.mark.ray
def test_two_workers_make_the_same_bytes_as_none(ray_cluster: None, tmp_path: Path, data: PreparedDataset) -> None:
    alone = made(tmp_path, data)
    two = replace(alone, output=str(tmp_path / "two"), cluster=GpuClusterConfig(num_workers=2))
    encode(two)
    assert manifest_of(two)["shards"] == manifest_of(alone)["shards"]
    assert manifest_of(two)["round_trip"] == manifest_of(alone)["round_trip"]


def test_verify_makes_a_shard_again_and_finds_a_changed_byte_and_another_round_trip(
    tmp_path: Path, data: PreparedDataset
) -> None:
    config = made(tmp_path, data)
    assert verify(VerifyConfig(config.output)).problems == []
    path, manifest = Path(config.output) / "data" / "part-00001.parquet", manifest_of(config)
    content, location = path.read_bytes(), Location.parse(config.output)
    request = EncodeRequest.from_json(manifest["request"], location / MANIFEST)
    assert ENCODING.factory is not None
    assert ENCODING.factory(location, request, manifest, 1)()(1).data == content
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    assert verify(VerifyConfig(config.output)).problems == [f"{path}: its sha256 is not the recorded one"]
    path.write_bytes(content)
    manifest["round_trip"]["worst_rms"] += 1.0
    place = location / MANIFEST
    place.write_json(manifest)
    assert verify(VerifyConfig(config.output)).problems == [f"{place}: round_trip is not what the rows give"]


def test_a_lost_shard_is_made_again(tmp_path: Path, data: PreparedDataset) -> None:
    config = made(tmp_path, data)
    path = Path(config.output) / "data" / "part-00002.parquet"
    content = path.read_bytes()
    path.unlink()
    assert encode(config).title == "Encoding, 1 lost shard(s) made again"
    assert path.read_bytes() == content


def test_another_request_and_an_output_in_the_data_are_refused(tmp_path: Path, data: PreparedDataset) -> None:
    config = made(tmp_path, data)
    with pytest.raises(RequestMismatchError, match="clip_x_0: False -> True"):
        encode(replace(config, clip_x_0=True))
    with pytest.raises(ConfigError, match="the data set"):
        encode(replace(config, output=f"{data.location.path}/inside"))
    save_tiny_model(tmp_path / "other", weights_seed=1)
    with pytest.raises(RequestMismatchError, match="model_id"):
        encode(replace(config, model=str(tmp_path / "other")))
