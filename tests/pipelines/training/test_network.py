"""Training across machines with addresses of their own, one of which is cut off in the middle."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from job_process import JobProcess
from network_namespaces import Machines
from train_runs import assert_each_row_once, checkpoints, curve, mlflow_run, tiny

from pipelines.config import as_dict

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PORT = 6379
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    "RAY_health_check_timeout_ms": "3000",  # a node that is silent for 12 s instead of 50 s is dead
    "RAY_health_check_failure_threshold": "4",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "GLOO_SOCKET_IFNAME": "lan",  # on all of them this host's name stands for 127.0.0.1
}


@pytest.fixture
def machines() -> Iterator[Machines]:
    """A head that runs no work, and two machines with one CPU each; `ray start` has been run on all."""
    machines = Machines(3)
    started: list[JobProcess] = []
    try:
        for n, address in enumerate(machines.addresses):
            role = ["--head", f"--port={PORT}", "--include-dashboard=false", "--num-cpus=0"]
            if n:
                role = [f"--address={machines.addresses[0]}:{PORT}", "--num-cpus=1"]
            start = ["-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
            start += [f"--node-ip-address={address}", "--object-store-memory=150000000", *role]
            ray = JobProcess(*start, environment=ENVIRONMENT, on=machines.on(n))
            started.append(ray)
            ray.wait_until(lambda ray=ray: "Ray runtime started." in ray.text)
        yield machines
    finally:
        for ray in reversed(started):
            ray.send(signal.SIGTERM)
        for ray in started:
            ray.wait()
        machines.close()


def test_a_machine_that_is_cut_off_does_not_hang_the_others(machines: Machines, training_root: Path) -> None:
    steps, batch = 150, 16
    config = tiny(
        training_root,
        "cut-off",
        cluster={"address": f"{machines.addresses[0]}:{PORT}", "num_workers": (1, 2), "cpus_per_worker": 0.75},
        data={"cpus_per_read": 0.25},
        train={"steps": steps, "batch_size": batch},
        checkpoint={"every_steps": 50},
        validation={"every_steps": steps},
        grid={"every_steps": steps},
    )
    recipe = training_root / "cut-off.yaml"
    recipe.write_text(yaml.safe_dump(as_dict(config)))
    store = checkpoints(config)
    job = JobProcess("jobs/train.py", "--config", str(recipe), environment=ENVIRONMENT, on=machines.on(0))
    try:
        job.wait_until(lambda: store.steps())
        assert store.load(store.steps()[-1]).state["world_size"] == 2
        machines.cut_off(2)
        assert job.wait(600) == 0, job.text
    finally:
        job.close()
    assert "on 1 worker(s)" in job.text
    assert_each_row_once(config)
    assert [step for step, _ in curve(config)] == list(range(1, steps + 1))
    assert mlflow_run(config)[1].info.status == "FINISHED"
