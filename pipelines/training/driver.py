"""The training job's driver: check everything that can be checked, run Ray Train, register the model."""

import time

from pipelines.cli.config import as_dict
from pipelines.cli.console import Interrupted, event, waiting
from pipelines.models.checkpoints import CheckpointStore
from pipelines.storage.location import Location
from pipelines.storage.ownership import claim
from pipelines.training.attempt import Attempt
from pipelines.training.checks import check
from pipelines.training.config import TrainConfig
from pipelines.training.ray_train import TrainLoop
from pipelines.training.run_directory import CONFIG, read_result
from pipelines.training.summary import TrainSummary, summarise
from pipelines.training.tracked import announce, open_tracker, register


def train(config: TrainConfig, loop: TrainLoop | None = None) -> TrainSummary:
    """Train from scratch or from the newest checkpoint of the run of that name; a finished run is left alone.

    Raises:
        ConfigError: The network cannot take the images, the run is longer than `train.steps`, its directory holds files
            of something else, or this machine is too small.
        DataError: A data set is missing, damaged, or has another shape than the other.
        CheckpointError: The run's checkpoints are corrupt, or made from another data set or under another config.
        ClusterError: Ray is out of reach, or workers were lost more than `cluster.max_failures` times.
        NonFiniteLossError: The loss became NaN or infinite.
        StorageError: `root` cannot be read or written.
    """
    checked = check(config)
    job, run = checked.job, Location.parse(checked.job.run)
    began, attempt, status = time.monotonic(), Attempt(job), "FAILED"
    tracker = open_tracker(checked, attempt.hear)
    try:
        announce(tracker.spool, checked)
        result = checked.result
        if result is None:
            for line in checked.told:
                event(line)
            (run / CONFIG).write_json(as_dict(job.config))
            claim(run)
            attempt.run(tracker, loop)
            result = read_result(run)
        assert result is not None
        register(tracker.spool, job, result)
        status = "FINISHED"
    except Interrupted as interruption:
        status = "KILLED"
        attempt.stop(tracker.spool)
        interruption.kept = CheckpointStore.open(run.uri).kept()
        raise
    finally:
        attempt.close()
        with waiting("sending the last records to MLflow"):
            report = tracker.finish(status, timeout_s=60.0)
    seconds = None if attempt.display is None else time.monotonic() - began
    rate = None if attempt.display is None else attempt.display.overall_rate
    return summarise(job, result, report, seconds, rate)
