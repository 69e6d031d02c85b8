"""What `cluster.gpus_per_worker: auto` stands for: a GPU for each worker where there is any, else CPUs."""

from dataclasses import dataclass, replace
from typing import TypeVar

from pipelines.cli.errors import ClusterError
from pipelines.cluster import connection, ray_private
from pipelines.cluster.config import GpuClusterConfig

Cluster = TypeVar("Cluster", bound=GpuClusterConfig)
CLUSTER = "the cluster"
_known: set[tuple[str, float]] = set()


@dataclass(frozen=True)
class Supply:
    """GPUs that workers can have.

    Attributes:
        place: `CLUSTER`, or 'this machine'.
        there: GPUs that it has now.
        startable: Whether its autoscaler can start a machine with one; None: it does not tell.
    """

    place: str
    there: int
    startable: bool | None = False


def settle(cluster: Cluster, begun_with: object = None, unusable: str | None = None) -> tuple[Cluster, str | None]:
    """The section with a number of GPUs in the place of `auto`, and a line to say about it.

    Args:
        cluster: A number in it is taken as it is.
        begun_with: The number that the run which is continued has, or the device ('cpu', 'cuda') of the output: `auto`
            keeps it, whatever is there.
        unusable: Why this job cannot use GPUs, if it cannot.

    Raises:
        ClusterError: The cluster does not answer, or has no GPU now and does not tell what it can start.
    """
    if cluster.gpus_per_worker != "auto":
        return cluster, None
    begun = {"cpu": 0.0, "cuda": 1.0}.get(begun_with, begun_with) if isinstance(begun_with, str) else begun_with
    if isinstance(begun, int | float) and not isinstance(begun, bool):
        gpus, why = float(begun), "as it was begun with"
    else:
        gpus, why = _chosen(cluster.address, unusable)
    line = f"GPUs: {gpus:g} per worker ({why})" if gpus else f"no GPU ({why}): computing on CPUs"
    return replace(cluster, gpus_per_worker=gpus), line


def _chosen(address: str | None, unusable: str | None) -> tuple[float, str]:
    """GPUs for each worker, and why."""
    import torch

    if unusable is None and not torch.backends.cuda.is_built():
        unusable = "this PyTorch is built without CUDA"
    if unusable is not None:
        return 0.0, unusable
    supply = supply_of(address)
    if supply.there:
        return 1.0, f"{supply.place} has {supply.there}"
    if supply.startable is None:
        raise ClusterError(
            "cluster.gpus_per_worker = auto: the cluster has no GPU now, and its autoscaler does not tell what it can "
            "start; give 1, or 0 to compute on CPUs"
        )
    if supply.startable:
        return 1.0, f"{supply.place} has none now, and can start some"
    return 0.0, f"{supply.place} has none" + (" and can start none" if supply.place == CLUSTER else "")


def supply_of(address: str | None, needed: float = 1.0) -> Supply:
    """What GPUs there are for workers that need so many each: where a cluster is named it is connected to and asked,
    whatever this machine has; else PyTorch is.

    Raises:
        ClusterError: No cluster answers at the address.
    """
    if not connection.is_named(address):
        import torch

        return Supply("this machine", torch.cuda.device_count() if torch.cuda.is_available() else 0)
    connection.connect(address)
    of_nodes = [node.get("GPU", 0.0) for node in ray_private.resources_by_node()[0]]
    there = int(sum(gpus for gpus in of_nodes if gpus >= needed))
    return Supply(CLUSTER, there, None if there else _can_start(needed))


def _can_start(gpus: float) -> bool | None:
    """Whether the connected cluster's autoscaler can; what it could once is not asked again by this process."""
    import ray

    key = ray.get_runtime_context().gcs_address, gpus
    if key in _known:
        return True
    startable = ray_private.can_start({"GPU": gpus})
    if startable:
        _known.add(key)
    return startable
