"""Connecting a job to Ray: to the cluster it was submitted to, or to a private local one."""

import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.cli.console import event, printing_to, waiting
from pipelines.cli.errors import ClusterError
from pipelines.cluster import ray_private

# Read by Ray at import: everything the worker processes need comes from the driver's own environment, so a
# local job must not make Ray build a second virtual environment because it was started by `uv run`.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# How long Ray Train waits for a node that it does not know yet to be dead before an elastic training goes on without.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
# Ray's C++ side otherwise prints advice about Ray Data's own actors on the terminal of every bulk job.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
# A private Ray's first process gets more than 30 s to answer, for a busy machine.
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "180")
_STARTS = 3


def connect(address: str | None = None, num_cpus: int | None = None) -> str:
    """Connect to Ray and return a short name of what was connected to.

    Args:
        address: A cluster's address. None takes `RAY_ADDRESS` (set by `ray job submit`) and, where that is
            not set, starts a private Ray on this machine which ends with the job. Where this process is
            connected already, that connection is used, and `disconnect` leaves it as it was.
        num_cpus: CPUs a private Ray may schedule; None for all of the machine's.

    Raises:
        ClusterError: No cluster answers at `address`, or a private Ray does not start.
    """
    import ray

    global _connected_here, _unwatched
    if ray.is_initialized():
        quiet_data()
        return f"Ray at {ray.get_runtime_context().gcs_address}"
    check(address)
    source = source_of(address)
    address = source and source[1]
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with (
            _silence(),
            ray_private.own_signal_handlers(),
            waiting(f"connecting to Ray at {address}" if address else "starting a local Ray"),
        ):
            if address:
                ray.init(address=address, **_QUIET)
            else:
                # No node of a private Ray is drained: a process that looks out for it need not be started.
                _unwatched = os.environ.setdefault(_WATCHER, "0") == "0"
                _keep_token()
                _start(num_cpus)
    except Exception as error:  # Ray has a bare one too: a node that does not start
        _remove_short_directory()
        if source:
            raise _unreachable(*source, _first_line(error)) from error
        raise ClusterError(
            f"a private Ray does not start on this machine ({_first_line(error)}); see that it has memory to spare and "
            "that TMPDIR or RAY_TMPDIR can be written to, and run again"
        ) from error
    _connected_here = True
    ray_private.print_no_worker_logs()
    quiet_data()
    return f"Ray at {ray.get_runtime_context().gcs_address}" if address else "a local Ray"


def is_named(address: str | None = None) -> bool:
    """Whether there is a cluster to use: by `address` or RAY_ADDRESS, or as this process is connected to one."""
    ray = sys.modules.get("ray")  # not imported here: a job that needs no Ray must not wait for it
    return source_of(address) is not None or (ray is not None and ray.is_initialized())


_connected_here = _unwatched = False
_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_own_directory: str | None = None
_HELLO_S = 0.5
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}


def _start(num_cpus: int | None) -> None:
    """Start a private Ray; again where one of its processes gave up waiting for another, as on a busy machine."""
    import psutil
    import ray

    directory = _short_directory()  # one for all starts: it is removed once
    for left in reversed(range(_STARTS)):
        before = set(psutil.Process().children(recursive=True))
        try:
            with ray_private.patience():
                ray_private.start_local(num_cpus, directory, _QUIET)
            return
        except Exception as error:
            # What the failed start leaves would be in the way of the next one.
            remains = set(psutil.Process().children(recursive=True)) - before
            for process in remains:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(remains)
            ray.shutdown()
            if not left:
                raise
            event(f"a private Ray has not started ({_first_line(error)}): trying once more")


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


def source_of(address: str | None) -> tuple[str, str] | None:
    """(name of what gives it, address) of the cluster that `connect` would connect to; None for a private Ray."""
    for name, value in (("cluster.address", address), ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS"))):
        if value:
            return None if value == "local" else (name, value)
    return None


def check(address: str | None = None) -> None:
    """Refuse an address at which no cluster answers that takes this process, in a moment and without connecting.

    For before anything is written. Does nothing where `connect` would start a private Ray, or is connected.

    Raises:
        ClusterError: There is none; what gives the address is named.
    """
    source = source_of(address)
    if source is None:
        return
    import ray

    if ray.is_initialized():
        return
    name, value = source
    if re.match(r"https?://", value):
        raise ClusterError(
            f"{name} = {value}: is the URL of a dashboard, which takes jobs (`ray job submit`) but no connections; "
            f"give the cluster's own address, such as HOST:6379, or {_without(name)}"
        )
    if (match := re.fullmatch(r"(?:ray://)?([\w.-]+|\[[\w:]+\]):(\d+)", value)) is None:
        return  # such as "auto": Ray finds it in a moment, or does not
    host, port = match[1].strip("[]"), int(match[2])
    try:
        with socket.create_connection((host, port), timeout=10) as connection:
            connection.settimeout(_HELLO_S)
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with suppress(TimeoutError):
                if connection.recv(5) == b"HTTP/":
                    raise _unreachable(name, value, "a web server answers there, such as the dashboard")
    except OSError as error:
        raise _unreachable(name, value, _first_line(error)) from error
    if not value.startswith("ray://"):
        _check_token(name, value)


def _check_token(name: str, address: str) -> None:
    """Refuse a cluster that does not take this process's token: Ray itself would go on trying, or end the process."""
    from ray.exceptions import AuthenticationError

    try:
        with _silence():
            ray_private.check_token(address)
    except AuthenticationError as error:
        if os.environ.get("RAY_AUTH_MODE") != "token":
            reason = "the cluster asks for a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token"
        else:
            reason = (
                "the cluster does not take this token, or there is none; set RAY_AUTH_TOKEN or ~/.ray/auth_token to "
                "what `ray get-auth-token` prints on its head"
            )
        raise ClusterError(f"{name} = {address}: {reason}") from error
    except Exception as error:  # RPC errors of Ray's, which share no class of their own
        raise _unreachable(name, address, _first_line(error)) from error


def _unreachable(name: str, address: str, reason: str) -> ClusterError:
    return ClusterError(
        f"{name} = {address}: cannot connect to Ray ({reason}); start a cluster there with `ray start --head`, "
        f"or {_without(name)}"
    )


def _without(name: str) -> str:
    return "unset it to use this machine" if name == "RAY_ADDRESS" else "leave the address out to use this machine"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _keep_token() -> None:
    """Make a private Ray's token where it cannot be kept: Ray writes it into ~/.ray, which a container may forbid."""
    given = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    directory = Path.home() / ".ray"
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if not given and not (directory / "auth_token").exists() and not os.access(there, os.W_OK):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _short_directory() -> str | None:
    """A temporary directory of our own where Ray's is too long for the names of sockets, as batch systems set it."""
    global _own_directory
    longest = ray_private.temporary_directory() + ray_private.LONGEST_SOCKET
    if len(os.fsencode(longest)) <= ray_private.MAX_SOCKET_BYTES:
        return None
    _own_directory = tempfile.mkdtemp(prefix="ddpm-ray-", dir="/tmp")
    return _own_directory


def _remove_short_directory() -> None:
    global _own_directory
    if _own_directory is not None:
        shutil.rmtree(_own_directory, ignore_errors=True)
    _own_directory = None


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
    global _connected_here, _unwatched
    if _connected_here:
        import ray

        with ray_private.own_signal_handlers():  # Ray's C++ side leaves none behind
            ray.shutdown()
        _remove_short_directory()
        if _unwatched:
            os.environ.pop(_WATCHER, None)
    _connected_here = _unwatched = False
