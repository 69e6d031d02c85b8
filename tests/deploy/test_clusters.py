"""The files of Ray's cluster launcher: what `ray up` checks before it uses the network, and what they promise."""

import copy
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

REPOSITORY = Path(__file__).parents[2]
AWS, LOCAL = REPOSITORY / "ray_cluster.yaml", REPOSITORY / "deploy/onpremises/ray_cluster.yaml"
DOCKERFILE = (REPOSITORY / "deploy/Dockerfile").read_text()
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
LOCK = {
    package["name"]: package.get("version")
    for package in tomllib.loads((REPOSITORY / "uv.lock").read_text())["package"]
}

both = pytest.mark.parametrize("path", [AWS, LOCAL], ids=["aws", "local"])


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def prepared(path: Path) -> dict[str, Any]:
    """The configuration as `ray up` completes it, which it also checks against Ray's schema."""
    config = prepare_config(load(path))
    validate_config(config)
    return config


def commands(config: dict[str, Any]) -> list[str]:
    return [command for key, value in config.items() if key.endswith("_commands") for command in value]


def option(command: str, name: str) -> str:
    (value,) = [word.partition("=")[2] for word in shlex.split(command) if word.startswith(f"{name}=")]
    return value


def start(config: dict[str, Any], node: str) -> str:
    """The command that starts Ray on the `head` or a `worker`."""
    (command,) = [line for line in config[f"{node}_start_ray_commands"] if "ray start" in line]
    return command


@both
def test_ray_accepts_the_file(path: Path) -> None:
    config = prepared(path)
    autoscaling = AutoscalingConfig(copy.deepcopy(config), skip_content_hash=True)
    assert autoscaling.get_head_node_type() == config["head_node_type"]
    assert autoscaling.get_max_num_worker_nodes() == config["max_workers"] > 0


def test_ray_refuses_what_it_does_not_know() -> None:
    config = load(AWS)
    config["available_node_types"]["data"]["max_worker"] = 3
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(config))


@both
def test_nothing_of_rays_defaults_is_installed(path: Path) -> None:
    """They install a nightly build of Ray for another Python."""
    assert not [line for line in commands(prepared(path)) if "ray-wheels" in line or "anaconda" in line]
    assert not [line for line in commands(prepared(path)) if re.search(r"pip install(?!.*==)", line)]


@both
def test_uv_python_and_packages_are_pinned(path: Path) -> None:
    """Ray and all other packages by uv.lock; uv and Python in the file, the same as in the image."""
    setup = "\n".join(prepared(path)["setup_commands"])
    (uv,) = re.findall(r"https://astral\.sh/uv/([\d.]+)/install\.sh", setup)
    assert f"uv=={uv}" in DOCKERFILE
    (sync,) = [line for line in prepared(path)["setup_commands"] if "uv sync" in line]
    assert "--locked --no-dev" in sync
    (python,) = re.findall(r"--python (\d+\.\d+\.\d+)$", sync)
    minor = python.rpartition(".")[0]
    assert f"FROM python:{minor}-slim" in DOCKERFILE
    low, high = re.findall(r"3\.\d+", PYPROJECT["project"]["requires-python"])
    assert int(low[2:]) <= int(minor[2:]) < int(high[2:])
    assert LOCK["ray"] == "2.60.0"  # what deploy/kubernetes names, too


def test_the_head_gets_the_locked_boto3() -> None:
    (install,) = load(AWS)["head_setup_commands"]
    assert install.endswith(f"boto3=={LOCK['boto3']}")


@both
def test_every_node_gets_the_token_and_uses_it(path: Path) -> None:
    config = prepared(path)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    for node in ("head", "worker"):  # setup_commands run on both
        (environment,) = [line for line in config[f"{node}_setup_commands"] if ">> ~/.bashrc" in line]
        assert "RAY_AUTH_MODE=token" in environment
        assert "$HOME/ddpm-pipeline/.venv/bin" in environment


@both
def test_the_mounted_tree_is_the_one_in_the_image(path: Path) -> None:
    mounts = load(path)["file_mounts"]
    project = {local for remote, local in mounts.items() if remote.startswith("~/ddpm-pipeline/")}
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    project -= {"deploy/aws/parameters.json"}  # from which the nodes have their root
    assert project == copied - {"jobs", "configs"}  # those come with each job (--working-dir)
    assert all((REPOSITORY / name).exists() for name in project)
    assert all(mounts[f"~/ddpm-pipeline/{name}"] == name for name in project)


@both
def test_the_head_runs_no_work_and_hides_its_dashboard(path: Path) -> None:
    config = prepared(path)
    command = start(config, "head")
    assert option(command, "--dashboard-host") == "127.0.0.1"
    assert option(command, "--autoscaling-config") == "~/ray_bootstrap_config.yaml"
    if path == AWS:
        assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    else:
        assert (option(command, "--num-cpus"), option(command, "--num-gpus")) == ("0", "0")


@both
def test_workers_join_the_head(path: Path) -> None:
    config = prepared(path)
    assert option(start(config, "worker"), "--address") == "$RAY_HEAD_IP:" + option(start(config, "head"), "--port")


def test_spot_is_for_gpu_workers_only_and_everything_scales_to_zero() -> None:
    config = load(AWS)
    types = config["available_node_types"]
    spot = {name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert spot == {"spot-gpu"}
    assert types["spot-gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    workers = {name: kind for name, kind in types.items() if name != config["head_node_type"]}
    assert all(kind["min_workers"] == 0 for kind in workers.values())
    assert config["max_workers"] >= sum(kind["max_workers"] for kind in workers.values())
    assert config["provider"]["cache_stopped_nodes"] is False


def test_machines_have_their_own_roles_and_guard_their_credentials() -> None:
    for name, kind in load(AWS)["available_node_types"].items():
        node = kind["node_config"]
        assert node["IamInstanceProfile"] == {"Name": "ddpm-head" if name == "head" else "ddpm-worker"}
        assert node["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])


@pytest.mark.parametrize(("node_type", "watched"), [("spot-gpu", True), ("data", False), ("", False)])
def test_the_watcher_starts_on_spot_workers(node_type: str, watched: bool, tmp_path: Path) -> None:
    """The file's own command, run as the launcher runs it, with a `python` that says how it was called."""
    (command,) = [line for line in load(AWS)["worker_start_ray_commands"] if "spot_notice" in line]
    (tmp_path / "python").write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/called.new && mv {tmp_path}/called.new {tmp_path}/called\n'
    )
    (tmp_path / "python").chmod(0o755)
    # `setsid --fork` leaves at once; the file that the shell holds open ends with the child.
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "RAY_NODE_TYPE_NAME": node_type}
    shell = subprocess.run(["bash", "-c", f"({command})"], env=environment, capture_output=True, timeout=60, check=True)
    assert shell.stdout == b""
    assert called(tmp_path / "called", watched) == ("-m pipelines.cluster.spot_notice" if watched else None)
    assert (REPOSITORY / "pipelines/cluster/spot_notice.py").exists()


def called(path: Path, expected: bool) -> str | None:
    deadline = time.monotonic() + 60
    while expected and not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.read_text().strip() if path.exists() else None


@both
def test_shell_commands_parse(path: Path) -> None:
    """As the launcher sends them: in a subshell, one line each."""
    for command in commands(prepared(path)):
        assert "\n" not in command
        subprocess.run(["bash", "-n", "-c", f"source ~/.bashrc; export A=1 && ({command})"], check=True, timeout=60)


@both
def test_the_environment_is_written_once(path: Path, tmp_path: Path) -> None:
    """The setup command itself, twice, as in a second `ray up`; cloud-init is what AWS's Ubuntu images have."""
    (command,) = [line for line in load(path)["setup_commands"] if ".bashrc" in line]
    (tmp_path / "cloud-init").write_text("#!/bin/sh\necho eu-west-3\n")
    (tmp_path / "cloud-init").chmod(0o755)
    (tmp_path / "python3").symlink_to(sys.executable)
    (tmp_path / ".bashrc").write_text("export KEPT=1\n")
    parameters = tmp_path / "ddpm-pipeline/deploy/aws/parameters.json"
    parameters.parent.mkdir(parents=True)
    parameters.write_bytes((REPOSITORY / "deploy/aws/parameters.json").read_bytes())
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    for _ in range(2):
        subprocess.run(["bash", "-c", f"({command})"], env=environment, check=True, timeout=60)
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 2
    shown = subprocess.run(
        ["bash", "-c", ". ~/.bashrc; env"], env=environment, capture_output=True, text=True, check=True
    )
    variables = dict(line.split("=", 1) for line in shown.stdout.splitlines())
    assert variables["KEPT"] == "1"
    assert variables["RAY_AUTH_MODE"] == "token"
    assert variables["PATH"].startswith(f"{tmp_path}/ddpm-pipeline/.venv/bin:{tmp_path}/.local/bin:")
    assert variables.get("AWS_DEFAULT_REGION") == ("eu-west-3" if path == AWS else None)
    assert variables.get("DDPM_ROOT") == ("s3://example-bucket/ddpm" if path == AWS else None)
