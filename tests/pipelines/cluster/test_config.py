"""The section `cluster`: the same names and rules in every job, and what a job's own defaults stand for."""

from typing import Any

import pytest

from pipelines.cli.config import parse
from pipelines.cli.errors import ConfigError
from pipelines.cluster.actor_pool import ActorPool
from pipelines.cluster.config import ClusterConfig, CpuClusterConfig, GpuClusterConfig
from pipelines.data.ingest.config import IngestConfig
from pipelines.evaluation.config import EvaluateConfig
from pipelines.sampling.config import SampleConfig
from pipelines.training.config import TrainClusterConfig, TrainConfig
from pipelines.verify.config import VerifyConfig

JOBS: dict[type[Any], list[str]] = {
    IngestConfig: ["--source=a", "--output=b"],
    SampleConfig: ["--model=a", "--output=b", "--num_images=1"],
    EvaluateConfig: ["--model=a", "--data=b", "--output=c"],
    VerifyConfig: ["--uri=a"],
    TrainConfig: [],
}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("workers", ["-1", "[3, 2]", "[0, 2]"])
def test_every_job_refuses_numbers_of_workers_that_cannot_be(job: type[Any], workers: str) -> None:
    with pytest.raises(ConfigError, match=r"^cluster\.num_workers = .*: must be .*\[min, max\]"):
        parse(job, [*JOBS[job], f"--cluster.num_workers={workers}"], "")


@pytest.mark.parametrize("job", [job for job in JOBS if job is not IngestConfig])
@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("cpus_per_worker", "0", "must be positive and finite"),
        ("cpus_per_worker", ".inf", "must be positive and finite"),
        ("threads_per_worker", "-1", "must be >= 0"),
        ("threads_per_worker", "1.5", ""),
    ],
)
def test_every_job_that_computes_refuses_sizes_of_workers_that_cannot_be(
    job: type[Any], field: str, value: str, rule: str
) -> None:
    with pytest.raises(ConfigError, match=rf"cluster\.{field}.*{rule}") as refusal:
        parse(job, [*JOBS[job], f"--cluster.{field}={value}"], "")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("job", JOBS)
def test_every_job_takes_an_address(job: type[Any]) -> None:
    config = parse(job, [*JOBS[job], "--cluster.address", "head:6379"], "")
    assert config.cluster.address == "head:6379"
    assert ActorPool.of(config.cluster).address == "head:6379"


@pytest.mark.parametrize(
    ("value", "bulk", "training"),
    [(0, True, True), (1, True, True), (2, True, True), (0.5, True, False), (1.5, False, False), (-1, False, False)],
)
def test_actors_share_a_gpu_and_workers_of_a_training_do_not(value: float, bulk: bool, training: bool) -> None:
    for section, allowed, rule in (
        (GpuClusterConfig, bulk, r"must be in \[0, 1\) or whole"),
        (TrainClusterConfig, training, "must be 0 or a whole number: workers of one training cannot share a GPU"),
    ):
        if allowed:
            assert section(gpus_per_worker=value).needs == {"CPU": 1.0, "GPU": value}
        else:
            with pytest.raises(ConfigError, match=rf"^cluster\.gpus_per_worker = {value}: {rule}$"):
                section(gpus_per_worker=value)


@pytest.mark.parametrize(
    ("cpus", "given", "threads"), [(1, 0, 1), (4, 0, 4), (2.5, 0, 2), (0.5, 0, 1), (4, 1, 1), (1, 3, 3)]
)
def test_an_actor_has_as_many_threads_as_cpus_unless_told(cpus: float, given: int, threads: int) -> None:
    assert CpuClusterConfig(cpus_per_worker=cpus, threads_per_worker=given).threads == threads


def test_actors_are_what_was_asked_for() -> None:
    assert ActorPool.of(ClusterConfig()) == ActorPool(None, 1, 0)
    asked = GpuClusterConfig("head:6379", (1, 4), cpus_per_worker=2, gpus_per_worker=0.5)
    assert ActorPool.of(asked) == ActorPool((1, 4), 2, 0.5, "head:6379")
