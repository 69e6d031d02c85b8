"""The files under deploy/: valid for Kubernetes and KubeRay, and their commands are commands of this project."""

import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S

from pipelines.cli.config import parse
from pipelines.sampling.config import SampleConfig
from pipelines.training.config import TrainConfig

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
CRDS = json.loads(Path(__file__).with_name("kuberay_crds.json").read_text())
MANIFESTS = sorted(DEPLOY.glob("kube*/*.yaml"))
RAY_VERSION = version("ray")


def load(path: Path) -> dict[str, Any]:
    (document,) = yaml.safe_load_all(path.read_text())
    return document


def pods(value: Any) -> list[dict[str, Any]]:
    """Every pod template in a manifest."""
    if isinstance(value, list):
        return [pod for item in value for pod in pods(item)]
    if not isinstance(value, dict):
        return []
    own = [value["template"]] if "containers" in value.get("template", {}).get("spec", {}) else []
    return own + [pod for item in value.values() for pod in pods(item)]


def check_crd(manifest: dict[str, Any]) -> None:
    schema = {**CRDS[manifest["kind"]], "RayJob": CRDS["RayJob"]}
    jsonschema.validate(manifest, schema, cls=jsonschema.Draft202012Validator)


def sample_config(command: str | list[str]) -> SampleConfig:
    words = shlex.split(command) if isinstance(command, str) else command
    start = words.index("jobs/sample.py")
    return parse(SampleConfig, words[start + 1 :], "")


def ray_cluster_specs() -> dict[str, dict[str, Any]]:
    """What KubeRay makes clusters of, by file name."""
    specs = {}
    for path in sorted((DEPLOY / "kuberay").glob("*.yaml")):
        spec = load(path)["spec"]
        specs[path.name] = spec.get("jobTemplate", spec).get("rayClusterSpec", spec)
    return specs


def test_there_is_a_file_for_each_way_to_run() -> None:
    kinds = sorted(load(path)["kind"] for path in MANIFESTS)
    assert kinds == ["CronJob", "RayCluster", "RayCronJob", "RayJob", "RayJob"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_their_schemas(path: Path) -> None:
    manifest = load(path)
    if manifest["apiVersion"].startswith("ray.io/"):
        check_crd(manifest)
    else:
        kubernetes_validate.validate(manifest, "1.34", strict=True)
    found = pods(manifest)
    assert found
    for pod in found:
        # Inside a template restartPolicy and metadata are the controller's to fill in.
        complete = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod["spec"]}
        kubernetes_validate.validate(complete, "1.34", strict=True)


def test_the_schemas_refuse_what_is_not_in_them() -> None:
    manifest = load(DEPLOY / "kuberay/rayjob.yaml")
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        check_crd(manifest)
    manifest = load(DEPLOY / "kuberay/raycronjob.yaml")
    manifest["spec"]["jobTemplate"]["entryPoint"] = "python"
    with pytest.raises(jsonschema.ValidationError, match="entryPoint"):
        check_crd(manifest)


def test_the_commands_are_accepted_and_dated() -> None:
    (cron,) = [line for line in (DEPLOY / "cron/ddpm-samples").read_text().splitlines() if line.startswith("17")]
    assert re.match(r"17 \* \* \* \* ddpm cd \S+ && uv run --locked jobs/sample.py ", cron)
    container = load(DEPLOY / "kubernetes/cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    commands = [
        cron.partition(" >> ")[0],
        container["command"] + container["args"],
        load(DEPLOY / "kuberay/rayjob.yaml")["spec"]["entrypoint"],
        load(DEPLOY / "kuberay/raycronjob.yaml")["spec"]["jobTemplate"]["entrypoint"],
    ]
    for command in commands:
        config = sample_config(command)
        assert (config.seed, config.num_images, config.sampler) == ("{date}", 10_000, "ddim")
        assert config.output == "s3://example-bucket/samples/{date}"
    assert sample_config(commands[2]).cluster.num_workers == (1, 4)


def test_both_kuberay_files_run_the_same_cluster() -> None:
    job, cron = load(DEPLOY / "kuberay/rayjob.yaml"), load(DEPLOY / "kuberay/raycronjob.yaml")
    assert cron["spec"]["jobTemplate"] == job["spec"]


def test_the_training_job_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    program, script, *arguments = shlex.split(load(DEPLOY / "kuberay/train-rayjob.yaml")["spec"]["entrypoint"])
    assert (program, script) == ("python", "jobs/train.py")
    config = parse(TrainConfig, arguments, "")
    assert config.cluster.worker_range == (1, 4)
    assert config.cluster.gpus_per_worker == 1
    assert all(uri.startswith("s3://example-bucket/ddpm") for uri in (config.root, config.data.train))


@pytest.mark.parametrize("name", ray_cluster_specs())
def test_every_kuberay_cluster_is_guarded_and_has_an_idle_head(name: str) -> None:
    spec = ray_cluster_specs()[name]
    assert spec["rayVersion"] == RAY_VERSION
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert any(
        "nvidia.com/gpu" in container["resources"]["limits"]
        for group in spec["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"]
    )


@pytest.mark.parametrize("name", ray_cluster_specs())
def test_kuberay_workers_drain_before_kubernetes_kills_them(name: str) -> None:
    for group in ray_cluster_specs()[name]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        drain = float(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S))
        assert 30 <= drain <= pod["terminationGracePeriodSeconds"] - 20


def test_the_standing_cluster_is_the_one_that_jobs_are_submitted_to() -> None:
    cluster = load(DEPLOY / "kuberay/raycluster.yaml")["metadata"]["name"]
    job = load(DEPLOY / "kubernetes/cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert f"http://{cluster}-head-svc:8265" in job["command"]
    env = {entry["name"]: entry for entry in job["env"]}
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": cluster, "key": "auth_token"}


def test_the_image_copies_what_there_is() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert all((REPOSITORY / name).exists() for line in copied for name in line.split())
