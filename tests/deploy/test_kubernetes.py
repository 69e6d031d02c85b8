"""deploy/kubernetes: overlays and jobs as Kustomize makes them, valid for Kubernetes and KubeRay; what they promise."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
from support.kustomize import containers, render

REPOSITORY = Path(__file__).parents[2]
CRDS = json.loads(Path(__file__).with_name("kuberay_crds.json").read_text())
OVERLAYS, JOBS = ("static-keys", "workload-identity"), ("train", "samples", "samples-daily", "samples-hourly")
BUILDS = [(overlay, build) for overlay in OVERLAYS for build in (None, *JOBS)]
MADE_BY_THE_OPERATOR = {"bucket", "mlflow", "mlflow-user", "registry"}
MADE_BY_KUBERAY = {"ddpm"}  # the token of the cluster of that name

Manifests = dict[str, dict[str, Any]]
Build = Callable[[str, str | None], Path]

builds = pytest.mark.parametrize(("overlay", "job"), BUILDS)
overlays = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The directory of an overlay, or of a job with it: its kustomization.yaml is changed as its comment says."""
    trees = {}
    for overlay in OVERLAYS:
        trees[overlay] = tmp_path_factory.mktemp(overlay) / "deploy"
        shutil.copytree(REPOSITORY / "deploy", trees[overlay])
        for path in (trees[overlay] / "kubernetes/jobs").glob("*/kustomization.yaml"):
            path.write_text(path.read_text().replace("[../../overlays/static-keys,", f"[../../overlays/{overlay},"))
    return lambda overlay, job: trees[overlay] / "kubernetes" / (f"jobs/{job}" if job else f"overlays/{overlay}")


def by_kind(manifests: list[dict[str, Any]], kind: str) -> Manifests:
    return {manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] == kind}


def cluster_specs(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What KubeRay makes clusters of."""
    specs = [m["spec"].get("jobTemplate", m["spec"]) for m in manifests if m["apiVersion"].startswith("ray.io/")]
    return [spec.get("rayClusterSpec", spec) for spec in specs]


def pods(value: Any) -> list[dict[str, Any]]:
    """Every pod template in a manifest."""
    if isinstance(value, list):
        return [pod for item in value for pod in pods(item)]
    if not isinstance(value, dict):
        return []
    own = [item for item in value.values() if isinstance(item, dict) and "containers" in item.get("spec", {})]
    return own + [pod for item in value.values() for pod in pods(item)]


def check(manifest: dict[str, Any]) -> None:
    """By the schema of the server that takes it."""
    if manifest["apiVersion"].startswith("ray.io/"):
        schema = {**CRDS[manifest["kind"]], "RayJob": CRDS["RayJob"]}
        jsonschema.validate(manifest, schema, cls=jsonschema.Draft202012Validator)
    else:
        kubernetes_validate.validate(manifest, "1.34", strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@builds
def test_kubectl_makes_what_the_tests_look_at(build: Build, overlay: str, job: str | None) -> None:
    command = ["kubectl", "kustomize", build(overlay, job)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    # The hash of a config map's content, in Kustomize's alphabet.
    text = re.sub(r"\b(mlflow)-[bcdfghkmt2456789]{10}$", r"\1", text, flags=re.MULTILINE)
    assert {json.dumps(made, sort_keys=True) for made in yaml.safe_load_all(text)} == {
        json.dumps(made, sort_keys=True) for made in render(build(overlay, job))
    }


@builds
def test_manifests_fit_their_schemas(build: Build, overlay: str, job: str | None) -> None:
    manifests = render(build(overlay, job))
    found = pods(manifests)
    assert len(found) >= 4
    for manifest in manifests:
        check(manifest)
    for pod in found:
        # Inside a template restartPolicy and metadata are the controller's to fill in.
        check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod["spec"]})


def test_the_schemas_refuse_what_is_not_in_them(build: Build) -> None:
    (job,) = by_kind(render(build("static-keys", "samples")), "RayJob").values()
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        check(job)
    (job,) = by_kind(render(build("static-keys", "samples-daily")), "RayCronJob").values()
    job["spec"]["jobTemplate"]["entryPoint"] = "python"
    with pytest.raises(jsonschema.ValidationError, match="entryPoint"):
        check(job)


@overlays
def test_each_job_makes_what_it_is_and_no_second_cluster(build: Build, overlay: str) -> None:
    kinds = {"RayCluster", "RayJob", "RayCronJob", "CronJob"}
    made = {job: sorted({m["kind"] for m in render(build(overlay, job))} & kinds) for job in (None, *JOBS)}
    assert made == {
        None: ["RayCluster"],
        "train": ["RayJob"],
        "samples": ["RayJob"],
        "samples-daily": ["RayCronJob"],
        "samples-hourly": ["CronJob", "RayCluster"],
    }


@overlays
def test_all_clusters_are_the_overlays(build: Build, overlay: str) -> None:
    (cluster,) = cluster_specs(render(build(overlay, None)))
    for job in JOBS:
        assert cluster_specs(render(build(overlay, job))) == [cluster]
    (job,) = by_kind(render(build(overlay, "samples")), "RayJob").values()
    (cron,) = by_kind(render(build(overlay, "samples-daily")), "RayCronJob").values()
    assert cron["spec"]["jobTemplate"] == job["spec"]


@overlays
def test_the_cluster_is_guarded_and_has_an_idle_head(build: Build, overlay: str) -> None:
    (spec,) = cluster_specs(render(build(overlay, None)))
    assert spec["rayVersion"] == version("ray")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@overlays
def test_gpu_workers_go_to_one_kind_of_node_which_others_leave_free(build: Build, overlay: str) -> None:
    (spec,) = cluster_specs(render(build(overlay, None)))
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        gpus = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        assert gpus == (group["groupName"] == "gpu") == ("tolerations" in pod) == ("nodeSelector" in pod)
        assert (group["replicas"], group["minReplicas"]) == (0, 0)


@overlays
def test_workers_drain_before_kubernetes_kills_them(build: Build, overlay: str) -> None:
    (spec,) = cluster_specs(render(build(overlay, None)))
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        drain = float(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S))
        assert 30 <= drain <= pod["terminationGracePeriodSeconds"] - 20


@builds
def test_no_pod_is_privileged_and_each_says_what_it_takes(build: Build, overlay: str, job: str | None) -> None:
    """What `pod-security.kubernetes.io/enforce: restricted` asks, of KubeRay's own containers too."""
    manifests = render(build(overlay, job))
    for pod in pods(manifests):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    limited = [*containers(manifests), *[spec["autoscalerOptions"] for spec in cluster_specs(manifests)]]
    for container in limited:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]


@builds
def test_what_pods_refer_to_exists_or_is_made_as_the_page_says(build: Build, overlay: str, job: str | None) -> None:
    manifests = render(build(overlay, job))
    text = json.dumps(manifests)
    assert set(re.findall(r'"configMapRef": {"name": "([\w-]+)"', text)) == set(by_kind(manifests, "ConfigMap"))
    assert set(re.findall(r'"serviceAccountName": "([\w-]+)"', text)) == set(by_kind(manifests, "ServiceAccount"))
    secrets = set(re.findall(r'"secretRef": {"name": "([\w-]+)"', text))
    secrets |= {re.search(r'"name": "([\w-]+)"', ref)[1] for ref in re.findall(r'"secretKeyRef": {[^}]+}', text)}
    assert secrets <= MADE_BY_THE_OPERATOR | MADE_BY_KUBERAY
    assert ("bucket" in secrets) == (overlay == "static-keys")
    page = (REPOSITORY / "docs/operations.md").read_text()
    for name in MADE_BY_THE_OPERATOR:
        assert re.search(rf"kubectl create secret [\w-]+ {name} ", page)


@overlays
def test_keys_or_a_role(build: Build, overlay: str) -> None:
    manifests = render(build(overlay, None))
    (account,) = by_kind(manifests, "ServiceAccount").values()
    annotations = set(account["metadata"].get("annotations", {}))
    settings = by_kind(manifests, "ConfigMap")["ddpm"]["data"]
    assert "AWS_DEFAULT_REGION" in settings
    assert ("AWS_ENDPOINT_URL" in settings) == (overlay == "static-keys")
    roles = {"eks.amazonaws.com/role-arn", "iam.gke.io/gcp-service-account"}
    assert annotations == (roles if overlay == "workload-identity" else set())
    assert account["imagePullSecrets"] == [{"name": "registry"}]
    assert ("mlflow-postgresql" in by_kind(manifests, "StatefulSet")) == (overlay == "static-keys")


def test_the_heads_pod_is_not_removed_by_a_drain(build: Build) -> None:
    manifests = render(build("static-keys", None))
    (name,) = by_kind(manifests, "RayCluster")
    (budget,) = by_kind(manifests, "PodDisruptionBudget").values()
    # KubeRay's own labels; and only whole pods are possible for what has no scale.
    assert budget["spec"]["selector"]["matchLabels"] == {"ray.io/cluster": name, "ray.io/node-type": "head"}
    assert budget["spec"]["minAvailable"] == 1


def test_the_standing_cluster_is_the_one_that_jobs_are_submitted_to(build: Build) -> None:
    manifests = render(build("static-keys", "samples-hourly"))
    (cluster,) = by_kind(manifests, "RayCluster")
    (job,) = containers(by_kind(manifests, "CronJob")["ddpm-samples"])
    assert f"http://{cluster}-head-svc:8265" in job["command"]
    env = {entry["name"]: entry for entry in job["env"]}
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": cluster, "key": "auth_token"}


def test_an_images_name_is_changed_in_one_place(build: Build) -> None:
    directory = build("static-keys", "train")
    path = directory.parents[1] / "overlays/static-keys/kustomization.yaml"
    text = path.read_text()
    try:
        path.write_text(text.replace("newTag: 0.1.0", "newTag: 9.9.9"))
        images = {container["image"] for container in containers(render(directory))}
    finally:
        path.write_text(text)
    assert images == {"postgres:17", "registry.example/ddpm-mlflow:9.9.9", "registry.example/ddpm-pipeline:9.9.9"}
