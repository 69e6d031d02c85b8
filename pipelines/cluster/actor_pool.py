"""Running a function of an index on a pool of Ray actors, whatever dies meanwhile."""

import pickle
import socket
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.cli.errors import ClusterError, DDPMError
from pipelines.cluster import connection, demand
from pipelines.cluster.config import ClusterConfig

# Half a minute to a minute of one core. A private Ray and its actors take 20 to 40 s to start, and are then faster by
# the number of cores at most.
_SMALL_WORK = 4e12
# An actor that dies on the same task this often is killed by the task (memory), not by its machine.
_MAX_TASK_RETRIES = 5
# Ray Data gives up when a node is lost at certain moments; so many times without a result in between we do, too.
_MAX_LOSSES = 5
# A node that does not answer within so many seconds is cut off.
_NODE_ANSWERS_S = 5
# Ray's driver keeps some kilobytes for each task; beyond this many indices, a task computes several.
_MAX_TASKS = 4096


@dataclass(frozen=True)
class ActorPool:
    """How many Ray actors compute, and what each one needs.

    The size is a number, (min, max) for a pool that follows an autoscaling cluster, or None for as many as
    the cluster holds now.
    """

    size: int | tuple[int, int] | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    address: str | None = None
    """Of the Ray that they run on, see `connection.connect`."""

    @classmethod
    def of(cls, cluster: ClusterConfig) -> "ActorPool":
        """The actors that a job's section `cluster` asks for; 0 workers stand for as many as fit."""
        needs = cluster.needs
        return cls(cluster.num_workers or None, needs["CPU"], needs["GPU"], cluster.address)

    def unless_small(self, work: Callable[[], tuple[int, float]]) -> "ActorPool | None":
        """The pool, or None for little work that nobody has asked actors for: this process has done it before they
        would have started. They are asked for by a number of workers, by GPUs, or by a cluster.

        Args:
            work: Gives the number of shards (a single one would keep a single actor busy, no faster than this process),
                and the evaluations of a network times its `pixel_weights`.
        """
        asked_for = self.size is not None or self.num_gpus > 0 or connection.is_named(self.address)
        if asked_for:
            return self
        shards, weights = work()
        return self if shards > 1 and weights > _SMALL_WORK else None

    @property
    def needs(self) -> dict[str, float]:
        """What one actor needs, by Ray's names."""
        return {"CPU": self.num_cpus, "GPU": self.num_gpus}

    def check(self) -> None:
        """Refuse, before anything is written, actors that Ray can never start.

        Raises:
            ClusterError: See `pipelines.cluster.demand.check`.
        """
        fields = {
            "CPU": ("cluster.cpus_per_worker", self.num_cpus),
            "GPU": ("cluster.gpus_per_worker", self.num_gpus),
        }
        demand.check(1, self.needs, fields, self.address)

    def bounds(self, cluster: Mapping[str, float]) -> tuple[int, int]:
        """(min, max) number of actors on a cluster with these resources."""
        if self.size is not None:
            return self.size if isinstance(self.size, tuple) else (self.size, self.size)
        size = max(1, int(min(cluster.get(kind, 0.0) // need for kind, need in self.needs.items() if need > 0)))
        return size, size


class _Actor:
    """What Ray Data runs. An exception travels as a value, so that it arrives unchanged and is not retried."""

    def __init__(self, worker: Callable[[int], Any]) -> None:
        self._worker = worker

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        for index in map(int, batch["indices"][0]):
            try:
                result: Any = (index, self._worker(index))
            except DDPMError as error:
                result = error
            except Exception as error:  # noqa: BLE001  a defect: reported by the driver with its trace
                trace = "".join(traceback.format_exception(error))
                result = RuntimeError(f"{type(error).__name__} at index {index}: {error}\n{trace}")
            yield {"result": [pickle.dumps(result)]}


def run_on_actors(
    worker: Callable[[int], Any], indices: Sequence[int], pool: ActorPool | None, where: str
) -> Generator[tuple[int, Any], None, None]:
    """Each index and what `worker(index)` returns, in the order of completion.

    Args:
        worker: Picklable; each actor has a copy of its own and keeps it.
        indices: What is computed, each at least once: again where an actor was lost before its result arrived.
        pool: The actors; None computes in this process, one after the other.
        where: Names the work in errors.

    Raises:
        DDPMError: What a worker raised: it ends the computation at once.
        ClusterError: Ray gave up.
    """
    if pool is None:
        for index in indices:
            yield index, worker(index)
        return
    left, losses = dict.fromkeys(indices), 0
    while left:
        try:
            for index, result in _run_once(worker, list(left), pool, where):
                losses = 0
                del left[index]
                yield index, result
        except _NodeLost as error:
            losses += 1
            if losses > _MAX_LOSSES:
                raise _gave_up(where, error.reason) from error.reason


@contextmanager
def one_actor(pool: ActorPool) -> Iterator[ActorPool | None]:
    """For `run_on_actors`: a pool of one such actor, and a connection to Ray, where GPUs are asked for or a cluster is
    named; else None: this machine's actors would be as fast as this process, and start later.

    Raises:
        ClusterError: See `pipelines.cluster.connection.connect`.
    """
    try:
        if pool.num_gpus > 0 or connection.is_named(pool.address):
            connection.connect(pool.address)
            yield replace(pool, size=1)
        else:
            yield None
    finally:
        connection.disconnect()


class _NodeLost(Exception):
    """A node went in a way that ended Ray Data's execution: what is left can be computed by a new one."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _run_once(
    worker: Callable[[int], Any], indices: Sequence[int], pool: ActorPool, where: str
) -> Generator[tuple[int, Any], None, None]:
    """One execution of Ray Data; arguments and errors as of `run_on_actors`, and _NodeLost."""
    import ray.data  # here: a run with nothing to compute, or in-process, must not pay seconds for it
    from ray.exceptions import ActorUnavailableError, NodeDiedError, ObjectLostError, RayError

    if not ray.is_initialized():
        connection.connect(pool.address)
    low, high = pool.bounds(ray.cluster_resources())
    num_tasks = min(len(indices), _MAX_TASKS)
    high = min(high, num_tasks)
    tasks = [{"indices": part.tolist()} for part in np.array_split(np.asarray(indices), num_tasks)]
    # One block per task: a block is what Ray schedules, retries and counts against its back-pressure.
    blocks = ray.data.from_items(tasks, override_num_blocks=num_tasks)
    blocks.context.enable_progress_bars = False
    blocks.context.print_on_execution_start = False
    blocks.context.target_max_block_size = 1  # a result arrives when it is there, not when its task is done
    dead = _dead_nodes()
    with warnings.catch_warnings():
        # Ray 2.60 announces another spelling of max_task_retries but has none yet.
        warnings.filterwarnings("ignore", message=".*ray_remote_args", category=DeprecationWarning)
        computed = blocks.map_batches(
            _Actor,
            fn_constructor_args=(worker,),
            batch_size=1,
            concurrency=(min(low, high), high),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
            max_task_retries=_MAX_TASK_RETRIES,
        )
    try:
        batch: Any
        with demand.told(1, pool.needs):
            for batch in computed.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for pickled in batch["result"].to_pylist():
                    # Written by our own actor a moment ago, over Ray's authenticated channels.
                    result = pickle.loads(pickled)
                    if isinstance(result, Exception):
                        raise result
                    yield result
    except RayError as error:
        # An actor that dies of its own task can be reported as unavailable, too.
        if isinstance(error, ActorUnavailableError | NodeDiedError | ObjectLostError) and _dead_nodes() - dead:
            raise _NodeLost(error) from error
        raise _gave_up(where, error) from error


def _dead_nodes() -> set[str]:
    """The ids of the nodes that Ray knows to be dead, and of those that it will find dead in some seconds."""
    import ray

    def answers(node: dict[str, Any]) -> bool:
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _NODE_ANSWERS_S).close()
        except OSError:
            return False
        return True

    return {node["NodeID"] for node in ray.nodes() if not (node["Alive"] and answers(node))}


def _gave_up(where: str, error: Exception) -> ClusterError:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return ClusterError(
        f"{where}: Ray gave up ({type(error).__name__}: {lines[0] if lines else 'no message'}); "
        "look for workers killed by the memory limit, then run again: finished shards are kept"
    )
