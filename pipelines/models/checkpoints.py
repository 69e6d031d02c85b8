"""Training checkpoints: written in the background, committed by one small object, verified before use.

    RUN/checkpoints/step-00000500/
        model/ema.safetensors, model/config.json   the model of that step, as ddpm_core loads it
        weights.safetensors  optimizer.safetensors  ledger.parquet
        objective.safetensors                      where the training's objective remembers something
        labels.parquet                             with balanced classes: each row's label, to check the ledger by
        state.json                                 the commit: step, config, data set, sha256 of every file

A directory without state.json is not a checkpoint. Workers agree on the checkpoint to resume from by reading
these directories, so what is restored and where the data goes on cannot differ, whatever a kill left behind.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipelines.cli.errors import CheckpointError, StorageError
from pipelines.storage.location import Location
from pipelines.storage.ownership import delete_files, discard_temporaries

FORMAT = 1
COMMIT = "state.json"
# What every checkpoint holds, beside its commit.
FILES = (
    "model/ema.safetensors",
    "model/config.json",
    "weights.safetensors",
    "optimizer.safetensors",
    "ledger.parquet",
)
# What a checkpoint holds where the objective of its training remembers something, and with balanced classes.
OPTIONAL_FILES = ("objective.safetensors", "labels.parquet")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files have been verified: `state` is its state.json."""

    location: Location
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps trained."""
        return int(self.state["step"])

    @property
    def model(self) -> Location:
        """The model directory of this checkpoint."""
        return self.location / "model"

    def read(self, name: str) -> bytes:
        """One file's bytes.

        Raises:
            CheckpointError: They are missing or not the bytes that were committed.
            StorageError: The store cannot be read now.
        """
        path = self.location / name
        data = _read(path)
        wanted = self.state["files"][name]
        if hashlib.sha256(data).hexdigest() != wanted["sha256"]:
            raise CheckpointError(
                f"{path.uri}: holds {len(data):,} bytes that are not the {wanted['bytes']:,} bytes committed"
            )
        return data

    def verify(self) -> None:
        """Read every file and compare its digest; raises CheckpointError."""
        for name in self.state["files"]:
            self.read(name)


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run."""

    location: Location

    @classmethod
    def open(cls, run_uri: str) -> "CheckpointStore":
        """The checkpoints of the run directory at `run_uri`."""
        return cls(Location.parse(run_uri) / "checkpoints")

    def directory(self, step: int) -> Location:
        """Where the checkpoint of a step lies."""
        return self.location / f"step-{step:08d}"

    def write(self, step: int, files: Mapping[str, bytes]) -> dict[str, Any]:
        """Upload a checkpoint's files and return their digests. Nothing is committed by this."""
        directory = self.directory(step)
        # Training reaches a step twice only when the checkpoint there turned out corrupt: uncommit it first.
        if (directory / COMMIT).exists():
            (directory / COMMIT).delete()
        for name, data in files.items():
            (directory / name).write_bytes(data)
        return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}

    def commit(self, step: int, state: Mapping[str, Any]) -> None:
        """Make an uploaded checkpoint valid: one atomic write."""
        (self.directory(step) / COMMIT).write_json(dict(state))

    def save(self, step: int, files: Mapping[str, bytes], state: Mapping[str, Any]) -> None:
        """Upload and commit."""
        digests = self.write(step, files)
        self.commit(step, {**state, "format": FORMAT, "step": step, "files": digests})

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return [step for step in self._directories() if (self.directory(step) / COMMIT).exists()]

    def _directories(self) -> list[int]:
        """Steps that have a directory, committed or not, ascending; other names are not ours."""
        found = (re.fullmatch(r"step-(\d{8,})", name) for name in self.location.list())
        return sorted(int(match[1]) for match in found if match)

    def newest(self, notify: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
        """The newest checkpoint that is intact, or None before the first; `notify` is told of corrupt ones passed over.

        Raises:
            CheckpointError: There are checkpoints, and none is intact: to begin anew would hide the loss.
            StorageError: The store cannot be read now, which says nothing about the checkpoint.
        """
        corrupt: list[CheckpointError] = []
        for step in reversed(self.steps()):
            try:
                checkpoint = self.load(step)
                checkpoint.verify()
                return checkpoint
            except CheckpointError as error:
                notify(f"checkpoint of step {step} is corrupt and passed over: {error}")
                corrupt.append(error)
        if not corrupt:
            return None
        raise CheckpointError(
            f"{self.location.uri}: holds no intact checkpoint, only {len(corrupt)} corrupt ({corrupt[0]}); restore one "
            "from a backup, or give the run another `name`"
        )

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step, its files not yet verified.

        Raises:
            CheckpointError: There is none, or its state.json is damaged.
            StorageError: The store cannot be read now.
        """
        commit = self.directory(step) / COMMIT
        try:
            state = json.loads(_read(commit))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{commit.uri}: is not JSON ({error})") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("step") != step:
            raise CheckpointError(f"{commit.uri}: is not the commit of a checkpoint of step {step}, format {FORMAT}")
        files = state.get("files")
        if not isinstance(files, dict) or not all(_is_file_entry(name, entry) for name, entry in files.items()):
            raise CheckpointError(f"{commit.uri}: files = {files!r:.100}: must give bytes and sha256 of its files")
        for name in ("dataset", "config"):
            if not isinstance(state.get(name), dict):
                raise CheckpointError(f"{commit.uri}: {name} = {state.get(name)!r:.100}: must be an object")
        return Checkpoint(commit.parent, state)

    def kept(self) -> str:
        """What an interrupted training leaves for the next, as the end of a line for its user."""
        try:
            steps = self.steps()
        except StorageError:
            return "run the same command to continue"
        if not steps:
            return "nothing had been saved yet, run the same command to start again"
        return f"step {steps[-1]:,} is kept, run the same command to continue"

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints, and what kills left uncommitted before them.

        Of a directory only the files of a checkpoint are deleted: what else somebody put there stays, and so does all
        of a directory whose state.json is none of a checkpoint.
        """
        committed = self.steps()
        strange = {step for step in committed if not self._is_ours(step)}
        kept = [step for step in committed if step not in strange][-keep:]
        for step in self._directories():
            if kept and step < kept[0] and step not in strange:
                directory = self.directory(step)
                (directory / COMMIT).delete()  # first, so that no half-deleted directory looks valid
                files = (*FILES, *OPTIONAL_FILES)
                for inside in (directory, directory / "model"):
                    discard_temporaries(inside, "|".join(re.escape(name.rpartition("/")[2]) for name in files))
                delete_files(directory, files)

    def _is_ours(self, step: int) -> bool:
        try:
            self.load(step)
        except CheckpointError:
            return False
        return True


def _is_file_entry(name: str, entry: Any) -> bool:
    """Whether `state.json` may name this file: one of the checkpoint's own, with its digest."""
    plain = re.fullmatch(r"(model/)?[\w-]+\.\w+", name) is not None
    return (
        plain
        and isinstance(entry, dict)
        and {"bytes": int, "sha256": str}.items() <= {key: type(value) for key, value in entry.items()}.items()
    )


def _read(path: Location) -> bytes:
    """A file's bytes; only a missing one is the checkpoint's fault, any other failure the store's."""
    try:
        return path.read_bytes()
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CheckpointError(f"{path.uri}: is missing") from error
        raise


class CheckpointWriter:
    """Saves checkpoints on a background thread, one at a time, so that an upload never idles the GPU."""

    def __init__(self, store: CheckpointStore, keep: int) -> None:
        self._store, self._keep = store, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, files: Mapping[str, bytes], state: Mapping[str, Any]) -> None:
        """Start saving; waits for the save before it and raises what went wrong there."""
        self.wait()
        self._pending = self._pool.submit(self._save, step, files, json.loads(json.dumps(state)))

    def _save(self, step: int, files: Mapping[str, bytes], state: Mapping[str, Any]) -> None:
        self._store.save(step, files, state)
        self._store.prune(self._keep)

    def wait(self) -> None:
        """Until the last save is committed; raises StorageError if it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
