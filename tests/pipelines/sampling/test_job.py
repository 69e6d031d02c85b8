"""The sampling job: one sample set per request, whoever makes it and whatever is killed meanwhile."""

import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray
from mlflow import MlflowClient
from support.mortal_actors import Mortal
from support.sample_runs import save_tiny_model, tiny

from ddpm_core.model import load_model
from pipelines.cli.errors import ConfigError, RequestMismatchError, StorageError
from pipelines.cluster.actor_pool import ActorPool
from pipelines.cluster.config import GpuClusterConfig
from pipelines.models.find import find_model
from pipelines.outputs.manifest import MANIFEST
from pipelines.outputs.shards import ShardedOutput
from pipelines.sampling.config import SampleConfig
from pipelines.sampling.job import sample
from pipelines.sampling.kind import SAMPLE_SET
from pipelines.sampling.request import request_of
from pipelines.sampling.sampler_config import SamplerConfig
from pipelines.sampling.shard import SampleShards
from pipelines.storage.location import Location
from pipelines.tracking.champion import CHAMPION
from pipelines.tracking.config import TrackingConfig
from pipelines.verify.config import VerifyConfig
from pipelines.verify.job import verify

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_cluster_or_server_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def manifest_of(config: SampleConfig) -> dict[str, Any]:
    return Location.parse(config.output).__truediv__(MANIFEST).read_json()


def digests(config: SampleConfig) -> list[str]:
    return [shard["sha256"] for shard in manifest_of(config)["shards"]]


def by_hand(config: SampleConfig) -> tuple[ShardedOutput, SampleShards]:
    """The sample set's output and compute function, begun as the job begins it."""
    found, location = find_model(config.model, None, Path(config.root)), Location.parse(config.output)
    request = request_of(config, load_model(config.model))
    output = SAMPLE_SET.output(location, request)
    output.begin()
    found.keep(location / "model")
    return output, SampleShards(location, request, 1)


@pytest.fixture(scope="module")
def made(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SampleConfig:
    """A sample set made by the job with two actors."""
    config = tiny(tmp_path_factory.mktemp("made"))
    sample(config)
    return config


@pytest.mark.ray
def test_the_manifest_says_what_was_made_and_from_what(made: SampleConfig) -> None:
    manifest, model = manifest_of(made), load_model(made.model)
    assert (manifest["num_rows"], manifest["image_shape"]) == (22, [8, 8, 1])
    assert manifest["evaluations_per_image"] == 5
    assert [shard["rows"] for shard in manifest["shards"]] == [6, 6, 6, 4]
    assert [shard["first_id"] for shard in manifest["shards"]] == [0, 6, 12, 18]
    named = {"reference": made.model, "uri": made.model, "name": "model", "run_id": None}
    assert manifest["model"] == {**named, "model_id": model.model_id}
    assert manifest["request"]["model_id"] == model.model_id
    assert manifest["lineage"]["dataset"]["id"] == "d" * 64
    assert (Path(made.output) / "preview" / "grid.png").stat().st_size > 500
    assert not (Path(made.output) / "_work").exists()
    assert verify(VerifyConfig(made.output)).problems == []


@pytest.mark.ray
def test_the_run_in_mlflow_has_parameters_lineage_progress_and_pictures(made: SampleConfig) -> None:
    client = MlflowClient(f"sqlite:///{made.root}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("model/samples").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "samples")
    assert {"seed": "3", "sampler": "ddim", "steps": "5", "num_images": "22"}.items() <= run.data.params.items()
    assert run.data.tags["ddpm.model_id"] == load_model(made.model).model_id
    assert run.data.tags["ddpm.dataset_id"] == "d" * 64
    assert run.data.metrics["sample/images"] == 22
    assert run.data.metrics["images_per_second"] > 0
    assert run.data.metrics["eta_seconds"] == 0
    assert {file.path for file in client.list_artifacts(run.info.run_id, "preview")} == {
        "preview/grid.png",
        "preview/trajectory.png",
    }
    assert "22 images" in run.data.tags["mlflow.note.content"]


@pytest.mark.ray
def test_any_number_of_actors_and_any_kills_of_them_give_the_same_shards(made: SampleConfig, tmp_path: Path) -> None:
    one = replace(made, output=str(tmp_path / "one"), cluster=GpuClusterConfig(num_workers=1))
    sample(one)
    assert digests(one) == digests(made)
    output, shards = by_hand(replace(made, output=str(tmp_path / "killed")))
    ray.cloudpickle.register_pickle_by_value(sys.modules[Mortal.__module__])  # actors cannot import the tests
    mortal = Mortal(shards, str(tmp_path / "deaths"))
    Path(mortal.log).mkdir()
    records = output.compute(mortal, 4, pool=ActorPool(2))
    assert [record.sha256 for record in records] == digests(made)
    assert len(list(Path(mortal.log).iterdir())) == 4, "an actor died at every shard"


@pytest.mark.ray
def test_a_small_request_is_made_in_this_process_with_the_same_bytes_and_counted_step_by_step(
    made: SampleConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.cluster.connection.is_named", lambda address: False)
    monkeypatch.setattr("pipelines.cluster.connection.connect", None)
    monkeypatch.setattr("pipelines.outputs.progress._INTERVAL_S", 0.0)
    config = replace(made, output=str(tmp_path / "samples"), root=str(tmp_path / "home"), cluster=GpuClusterConfig())
    sample(config)
    assert digests(config) == digests(made)
    shown = capsys.readouterr().err
    assert "sampling 22 images in this process" in shown
    assert sum(line.startswith("samples ") for line in shown.splitlines()) > 5, "more often than once for each shard"


@pytest.mark.ray
@pytest.mark.parametrize("finished", [True, False])
def test_a_request_that_was_begun_with_another_shard_size_is_the_same_where_none_is_given(
    made: SampleConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    begun = made if finished else replace(made, output=str(tmp_path / "samples"), root=str(tmp_path / "home"))
    if not finished:
        by_hand(begun)
    monkeypatch.setattr(ActorPool, "unless_small", lambda pool, flops: None)
    assert replace(begun, shard_size=None).chosen_shard_size != made.shard_size
    assert sample(replace(begun, shard_size=None)).title == (
        "Sample set, complete before" if finished else "Sample set"
    )
    assert digests(begun) == digests(made)
    with pytest.raises(RequestMismatchError, match=r"\(shard_size: 6 -> 3\)"):
        sample(replace(begun, shard_size=3))


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_job_continues_and_ends_in_the_same_shards(made: SampleConfig, tmp_path: Path) -> None:
    config = replace(
        made,
        output=str(tmp_path / "samples"),
        root=str(tmp_path / "home"),
        num_images=60,
        cluster=GpuClusterConfig(num_workers=1),
    )
    fields = (
        "model",
        "output",
        "num_images",
        "seed",
        "sampler.name",
        "sampler.steps",
        "precision",
        "batch_size",
        "shard_size",
        "root",
    )
    command = [sys.executable, str(ROOT / "jobs" / "sample.py"), "--cluster.num_workers", "1"]
    command += ["--cluster.address", ray.get_runtime_context().gcs_address]
    command += [f"--{name}={attrgetter(name)(config)}" for name in fields]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    killed = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert killed.stderr is not None
    seen = [line for line in iter(killed.stderr.readline, "") if killed_at_first_shard(killed, line)]
    killed.wait()
    assert killed.returncode == -signal.SIGKILL, seen
    left = len(list((tmp_path / "samples" / "_work" / "records" / "data").iterdir()))
    assert 0 < left < 10
    assert not (tmp_path / "samples" / MANIFEST).exists()
    foreign = [tmp_path / "samples" / name for name in ("data/part-of-my-thesis.txt", "_work/records/data/notes")]
    for path in foreign:
        path.write_text("mine")
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "60 of 8x8x1" in ended.stdout
    assert digests(config)[:3] == digests(made)[:3]
    assert [path.read_text() for path in foreign] == ["mine", "mine"]
    (run,) = MlflowClient(f"sqlite:///{tmp_path}/home/mlflow.db").search_runs(["1"])
    assert (run.info.status, run.data.tags["ddpm.attempt"]) == ("FINISHED", "2")


def killed_at_first_shard(job: "subprocess.Popen[str]", line: str) -> bool:
    """Kill the job when its progress line tells of images beyond the first shard, which is stored then."""
    shown = re.match(r"samples (\d+)/", line)
    if shown and int(shown[1]) > 6:
        os.kill(job.pid, signal.SIGKILL)
    return True


@pytest.mark.ray
def test_a_finished_request_needs_no_cluster(made: SampleConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cluster.connection.connect", None)
    before = {path: path.stat().st_mtime_ns for path in Path(made.output).rglob("*")}
    assert sample(made).title == "Sample set, complete before"
    assert (
        sample(replace(made, cluster=GpuClusterConfig(num_workers=7, cpus_per_worker=2))).title
        == "Sample set, complete before"
    )
    assert {path: path.stat().st_mtime_ns for path in Path(made.output).rglob("*")} == before


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 4}, "seed: 3 -> 4"),
        ({"sampler": SamplerConfig("ddpm")}, "sampler: 'ddim' -> 'ddpm'.*steps: 5 -> 20"),
        ({"sampler": SamplerConfig("ddim", 6)}, "steps: 5 -> 6"),
        ({"sampler": SamplerConfig("ddim", 5, eta=0.5)}, r"eta: 0\.0 -> 0\.5"),
        ({"num_images": 23}, "num_images: 22 -> 23"),
        ({"batch_size": 2}, "batch_size: 3 -> 2"),
        ({"precision": "bf16"}, "precision: 'fp32' -> 'bf16'"),
        ({"cluster": GpuClusterConfig(gpus_per_worker=1)}, "device: 'cpu' -> 'cuda'"),
    ],
)
def test_another_request_is_refused_and_the_fields_named(
    made: SampleConfig, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(RequestMismatchError, match=f"finished output of another request .*{named}"):
        sample(replace(made, **changed))
    unfinished = replace(made, output=str(tmp_path / "unfinished"))
    by_hand(unfinished)
    for dry_run in (False, True):
        with pytest.raises(RequestMismatchError, match=f"unfinished output of another request .*{named}"):
            sample(replace(unfinished, dry_run=dry_run, **changed))


@pytest.mark.ray
def test_another_model_is_refused(made: SampleConfig, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "other", weights_seed=1)
    with pytest.raises(RequestMismatchError, match=r"model_id: '.*' -> '.*'"):
        sample(replace(made, model=str(tmp_path / "other")))


def test_what_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^sampler\.steps = 21: the model has 20 diffusion steps"):
        sample(tiny(tmp_path, sampler={"steps": 21}))
    with pytest.raises(ConfigError, match=r"^sampler\.sigma2: 'learned' needs a model that predicts its variances"):
        sample(tiny(tmp_path, sampler={"name": "ddpm", "sigma2": "learned"}))
    assert not (tmp_path / "samples").exists()


@pytest.mark.ray
def test_a_lost_shard_is_made_again_and_a_different_one_is_not_taken(made: SampleConfig, tmp_path: Path) -> None:
    config = replace(made, output=str(tmp_path / "samples"))
    Location.parse(config.output).upload_directory(made.output)
    data = Path(config.output) / "data"
    whole = {path.name: path.read_bytes() for path in data.iterdir()}
    (data / "part-00002.parquet").unlink()
    assert sample(config).title == "Sample set, 1 lost shard(s) made again"
    assert {path.name: path.read_bytes() for path in data.iterdir()} == whole
    manifest = manifest_of(config)
    manifest["shards"][1]["sha256"] = "0" * 64
    (Location.parse(config.output) / MANIFEST).write_json(manifest)
    (data / "part-00001.parquet").unlink()
    with pytest.raises(StorageError, match=r"part-00001\.parquet: is lost, and came out different"):
        sample(config)


@pytest.mark.ray
def test_an_alias_that_moves_does_not_change_a_sample_set(
    made: SampleConfig, tmp_path: Path, registry: tuple[str, MlflowClient]
) -> None:
    uri, client = registry
    config = replace(
        made, model="models:/flowers@champion", tracking=TrackingConfig(uri), output=str(tmp_path / "samples")
    )
    sample(config)
    assert manifest_of(config)["model"]["uri"] == "models:/flowers/1"
    client.set_registered_model_alias("flowers", CHAMPION, "2")
    assert sample(config).title == "Sample set, complete before"
    with pytest.raises(RequestMismatchError, match="model_id"):
        sample(replace(config, model="models:/flowers/2"))
    moved = replace(config, output=str(tmp_path / "moved"))
    sample(moved)
    assert manifest_of(moved)["model"]["uri"] == "models:/flowers/2"
    assert digests(moved) != digests(config)


@pytest.fixture
def registry(tmp_path: Path) -> tuple[str, MlflowClient]:
    """A registry whose model `flowers` has two versions; the first is the champion."""
    from pipelines.tracking.registry import register_model

    uri, patch = f"sqlite:///{tmp_path}/mlflow.db", pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("flowers", artifact_location=(tmp_path / "artifacts").as_uri()))
    for step in (10, 20):
        model_id = save_tiny_model(tmp_path / f"model-{step}", weights_seed=step)
        payload = {"uri": "unused", "name": "flowers", "model_id": model_id, "step": step}
        register_model(client, run.info.run_id, run.info.experiment_id, payload, tmp_path / f"model-{step}")
    mlflow.set_tracking_uri(None)
    patch.undo()
    return uri, client


@pytest.mark.ray
def test_two_jobs_at_once_make_one_sample_set(made: SampleConfig, tmp_path: Path) -> None:
    config, ended = replace(made, output=str(tmp_path / "samples"), cluster=GpuClusterConfig(num_workers=1)), []
    threads = [threading.Thread(target=lambda: ended.append(sample(config).title)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 2
    assert digests(config) == digests(made)
    assert verify(VerifyConfig(config.output)).problems == []


@pytest.mark.ray
def test_a_dry_run_plans_and_writes_nothing(
    made: SampleConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(made, output=str(tmp_path / "new"), dry_run=True, root=str(tmp_path / "home"))
    rows = dict(sample(config).rows)
    assert rows["shards"] == "4 of 4 to do, up to 6 images each"
    assert rows["network"] == "40 calls with 3 images = 120 evaluations"  # 22 images in 8 batches, 5 steps each
    assert "on 2 worker(s)" in rows["time"]
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "home").exists()
    monkeypatch.setattr("pipelines.cluster.connection.connect", None)  # nothing to measure where nothing is to do
    assert dict(sample(replace(made, dry_run=True)).rows)["shards"].startswith("0 of 4 to do")


@pytest.mark.ray
def test_an_object_store_and_tar_files(made: SampleConfig, s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The shared cluster is older than this store's credentials: this process computes the shards itself.
    monkeypatch.setattr(ActorPool, "unless_small", lambda pool, flops: None)
    config = replace(made, output=f"{s3_prefix}/{{date}}", format="webdataset", date="2026-02-03")
    sample(config)
    dated = replace(config, output=f"{s3_prefix}/2026-02-03")
    assert [shard["name"] for shard in manifest_of(dated)["shards"]] == [f"part-0000{i}.tar" for i in range(4)]
    assert verify(VerifyConfig(dated.output)).problems == []
    assert sample(config).title == "Sample set, complete before"
