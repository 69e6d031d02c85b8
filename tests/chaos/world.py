"""What the jobs live on: Ray nodes, an object store behind a faulty network, an MLflow server, a small disk."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
from support.fault_proxy import FaultProxy, mixed
from support.job_process import JobProcess
from support.mlflow_store import Server
from support.ray_nodes import RayNodes
from support.s3_store import S3Store
from support.small_disk import small_disk

_WORKERS = ("ray::RayTrainWorker", "ray::MapWorker")  # Ray's names of the processes that compute
_BALLAST = "ballast"
PREFIX = "ddpm"


class World:
    """All of it, with a way to break each part; what heals by itself after a while does so in `heal`.

    Attributes:
        disk: Directory on a file system of its own.
        bucket: URI of a bucket's prefix, the one that deploy/aws gives rights to; `environment` points at it through
            the proxy.
        environment: Variables of a user who works here.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self._stack = ExitStack()
        for name in ("store", "mlflow"):
            (directory / name).mkdir(parents=True)
        self.store = S3Store(directory / "store")
        self._stack.callback(self.store.close)
        self.proxy = FaultProxy(self.store.port, seed)
        self._stack.callback(self.proxy.close)
        self.mlflow = Server(directory / "mlflow")
        self.mlflow.start()
        self._stack.callback(self.mlflow.stop)
        self.disk = self._stack.enter_context(small_disk(directory, "96m"))
        self.bucket = f"s3://{self.store.bucket}/{PREFIX}"
        self.environment = {
            **self.store.environment,
            "AWS_ENDPOINT_URL": self.proxy.endpoint,
            "MLFLOW_TRACKING_URI": self.mlflow.uri,
            "HOME": str(self.disk),  # where a training with its root in a store keeps its spool
            "RAY_AUTH_TOKEN_PATH": str(Path("~/.ray/auth_token").expanduser()),
        }
        self.nodes = RayNodes(2, environment=self.environment)
        self._stack.callback(self.nodes.close)
        self.environment["RAY_ADDRESS"] = self.nodes.address
        self._healing: list[tuple[float, Callable[[], object]]] = []
        self._starting: threading.Thread | None = None

    def close(self) -> None:
        """End everything."""
        self._stack.close()

    def heal(self, *, now: bool = False) -> None:
        """Undo the faults whose time is over, or all of them `now`, and then wait until everything is back."""
        for due in list(self._healing):
            if now or time.monotonic() >= due[0]:
                self._healing.remove(due)
                due[1]()
        if now and self._starting is not None:
            self._starting.join()

    def _later(self, seconds: float, action: Callable[[], object]) -> None:
        self._healing.append((time.monotonic() + seconds, action))

    def kill_worker(self, choice: float) -> bool:
        """SIGKILL one process that computes, chosen by a number in [0, 1); False when there is none now."""
        found = []
        for node in self.nodes.nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            found += [child for child in raylet.children() if _title(child).startswith(_WORKERS)]
        if not found:
            return False
        sorted(found, key=lambda process: process.create_time())[int(choice * len(found))].kill()
        return True

    def kill_node(self, choice: float) -> None:
        """SIGKILL everything on one node; a new one takes its place, as an autoscaler would see to it."""
        self.nodes.lose(int(choice * len(self.nodes.nodes)))
        self.nodes.add()

    def kill_store(self, seconds: float) -> None:
        """SIGKILL the store; it comes back after `seconds` with what it had acknowledged."""
        if self.store.restart in [action for _, action in self._healing]:
            return  # it is away already
        self.store.kill()
        self._later(seconds, self.store.restart)

    def spoil_requests(self, seconds: float) -> None:
        """Let a fifth of the requests to the store fail for `seconds`."""
        self.proxy.set_rules(mixed(0.2))
        self._later(seconds, lambda: self.proxy.set_rules([]))

    def stop_mlflow(self, seconds: float) -> None:
        """SIGKILL the MLflow server for `seconds`; it takes some more to start, for which nobody waits."""
        if self._start_mlflow in [action for _, action in self._healing]:
            return  # it is away already
        if self._starting is not None:
            self._starting.join()
        self.mlflow.stop()
        self._later(seconds, self._start_mlflow)

    def _start_mlflow(self) -> None:
        self._starting = threading.Thread(target=self.mlflow.start)
        self._starting.start()

    def fill_disk(self, seconds: float) -> None:
        """Leave not a byte free on the disk for `seconds`."""
        ballast = self.disk / _BALLAST
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                os.fsync(file.fileno())
        self._later(seconds, lambda: ballast.unlink(missing_ok=True))

    def run(self, *arguments: str) -> str:
        """Run a program to its end, undisturbed; gives what it printed."""
        job = JobProcess(*arguments, environment=self.environment)
        try:
            assert job.wait(600) == 0, job.text
        finally:
            job.close()
        return job.text


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
