"""One attempt at a training: Ray Train runs in the background, while signals and fatal errors are watched for."""

import importlib
import math
import os
import threading
from contextlib import suppress

from pipelines.cli.console import event, interrupted_again, waiting
from pipelines.cli.errors import ClusterError, DDPMError, error_of
from pipelines.cluster import connection, demand
from pipelines.tracking.spool import Record, Spool
from pipelines.tracking.tracker import Tracker
from pipelines.training.config import TrainJob
from pipelines.training.display import Display
from pipelines.training.ray_train import TrainLoop, first_line, own_error, run_workers
from pipelines.training.stop import RayBoard, ask_to_stop


class Attempt:
    """The driver's side of running workers.

    Attributes:
        display: The progress line, once there are workers to be waited for.
    """

    def __init__(self, job: TrainJob) -> None:
        self._job = job
        self.display: Display | None = None
        self._fatal: DDPMError | None = None
        self._board: RayBoard | None = None  # once Ray is connected
        # Not Thread.is_alive: Python 3.11 takes a thread for dead when a signal interrupts waiting for it.
        self._idle = threading.Event()  # Ray Train does not run
        self._idle.set()

    def hear(self, record: Record) -> None:
        """Show a record that has just been spooled; called from the tracker's thread."""
        if record.kind == "event":
            event(record.payload["message"])
        elif record.kind == "fatal":
            self._fatal = error_of(record.payload["error"], record.payload["message"])
        elif record.kind == "metrics" and not self._idle.is_set() and self.display is not None:
            self.display.hear(record)

    def run(self, tracker: Tracker, loop: TrainLoop | None) -> None:
        """Run `loop` (None: the training itself) on the workers to its end; what `tracker` hears comes to `hear`.

        Raises:
            ClusterError: Ray is out of reach, or workers were lost more than `cluster.max_failures` times.
            DDPMError: What ended a worker and would end the next one.
        """
        config = self._job.config
        low, high = config.cluster.worker_range
        private_cpus = max(os.cpu_count() or 1, math.ceil(high * config.cluster.cpus_per_worker))
        # Ray's processes start meanwhile. Not before: a finished training needs neither, nor does a refused one.
        threading.Thread(target=lambda: importlib.import_module("torch"), name="loading", daemon=True).start()
        with waiting("loading Ray"):
            connected = connection.connect(config.cluster.address, private_cpus)
        import ray

        self._board = RayBoard()
        tracker.spool.append("tags", values={"ray.job_id": ray.get_runtime_context().get_job_id()})
        event(f"training {config.name} on {connected} with {_workers(low, high)}; run directory {self._job.run}")
        self.display = Display(config, f"starting {_workers(low, high)}")
        failure: list[BaseException] = []
        self._idle.clear()
        threading.Thread(target=self._fit, args=(tracker, loop, failure), name="ray-train", daemon=True).start()
        with demand.told(low, config.cluster.needs):
            while not self._idle.wait(0.2) and self._fatal is None:
                pass  # a signal's handler runs between two waits
        if self._fatal is None and failure:
            self._fatal = own_error(failure[0]) or ClusterError(
                f"cluster.max_failures = {config.cluster.max_failures}: gave up ({first_line(failure[0])}); "
                "run the same command to continue from the last checkpoint"
            )
        if self._fatal is not None:
            raise self._fatal

    def stop(self, spool: Spool) -> None:
        """Have the workers save the step they are at and end; a second signal ends the waiting for them."""
        if self._board is None or self._idle.is_set():
            return
        # Whoever sent the signal may have no patience: MLflow is told now, in the background, and again at the end.
        spool.append("finish", status="KILLED")
        with suppress(Exception):  # Ray may be what has ended: then nobody is there to save
            ask_to_stop(
                self._board,
                lambda seconds: self._idle.wait(seconds) or self._fatal is not None or interrupted_again(),
                event,
            )

    def close(self) -> None:
        """Take the progress line off the terminal and leave Ray."""
        if self.display is not None:
            self.display.close()
        # Ray ends a process at once in which one thread leaves while another still waits for an answer. A
        # training that is given up is therefore left to end with this process, as after a kill.
        if self._idle.is_set():
            if self._board is not None:
                with suppress(Exception):  # the entries of a Ray that has ended are gone with it
                    self._board.clear()
            connection.disconnect()

    def _fit(self, tracker: Tracker, loop: TrainLoop | None, failure: list[BaseException]) -> None:
        try:
            run_workers(self._job, tracker.spool, loop)
        except BaseException as error:  # noqa: BLE001  # handed to the main thread
            failure.append(error)
        try:
            tracker.catch_up()  # the controller's last words may still be on their way
        finally:
            self._idle.set()


def _workers(low: int, high: int) -> str:
    return f"{low} worker(s)" if low == high else f"{low} to {high} workers"
