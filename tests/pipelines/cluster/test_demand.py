"""What workers need of Ray: refused, or waited for with a word."""

import pytest
from support.sample_runs import save_tiny_model

from pipelines.cli.errors import ClusterError
from pipelines.cluster import demand
from pipelines.cluster.actor_pool import ActorPool, run_on_actors
from pipelines.cluster.config import GpuClusterConfig
from pipelines.cluster.gpus import settle
from pipelines.sampling.config import SampleConfig
from pipelines.sampling.job import sample


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own, on a machine without a cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.mark.parametrize(
    ("cluster", "says"),
    [
        (
            GpuClusterConfig(gpus_per_worker=1000),
            "cluster.gpus_per_worker = 1000: 1 worker(s) need 1000 GPU, this machine has ",
        ),
        (
            GpuClusterConfig(num_workers=(1, 4), cpus_per_worker=10**6),
            "cluster.cpus_per_worker = 1000000: 1 worker(s) need 1e+06 CPU, this machine has ",
        ),
    ],
)
def test_a_private_ray_cannot_get_what_the_machine_lacks(
    no_cluster: None, cluster: GpuClusterConfig, says: str
) -> None:
    with pytest.raises(ClusterError) as refusal:
        ActorPool.of(cluster).check()
    assert str(refusal.value).startswith(says)
    assert "RAY_ADDRESS=HOST:6379" in str(refusal.value)
    ActorPool.of(GpuClusterConfig()).check()


@pytest.mark.ray
def test_a_cluster_may_grow_but_gets_no_gpu_that_nobody_starts(ray_cluster: None) -> None:
    ActorPool.of(GpuClusterConfig(cpus_per_worker=1000)).check()
    with pytest.raises(ClusterError, match=r"^cluster\.gpus_per_worker = 1: no machine of the cluster has 1 GPU"):
        ActorPool.of(GpuClusterConfig(gpus_per_worker=1)).check()
    assert settle(GpuClusterConfig())[1] == "no GPU (the cluster has none and can start none): computing on CPUs"


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("cluster", "says"),
    [
        (GpuClusterConfig(gpus_per_worker=1000), r"^cluster\.gpus_per_worker = 1000"),
        (GpuClusterConfig("127.0.0.1:1"), r"^cluster\.address = 127\.0\.0\.1:1: cannot connect to Ray"),
    ],
)
def test_a_job_is_refused_before_it_writes(
    no_cluster: None, tmp_path, dry_run: bool, cluster: GpuClusterConfig, says: str
) -> None:
    save_tiny_model(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    config = SampleConfig(
        str(tmp_path / "model"),
        str(tmp_path / "samples"),
        4,
        cluster=cluster,
        dry_run=dry_run,
        root=str(tmp_path / "root"),
    )
    with pytest.raises(ClusterError, match=says):
        sample(config)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("each", "total", "free", "says"),
    [
        ({"CPU": 1, "GPU": 0}, [2], [2], None),
        ({"CPU": 0.5, "GPU": 0}, [1], [1], None),
        ({"CPU": 2, "GPU": 0}, [2, 2], [2, 2], None),
        (
            {"CPU": 1, "GPU": 1},
            [8],
            [8],
            "1 node(s) have 8 CPU (8 free) and 0 GPU (0 free); it goes on when nodes",
        ),
        ({"CPU": 4, "GPU": 0}, [4, 4], [4, 0], "have 8 CPU (4 free); it goes on when others leave them"),
        ({"CPU": 4, "GPU": 0}, [2, 2, 2, 2], [2, 2, 2, 2], "4 node(s) have 8 CPU (8 free); it goes on when nodes join"),
    ],
)
def test_the_line_says_what_is_there_and_what_is_hoped_for(each, total, free, says: str | None) -> None:
    line = demand.shortage(2, each, [{"CPU": cpus} for cpus in total], [{"CPU": cpus} for cpus in free])
    assert line is None if says is None else says in str(line)


@pytest.mark.ray
def test_workers_that_find_no_place_are_waited_for_with_a_word(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    @ray.remote(num_cpus=4)
    class Other:
        def is_there(self) -> bool:
            return True

    other, said = Other.remote(), []
    assert ray.get(other.is_there.remote())

    def hear(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            ray.kill(other)

    monkeypatch.setattr(demand, "event", hear)
    monkeypatch.setattr(demand, "INTERVAL_S", 0.2)
    assert sorted(run_on_actors(str, [3, 5], ActorPool(1, 1, 0), "here")) == [(3, "3"), (5, "5")]
    assert len(said) >= 2
    line = "waiting: 1 worker(s) need 1 CPU each; 1 node(s) have 4 CPU (0 free); it goes on when others leave them"
    assert said[:2] == [line, line]
