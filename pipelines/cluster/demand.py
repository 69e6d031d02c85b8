"""What a job's workers need of Ray: refused where nothing can give it, waited for where nodes may join."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from pipelines.cli.console import event
from pipelines.cli.errors import ClusterError
from pipelines.cluster import connection, ray_private
from pipelines.cluster.gpus import supply_of

INTERVAL_S = 30.0
# Classes of the actors in which Ray Data and Ray Train run a job's code.
_WORKERS = ("MapWorker", "RayTrainWorker")


def check(
    workers: int, each: Mapping[str, float], fields: Mapping[str, tuple[str, object]], address: str | None = None
) -> None:
    """Refuse, before anything is written, a cluster that does not answer, and what the job would wait for in vain.

    No node joins a private Ray. Any other cluster may grow, but gets no GPU that it neither has nor can start.

    Args:
        workers: How many must run at the same time.
        each: What one needs, by Ray's names (`CPU`, `GPU`).
        fields: For the resources that are looked after, the field that asks for it and its value.
        address: As of `connection.connect`.

    Raises:
        ClusterError: No cluster answers at the address, it can have no such GPU, or this machine has fewer.
    """
    gpus = each["GPU"] if "GPU" in fields else 0.0
    if gpus > 0 and connection.is_named(address):
        _check_gpus(gpus, *fields["GPU"], address)
        return
    if connection.source_of(address) is not None:
        connection.check(address)
        return
    needs = {kind: workers * each[kind] for kind in fields if each[kind] > (1 if kind == "CPU" else 0)}
    if not needs:  # as usual: Ray need not be imported to know
        return
    import ray

    if ray.is_initialized():
        return
    for kind, needed in needs.items():
        (field, value), has = fields[kind], ray_private.machine_has(kind)
        if needed > has:
            raise ClusterError(
                f"{field} = {value}: {workers} worker(s) need {needed:g} {kind}, this machine has {has}, and no other "
                "can join a private Ray; ask for less, or name a cluster by its address (RAY_ADDRESS=HOST:6379)"
            )


def _check_gpus(each: float, field: str, value: object, address: str | None) -> None:
    """Refuse a cluster that has no machine with so many GPUs and can start none."""
    supply = supply_of(address, each)
    if not supply.there and supply.startable is False:
        connection.disconnect()
        raise ClusterError(
            f"{field} = {value}: no machine of the cluster has {each:g} GPU for a worker, and none can be started; "
            "ask for less (0: CPUs), or use a cluster that has"
        )


@contextmanager
def told(workers: int, each: Mapping[str, float]) -> Iterator[None]:
    """While this job's workers find no place on the cluster, say what they wait for: at once, then every 30 s.

    Args:
        workers: How many must run at the same time.
        each: What one needs, by Ray's names.
    """
    over = threading.Event()

    def watch() -> None:
        with suppress(Exception):  # Ray is gone: so is the waiting
            while True:
                if not ray_private.has_placed(_WORKERS):
                    lacking = shortage(workers, each, *ray_private.resources_by_node())
                    if lacking:
                        event(lacking)
                if over.wait(INTERVAL_S):
                    return

    watcher = threading.Thread(target=watch, name="demand", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(1.0)  # Ray may be left next, and should not be while it is asked


def shortage(
    workers: int, each: Mapping[str, float], total: Sequence[Mapping[str, float]], free: Sequence[Mapping[str, float]]
) -> str | None:
    """What the cluster lacks for the workers, in a line; None when it has all. `total` and `free` are by node.

    >>> shortage(2, {"CPU": 4}, [{"CPU": 8}, {"CPU": 1}], [{"CPU": 3}, {"CPU": 1}])
    'waiting: 2 worker(s) need 4 CPU each; 2 node(s) have 9 CPU (4 free); it goes on when others leave them'
    """
    needs = {kind: need for kind, need in each.items() if need > 0}
    if _places(free, needs) >= workers:
        return None
    hope = "others leave them" if _places(total, needs) >= workers else "nodes join (or ask for less)"
    need_text = " and ".join(f"{need:g} {kind}" for kind, need in needs.items())
    has_text = " and ".join(f"{_sum(total, kind):g} {kind} ({_sum(free, kind):g} free)" for kind in needs)
    return (
        f"waiting: {workers} worker(s) need {need_text} each; {len(total)} node(s) have {has_text}; "
        f"it goes on when {hope}"
    )


def _places(nodes: Sequence[Mapping[str, float]], needs: Mapping[str, float]) -> int:
    """How many workers the nodes hold: each one needs a node to itself or a part of one."""
    return sum(int(min(node.get(kind, 0.0) / need + 1e-9 for kind, need in needs.items())) for node in nodes)


def _sum(nodes: Sequence[Mapping[str, float]], kind: str) -> float:
    return sum(node.get(kind, 0.0) for node in nodes)
