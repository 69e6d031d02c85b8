"""Ray Train as the driver uses it: the workers' run to its end, what they report on the way, what ended it."""

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipelines import THREADS
from pipelines.cli.errors import DDPMError
from pipelines.cluster import ray_private
from pipelines.storage.location import Location
from pipelines.tracking.spool import Spool
from pipelines.training.config import TrainJob

if TYPE_CHECKING:
    from ray.train import UserCallback

TrainLoop = Callable[[dict[str, TrainJob]], None]


def run_workers(job: TrainJob, spool: Spool, loop: TrainLoop | None) -> None:
    """Run `loop` (None: the training itself) on the job's workers to its end, restarts included.

    What they report goes into the spool. Raises what Ray Train raises when it gives up; see `own_error`.
    """
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from pipelines.training.worker import train_loop

    scaling = job.config.cluster
    # Ray's own files; our checkpoints and their commit are not among them (docs/adr/0003).
    storage = Location.parse(job.run) / "ray"
    trainer = ray_private.trainer_class()(
        loop or train_loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,  # type: ignore[arg-type]  # (min, max) is Ray Train v2's
            use_gpu=scaling.gpus > 0,
            resources_per_worker={kind: need for kind, need in scaling.needs.items() if need},
        ),
        run_config=RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=storage.path,
            storage_filesystem=None if storage.is_local else PyFileSystem(FSSpecHandler(storage.fs)),
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            callbacks=[controller_callback(spool)],  # type: ignore[list-item]
            # Ray Train's workers load torch before they load `pipelines`.
            worker_runtime_env={"env_vars": {name: os.environ[name] for name in THREADS if name in os.environ}},  # type: ignore[call-arg]
        ),
    )
    trainer.fit()


def controller_callback(spool: Spool) -> "UserCallback":
    """Carries what workers report into the spool; runs in Ray Train's controller, on the driver's node."""
    from ray.train import UserCallback

    class ReportToSpool(UserCallback):
        def __init__(self) -> None:
            self._told: set[str] = set()  # Ray tells of one loss several times

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            self._told.clear()
            for report in metrics:
                for record in report["records"]:
                    spool.append(**record)

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for rank, error in sorted(worker_exceptions.items()):
                cause = own_error(error)
                if cause is not None:
                    spool.append("fatal", error=type(cause).__name__, message=str(cause))
                    return
                message = f"worker {rank} was lost ({first_line(error)}): restarting"
                if message not in self._told:
                    self._told.add(message)
                    spool.append("event", message=message)

    return ReportToSpool()


def own_error(error: BaseException | None) -> DDPMError | None:
    """The error of our tree that Ray has wrapped, if there is one: restarting would only meet it again."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        # What a Ray task raised arrives as a class of Ray's own that also is our error's; ours is its cause.
        if isinstance(error, DDPMError) and not hasattr(error, "cause"):
            return error
        seen.add(id(error))
        for failure in getattr(error, "worker_failures", {}).values():
            if (found := own_error(failure)) is not None:
                return found
        error = getattr(error, "cause", None) or ray_private.wrapped_in(error) or error.__cause__
    return None


def first_line(error: BaseException) -> str:
    """What an error says, in a line of at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
