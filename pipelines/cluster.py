"""Connecting a job to Ray: to the cluster it was submitted to, or to a private local one."""

import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ddpm_core.errors import ClusterError
from pipelines.console import printing_to, waiting

# Read by Ray at import: everything the worker processes need comes from the driver's own environment, so a
# local job must not make Ray build a second virtual environment because it was started by `uv run`.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
# How long Ray Train waits for a node that it does not know yet to be dead before an elastic training goes on without.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
# Ray's C++ side otherwise prints advice about Ray Data's own actors on the terminal of every bulk job.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


def connect(address: str | None = None, num_cpus: int | None = None) -> str:
    """Connect to Ray and return a short name of what was connected to.

    Args:
        address: A cluster's address. None takes `RAY_ADDRESS` (set by `ray job submit`) and, where that is
            not set, starts a private Ray on this machine which ends with the job. Where this process is
            connected already, that connection is used, and `disconnect` leaves it as it was.
        num_cpus: CPUs a private Ray may schedule; None for all of the machine's.

    Raises:
        ClusterError: No cluster answers at `address`.
    """
    import ray

    global _connected_here
    if ray.is_initialized():
        quiet_data()
        return f"Ray at {ray.get_runtime_context().gcs_address}"
    address = address or os.environ.get("RAY_ADDRESS")
    logging.getLogger("ray").setLevel(logging.ERROR)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if address:
            _probe(address)
        with _silence(), waiting(f"connecting to Ray at {address}" if address else "starting a local Ray"):
            if address:
                ray.init(address=address, **_QUIET)
            else:
                ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **_QUIET)
    except Exception as error:  # Ray has a bare one too: a node that takes more than 30 s to start
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClusterError(
            f"cluster.address = {address or 'local'}: cannot connect to Ray ({reason}); "
            "start one with `ray start --head` or leave the address out"
        ) from error
    _connected_here = True
    # Otherwise a lost node prints pages of its raylet's log on stdout; the job says in one line what was lost.
    ray._private.worker._worker_logs_enabled = False
    if threading.current_thread() is threading.main_thread():
        # Ray has put its own in place: they would end the job before it has recorded that it was stopped.
        for number, handler in handlers.items():
            signal.signal(number, handler)
    quiet_data()
    return f"Ray at {ray.get_runtime_context().gcs_address}" if address else "a local Ray"


def is_named() -> bool:
    """Whether there is a cluster to use: by RAY_ADDRESS, or as this process is connected to one."""
    ray = sys.modules.get("ray")  # not imported here: a job that needs no Ray must not wait for it
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


_connected_here = False
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what Ray's C++ side prints while it starts off the terminal: failures come as exceptions too.

    What the job itself says meanwhile is still seen.
    """
    sys.stderr.flush()
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with printing_to(terminal):
            yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def _probe(address: str) -> None:
    """Raise OSError where nothing listens at a host:port address: Ray itself would go on trying for minutes."""
    if match := re.fullmatch(r"([\w.-]+|\[[\w:]+\]):(\d+)", address):
        socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=10).close()


def quiet_data() -> None:
    """Turn off Ray Data's own progress bars and plan dumps in this process: the job prints its own line."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors reach the job as exceptions
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def disconnect() -> None:
    """Leave the Ray that `connect` connected to; a private local Ray ends. Does nothing when it did not."""
    global _connected_here
    if _connected_here:
        import ray

        ray.shutdown()
    _connected_here = False
