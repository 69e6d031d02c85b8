"""The files under deploy/: valid for Kubernetes and KubeRay, and their commands are commands of this project."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipelines.config import parse
from pipelines.sampling.config import SampleConfig

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
CRDS = json.loads(Path(__file__).with_name("kuberay_crds.json").read_text())
MANIFESTS = sorted(DEPLOY.glob("*/*.yaml"))


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


def test_there_is_one_file_for_each_way_to_schedule() -> None:
    kinds = {load(path)["kind"] for path in MANIFESTS}
    assert kinds == {"CronJob", "RayJob", "RayCronJob"}


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
    assert sample_config(commands[2]).num_workers == (1, 4)


def test_both_kuberay_files_run_the_same_cluster() -> None:
    job, cron = load(DEPLOY / "kuberay/rayjob.yaml"), load(DEPLOY / "kuberay/raycronjob.yaml")
    assert cron["spec"]["jobTemplate"] == job["spec"]


def test_the_image_copies_what_there_is() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert all((REPOSITORY / name).exists() for line in copied for name in line.split())
