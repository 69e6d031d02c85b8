"""Training on several nodes that die, join and are drained: elastic workers, a just-in-time checkpoint, SIGTERM."""

import signal
from pathlib import Path

import pytest
import yaml
from job_process import JobProcess
from ray_nodes import RayNodes
from train_runs import ROWS, checkpoints, mlflow_run, tiny

from pipelines.config import as_dict

pytestmark = [pytest.mark.ray, pytest.mark.slow]
EVERY, BATCH = 50, 12


def test_elastic_workers_follow_the_cluster_and_a_drained_node_costs_no_step(training_root: Path) -> None:
    nodes = RayNodes(2)
    config = tiny(
        training_root,
        "elastic",
        # One worker and one read fill a node of one CPU.
        cluster={"address": nodes.address, "num_workers": (1, 3), "cpus_per_worker": 0.75},
        data={"cpus_per_read": 0.25},
        train={"steps": 1_000_000, "batch_size": BATCH},
        checkpoint={"every_steps": EVERY, "keep": 1000},
        validation={"every_steps": 1_000_000},
        grid={"every_steps": 1_000_000},
    )
    recipe = training_root / "elastic.yaml"
    recipe.write_text(yaml.safe_dump(as_dict(config)))
    store = checkpoints(config)
    job = JobProcess("jobs/train.py", "--config", str(recipe))
    try:
        job.wait_until(lambda: store.steps())
        assert store.load(store.steps()[-1]).state["world_size"] == 2
        nodes.kill(0)
        job.wait_until(lambda: "on 1 worker(s)" in job.text)
        job.wait_until(lambda: store.load(store.steps()[-1]).state["world_size"] == 1)
        nodes.add()
        nodes.add()
        job.wait_until(lambda: "on 3 worker(s)" in job.text)
        job.wait_until(lambda: store.load(store.steps()[-1]).state["world_size"] == 3)
        # A checkpoint that is not due can only be the one that the drain asked for.
        nodes.drain(1, deadline_s=120)
        job.wait_until(lambda: [step for step in store.steps() if step % EVERY])
        nodes.kill(1)
        resumed = job.text.count("resumed at step")
        job.wait_until(lambda: job.text.count("resumed at step") > resumed)
        job.send(signal.SIGTERM)
        assert job.wait() == 143, job.text
        assert "state is kept, run the same command to continue" in job.text
        assert "raylet" not in job.text
    finally:
        job.close()
        nodes.close()
    state, ledger = store.load_ledger()
    ledger.check(ROWS, state["step"], BATCH)
    for epoch in range(state["step"] * BATCH // ROWS):
        assert ledger.ids(epoch).tolist() == list(range(ROWS))
    client, run = mlflow_run(config)
    assert run.info.status == "KILLED"
    steps = {point.step for point in client.get_metric_history(run.info.run_id, "train/loss")}
    assert steps >= set(range(1, state["step"] + 1))
