"""What every Ray Train worker runs: restore, stream, step, report, validate, checkpoint."""

import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ddpm_core.denoiser import EpsDenoiser
from ddpm_core.model import model_bytes, model_id_of
from pipelines.cli.console import plus_minus
from pipelines.cli.errors import NonFiniteLossError
from pipelines.data.baselines import training_baselines
from pipelines.data.dataset import PreparedDataset
from pipelines.data.hold_out import HoldOut
from pipelines.data.ledger import Ledger
from pipelines.data.stream import MicroBatch, StreamPlan, micro_batches, read_here, start_stream
from pipelines.models.checkpoints import CheckpointStore, CheckpointWriter
from pipelines.outputs.pictures import grid_png
from pipelines.storage.location import Location
from pipelines.training.config import HELD_OUT, TrainJob
from pipelines.training.learner import Learner, StepResult
from pipelines.training.node_metrics import NodeMetrics
from pipelines.training.run_directory import RESULT
from pipelines.training.stop import RayBoard, StopWatch
from pipelines.training.validation import BitsPerDim, Ranks, sample_images, validate, validated_rows

Record = dict[str, Any]
# Reports that may be lost with the controller or another rank: Ray holds one, and one can be on its way, half
# arrived, with the next one taken already.
_UNSURE_REPORTS = 3


def train_loop(loop_config: dict[str, TrainJob]) -> None:
    """Entry point of a Ray Train worker."""
    Worker(loop_config["job"]).run()


class Worker:
    """One DDP rank."""

    def __init__(self, job: TrainJob) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.job, self.config = job, job.config
        self.ranks = Ranks(context.get_world_rank(), context.get_world_size())
        self.device = ray.train.torch.get_device()
        # Ray gives workers one thread; a CPU worker wants its share of the node's cores.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = self.config.cluster.threads_per_worker or cores // context.get_local_world_size()
        torch.set_num_threads(max(1, threads))
        self.node = NodeMetrics(context.get_node_rank()) if context.get_local_rank() == 0 else None
        self.dataset = PreparedDataset.open(job.train)
        self.hold_out = HoldOut(self.dataset.num_rows, self.config.data.hold_out or 0)
        self.validation = PreparedDataset.open(job.validation) if job.validation else None
        self.held_out = self.hold_out if self.config.data.validation == HELD_OUT else None  # what of it is validated on
        network, process = self.config.network.unet_config(self.dataset.image_shape), self.config.diffusion.process()
        self.learner = Learner(
            lambda: EpsDenoiser.build(network, process),
            self.config.train,
            self.config.data.random_flip,
            self.device,
            self.ranks.rank,
            self.ranks.world_size,
        )
        self.store = CheckpointStore.open(job.run)
        self.writer = CheckpointWriter(self.store, self.config.checkpoint.keep)
        self.used = Ledger()  # what this rank used since the last checkpoint
        self.used_before = Ledger()  # rank 0: what all ranks used up to the last checkpoint
        self.outbox: list[Record] = []  # to be reported
        self.unsure: list[list[Record]] = [[]]  # by report, kept with the next checkpoint: see _checkpoint
        self.results: list[tuple[StepResult, float]] = []  # of the steps not yet collected, with their times
        self.last_validation: BitsPerDim | None = None
        self.preemption_saved = False
        self.done = 0  # steps
        self.saved = 0  # step of the newest checkpoint
        self.clock, self.clock_step, self.waited = 0.0, 0, 0.0  # of the steps since the last report: see _start_clock

    def run(self) -> None:
        """Train from the newest checkpoint to the last step, or until the driver asks to stop."""
        config, steps = self.config, self.config.train.steps
        start = self.done = self.saved = self._restore()
        self._report()
        if start < steps:
            group = self.ranks.broadcast(uuid.uuid4().hex)
            stop = StopWatch(RayBoard(), group, self.ranks.rank, self.ranks.world_size, start)
            self._train(start, stop)
            if self.done < steps:
                self._leave(stop)
                return
        else:  # killed between the last checkpoint and the result
            self._validate(steps)
            self._grid(steps)
        self.writer.wait()
        if self.ranks.rank == 0:
            self._write_result(steps)
        self._say(f"training finished: {steps:,} steps of {config.train.batch_size} images")
        self._report()

    def _train(self, start: int, stop: StopWatch) -> None:
        config = self.config
        plan = StreamPlan.of(
            self.dataset,
            config.train.seed,
            config.train.batch_size,
            config.train.steps,
            config.data.window_mib << 20,
            self.hold_out.every,
        )
        stream, fresh = self._next_stream(plan), True
        self._start_clock(start)
        while self.done == config.train.steps or not stop.reached(self.done):
            before = time.perf_counter()
            batch = next(stream, None)
            waited = time.perf_counter() - before
            if fresh:  # starting a stream is no wait for data: seconds among the milliseconds of later batches
                self._metrics(self.done + 1, {"first_batch_seconds": waited})
                self._report()  # the display learns that the start is over
                self.clock, fresh = self.clock + time.perf_counter() - before, False
            else:
                self.waited += waited
            if batch is not None:
                self.results.append((self.learner.step(batch), time.time()))
                self.used.add(batch.epochs, batch.ids)
                self.done = batch.step + 1
                self._after_step(self.done)
            elif self.done < config.train.steps:
                stream, fresh = self._next_stream(plan), True
            else:
                break

    def _leave(self, stop: StopWatch) -> None:
        """Save what has been trained, as the driver was asked to end."""
        if self.results:
            self._collect(self.done)
        if self.saved < self.done:
            self._checkpoint(self.done)
        self.writer.wait()
        stop.saved(self.done)
        self._report()

    def _next_stream(self, plan: StreamPlan) -> Iterator[MicroBatch]:
        """This rank's share of the steps from `done` on, as far as one stream goes."""
        if plan.is_one_window:
            return read_here(plan, self.dataset, self.ranks.rank, self.ranks.world_size, self.done)
        data, iterators = self.config.data, None
        if self.ranks.rank == 0:
            # Built here, from the very step that was restored, so that data and weights cannot disagree.
            iterators = start_stream(plan, self.done, self.ranks.world_size, data.cpus_per_read, data.reads_ahead)
        iterator = self._broadcast_iterators(iterators)[self.ranks.rank]
        return micro_batches(iterator, self.ranks.rank, self.done, self.dataset.image_shape)

    def _broadcast_iterators(self, iterators: Any) -> Any:
        import ray

        return ray.cloudpickle.loads(self.ranks.broadcast(ray.cloudpickle.dumps(iterators)))

    def _after_step(self, done: int) -> None:
        """Whatever is due when `done` steps are done."""
        config, steps = self.config, self.config.train.steps

        def due(every: int) -> bool:
            return done % every == 0 or done == steps

        validation = due(config.validation.every_steps) and self.validation is not None
        grid = due(config.grid.every_steps)
        checkpoint = due(config.checkpoint.every_steps)
        if not (due(config.tracking.every_steps) or validation or grid or checkpoint):
            return
        self._collect(done)
        for due_now, what, do in ((validation, "validating", self._validate), (grid, "sampling a grid", self._grid)):
            if due_now:
                self._say(f"step {done:,}: {what}")
                self._report()  # what is known is seen while this takes its time
                do(done)
        if checkpoint or self._about_to_be_preempted():
            self._checkpoint(done)
        self._report()
        self._start_clock(done)

    def _start_clock(self, done: int) -> None:
        self.clock, self.clock_step, self.waited = time.perf_counter(), done, 0.0

    def _collect(self, done: int) -> None:
        """Turn the steps since the last collection into metric records, and stop if a loss is not finite."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.clock
        losses = torch.stack([result.loss for result, _ in self.results]).double()
        norms = torch.stack([result.grad_norm for result, _ in self.results]).double()
        if self.ranks.world_size > 1:
            dist.all_reduce(losses)
        table = torch.stack([losses, norms]).cpu().numpy()
        first = done - len(self.results)
        bad = np.flatnonzero(~np.isfinite(table).all(axis=0))
        if len(bad):
            loss, norm = table[:, bad[0]]
            raise NonFiniteLossError(
                f"step {first + int(bad[0]) + 1}: loss = {loss}, gradient norm = {norm}; nothing after the last "
                "checkpoint is kept. Lower train.learning_rate or train.grad_clip and start under a new name"
            )
        for offset, (loss, norm) in enumerate(table.T.tolist()):
            step = first + offset + 1
            values = {
                "train/loss": loss,
                "grad_norm": norm,
                "learning_rate": self.learner.learning_rate(step - 1),
            }
            self._metrics(step, values, self.results[offset][1])
        steps = done - self.clock_step
        self._metrics(
            done,
            {
                "epoch": done * self.config.train.batch_size / self.hold_out.num_trained,
                "images_per_second": steps * self.config.train.batch_size / seconds,
                "data_wait_seconds": self.waited,
                "data_wait_fraction": self.waited / seconds,
                "workers": self.ranks.world_size,
            },
        )
        self.results.clear()

    def _validate(self, done: int) -> None:
        if self.validation is None:
            return
        config = self.config
        result = validate(
            self.learner.averaged(),
            self.validation,
            config.validation,
            config.train.seed,
            self.device,
            self.ranks,
            self.held_out,
        )
        prefix = f"validation/{result.sigma2}"
        values = {
            f"{prefix}/bits_per_dim": result.total,
            f"{prefix}/terms/prior": result.prior,
            f"{prefix}/terms/kl_sum": result.kl_sum,
            f"{prefix}/terms/decoder": result.decoder,
        }
        if not np.isfinite(list(values.values())).all():
            raise NonFiniteLossError(
                f"step {done}: validation gives {result.total} bits/dim; nothing after the last checkpoint is kept. "
                "Lower train.learning_rate, or take train.precision fp32, and start under a new name"
            )
        if result.standard_error is not None:
            values[f"{prefix}/bits_per_dim_standard_error"] = result.standard_error
        self._metrics(done, values)
        self._say(
            f"step {done:,}: validation {plus_minus(result.total, result.standard_error)} bits/dim "
            f"({result.num_images} images, σ² = {result.sigma2})"
        )
        self.last_validation = result

    def _grid(self, done: int) -> None:
        images = sample_images(
            self.learner.averaged(),
            self.config.grid,
            self.config.train.seed,
            self.device,
            self.ranks,
        )
        if self.ranks.rank == 0:
            path = Location.parse(self.job.run) / "grids" / f"step-{done:08d}.png"
            path.write_bytes(grid_png(images))
            self._record({"kind": "image", "key": "samples", "step": done, "path": path.uri})

    def _checkpoint(self, done: int) -> None:
        """Save everything that a resumed run needs to go on as if nothing had happened.

        The records since the last checkpoint go with it, and those of the last reports: should they have been
        lost on their way to the tracker when the run dies, the resumed run reports them again.
        """
        parts = self.ranks.gather(self.used)
        self.used = Ledger()
        if self.ranks.rank == 0:
            for part in parts:
                self.used_before.merge(part)
            self._check_ledger(done)
            model = model_bytes(self.learner.ema.state_dict(), self.learner.denoiser, self._provenance(done))
            files = {f"model/{name}": data for name, data in model.items()}
            files |= {**self.learner.state(), "ledger.parquet": self.used_before.to_bytes()}
            state = {
                **self._provenance(done),
                "model_id": model_id_of(model),
                "world_size": self.ranks.world_size,
                "records": [record for report in self.unsure for record in report],
            }
            self.writer.save(done, files, state)
        self.saved = done
        del self.unsure[: -1 - _UNSURE_REPORTS]

    def _check_ledger(self, step: int) -> None:
        batch_size = self.config.train.batch_size
        self.used_before.check(self.dataset.num_rows, step, batch_size, self.hold_out.every)

    def _provenance(self, done: int) -> Record:
        dataset = {"id": self.dataset.dataset_id, "uri": self.job.train, "num_rows": self.dataset.num_rows}
        return {
            "step": done,
            "dataset": dataset,
            "config": self.config.semantic(),
            "code_version": self.job.code_version,
        }

    def _restore(self) -> int:
        """Take up the newest intact checkpoint, chosen by rank 0 for all; returns the steps done."""
        step = None
        if self.ranks.rank == 0:
            newest = self.store.newest(self._say)
            step = newest.step if newest else None
        step = self.ranks.broadcast(step)
        if step is None:
            return 0
        checkpoint = self.store.load(step)
        self.learner.load(
            checkpoint.read("weights.safetensors"),
            checkpoint.read("optimizer.safetensors"),
            checkpoint.read("model/ema.safetensors"),
        )
        if self.ranks.rank == 0:
            self.used_before = Ledger.from_bytes(checkpoint.read("ledger.parquet"))
            self._check_ledger(step)
            for record in checkpoint.state["records"]:
                self._record(record)
        self._say(f"resumed at step {step:,} on {self.ranks.world_size} worker(s)")
        return int(step)

    def _write_result(self, steps: int) -> None:
        checkpoint = self.store.load(steps)
        result = {
            "step": steps,
            "model": checkpoint.model.uri,
            "model_id": checkpoint.state["model_id"],
            "dataset_id": self.dataset.dataset_id,
            "grid": (Location.parse(self.job.run) / "grids" / f"step-{steps:08d}.png").uri,
            "validation": self._validation_result(),
            "parameters": sum(parameter.numel() for parameter in self.learner.denoiser.parameters()),
        }
        (Location.parse(self.job.run) / RESULT).write_json(result)

    def _validation_result(self) -> Record | None:
        """The last validation, of which data set it is, and what the same images take without a model."""
        if self.last_validation is None or self.validation is None:
            return None
        dataset_id = self.validation.dataset_id
        ids = validated_rows(self.validation, self.config.validation.num_images, self.held_out)
        return {
            **asdict(self.last_validation),
            "dataset_id": self.held_out.name_of(dataset_id) if self.held_out else dataset_id,
            "baselines": training_baselines(self.dataset, self.hold_out, self.validation, ids),
        }

    def _about_to_be_preempted(self) -> bool:
        """Whether a node of ours is being drained and nothing has been saved since that was known."""
        import ray.train

        preempted = ray.train.get_preemption_info() is not None
        save = preempted and not self.preemption_saved
        self.preemption_saved = preempted
        return save

    def _metrics(self, step: int, values: dict[str, float], seconds: float | None = None) -> None:
        stamp = int((seconds or time.time()) * 1000)
        self._record({"kind": "metrics", "step": step, "values": values, "timestamp_ms": stamp})

    def _say(self, message: str) -> None:
        if self.ranks.rank == 0:
            self.outbox.append({"kind": "event", "message": message})

    def _record(self, record: Record) -> None:
        if self.ranks.rank == 0:
            self.outbox.append(record)
            self.unsure[-1].append(record)

    def _report(self) -> None:
        import ray.train

        records, self.outbox = self.outbox, []
        if self.node is not None:
            values = self.node.read(self.device)
            records.append({"kind": "metrics", "step": self.done, "values": values})
        self.unsure.append([])
        ray.train.report({"records": records})
