"""The files under deploy/ that are no manifests, and that all their commands are commands of this project."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.kustomize import load

from pipelines.cli.config import parse
from pipelines.sampling.config import SampleConfig
from pipelines.training.config import TrainConfig

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
JOBS = DEPLOY / "kubernetes/jobs"
DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "mlflow/Dockerfile"]


def sample_config(command: str | list[str]) -> SampleConfig:
    words = shlex.split(command) if isinstance(command, str) else command
    start = words.index("jobs/sample.py")
    return parse(SampleConfig, words[start + 1 :], "")


def test_the_commands_are_accepted_and_dated() -> None:
    (cron,) = [line for line in (DEPLOY / "cron/ddpm-samples").read_text().splitlines() if line.startswith("17")]
    assert re.match(r"17 \* \* \* \* ddpm cd \S+ && uv run --locked jobs/sample.py ", cron)
    (cronjob,) = load(JOBS / "samples-hourly/cronjob.yaml")
    (container,) = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (job,) = load(JOBS / "samples/rayjob.yaml")
    commands = [cron.partition(" >> ")[0], container["command"] + container["args"], job["spec"]["entrypoint"]]
    for command in commands:
        config = sample_config(command)
        assert (config.seed, config.num_images, config.sampler.name) == ("{date}", 10_000, "ddim")
        assert config.output == "s3://example-bucket/ddpm/samples/{date}"
    assert sample_config(commands[2]).cluster.num_workers == (1, 4)


def test_the_training_job_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    (job,) = load(JOBS / "train/rayjob.yaml")
    program, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (program, script) == ("python", "jobs/train.py")
    config = parse(TrainConfig, arguments, "")
    assert config.cluster.worker_range == (1, 4)
    assert config.cluster.gpus_per_worker == 1
    assert all(uri.startswith("s3://example-bucket/ddpm") for uri in (config.root, config.data.train))


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(name, rest), without comments and with continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


dockerfiles = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: str(path.relative_to(DEPLOY)))


@dockerfiles
def test_the_image_copies_what_there_is(dockerfile: Path) -> None:
    copied = [name for kind, rest in instructions(dockerfile) if kind == "COPY" for name in rest.split()[:-1]]
    assert copied
    assert all((REPOSITORY / name).exists() for name in copied)


@dockerfiles
def test_the_image_is_installed_from_what_it_copies(dockerfile: Path, tmp_path: Path) -> None:
    """Its own step, as far as uv goes without installing."""
    for line in (rest.split() for name, rest in instructions(dockerfile) if name == "COPY"):
        for name in line[:-1]:
            subprocess.run(["cp", "-r", REPOSITORY / name, tmp_path], check=True)
    (sync,) = [rest for name, rest in instructions(dockerfile) if name == "RUN" and rest.startswith("uv sync")]
    uv = shutil.which("uv") or pytest.skip("uv is not on PATH")
    command = [uv, *sync.split()[1:], "--dry-run", "--python", sys.executable]
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert " + mlflow==" in said.stderr


@dockerfiles
def test_the_image_is_pinned_small_and_not_roots(dockerfile: Path) -> None:
    """What hadolint would ask; there is none here."""
    found = instructions(dockerfile)
    names = [name for name, _ in found]
    assert names[0] == "FROM"
    assert set(names) <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "EXPOSE", "CMD"}
    of = {name: [rest for kind, rest in found if kind == name] for name in names}
    assert all(re.fullmatch(r"python:3\.\d+-slim", image) for image in of["FROM"])
    assert all(directory.startswith("/") for directory in of["WORKDIR"])
    # By number: Kubernetes cannot tell of a name whether it is root.
    assert of["USER"] == ["1000"]
    assert "RUN" not in names[names.index("USER") :]
    assert any("useradd --create-home --uid 1000 " in command for command in of["RUN"])
    for command in of["RUN"]:
        for install in re.findall(r"apt-get install[^&]*", command):
            assert "--no-install-recommends" in install
            assert "rm -rf /var/lib/apt/lists/*" in command
        for install in re.findall(r"pip install[^&]*", command):
            assert "--no-cache-dir" in install
            assert re.search(r"\w==\d", install)
    assert any("uv sync --locked" in command for command in of["RUN"])
    assert all(command.startswith('["') for command in of.get("CMD", []))


def test_the_pods_image_has_the_drivers_of_all_object_stores() -> None:
    assert "--extra gcs --extra azure" in (DEPLOY / "Dockerfile").read_text()
