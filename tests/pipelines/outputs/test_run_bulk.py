"""The way of every bulk job, with a job that this software does not have: a room and an entry are all that it takes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from mlflow import MlflowClient
from support import brightness_job
from support.brightness_job import BRIGHTNESS, BrightnessConfig, measure

from pipelines.cli.config import digest
from pipelines.cli.errors import DataError, RequestMismatchError
from pipelines.cluster.config import ClusterConfig, CpuClusterConfig
from pipelines.data.dataset import PreparedDataset
from pipelines.outputs.manifest import MANIFEST
from pipelines.storage.location import Location
from pipelines.verify.config import VerifyConfig
from pipelines.verify.job import verify
from pipelines.verify.kinds import KINDS

ROWS = 70


@pytest.fixture
def config(
    make_dataset: Callable[..., PreparedDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> BrightnessConfig:
    """A measurement of 70 images in 5 shards, in this process; its kind is in the table."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pipelines.cluster.connection.is_named", lambda address: False)
    monkeypatch.setitem(KINDS, BRIGHTNESS.format, BRIGHTNESS)
    return BrightnessConfig(make_dataset(ROWS).location.uri, str(tmp_path / "out"), str(tmp_path / "home"))


def manifest_of(config: BrightnessConfig) -> dict[str, Any]:
    manifest: dict[str, Any] = (Location.parse(config.output) / MANIFEST).read_json()
    return manifest


def test_it_is_committed_with_what_every_output_has_and_with_what_is_its_own(config: BrightnessConfig) -> None:
    result, manifest, data = measure(config), manifest_of(config), PreparedDataset.open(config.data)
    mean = data.read_images(0, ROWS)[1].mean()
    assert (result.title, dict(result.rows)["mean level"]) == ("Brightness", f"{mean:.3f}")
    assert result.manifest == manifest
    request = {"dataset_id": data.dataset_id, "shard_size": 16}
    assert (manifest["request"], manifest["request_sha256"]) == (request, digest(request))
    assert (manifest["format"], manifest["version"], manifest["num_rows"]) == ("toy-brightness", 1, ROWS)
    assert manifest["mean"] == pytest.approx(mean)
    assert manifest["made_with"].keys() == {"torch", "pillow", "pyarrow"}
    assert "model" not in manifest
    shards = Path(config.output) / "data"
    assert pq.read_table(shards)["level"].to_pylist() == pytest.approx(
        data.read_images(0, ROWS)[1].reshape(ROWS, -1).mean(1).tolist()
    )
    assert measure(config).title == "Brightness, complete before"
    client = MlflowClient(f"sqlite:///{config.root}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("brightness").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "out")
    assert run.data.params == {name: str(value) for name, value in request.items()}
    assert run.data.tags["ddpm.job"] == "brightness"
    assert run.data.tags["ddpm.dataset_id"] == data.dataset_id
    assert run.data.metrics["brightness/mean"] == pytest.approx(mean)
    assert run.data.metrics["brightness/images"] == ROWS


def test_another_request_is_refused_by_its_fields(
    config: BrightnessConfig, make_dataset: Callable[..., PreparedDataset]
) -> None:
    measure(config)
    with pytest.raises(RequestMismatchError, match=r"finished output of another request \(shard_size: 16 -> 20\)"):
        measure(replace(config, shard_size=20))
    other = make_dataset(ROWS - 1, name="other").location.uri
    with pytest.raises(RequestMismatchError, match=r"dataset_id: '.*' -> '.*'"):
        measure(replace(config, data=other))


def test_damage_is_named_by_verify(config: BrightnessConfig) -> None:
    measure(config)
    found = verify(VerifyConfig(config.output))
    assert (found.title, found.problems) == (f"Brightness {config.output}", [])
    assert dict(found.rows)["checked"].startswith(f"{ROWS} images in 5 shards")
    (Path(config.output) / "mean.json").write_text("1.0")
    (Path(config.output) / "data" / "part-00003.parquet").unlink()
    lost, changed = verify(VerifyConfig(config.output)).problems
    assert "part-00003.parquet" in lost
    assert "mean.json: says 1.0, the manifest" in changed
    path = Location.parse(config.output) / MANIFEST
    path.write_json({**manifest_of(config), "request": {"dataset_id": "d", "shard_size": "16"}})
    with pytest.raises(DataError, match=r"request\.shard_size = '16': must be a whole number"):
        verify(VerifyConfig(config.output))


@pytest.mark.ray
def test_actors_make_the_same_shards_and_make_lost_ones_again(
    ray_cluster: None, config: BrightnessConfig, tmp_path: Path
) -> None:
    """As they do for verify, which compares."""
    ray.cloudpickle.register_pickle_by_value(brightness_job)  # actors cannot import the tests
    measure(config)
    actors = replace(config, output=str(tmp_path / "actors"), cluster=ClusterConfig(num_workers=2))
    measure(actors)
    assert manifest_of(actors)["shards"] == manifest_of(config)["shards"]
    lost = Path(actors.output) / "data" / "part-00001.parquet"
    content = lost.read_bytes()
    lost.unlink()
    assert measure(actors).title == "Brightness, 1 lost shard(s) made again"
    assert lost.read_bytes() == content
    found = verify(VerifyConfig(actors.output, recompute=0.5, cluster=CpuClusterConfig(num_workers=1)))
    assert found.problems == []
    assert dict(found.rows)["made again"].startswith("2 shard(s), 2 bit-equal")
