"""Training on several machines that are cut off, join and are drained: elastic workers, a just-in-time checkpoint."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.job_process import JobProcess
from support.network_namespaces import Machines, NotPermitted
from support.ray_nodes import RayMachines, RayNodes
from support.train_runs import ROWS, checkpoints, mlflow_run, tiny

from pipelines.cli.config import as_dict
from pipelines.data.epochs import Epochs
from pipelines.data.hold_out import HoldOut
from pipelines.training.ledger_report import newest_ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow]
EVERY, BATCH, FOREVER = 50, 12, 50_000


@pytest.fixture
def nodes() -> Iterator[RayMachines | RayNodes]:
    """Two nodes of one CPU and a head without; with addresses of their own where that is permitted."""
    try:
        machines = Machines(5)
    except NotPermitted:
        nodes = RayNodes(2)
        yield nodes
        nodes.close()
        return
    try:
        ray = RayMachines(machines, 2)
        yield ray
        ray.close()
    finally:
        machines.close()


def test_elastic_workers_follow_the_cluster_and_a_drained_node_costs_no_step(
    nodes: RayMachines | RayNodes, training_root: Path
) -> None:
    config = tiny(
        training_root,
        "elastic",
        # One worker and one read fill a node of one CPU.
        cluster={"address": nodes.address, "num_workers": (1, 3), "cpus_per_worker": 0.75},
        data={"cpus_per_read": 0.25},
        batch_size=BATCH,
        train={"steps": FOREVER},
        checkpoint={"every_steps": EVERY, "keep": 1000},
        validation={"every_steps": FOREVER},
        grid={"every_steps": FOREVER},
    )
    recipe = training_root / "elastic.yaml"
    recipe.write_text(yaml.safe_dump(as_dict(config)))
    store = checkpoints(config)

    def trained_on(workers: int) -> bool:
        steps = store.steps()
        return bool(steps) and store.load(steps[-1]).state["world_size"] == workers

    job = JobProcess("jobs/train.py", "--config", str(recipe), environment=nodes.environment, on=nodes.driver)
    try:
        job.wait_until(lambda: trained_on(2))
        nodes.lose(0)  # the other worker hangs in a sum over both until Ray has noticed
        job.wait_until(lambda: trained_on(1))
        nodes.add()
        nodes.add()
        job.wait_until(lambda: trained_on(3))
        # A checkpoint that is not due can only be the one that the drain asked for.
        nodes.drain(1, deadline_s=120)
        job.wait_until(lambda: [step for step in store.steps() if step % EVERY])
        job.send(signal.SIGTERM)
        assert job.wait() == 143, job.text
    finally:
        job.close()
    assert "on 1 worker(s)" in job.text
    assert "on 3 worker(s)" in job.text
    assert f"step {store.steps()[-1]:,} is kept, run the same command to continue" in job.text
    assert "raylet" not in job.text
    assert f"step {store.steps()[-1]:,} is saved" in job.text  # by all workers, when the signal came
    newest, ledger = newest_ledger(store)
    state = newest.state
    ledger.check(Epochs(HoldOut(ROWS)), state["step"], BATCH)
    for epoch in range(state["step"] * BATCH // ROWS):
        assert ledger.ids(epoch).tolist() == list(range(ROWS))
    client, run = mlflow_run(config)
    assert run.info.status == "KILLED"
    steps = {point.step for point in client.get_metric_history(run.info.run_id, "train/loss")}
    # What was still on its way is with the checkpoint, for the next attempt to report.
    steps |= {record["step"] for record in state["records"]}
    assert steps >= set(range(1, state["step"] + 1))
