"""Ray clusters of several nodes on this machine: a head that runs no work, nodes that come, are drained, and go."""

import os
import signal
import time
from collections.abc import Mapping
from unittest.mock import patch
from uuid import uuid4

import psutil
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from support.job_process import JobProcess
from support.network_namespaces import Machines

from pipelines.cluster import ray_private
from pipelines.cluster.spot_notice import Raylet


class RayNodes:
    """Raylets side by side, with one CPU each; their workers have the variables of `environment`.

    `address` is for `cluster.address`, `driver` are words before the command of a job that uses it.
    """

    driver: tuple[str, ...] = ()

    def __init__(self, count: int, environment: Mapping[str, str] | None = None) -> None:
        assert not ray.is_initialized(), "the driver that is connected would lose its cluster; see FIRST in conftest.py"
        self.environment = dict(environment or {})
        with patch.dict(os.environ, self.environment), ray_private.patience():
            self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address: str = self._cluster.address
        self.nodes = []
        for _ in range(count):
            self.add()

    def add(self, num_gpus: int = 0) -> None:
        """Start one more node, which says that it has so many GPUs; returns when the cluster knows it."""
        handler = signal.getsignal(signal.SIGTERM)
        with patch.dict(os.environ, self.environment), ray_private.patience():
            self.nodes.append(self._cluster.add_node(num_cpus=1, num_gpus=num_gpus))
        signal.signal(signal.SIGTERM, handler)  # Ray's own would drain a node of ours when this process is ended

    def lose(self, index: int) -> None:
        """SIGKILL a node's raylet and all its processes."""
        self._cluster.remove_node(self.nodes.pop(index), allow_graceful=False)

    def drain(self, index: int, deadline_s: float) -> None:
        """Announce that a node will go, as a spot notice does."""
        deadline_ms = int((time.time() + deadline_s) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(
            self.nodes[index].node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot notice", deadline_ms
        )
        assert accepted, why

    def close(self) -> None:
        """Kill everything."""
        for node in [*self.nodes, self._cluster.head_node]:
            self._cluster.remove_node(node, allow_graceful=False)


class RayMachines:
    """The same on machines with addresses of their own, started by `ray start`; `lose` pulls a machine's cable."""

    _PORT = 6379

    def __init__(self, machines: Machines, count: int) -> None:
        self._machines, self._started = machines, 0
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid4().hex,
            "RAY_health_check_timeout_ms": "3000",  # a node that is silent for 12 s instead of 50 s is dead
            "RAY_health_check_failure_threshold": "4",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "GLOO_SOCKET_IFNAME": "lan",  # on all of them this host's name stands for 127.0.0.1
        }
        self.address = f"{machines.addresses[0]}:{self._PORT}"
        self.driver = tuple(machines.on(0))
        self._processes: list[JobProcess] = []
        self._nodes: list[int] = []
        self._start("--head", f"--port={self._PORT}", "--include-dashboard=false", "--num-cpus=0")
        for _ in range(count):
            self.add()

    def _start(self, *role: str) -> None:
        n = self._started
        command = ["-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=150000000"]
        command += [f"--node-ip-address={self._machines.addresses[n]}", *role]
        process = JobProcess(*command, environment=self.environment, on=self._machines.on(n))
        self._processes.append(process)
        process.wait_until(lambda: "Ray runtime started." in process.text)
        self._started += 1

    def add(self) -> None:
        """Start Ray on one more machine."""
        self._nodes.append(self._started)
        self._start(f"--address={self.address}", "--num-cpus=1")

    def lose(self, index: int) -> None:
        """Cut a machine off."""
        self._machines.cut_off(self._nodes.pop(index))

    def drain(self, index: int, deadline_s: float) -> None:
        """Announce that a machine will go."""
        n = self._nodes[index]
        command = ["-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot notice"]
        command += [f"--deadline-remaining-seconds={deadline_s:.0f}", f"--node-id={self._node_id(n)}"]
        drain = JobProcess(*command, environment=self.environment, on=self.driver)
        assert drain.wait() == 0, drain.text

    def _node_id(self, n: int) -> str:
        children = {
            child.name(): child.pid for child in psutil.Process(self._processes[n].pid).children(recursive=True)
        }
        return Raylet.find(children["raylet"]).node_id

    def close(self) -> None:
        """End Ray everywhere."""
        for process in reversed(self._processes):
            process.send(signal.SIGTERM)
        for process in self._processes:
            process.wait()
