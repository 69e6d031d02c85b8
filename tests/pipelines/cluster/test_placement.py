"""Tasks that reserve nothing, on three raylets of which the head is to do no work."""

import json
import subprocess
import sys

import pytest
from support.ray_nodes import RayNodes

PLACES = """
import json, sys
import ray
from pipelines.cluster.placement import off_idle_nodes

ray.init(address=sys.argv[1], log_to_driver=False)
selector = off_idle_nodes()

def place(batch):
    return {"node": [ray.get_runtime_context().get_node_id()]}

def places(label_selector):
    rows = ray.data.from_items(list(range(24)), override_num_blocks=24)
    found = rows.map_batches(place, batch_size=None, num_cpus=0, label_selector=label_selector)
    return sorted({row["node"] for row in found.take_all()})

idle = [node["NodeID"] for node in ray.nodes() if not node["Resources"].get("CPU")]
print(json.dumps({"idle": idle, "places": places(selector)}))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_reads_that_reserve_no_cpu_keep_off_a_head_without_any() -> None:
    nodes = RayNodes(2)
    try:
        command = [sys.executable, "-c", PLACES, nodes.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert len(found["idle"]) == 1
        assert found["places"]
        assert set(found["places"]) <= {node.node_id for node in nodes.nodes}
    finally:
        nodes.close()
