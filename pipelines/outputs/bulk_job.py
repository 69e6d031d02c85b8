"""What `run_bulk` asks of a job whose output is shards."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pipelines.cluster.config import ClusterConfig
from pipelines.models.used import UsedModel
from pipelines.outputs.attempt import Record
from pipelines.outputs.kind import Manifest, OutputKind
from pipelines.outputs.request import Request
from pipelines.outputs.shards import Compute, ShardedOutput, ShardRecord
from pipelines.storage.location import Location
from pipelines.tracking.config import TrackingConfig

Rows = list[tuple[str, str]]
"""(name, value) pairs of a summary."""


class BulkConfig(Protocol):
    """What every bulk job's configuration has."""

    @property
    def output(self) -> str:
        """Directory or prefix of the output."""
        ...

    @property
    def name(self) -> str | None:
        """Of the MLflow run; None takes the last part of the output."""
        ...

    @property
    def root(self) -> str:
        """Local directory of the MLflow database and of records not sent yet."""
        ...

    @property
    def tracking(self) -> TrackingConfig:
        """Where MLflow is."""
        ...

    @property
    def cluster(self) -> ClusterConfig:
        """The actors that compute, and where."""
        ...


@dataclass(frozen=True)
class Pass:
    """Parts that are computed before the shards, which depend on them.

    Attributes:
        directory: Takes the parts, one of the kind's `passes`; the manifest lists them under its name.
        suffix: Of their objects.
        factory: As for `ShardedOutput.compute`.
        num_parts: Indices are 0..num_parts-1.
        is_small: Whether they take less time than starting an actor.
        waiting: What the user is told meanwhile.
    """

    directory: str
    suffix: str
    factory: Callable[[], Compute]
    num_parts: int
    is_small: bool
    waiting: str


@dataclass(frozen=True)
class Finished:
    """What a job makes of its finished shards: its own fields of the manifest, and records for its MLflow run."""

    fields: Mapping[str, Any]
    records: Sequence[Record] = ()


class BulkJob(ABC):
    """What one run of a job is and does, between the steps that `run_bulk` takes for every job.

    Attributes:
        kind: Of its output.
        job: Names the job in MLflow; it is started as jobs/JOB.py.
        doing: As in 'sampling 22 images on ...'.
        counted: What the progress line calls the images.
        config: As its user gave it.
        request: What the output answers.
        model: The model it uses, which the output keeps a copy of; None for a job that uses none.
    """

    kind: ClassVar[OutputKind[Any]]
    job: ClassVar[str]
    doing: ClassVar[str]
    counted: ClassVar[str]
    config: BulkConfig
    request: Request
    model: UsedModel | None

    @property
    def location(self) -> Location:
        """The output."""
        return Location.parse(self.config.output)

    @property
    def run_name(self) -> str:
        """Of the MLflow run."""
        return self.config.name or self.location.name

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment."""
        return self.config.tracking.experiment or self.usual_experiment

    @property
    @abstractmethod
    def usual_experiment(self) -> str:
        """Name of the MLflow experiment where none is asked for."""

    @property
    @abstractmethod
    def num_images(self) -> int:
        """Of all shards."""

    @property
    @abstractmethod
    def num_shards(self) -> int:
        """Indices are 0..num_shards-1."""

    @property
    def suffix(self) -> str:
        """Of the shards' objects."""
        return ".parquet"

    @abstractmethod
    def factory(self) -> Callable[[], Compute]:
        """What makes the shards: picklable, it runs where MLflow need not be installed."""

    @abstractmethod
    def weights(self, shards: Sequence[int]) -> float:
        """What making these shards takes: evaluations of a network times its `pixel_weights`."""

    def further_models(self) -> Mapping[str, UsedModel]:
        """Other models that it uses, and that the output keeps copies of, by the directory that takes one."""
        return {}

    def tags(self) -> Mapping[str, Any]:
        """Further tags of the MLflow run; None leaves one out."""
        return {}

    def reads(self) -> Sequence[Record]:
        """Records of what is read."""
        return ()

    def passes(self) -> Sequence[Pass]:
        """What is computed before the shards, in this order."""
        return ()

    def enough(self, records: Sequence[ShardRecord]) -> bool:
        """Whether the first shards are all that is needed, see `ShardedOutput.compute`."""
        return False

    @property
    def detail(self) -> str:
        """What the progress line says beside the images."""
        return ""

    @abstractmethod
    def finish(self, output: ShardedOutput, records: Sequence[ShardRecord]) -> Finished:
        """Write what belongs to the output beside its shards; the manifest is written after it."""

    @abstractmethod
    def rows(self, manifest: Manifest) -> Rows:
        """What the closing summary says of the finished output."""
