"""What every Ray Train worker runs: restore, then step after step, with reports, validation, grids and checkpoints.

The steps are on this page. What happens around them has one file each, and none of these knows another: batches,
used_rows (the ledger), step_metrics, validation, grid, quality, noise_schedule, checkpoints, preemption, stop. They
share the place among the ranks (`Ranks`) and the way to the driver (`Reports`). What is called a collective in them all
ranks call together, in the same order: that of this page.
"""

import os
import time
import uuid
from typing import Protocol

import torch

from pipelines.data.dataset import PreparedDataset
from pipelines.data.epochs import epochs_of
from pipelines.data.hold_out import HoldOut
from pipelines.data.stream import StreamPlan
from pipelines.storage.location import Location
from pipelines.training.batches import Batches
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.config import TrainJob
from pipelines.training.grid import Grid
from pipelines.training.labels import label_names
from pipelines.training.learner import Learner, build
from pipelines.training.node_metrics import NodeMetrics
from pipelines.training.noise_schedule import NoiseSchedule
from pipelines.training.preemption import Preemption
from pipelines.training.quality import Quality
from pipelines.training.ranks import Ranks
from pipelines.training.reports import Reports
from pipelines.training.run_directory import RESULT
from pipelines.training.step_metrics import StepMetrics
from pipelines.training.stop import Board, RayBoard, StopWatch
from pipelines.training.used_rows import UsedRows
from pipelines.training.validation import Validation


class Observer(Protocol):
    """What takes a while after some steps and changes nothing in the training."""

    @property
    def doing(self) -> str:
        """What it does, for the user."""
        ...

    def is_due(self, done: int) -> bool:
        """Whether it happens after `done` steps."""
        ...

    def observe(self, done: int) -> None:
        """Do it. A collective."""
        ...


def train_loop(loop_config: dict[str, TrainJob]) -> None:
    """Entry point of a Ray Train worker."""
    import ray.train
    import ray.train.torch

    job, context, device = loop_config["job"], ray.train.get_context(), ray.train.torch.get_device()
    # Ray gives workers one thread; a CPU worker wants its share of the node's cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = job.config.cluster.threads_per_worker or cores // context.get_local_world_size()
    torch.set_num_threads(max(1, threads))
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    node = NodeMetrics(context.get_node_rank()) if context.get_local_rank() == 0 else None
    reports = Reports(ranks.rank, ray.train.report, None if node is None else lambda: node.read(device))
    preemption = Preemption(lambda: ray.train.get_preemption_info() is not None)
    Worker(job, ranks, device, reports, preemption, RayBoard()).run()


class Worker:
    """One DDP rank.

    Args:
        job: The training.
        ranks: This one's place.
        device: Where the network lies.
        reports: The way to the driver.
        preemption: Whether a node is about to be lost.
        board: Where the driver asks to stop.
    """

    def __init__(
        self, job: TrainJob, ranks: Ranks, device: torch.device, reports: Reports, preemption: Preemption, board: Board
    ) -> None:
        config = job.config
        self.config, self.ranks, self.reports, self.preemption, self.board = config, ranks, reports, preemption, board
        self.run_directory = Location.parse(job.run)
        self.dataset = PreparedDataset.open(job.train)
        every, balanced = config.data.hold_out or 0, config.data.balance_classes
        epochs, hold_out = epochs_of(self.dataset, every, balanced), HoldOut(self.dataset.num_rows, every)
        self.learner = Learner(lambda: build(config, self.dataset.image_shape), config, device, ranks)
        plan = StreamPlan.of(
            self.dataset,
            config.seed,
            config.batch_size,
            config.train.steps,
            config.data.window_mib << 20,
            every,
            balanced,
            labelled=config.network.num_classes is not None,
        )
        self.batches = Batches(plan, self.dataset, config.data, ranks)
        self.rows = UsedRows(epochs, config.batch_size, ranks)
        rate = self.learner.learning_rate
        self.metrics = StepMetrics(config, epochs.length, rate, device, ranks, reports)
        self.validation, self.quality = None, None
        if job.validation is not None:
            images, averaged = PreparedDataset.open(job.validation), self.learner.averaged
            self.validation = Validation(images, config, hold_out, averaged, device, ranks, reports)
            if config.quality.num_images:
                self.quality = Quality(self.run_directory, images, config, hold_out, averaged, device, ranks, reports)
        names = label_names(self.dataset, config.network.num_classes)
        self.grid = Grid(self.run_directory, config, names, self.learner.averaged, device, ranks, reports)
        self.noise_schedule = None
        if config.diffusion.schedule == "gamma_learned":
            self.noise_schedule = NoiseSchedule(self.run_directory, config, self.learner.averaged, ranks, reports)
        observers = (self.validation, self.grid, self.quality, self.noise_schedule)
        self.observers: list[Observer] = [each for each in observers if each is not None]
        trained_on = {"id": self.dataset.dataset_id, "uri": job.train, "num_rows": self.dataset.num_rows}
        self.checkpoints = Checkpoints(job, trained_on, names, self.learner, ranks)
        self.done = self.saved = 0  # steps; those of the newest checkpoint

    def run(self) -> None:
        """Train from the newest checkpoint to the last step, or until the driver asks to stop."""
        steps = self.config.train.steps
        self._restore()
        self.reports.send(self.done)
        if self.done < steps:
            group = self.ranks.broadcast(uuid.uuid4().hex)
            stop = StopWatch(self.board, group, self.ranks.rank, self.ranks.world_size, self.done)
            self._train(stop)
            if self.done < steps:
                self._leave(stop)
                return
        else:  # killed between the last checkpoint and the result
            for observer in self.observers:
                observer.observe(steps)
        self.checkpoints.wait()
        if self.ranks.rank == 0:
            self._write_result()
        self.reports.say(f"training finished: {steps:,} steps of {self.config.batch_size} images")
        self.reports.send(self.done)

    def _train(self, stop: StopWatch) -> None:
        self.batches.start(self.done)
        self.metrics.start_clock(self.done)
        while self.done < self.config.train.steps and not stop.reached(self.done):
            arrival = self.batches.next()
            self.metrics.add_wait(arrival.waited_s)
            if arrival.start_s is not None:
                before = time.perf_counter()
                self.reports.metrics(self.done + 1, {"first_batch_seconds": arrival.start_s})
                self.reports.send(self.done)  # the display learns that the start is over
                self.metrics.leave_out(arrival.start_s + time.perf_counter() - before)
            self.metrics.add(self.learner.step(arrival.batch))
            self.rows.add(arrival.batch)
            self.done = arrival.batch.step + 1
            self._after_step(self.done)
        if self.done == self.config.train.steps:
            self.batches.finish()

    def _after_step(self, done: int) -> None:
        """Whatever is due when `done` steps are done."""
        observers, save = [each for each in self.observers if each.is_due(done)], self.checkpoints.is_due(done)
        if not (self.metrics.is_due(done) or observers or save):
            return
        self.metrics.collect(done)
        for observer in observers:
            self.reports.say(f"step {done:,}: {observer.doing}")
            self.reports.send(done)  # what is known is seen while this takes its time
            observer.observe(done)
        if save or self.preemption.wants_checkpoint():
            self._save(done)
        self.reports.send(done)
        self.metrics.start_clock(done)

    def _leave(self, stop: StopWatch) -> None:
        """Save what has been trained, as the driver was asked to end."""
        self.metrics.collect(self.done)
        if self.saved < self.done:
            self._save(self.done)
        self.checkpoints.wait()
        stop.saved(self.done)
        self.reports.send(self.done)

    def _save(self, done: int) -> None:
        """Save everything that a resumed run needs to go on as if nothing had happened."""
        files, records = self.rows.gather(done), self.reports.unsure()
        if files is not None:
            self.checkpoints.save(done, files, records)
        self.saved = done

    def _restore(self) -> None:
        """Go on from the newest intact checkpoint, if there is one."""
        checkpoint = self.checkpoints.restore(self.reports.say)
        if checkpoint is None:
            return
        self.done = self.saved = checkpoint.step
        if self.ranks.rank == 0:
            self.rows.restore(checkpoint.read("ledger.parquet"), self.done)
            for record in checkpoint.state["records"]:
                self.reports.record(record)
        self.reports.say(f"resumed at step {self.done:,} on {self.ranks.world_size} worker(s)")

    def _write_result(self) -> None:
        checkpoint = self.checkpoints.load(self.done)
        result = {
            "step": self.done,
            "model": checkpoint.model.uri,
            "model_id": checkpoint.state["model_id"],
            "dataset_id": self.dataset.dataset_id,
            "grid": self.grid.path(self.done).uri,
            "validation": self.validation.result(self.dataset) if self.validation else None,
            "parameters": sum(parameter.numel() for parameter in self.learner.denoiser.parameters()),
        }
        if self.quality is not None:
            result["quality"] = self.quality.result()
        if self.noise_schedule is not None:
            result["noise_schedule"] = self.noise_schedule.path(self.done).uri
        if self.rows.repeats is not None:
            result["rows"] = {"used": self.done * self.config.batch_size, "repeats": self.rows.repeats}
        (self.run_directory / RESULT).write_json(result)
