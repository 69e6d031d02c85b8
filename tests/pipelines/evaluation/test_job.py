"""The evaluation job: one set of rows per request, whoever computes it and whatever is killed meanwhile."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray
from mlflow import MlflowClient
from support.evaluate_runs import ROWS, tiny_evaluation
from support.model_kinds import KINDS
from support.mortal_actors import Mortal
from support.sample_runs import save_tiny_model

from ddpm_core.model import WEIGHTS_FILE, load_model
from pipelines.cli.errors import ConfigError, DataError, ModelError, RequestMismatchError, TrackingError
from pipelines.cluster.actor_pool import ActorPool
from pipelines.cluster.config import GpuClusterConfig
from pipelines.data.dataset import PreparedDataset
from pipelines.evaluation.config import EvaluateConfig, OdeConfig
from pipelines.evaluation.job import evaluate
from pipelines.evaluation.kind import EVALUATION
from pipelines.evaluation.request import EvaluateRequest
from pipelines.evaluation.shard import TermShards
from pipelines.outputs.manifest import MANIFEST
from pipelines.outputs.shards import ShardedOutput
from pipelines.storage.location import Location
from pipelines.tracking.champion import CHAMPION
from pipelines.tracking.client import mlflow_client
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.registry import register_model
from pipelines.verify.config import VerifyConfig
from pipelines.verify.job import verify

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_cluster_or_server_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """70 labelled images, as ingest prepares them from a Parquet file."""
    import io

    from PIL import Image

    from pipelines.data.ingest.config import IngestConfig
    from pipelines.data.ingest.job import ingest

    directory, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    rows = []
    for index in range(ROWS):
        sink = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(sink, "PNG")
        rows.append({"image": {"bytes": sink.getvalue(), "path": None}, "label": index % 3})
    pd.DataFrame(rows).to_parquet(directory / "source.parquet")
    return ingest(IngestConfig(str(directory / "source.parquet"), str(directory / "prepared"))).dataset


@pytest.fixture(scope="module")
def made(ray_cluster: None, images: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """An evaluation by the job, with two actors, an importance pass and labels."""
    config = tiny_evaluation(tmp_path_factory.mktemp("made"), images, estimator="importance", by_label=True)
    evaluate(config)
    return config


def manifest_of(config: EvaluateConfig) -> dict[str, Any]:
    return json.loads((Path(config.output) / MANIFEST).read_text())


def digests(config: EvaluateConfig) -> list[str]:
    return [shard["sha256"] for shard in manifest_of(config)["shards"]]


def rows_of(config: EvaluateConfig) -> pd.DataFrame:
    return pd.read_parquet(Path(config.output) / "terms")


@pytest.mark.ray
def test_the_manifest_says_what_was_measured_on_what(made: EvaluateConfig, images: PreparedDataset) -> None:
    manifest = manifest_of(made)
    assert (manifest["num_rows"], [shard["rows"] for shard in manifest["shards"]]) == (ROWS, [16, 16, 16, 16, 6])
    assert manifest["request"]["model_id"] == load_model(made.model).model_id
    assert (manifest["request"]["dataset_id"], manifest["data"]) == (images.dataset_id, images.location.uri)
    assert not (Path(made.output) / "_work").exists()
    assert rows_of(made)["id"].tolist() == list(range(ROWS))
    assert rows_of(made)["label"].tolist() == [index % 3 for index in range(ROWS)]
    by_label = {name: found["num_images"] for name, found in manifest["results"]["means"].items() if "label" in name}
    assert by_label == {f"by_label.{label}.bits_per_dim.beta_tilde": n for label, n in ((0, 24), (1, 23), (2, 23))}


@pytest.mark.ray
def test_metrics_in_mlflow_are_the_aggregates_of_the_rows(made: EvaluateConfig, images: PreparedDataset) -> None:
    client = MlflowClient(f"sqlite:///{made.root}/mlflow.db")
    experiment = client.get_experiment_by_name("model/eval").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`ddpm.output` = '{made.output}'")
    rows, metrics = rows_of(made), run.data.metrics
    assert run.info.status == "FINISHED"
    for metric, column in {
        "bits_per_dim/beta_tilde": "bits_per_dim_beta_tilde",
        "clip/bpd": "bits_per_dim_beta_tilde_clipped",
        "terms/decoder": "L_0_beta_tilde",
        "terms/kl_sum": "L_t_sum_beta_tilde",
        "terms/prior": "L_T",
        "bpd/png": "png_bits_per_dim",
    }.items():
        assert metrics[metric] == pytest.approx(rows[column].mean(), abs=1e-9)
    assert metrics["bpd/bound"] == metrics["bits_per_dim/beta_tilde"]
    assert metrics["low/data_set.beta_tilde"] < metrics["bits_per_dim/beta_tilde"]
    assert metrics["high/population.beta_tilde"] > metrics["high/data_set.beta_tilde"]
    curve = client.get_metric_history(run.info.run_id, "eval_by_t/kl_bits_per_dim.beta_tilde")
    assert sorted(point.step for point in curve) == list(range(20))
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == images.dataset_id[:36]
    assert {file.path for file in client.list_artifacts(run.info.run_id, "report")} == {
        f"report/{name}" for name in ("index.html", "by_t.png", "histogram.png", "extremes.png", "by_label.csv")
    }
    assert min(metrics) == "bits_per_dim/beta_tilde"  # MLflow shows them in this order
    bars = [name for name in metrics if not name.startswith("eval_by_")]
    assert len({name[:7] for name in bars}) == len(bars)  # ... and cuts the titles of charts
    assert f"**{metrics['bits_per_dim/beta_tilde']:.4f} ±" in run.data.tags["mlflow.note.content"]


@pytest.mark.ray
def test_the_report_stands_alone(made: EvaluateConfig) -> None:
    page = (Path(made.output) / "report" / "index.html").read_text()
    for outside in ("http://", "https://", 'src="/', "<script", "@import"):
        assert outside not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
            "http://creativecommons.org", ""
        ).replace("https://matplotlib.org", "").replace("http://web.resource.org", "")
    assert page.count("<svg") == 3
    assert "data:image/png;base64," in page
    assert f"{manifest_of(made)['results']['means']['bits_per_dim.beta_tilde']['mean']:.4f} ±" in page
    found = manifest_of(made)["results"]["means"]["by_label.2.bits_per_dim.beta_tilde"]
    half = found["population"][1] - found["mean"]
    cells = "".join(f"<td>{text}</td>" for text in ("2", "23", f"{found['mean']:.4f}", f"{half:.4f}"))
    assert cells in page
    assert f"2,23,{found['mean']:.4f},{half:.4f}\n" in (Path(made.output) / "report" / "by_label.csv").read_text()


@pytest.mark.ray
def test_any_number_of_actors_and_any_kills_of_them_give_the_same_rows(
    made: EvaluateConfig, images: PreparedDataset, tmp_path: Path
) -> None:
    one = replace(made, output=str(tmp_path / "one"), cluster=GpuClusterConfig(num_workers=1))
    evaluate(one)
    assert digests(one) == digests(made)
    killed = Location.parse(tmp_path / "killed")
    request = EvaluateRequest.from_json(manifest_of(made)["request"], killed)
    output = EVALUATION.output(killed, request)
    for kept in ("model", "first_pass"):
        (output.location / kept).upload_directory(Path(made.output) / kept)
    ray.cloudpickle.register_pickle_by_value(sys.modules[Mortal.__module__])  # actors cannot import the tests
    mortal = Mortal(TermShards(output.location, request, images, 1), str(tmp_path / "deaths"))
    Path(mortal.log).mkdir()
    records = output.compute(mortal, 5, pool=ActorPool(2))
    assert [record.sha256 for record in records] == digests(made)
    assert len(list(Path(mortal.log).iterdir())) == 5, "an actor died at every shard"


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_job_continues_and_ends_in_the_same_rows_and_one_run(made: EvaluateConfig, tmp_path: Path) -> None:
    config = replace(made, output=str(tmp_path / "killed"))
    fields = ("model", "data", "train_data", "output", "estimator", "timesteps_per_image", "seed", "batch_size", "root")
    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), "--cluster.num_workers=1", "--shard_size=16"]
    command += [f"--precision={config.precision}"]
    command += ["--by_label=true", *(f"--{name}={getattr(config, name)}" for name in fields)]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    killed = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert killed.stderr is not None
    for line in iter(killed.stderr.readline, ""):
        shown = re.match(r"images (\d+)/", line)
        if shown and int(shown[1]) > 16:  # beyond the first shard, which is stored then
            os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (Path(config.output) / MANIFEST).exists()
    foreign = [Path(config.output, name) for name in ("terms/part-of-my-thesis.txt", "first_pass/x", "_work/notes")]
    for path in foreign:
        path.write_text("mine")
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert digests(config) == digests(made)
    assert [path.read_text() for path in foreign] == ["mine"] * 3
    assert manifest_of(config)["results"] == manifest_of(made)["results"]
    client = MlflowClient(f"sqlite:///{made.root}/mlflow.db")
    experiment = client.get_experiment_by_name("model/eval").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`ddpm.output` = '{config.output}'")
    assert (run.info.status, run.data.tags["ddpm.attempt"]) == ("FINISHED", "2")


@pytest.mark.ray
def test_a_finished_request_needs_no_cluster_and_changes_nothing(
    made: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.cluster.connection.connect", None)
    before = {path: path.stat().st_mtime_ns for path in Path(made.output).rglob("*")}
    assert evaluate(replace(made, cluster=GpuClusterConfig(num_workers=7))).title == "Evaluation, complete before"
    assert {path: path.stat().st_mtime_ns for path in Path(made.output).rglob("*")} == before


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 4}, "seed: 3 -> 4"),
        ({"timesteps_per_image": 10}, "timesteps_per_image: 8 -> 10"),
        ({"estimator": "stratified"}, "estimator: 'importance' -> 'stratified'"),
        ({"sigma2": "beta"}, "sigma2: 'beta_tilde' -> 'beta'"),
        ({"target_halfwidth": 0.1}, r"target_halfwidth: None -> 0\.1"),
    ],
)
def test_another_request_is_refused_and_the_field_named(made: EvaluateConfig, changed: Any, named: str) -> None:
    with pytest.raises(RequestMismatchError, match=f"finished output of another request .*{named}"):
        evaluate(replace(made, **changed))


@pytest.mark.ray
def test_verification_reads_everything_again(made: EvaluateConfig, tmp_path: Path) -> None:
    assert verify(VerifyConfig(made.output)).problems == []
    copy = tmp_path / "copy"
    Location.parse(copy).upload_directory(made.output)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["results"]["means"]["bits_per_dim.beta"]["mean"] += 1e-6
    (copy / MANIFEST).write_text(json.dumps(manifest))
    (problem,) = verify(VerifyConfig(str(copy))).problems
    assert problem.endswith("bits_per_dim.beta is not what the rows give")
    (copy / "first_pass" / "part-00001.npz").unlink()
    (copy / "terms" / "part-00002.parquet").unlink()
    problems = verify(VerifyConfig(str(copy))).problems
    assert len(problems) == 2
    assert "part-00002.parquet" in problems[0]
    assert "part-00001.npz: is missing" in problems[1]


@pytest.mark.ray
def test_a_lost_shard_is_made_again_and_shards_recompute_bit_for_bit(
    made: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: other processes made the shards."""
    monkeypatch.setattr(ActorPool, "unless_small", lambda pool, flops: None)
    real = ShardedOutput.recompute
    monkeypatch.setattr(ShardedOutput, "recompute", lambda *given, pool=None, **more: real(*given[:4], **more))
    config = replace(made, output=str(tmp_path / "copy"))
    Location.parse(config.output).upload_directory(made.output)
    lost = Path(config.output) / "terms" / "part-00001.parquet"
    content = lost.read_bytes()
    lost.unlink()
    assert evaluate(config).title == "Evaluation, 1 lost shard(s) made again"
    assert lost.read_bytes() == content
    found = verify(VerifyConfig(config.output, recompute=0.3))
    assert found.problems == []
    assert dict(found.rows)["made again"].startswith("2 shard(s), 2 bit-equal")


@pytest.mark.ray
def test_it_stops_where_the_mean_is_known_well_enough(
    ray_cluster: None, make_dataset: Callable[..., PreparedDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images for two actors and in one process, at least 256 and not all; the report says what it took."""
    data = make_dataset(1200)
    config = tiny_evaluation(tmp_path, data, target_halfwidth=0.5, cluster=GpuClusterConfig(num_workers=2))
    two, one = (replace(config, output=str(tmp_path / name)) for name in ("two", "one"))
    evaluate(two)
    monkeypatch.setattr(ActorPool, "unless_small", lambda pool, flops: None)
    evaluate(one)
    assert digests(one) == digests(two)
    found = manifest_of(two)["results"]
    low, high = found["means"]["bits_per_dim.beta_tilde"]["data_set"]
    assert (high - low) / 2 <= 0.5
    assert 256 <= found["num_images"] < 1200
    assert (Path(two.output) / "report" / "index.html").read_text().count("Target half-width 0.5: reached") == 1
    assert len(list((Path(two.output) / "terms").iterdir())) == found["num_images"] / 16
    assert verify(VerifyConfig(two.output)).problems == []


def test_what_does_not_fit_is_refused_before_anything_is_started(
    make_dataset: Callable[..., PreparedDataset], images: PreparedDataset, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("pipelines.cluster.connection.connect", None)
    data, root = make_dataset(ROWS), tmp_path

    def refused(error: type[Exception], message: str, **fields: Any) -> None:
        with pytest.raises(error, match=message) as refusal:
            evaluate(replace(tiny_evaluation(root, data), **fields))
        assert "\n" not in str(refusal.value)

    larger, one = make_dataset(20, (16, 8, 3), name="larger"), make_dataset(1, name="one")
    refused(DataError, r"data = .*: images are 16x8x3 \(H x W x C\), the model's are 8x8x1", data=larger.location.uri)
    refused(DataError, r"data = .*: holds 1 image\(s\); an interval needs", data=one.location.uri)
    refused(DataError, r"not a prepared data set \(no manifest.json\)", data=str(tmp_path / "nowhere"))
    refused(DataError, "has no labels, which by_label needs", by_label=True)
    refused(DataError, r"train_data = .*: images are \(16, 8, 3\)", train_data=larger.location.uri)
    refused(ConfigError, "num_images = 71: .* holds 70", num_images=71)
    refused(ConfigError, "held_out = True: needs the data set that the model was trained on, /data/tiny", held_out=True)
    trained_here = {"dataset": {"id": data.dataset_id, "uri": "here"}, "config": {"data": {}}}
    save_tiny_model(root / "none", extra=trained_here)
    refused(ConfigError, "held_out = True: the model's .* held out no rows", model=str(root / "none"), held_out=True)
    trained_here["config"]["data"] = {"hold_out": 40}
    save_tiny_model(root / "few", extra=trained_here)
    refused(DataError, "held-out rows: holds 1 image", model=str(root / "few"), held_out=True)
    refused(ConfigError, r"timesteps_per_image = 20: the model has T - 1 = 19 KL terms", timesteps_per_image=20)
    refused(ModelError, "holds neither a model .* nor the checkpoints of a training", model=str(tmp_path / "nothing"))
    (tmp_path / "model" / WEIGHTS_FILE).unlink()
    refused(ModelError, "holds neither a model", model=str(tmp_path / "model"))
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("vdm", {"sigma2": "beta"}, "sigma2: 'beta' is no variance of a continuous process"),
        ("vdm", {"sigma2": "learned"}, "sigma2: 'learned' is no variance of a continuous process"),
        ("eps", {"sigma2": "learned"}, "sigma2: 'learned' needs a model that predicts its variances"),
        ("vdm", {"estimator": "all"}, "estimator = all: continuous time has no T to sum over"),
        ("vdm", {"num_timesteps": 6}, "timesteps_per_image = 8: T = 6 steps have 6 KL terms"),
        ("eps", {"num_timesteps": 8}, "timesteps_per_image = 8: T = 8 steps have 7 KL terms"),
        ("eps", {"num_timesteps": 21}, "num_timesteps: 21 is above the model's 20 time steps"),
        ("v, zero terminal SNR", {"ode": OdeConfig(1, 4)}, "ode.num_images = 1: the model's SNR ends at 0"),
    ],
)
def test_what_a_models_kind_does_not_have_is_refused(
    make_dataset: Callable[..., PreparedDataset], tmp_path: Path, kind: str, fields: dict[str, Any], message: str
) -> None:
    KINDS[kind].save(tmp_path / "model")
    with pytest.raises(ConfigError, match=message) as refusal:
        evaluate(tiny_evaluation(tmp_path, make_dataset(ROWS), **fields))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.ray
def test_a_vdm_and_a_ddpm_stand_on_one_page_and_verify_knows_both(
    ray_cluster: None, make_dataset: Callable[..., PreparedDataset], tmp_path: Path
) -> None:
    """The same metrics of both, the rows again bit for bit by other processes, the report of a VDM."""
    data, runs = make_dataset(ROWS), []
    client = MlflowClient(f"sqlite:///{tmp_path}/home/mlflow.db")
    for kind in ("eps", "vdm, learned"):
        KINDS[kind].save(tmp_path / kind / "model", scale=0.02)
        config = tiny_evaluation(tmp_path / kind, data, estimator="importance", cluster=GpuClusterConfig())
        config = replace(config, root=str(tmp_path / "home"))
        evaluate(config)
        found = verify(VerifyConfig(config.output, recompute=1.0))
        assert found.problems == []
        assert dict(found.rows)["made again"].startswith("5 shard(s), 5 bit-equal")
        experiment = client.get_experiment_by_name("model/eval").experiment_id
        (run,) = client.search_runs([experiment], f"tags.`ddpm.output` = '{config.output}'")
        runs.append(run.data.metrics)
    ddpm, vdm = (set(run) for run in runs)
    own = {"bits_per_dim/", "low/", "high/", "eval_by_t/", "bpd/beta", "bpd/optimal"}
    assert {name for name in ddpm ^ vdm if not name.startswith(tuple(own))} == {
        f"bpd/{steps}_steps" for steps in (25, 50, 100, 250, 500, "1k")
    }
    common = {"bpd/bound", "bpd/png", "bpd/webp", "bpd/histogram", "bpd/10_steps", "eval_by_log_snr/eps_mse"}
    assert common | {"terms/prior", "terms/kl_sum", "terms/decoder", "clip/bpd"} <= ddpm & vdm
    assert runs[1]["bpd/bound"] == runs[1]["bits_per_dim/continuous"] > runs[1]["low/population.continuous"]
    page = (Path(config.output) / "report" / "index.html").read_text()
    for text in ("bits/dim, continuous time, softmax decoder", "The learned γ(t) = -log-SNR from -9.00 to 4.00"):
        assert text in page


def test_images_of_another_range_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    from pipelines.data.ingest.config import IngestConfig
    from pipelines.data.ingest.job import ingest

    (tmp_path / "source").mkdir()
    for index in range(3):
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "source" / f"{index}.png")
    data = ingest(IngestConfig(str(tmp_path / "source"), str(tmp_path / "prepared"))).dataset
    with pytest.raises(DataError, match=r"levels are 0\.\.1, the model's are 0\.\.255"):
        evaluate(tiny_evaluation(tmp_path, data))


@pytest.mark.ray
def test_a_registered_model_gets_links_a_point_on_its_curve_and_the_alias_if_it_is_better(
    ray_cluster: None,
    images: PreparedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two versions: the worse is the champion, then the better one is promoted, then the worse is not."""
    monkeypatch.setattr(ActorPool, "unless_small", lambda pool, flops: None)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow_client(uri)
    run = client.create_run(client.create_experiment("flowers", artifact_location=(tmp_path / "artifacts").as_uri()))
    for step, scale in ((10, 0.5), (20, 0.0)):  # without weights the prediction is 0: far better than a wild one
        directory = tmp_path / f"model-{step}"
        model_id = save_tiny_model(directory, weights_seed=step, scale=scale, step=step)
        payload = {"uri": "unused", "name": "flowers", "model_id": model_id, "step": step}
        register_model(client, run.info.run_id, run.info.experiment_id, payload, directory)

    def config(version: int, **fields: Any) -> EvaluateConfig:
        output = str(tmp_path / f"evaluation-{version}")
        model = f"models:/flowers/{version}"
        return tiny_evaluation(tmp_path, images, model=model, output=output, tracking=TrackingConfig(uri), **fields)

    with pytest.raises(TrackingError, match="the champion of 'flowers' has no evaluation on data set"):
        evaluate(config(2, promote=True))
    assert not (tmp_path / "evaluation-2").exists()  # it is refused before anything is computed
    evaluate(config(2))
    arguments = ["--promote", "true", "--tracking.uri", uri, "--batch_size", "24", "--shard_size", "16"]
    for name in ("model", "data", "train_data", "output", "timesteps_per_image", "seed", "root"):
        arguments += [f"--{name}", str(getattr(config(2), name))]
    capsys.readouterr()
    with pytest.raises(TrackingError, match="the champion of 'flowers' has no evaluation on data set"):
        runpy.run_path(str(ROOT / "jobs" / "evaluate.py"))["main"](arguments)
    assert " bits/dim, σ² = β̃" in capsys.readouterr().out  # the result is printed all the same
    evaluate(config(1))
    assert dict(evaluate(config(1, promote=True)).rows)["champion"] == "version 1 is the champion already"
    assert dict(evaluate(config(2, promote=True)).rows)["champion"] == "now version 2, was 1"
    assert str(client.get_registered_model("flowers").aliases[CHAMPION]) == "2"
    assert dict(evaluate(config(1, promote=True)).rows)["champion"].startswith("stays version 2: ")
    points = client.get_metric_history(run.info.run_id, "bits_per_dim/beta_tilde")
    assert sorted(point.step for point in points) == [10, 20]
    experiment = client.get_experiment_by_name("flowers/eval").experiment_id
    for found in client.search_runs([experiment]):
        (linked,) = client.get_run(found.info.run_id).inputs.model_inputs
        logged = client.get_logged_model(linked.model_id)
        assert logged.tags["ddpm.model_id"] == found.data.tags["ddpm.model_id"]
        (metric,) = [m for m in logged.metrics if m.run_id == found.info.run_id]
        assert metric.value == found.data.metrics["bits_per_dim/beta_tilde"]
        assert metric.dataset_digest == images.dataset_id[:36]
