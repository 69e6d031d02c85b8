"""What runs where, on three raylets: a head that is to do no work, a node of CPUs, and one that says it has a GPU."""

import json
import subprocess
import sys

import pytest
from support.ray_nodes import RayNodes

PLACES = """
import json, sys
import ray
from pipelines.cluster import gpus
from pipelines.cluster.actor_pool import ActorPool, run_on_actors
from pipelines.cluster.config import GpuClusterConfig
from pipelines.cluster.placement import off_idle_nodes

ray.init(address=sys.argv[1], log_to_driver=False)
selector = off_idle_nodes()

def place(batch):
    return {"node": [ray.get_runtime_context().get_node_id()]}

def places(label_selector):
    rows = ray.data.from_items(list(range(24)), override_num_blocks=24)
    found = rows.map_batches(place, batch_size=None, num_cpus=0, label_selector=label_selector)
    return sorted({row["node"] for row in found.take_all()})

def place_of(index):
    return ray.get_runtime_context().get_node_id()

idle = [node["NodeID"] for node in ray.nodes() if not node["Resources"].get("CPU")]
settled, told = gpus.settle(GpuClusterConfig())
actors = sorted({node for _, node in run_on_actors(place_of, range(4), ActorPool.of(settled), "here")})
print(json.dumps({"idle": idle, "places": places(selector), "told": told, "actors": actors}))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_reads_keep_off_a_head_without_cpus_and_actors_go_where_the_gpus_are() -> None:
    nodes = RayNodes(1)
    try:
        nodes.add(num_gpus=1)
        command = [sys.executable, "-c", PLACES, nodes.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert len(found["idle"]) == 1
        assert found["places"]
        assert set(found["places"]) <= {node.node_id for node in nodes.nodes}
        assert found["told"] == "GPUs: 1 per worker (the cluster has 1)"
        assert found["actors"] == [nodes.nodes[1].node_id]
    finally:
        nodes.close()
