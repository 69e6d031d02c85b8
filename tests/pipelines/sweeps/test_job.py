"""A sweep as its user runs it, stopped and killed on the way."""

import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support.job_process import JobProcess


@pytest.mark.ray
@pytest.mark.slow
def test_a_stopped_and_a_killed_sweep_go_on_and_nothing_is_trained_twice(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    options = {
        "root": str(tmp_path),
        "name": "s",
        "batch_size": "8",
        "precision": "fp32",
        "train.steps": "4",
        "checkpoint.every_steps": "2",
        "validation.num_images": "4",
        "validation.timesteps_per_image": "2",
        "grid.num_images": "1",
        "grid.sampler_steps": "1",
        "cluster.num_workers": "1",
        "cluster.address": ray.get_runtime_context().gcs_address,
    }
    command = ["jobs/sweep.py", *(word for name, value in options.items() for word in (f"--{name}", value))]
    command += ["--vary", "train.learning_rate=1e-4,1e-3", "--vary", "seed=0,1"]
    for reached, number, code in (
        ("1e-4, seed 0 | loading", signal.SIGTERM, 143),
        ("1e-4, seed 1 |", signal.SIGKILL, -9),
    ):
        sweep = JobProcess(*command)
        sweep.wait_until(lambda sweep=sweep, reached=reached: reached in sweep.text)
        sweep.send(number)
        assert sweep.wait() == code, sweep.text
        sweep.close()
        assert number == signal.SIGKILL or "0 of 4 trainings have ended" in sweep.text.splitlines()[-1]
    sweep = JobProcess(*command, "--parallel", "2")
    assert sweep.wait(600) == 0, sweep.text
    sweep.close()
    table = [line for line in sweep.text.splitlines() if line.endswith("bits/dim after 4 steps") and "|" not in line]
    bits = [float(line.split()[4]) for line in table]
    assert len(bits) == 4
    assert bits == sorted(bits)

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("s").experiment_id])
    (parent,) = (run for run in runs if run.info.run_name == "s")
    children = [run for run in runs if run is not parent]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.info.run_name for run in children) == [
        f"s.learning_rate-{rate}.seed-{seed}" for rate in ("1e-3", "1e-4") for seed in (0, 1)
    ]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    for run in children:
        assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]
    assert parent.data.metrics["sweep/best_bits_per_dim"] == pytest.approx(bits[0], abs=1e-4)
    assert len(client.search_model_versions("name='s'")) == 4
    assert client.get_registered_model("s").aliases.keys() == {"champion"}

    sweep = JobProcess(*command)
    assert sweep.wait() == 0, sweep.text
    sweep.close()
    assert "4 trainings, 4 of them finished before" in sweep.text
    assert " | " not in sweep.text
