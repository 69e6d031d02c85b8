"""The on-premises cluster, really started: the file's own start commands, run here as the launcher runs them on two
machines, with token authentication. Then AWS takes the worker's machine, as far as the watcher can tell."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config
from support.metadata_service import SpotInstance

from pipelines.cli.errors import ClusterError
from pipelines.cluster.spot_notice import Raylet

pytestmark = pytest.mark.slow

FILE = Path(__file__).parents[2] / "deploy/onpremises/ray_cluster.yaml"
PATIENCE_S = 120
# Asked in a process of its own: in this one another Ray may be in use, without a token.
NODES = """
import json, sys, time
from ray._raylet import GcsClient
from ray.core.generated.common_pb2 import NodeDeathInfo
from ray.core.generated.gcs_pb2 import GcsNodeInfo
wanted, deadline = sys.argv[2], time.monotonic() + 120
client = GcsClient(address=sys.argv[1])
while True:
    nodes = [
        {
            "id": node.node_id.hex(),
            "head": node.is_head_node,
            "state": GcsNodeInfo.GcsNodeState.Name(node.state),
            "reason": NodeDeathInfo.Reason.Name(node.death_info.reason),
            "cpus": node.resources_total.get("CPU", 0),
        }
        for node in client.get_all_node_info().values()
    ]
    if sorted(node["state"] for node in nodes) == sorted(wanted.split(",")) or time.monotonic() > deadline:
        break
    time.sleep(0.1)
print(json.dumps(nodes))
"""
# As a job asks that runs there.
GPUS = """
import json, sys
from pipelines.cli.errors import ClusterError
from pipelines.cluster import gpus
from pipelines.cluster.actor_pool import ActorPool
from pipelines.cluster.config import GpuClusterConfig

def refusal(number):
    try:
        ActorPool.of(GpuClusterConfig(sys.argv[1], gpus_per_worker=number)).check()
    except ClusterError as error:
        return str(error)

settled, line = gpus.settle(GpuClusterConfig(sys.argv[1]))
print(json.dumps([settled.gpus, line, refusal(4), refusal(5)]))
"""


@dataclass
class Cluster:
    """Both nodes of it are here; `environment` is what a client needs, its token included."""

    directory: Path
    port: int
    dashboard: str
    environment: dict[str, str]

    def nodes(self, *states: str) -> list[dict[str, Any]]:
        """All nodes, the head first, as soon as they are in `states`."""
        command = [sys.executable, "-c", NODES, f"127.0.0.1:{self.port}", ",".join(states)]
        answer = subprocess.run(
            command, env=self.environment, stdout=subprocess.PIPE, text=True, timeout=2 * PATIENCE_S, check=True
        )
        return sorted(json.loads(answer.stdout), key=lambda node: not node["head"])

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Ray's processes of this cluster: all of them have its directory on their command line."""
        mine = f"{self.directory}/"
        found = [process for process in psutil.process_iter(["name", "cmdline"]) if process.pid != os.getpid()]
        return [
            process
            for process in found
            if name in process.info["name"] and any(mine in word for word in process.info["cmdline"] or ())
        ]


def start_command(node: str, port: int) -> str:
    """The file's commands, except for the port, and for `ray stop`: it would end every Ray of this machine."""
    commands = yaml.safe_load(FILE.read_text())[f"{node}_start_ray_commands"]
    assert commands.pop(0) == "ray stop"
    (command,) = commands
    assert ":6379" in command or "=6379" in command
    return command.replace("6379", str(port))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    directory = Path(f"/tmp/op-{secrets.token_hex(4)}")  # short: sockets lie in it
    directory.mkdir()
    port, client_port = free_ports(2)
    config = yaml.safe_load(FILE.read_text())
    config["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}  # so the autoscaler starts none by SSH
    prepared = prepare_config(config)
    # Machines that the autoscaler may ask for, and does not get.
    prepared["available_node_types"]["gpu"] = {"resources": {"GPU": 4}, "node_config": {}, "max_workers": 2}
    prepared["max_workers"] = 2
    (directory / ".ssh").mkdir()
    (directory / ".ssh/id_ed25519").touch()  # the autoscaler hashes it
    (directory / "ray_bootstrap_config.yaml").write_text(json.dumps(prepared))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "OMP_"))} | {
        "HOME": str(directory),
        "RAY_TMPDIR": str(directory),
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_HEAD_IP": "127.0.0.1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    made = Cluster(directory, port, "", environment)

    def run(command: str, **more: str) -> str:
        ran = subprocess.run(
            ["bash", "-c", f"({command})"],
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * PATIENCE_S,
        )
        assert ran.returncode == 0, ran.stdout
        return ran.stdout

    try:
        run("ray get-auth-token --generate")
        # What the launcher sets for the autoscaler; the other ports keep clear of the machine's other Rays.
        head = {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": "127.0.0.1"}
        head["RAY_NODE_TYPE_NAME"] = "local.cluster.node"
        options = f" --node-ip-address=127.0.0.1 --ray-client-server-port={client_port} --dashboard-agent-listen-port=0"
        said = run(start_command("head", port) + options, **head)
        made.dashboard = re.findall(r"RAY_API_SERVER_ADDRESS='(http://[^']+)'", said)[0]
        run(
            start_command("worker", port)
            + " --num-cpus=3 --num-gpus=0 --node-ip-address=127.0.0.1 --dashboard-agent-listen-port=0"
        )
        yield made
    finally:
        for process in made.processes():
            process.kill()
        psutil.wait_procs(made.processes(), timeout=PATIENCE_S)
        shutil.rmtree(directory, ignore_errors=True)


def status(url: str, token: str | None) -> int:
    """The answer's status, as soon as there is one."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_two_nodes_and_a_head_without_work(cluster: Cluster) -> None:
    head, worker = cluster.nodes("ALIVE", "ALIVE")
    assert (head["head"], head["cpus"]) == (True, 0)
    assert (worker["head"], worker["cpus"]) == (False, 3)
    # The autoscaler has taken the file's configuration.
    assert any("autoscaler/v2/monitor.py" in " ".join(process.info["cmdline"]) for process in cluster.processes())


def test_a_job_learns_from_the_autoscaler_which_gpus_it_can_start(cluster: Cluster) -> None:
    command = [sys.executable, "-c", GPUS, f"127.0.0.1:{cluster.port}"]
    answer = subprocess.run(
        command, env=cluster.environment, stdout=subprocess.PIPE, text=True, timeout=2 * PATIENCE_S, check=True
    )
    gpus, line, of_four, of_five = json.loads(answer.stdout)
    assert (gpus, line) == (1, "GPUs: 1 per worker (the cluster has none now, and can start some)")
    assert of_four is None
    assert of_five.startswith("cluster.gpus_per_worker = 5: no machine of the cluster has 5 GPU for a worker, and none")


def test_the_dashboard_wants_the_token_and_listens_on_loopback(cluster: Cluster) -> None:
    token = (cluster.directory / ".ray/auth_token").read_text()
    assert status(f"{cluster.dashboard}/api/jobs/", None) == 401
    assert status(f"{cluster.dashboard}/api/jobs/", "wrong") in (401, 403)
    assert status(f"{cluster.dashboard}/api/jobs/", token) == 200
    port = int(cluster.dashboard.rpartition(":")[2])
    listening = [c.laddr for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.laddr.port == port]
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_a_spot_notice_drains_the_node_it_is_for(cluster: Cluster, tmp_path: Path) -> None:
    """Also while the GCS does not answer at first; and the watcher ends with success."""
    head, worker = cluster.nodes("ALIVE", "ALIVE")
    raylets = {Raylet.find(process.pid).node_id: process for process in cluster.processes("raylet")}
    assert set(raylets) == {head["id"], worker["id"]}
    with pytest.raises(ClusterError, match=r"raylet_pid = null: must name one of \[.*\d+, \d+"):
        Raylet.find()
    (gcs,) = cluster.processes("gcs_server")
    log = tmp_path / "spot_notice.log"
    with SpotInstance() as instance, log.open("w") as output:
        command = [sys.executable, "-m", "pipelines.cluster.spot_notice", "--poll_seconds", "0.2"]
        command += ["--metadata", instance.address, "--raylet_pid", str(raylets[worker["id"]].pid)]
        impatient = {"RAY_py_gcs_connect_timeout_s": "1", "RAY_gcs_rpc_server_connect_timeout_s": "1"}
        watcher = subprocess.Popen(command, env=cluster.environment | impatient, stderr=output)
        try:
            wait_for(log, "watching http://127.0.0.1")
            gcs.send_signal(signal.SIGSTOP)
            instance.interrupt(PATIENCE_S)
            wait_for(log, "trying again")
            gcs.send_signal(signal.SIGCONT)
            assert watcher.wait(PATIENCE_S) == 0
        finally:
            gcs.send_signal(signal.SIGCONT)
            watcher.kill()
            watcher.wait()
    # One line each; those in brackets are Ray's own.
    first, notice, *failures, last = [line for line in log.read_text().splitlines() if not line.startswith("[")]
    assert first == f"Ray node {worker['id']}: watching {instance.address} for spot notices"
    assert notice.startswith("spot notice: terminate at ")
    assert failures
    assert [line for line in failures if not re.fullmatch(r"GCS at [\d.]+:\d+: .*: trying again", line)] == []
    assert last == f"Ray node {worker['id']} drains"
    # Without work a drained node leaves at once.
    left, gone = cluster.nodes("ALIVE", "DEAD")
    assert (left["id"], gone["id"]) == (head["id"], worker["id"])
    assert gone["reason"] == "AUTOSCALER_DRAIN_PREEMPTED"


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
