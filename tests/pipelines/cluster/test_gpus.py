"""What `auto` stands for on clusters with and without GPUs, and what is kept of it."""

import pytest

from pipelines.cli.errors import ClusterError
from pipelines.cluster import gpus
from pipelines.cluster.config import GpuClusterConfig
from pipelines.cluster.gpus import Supply, settle
from pipelines.outputs.run_bulk import settled_gpus
from pipelines.training.config import TrainClusterConfig


@pytest.mark.parametrize(
    ("supply", "begun_with", "found", "says"),
    [
        (Supply("the cluster", 4, None), None, 1, "GPUs: 1 per worker (the cluster has 4)"),
        (Supply("the cluster", 0, True), None, 1, "GPUs: 1 per worker (the cluster has none now, and can start some)"),
        (Supply("the cluster", 0), None, 0, "no GPU (the cluster has none and can start none): computing on CPUs"),
        (Supply("this machine", 2), None, 1, "GPUs: 1 per worker (this machine has 2)"),
        (Supply("this machine", 0), None, 0, "no GPU (this machine has none): computing on CPUs"),
        (Supply("the cluster", 4), "cpu", 0, "no GPU (as it was begun with): computing on CPUs"),
        (Supply("the cluster", 0), "cuda", 1, "GPUs: 1 per worker (as it was begun with)"),
        (Supply("the cluster", 4), 0.0, 0, "no GPU (as it was begun with): computing on CPUs"),
        (Supply("the cluster", 0), 2, 2, "GPUs: 2 per worker (as it was begun with)"),
        (Supply("the cluster", 4), "tpu", 1, "the cluster has 4"),  # not one of ours: refused where it is compared
        (Supply("the cluster", 4), True, 1, "the cluster has 4"),
        (Supply("the cluster", 4), "auto", 1, "the cluster has 4"),
    ],
)
def test_auto(monkeypatch, supply, begun_with, found, says) -> None:
    monkeypatch.setattr(gpus, "supply_of", lambda address: supply)
    for section in (GpuClusterConfig(), TrainClusterConfig()):
        settled, line = settle(section, begun_with)
        assert (type(settled), settled.gpus_per_worker) == (type(section), found)
        assert says in str(line)


@pytest.mark.parametrize("given", [0, 0.5, 3])
def test_a_number_stays_and_nobody_is_asked(monkeypatch, given) -> None:
    monkeypatch.setattr(gpus, "supply_of", lambda address: pytest.fail("asked"))
    assert settle(GpuClusterConfig(gpus_per_worker=given), "cuda") == (GpuClusterConfig(gpus_per_worker=given), None)


def test_what_cannot_use_gpus_does_not_ask_for_them(monkeypatch) -> None:
    monkeypatch.setattr(gpus, "supply_of", lambda address: pytest.fail("asked"))
    settled, line = settle(GpuClusterConfig(), None, "this onnxruntime has no CUDA")
    assert (settled.device, line) == ("cpu", "no GPU (this onnxruntime has no CUDA): computing on CPUs")
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
    assert settle(GpuClusterConfig())[1] == "no GPU (this PyTorch is built without CUDA): computing on CPUs"


def test_an_autoscaler_that_does_not_tell_is_no_reason_for_cpus(monkeypatch) -> None:
    monkeypatch.setattr(gpus, "supply_of", lambda address: Supply("the cluster", 0, None))
    with pytest.raises(ClusterError, match=r"^cluster\.gpus_per_worker = auto: .*; give 1, or 0 to compute on CPUs$"):
        settle(GpuClusterConfig())


def test_what_a_bulk_job_begins_with_is_said_and_kept(monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpus, "supply_of", lambda address: Supply("the cluster", 4))
    assert settled_gpus(GpuClusterConfig(), {}).device == "cuda"
    assert settled_gpus(GpuClusterConfig(), {"device": "cpu"}).device == "cpu"
    assert capsys.readouterr().err.splitlines() == [
        "GPUs: 1 per worker (the cluster has 4)",
        "no GPU (as it was begun with): computing on CPUs",
    ]
