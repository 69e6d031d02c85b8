"""A Ray cluster of several raylets on this machine, whose nodes can be added, drained and killed."""

import os
import signal
import time
from collections.abc import Mapping
from unittest.mock import patch

from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason


class RayNodes:
    """A head that runs no work, and `count` nodes of one CPU each, whose workers have the variables of `environment`.

    `address` is for `cluster.address`.
    """

    def __init__(self, count: int, environment: Mapping[str, str] | None = None) -> None:
        # Ray gives its workers the lowest priority, and here a test waits for them.
        self._environment = {**(environment or {}), "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        with patch.dict(os.environ, self._environment):
            self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address: str = self._cluster.address
        self.nodes = []
        for _ in range(count):
            self.add()

    def add(self) -> None:
        """Start one more node; returns when the cluster knows it."""
        handler = signal.getsignal(signal.SIGTERM)
        with patch.dict(os.environ, self._environment):
            self.nodes.append(self._cluster.add_node(num_cpus=1))
        signal.signal(signal.SIGTERM, handler)  # Ray's own would drain a node of ours when this process is ended

    def kill(self, index: int) -> None:
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
