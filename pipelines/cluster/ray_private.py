"""Every private name of Ray that this project uses, each with the reason: what to look at when Ray is upgraded.

Private are names with an underscore, modules below one, and what is generated or internal. Ray is imported in the
functions, as everywhere: a command that needs no Ray does not wait for it.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

_START_PATIENCE_S = 180.0
# An autoscaler looks every five seconds, and then waits for its cloud.
_AUTOSCALER_PATIENCE_S = 60.0
# What Ray appends to its temporary directory for the longest name of a socket; no such name may have more bytes than
# the system takes.
LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
MAX_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107


# Starting and connecting.


def start_local(num_cpus: int | None, directory: str | None, options: Mapping[str, Any]) -> None:
    """Start a private Ray with its files in `directory`; None: where Ray puts them. Its ports are on loopback only.

    The public ways to have both, RAY_TMPDIR and RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which keeps Ray on loopback where
    no other machine may join, would reach every process that the job starts.
    """
    import ray
    from ray._private import ray_constants

    others_join, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, _temp_dir=directory, **options)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = others_join


def temporary_directory() -> str:
    """Where Ray puts its files if it is not told, by its own rule, which no public function tells before Ray runs."""
    from ray._common.utils import get_default_ray_temp_dir

    return str(get_default_ray_temp_dir())


@contextmanager
def own_signal_handlers() -> Iterator[None]:
    """Keep out Ray's handlers of signals, which end a job before it has recorded that it was stopped.

    Ray has no option that leaves them out.
    """
    from ray._private import utils

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    theirs = utils.set_sigterm_handler

    def keep(handler: Any = None) -> None:
        # Put in place anew, as Ray's C++ side has one of its own that Python does not know of.
        if threading.current_thread() is threading.main_thread():
            for number, ours in handlers.items():
                signal.signal(number, ours)

    utils.set_sigterm_handler = keep
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        keep()


@contextmanager
def patience() -> Iterator[None]:
    """Give a private Ray minutes to start, while its process lives: Ray's 30 s are too few on a busy machine.

    They are a constant in Ray's code.
    """
    import psutil
    from ray._private import services

    once = services.get_node
    deadline = time.monotonic() + _START_PATIENCE_S

    def raylets() -> set[int]:
        children = psutil.Process().children()
        return {c.pid for c in children if c.name() == "raylet" and c.status() != psutil.STATUS_ZOMBIE}

    before = raylets()  # of another Ray that this process has started

    def patiently(*arguments: Any) -> Any:
        while True:
            try:
                return once(*arguments)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                if raylets() <= before:  # not a RuntimeError: after one of those Ray itself would ask again
                    raise ChildProcessError("its raylet ended before it answered") from error
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    services.get_node = patiently  # read as an attribute by the node that is being started
    try:
        yield
    finally:
        services.get_node = once


def check_token(address: str) -> None:
    """Ask the cluster at `address` whether it takes this process's token; raises what Ray raises when it does not.

    `ray.init` would try for minutes, or end the process, where the token is wrong.
    """
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    ensure_token_if_auth_enabled(None, create_token_if_missing=False)
    GcsClient(address=address)


def print_no_worker_logs() -> None:
    """Otherwise a lost node prints pages of its raylet's log on stdout; the job says in one line what was lost.

    `log_to_driver=False` leaves those in.
    """
    import ray

    ray._private.worker._worker_logs_enabled = False


# What the machine and the cluster have. Ray's public functions add up what is free on all nodes, and its state API
# needs the dashboard, which a private Ray does not have.


def machine_has(kind: str) -> int:
    """How many CPUs or GPUs (`kind`) a Ray that is started here would find."""
    from ray._private import accelerators, utils

    if kind == "CPU":
        return int(utils.get_num_cpus())
    manager = accelerators.get_accelerator_manager_for_resource(kind)
    if manager is None:
        return 0
    visible = manager.get_current_process_visible_accelerator_ids()
    found = int(manager.get_current_node_num_accelerators())
    return found if visible is None else min(found, len(visible))


def resources_by_node() -> tuple[Sequence[Mapping[str, float]], Sequence[Mapping[str, float]]]:
    """What each node has, and what of it is free."""
    from ray._private.state import state

    return [*state.total_resources_per_node().values()], [*state.available_resources_per_node().values()]


def can_start(resources: Mapping[str, float]) -> bool | None:
    """Whether the cluster's autoscaler can start a machine with these resources; None: it does not tell.

    It is asked with a placement group, and begins to start the machine if it can. Nothing else answers for all clouds:
    `get_max_resources_from_cluster_config`, which Ray's libraries call, reads what no open-source autoscaler writes.
    """
    import json

    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
    from ray.util import placement_group, remove_placement_group

    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    if not is_autoscaler_v2(fetch_from_server=True):
        # One of the first generation, or none: then Ray reports each node as a type of its own, called after the node.
        report = json.loads(kv_get("__autoscaling_status") or "{}").get("autoscaler_report") or {}
        return False if all(name.startswith("node_") for name in report.get("active_nodes", {})) else None
    asked = placement_group([dict(resources)])
    name, noticed, deadline = asked.id.hex(), None, time.monotonic() + _AUTOSCALER_PATIENCE_S
    try:
        while time.monotonic() < deadline:
            reply = GetClusterStatusReply.FromString(gcs.get_cluster_status(timeout_s=10))
            cluster, answer = reply.cluster_resource_state, reply.autoscaling_state
            if noticed is None and any(name in each.details for each in cluster.pending_gang_resource_requests):
                noticed = cluster.cluster_resource_state_version
            if noticed is not None and answer.last_seen_cluster_resource_state_version >= noticed:
                return not any(name in each.details for each in answer.infeasible_gang_resource_requests)
            if asked.wait(0.2):
                return True  # on a machine that has just come
    finally:
        remove_placement_group(asked)
    return None


def has_placed(classes: tuple[str, ...]) -> bool:
    """Whether an actor of this job whose class's name begins with one of `classes` has got its place.

    It may still be starting there.
    """
    import ray
    from ray._private.state import state

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return any(
        actor["ActorClassName"].startswith(classes)
        and actor["State"] != "DEAD"
        and actor["Address"]["Port"]  # of its process; before it has one, only the node is known that was asked for it
        for actor in state.actor_table(None, job, None).values()
    )


# Draining a node. `ray drain-node` does the same, as a program of its own that imports Ray anew for each attempt.


def drain_node(gcs_address: str, node_id: str, reason: str, deadline: datetime, timeout: float) -> tuple[bool, str]:
    """Ask the GCS, once, to drain a node by `deadline`; whether it does, and if not, why.

    Args:
        gcs_address: HOST:PORT.
        node_id: Hexadecimal.
        reason: Shown with the node.
        deadline: When the machine is taken.
        timeout: Seconds that the GCS has to answer.

    Raises:
        RayError: The GCS does not answer.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

    preemption = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    milliseconds = int(deadline.timestamp() * 1000)
    accepted, refusal = GcsClient(address=gcs_address).drain_node(
        node_id, preemption, reason, milliseconds, timeout=timeout
    )
    return bool(accepted), str(refusal)


# The cluster's key-value store: entries outlive the process that wrote them and cost no actor, which would need a
# place on the cluster of its own.


def kv_get(key: str | bytes, namespace: str | None = None) -> bytes | None:
    """An entry, None where there is none."""
    from ray.experimental.internal_kv import _internal_kv_get

    value: bytes | None = _internal_kv_get(key, namespace=namespace)
    return value


def kv_list(prefix: str, namespace: str | None = None) -> list[bytes]:
    """The keys that begin with `prefix`."""
    from ray.experimental.internal_kv import _internal_kv_list

    return [*_internal_kv_list(prefix, namespace=namespace)]


def kv_put(key: str, value: str, namespace: str | None = None) -> None:
    """Write an entry, over the one that is there."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, value, namespace=namespace)


def kv_delete(prefix: str, namespace: str | None = None) -> None:
    """Remove the entries whose keys begin with `prefix`."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(prefix, del_by_prefix=True, namespace=namespace)


# Ray Train.


def trainer_class() -> "type[TorchTrainer]":
    """Ray Train's trainer without two callbacks that it always has, and that only cost time here.

    One of them asks the dashboard whether the controller lives, to free its resources when it does not; those of a
    dead driver are free anyway, and without a dashboard every training waits 12 s at its end. The other starts a
    process for data sets given to the trainer: there are none.
    """
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # Ray Train v2's
            unused = ("PlacementGroupCleanerCallback", "DatasetsCallback")
            return [each for each in callbacks if type(each).__name__ not in unused]

    return Trainer


def wrapped_in(error: BaseException) -> BaseException | None:
    """The error of a worker's that Ray Train's own error was made from, where it has no public `cause`."""
    found: BaseException | None = getattr(error, "_base_exc", None)
    return found
