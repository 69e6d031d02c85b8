"""What a training keeps in its checkpoints to be resumed as if nothing had happened, and how it takes that up."""

from collections.abc import Callable, Mapping, Sequence

from ddpm_core.model import model_bytes, model_id_of
from pipelines.models.checkpoints import Checkpoint, CheckpointStore, CheckpointWriter
from pipelines.training.config import TrainJob
from pipelines.training.learner import Learner
from pipelines.training.ranks import Ranks
from pipelines.training.reports import Record


class Checkpoints:
    """The checkpoints of a running training: its model and its learner's state, with files that others add.

    Args:
        job: The training.
        dataset: What a checkpoint says of the data set: `id`, `uri` and `num_rows`.
        label_names: What the classes are called; empty for a network without.
        learner: Whose state is kept.
        ranks: All that train; rank 0 writes.
    """

    def __init__(
        self, job: TrainJob, dataset: Record, label_names: Sequence[str], learner: Learner, ranks: Ranks
    ) -> None:
        self._job, self._dataset, self._label_names = job, dataset, label_names
        self._learner, self._ranks = learner, ranks
        self._store = CheckpointStore.open(job.run)
        self._writer = CheckpointWriter(self._store, job.config.checkpoint.keep)

    def restore(self, notify: Callable[[str], None]) -> Checkpoint | None:
        """Have the learner take up the newest intact checkpoint, which is returned; None before the first.

        A collective: rank 0 chooses for all, and `notify` is told there of corrupt ones passed over.

        Raises:
            CheckpointError: None is intact, or the newest that is belongs to another network.
        """
        step = None
        if self._ranks.rank == 0:
            newest = self._store.newest(notify)
            step = newest.step if newest else None
        step = self._ranks.broadcast(step)
        if step is None:
            return None
        checkpoint = self._store.load(step)
        self._learner.load(
            checkpoint.read("weights.safetensors"),
            checkpoint.read("optimizer.safetensors"),
            checkpoint.read("model/ema.safetensors"),
            checkpoint.read("objective.safetensors") if "objective.safetensors" in checkpoint.state["files"] else None,
        )
        return checkpoint

    def is_due(self, done: int) -> bool:
        """Whether one is to be saved after `done` steps."""
        return self._job.config.is_due(self._job.config.checkpoint.every_steps, done)

    def save(self, done: int, files: Mapping[str, bytes], records: Sequence[Record]) -> None:
        """Start saving, on rank 0, the state after `done` steps.

        Args:
            done: Steps.
            files: What others keep, by name.
            records: Those that a resumed run reports again.

        Raises:
            StorageError: The save before this one failed.
        """
        origin = self._origin(done)
        model = model_bytes(self._learner.ema.state_dict(), self._learner.denoiser, origin)
        kept = {f"model/{name}": data for name, data in model.items()} | self._learner.state() | dict(files)
        state = {
            **origin,
            "model_id": model_id_of(model),
            "world_size": self._ranks.world_size,
            "records": list(records),
        }
        self._writer.save(done, kept, state)

    def wait(self) -> None:
        """Until the last save is committed; raises StorageError if it failed."""
        self._writer.wait()

    def load(self, done: int) -> Checkpoint:
        """The committed checkpoint of `done` steps; raises CheckpointError where there is none."""
        return self._store.load(done)

    def _origin(self, done: int) -> Record:
        return {
            "step": done,
            "dataset": self._dataset,
            "config": self._job.config.semantic(),
            "code_version": self._job.code_version,
            **({"label_names": list(self._label_names)} if self._label_names else {}),
        }
