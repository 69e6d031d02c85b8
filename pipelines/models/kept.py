"""A model as an output keeps it: its two files and where they came from. All that a worker needs of a model."""

from dataclasses import dataclass
from typing import Any

from ddpm_core.model import CONFIG_FILE, WEIGHTS_FILE, Model, model_from_bytes, model_id_of
from pipelines.cli.errors import ModelError
from pipelines.storage.location import Location

SOURCE_FILE = "source.json"


@dataclass(frozen=True)
class FoundModel:
    """A model's two files and where they came from.

    Attributes:
        reference: What the user wrote.
        uri: What it stood for when it was looked up: an alias's version, a run's newest checkpoint.
        name: Registered name, name of the training run, or of the directory.
        model_id: Hash of the files; for a model that does not change, the one lasting name.
        run_id: The MLflow run that made it, where the registry knows.
        files: Content of config.json and ema.safetensors.
        score: Its validation at the end of its training, for a person; None where that is not on record.
    """

    reference: str
    uri: str
    name: str
    model_id: str
    run_id: str | None
    files: dict[str, bytes]
    score: str | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """Where it came from: everything but the files and the score."""
        return {name: getattr(self, name) for name in ("reference", "uri", "name", "model_id", "run_id")}

    def described(self, step: int | None) -> str:
        """What is used, in a line: the immutable URI, training step, bits/dim and id."""
        meant = "" if self.uri == self.reference else f"{self.reference}, "
        trained = "step unknown" if step is None else f"step {step:,}"
        return f"{self.uri} ({meant}{trained}, {self.score or 'bits/dim not on record'}, id {self.model_id[:12]})"

    def keep(self, directory: Location) -> None:
        """Write the files and, last, where they came from, as `stored_model` reads it, unless they are there."""
        stored = stored_model(directory)
        if stored is not None and stored.model_id == self.model_id:
            return
        for name, content in self.files.items():
            (directory / name).write_bytes(content)
        score = {} if self.score is None else {"score": self.score}
        (directory / SOURCE_FILE).write_json(self.origin | score)


def stored_model(directory: Location) -> FoundModel | None:
    """The model that `FoundModel.keep` wrote to `directory`, None if it did not get to its end.

    Raises:
        ModelError: The files are not the ones that were stored.
    """
    if not (directory / SOURCE_FILE).exists():
        return None
    origin = directory / SOURCE_FILE
    try:
        found = FoundModel(**origin.read_json(), files=read_files(directory))
    except TypeError as error:
        raise ModelError(f"{origin}: does not say where a model came from ({error}); restore it") from error
    if model_id_of(found.files) != found.model_id:
        raise ModelError(f"{directory}: is not the model {found.model_id[:12]} that was stored; restore it")
    return found


def is_registry_reference(reference: str) -> bool:
    """Whether MLflow, and not a file system, knows what this stands for."""
    return reference.startswith(("models:/", "runs:/"))


def source_of(found: FoundModel) -> Location | None:
    """The directory that a model was read from; None for one that MLflow keeps."""
    return None if is_registry_reference(found.uri) else Location.parse(found.uri)


def load_kept(kept: Location, model_id: str, device: str) -> Model:
    """The model of an output, loaded from the copy that the output keeps.

    Raises:
        ModelError: It is another one, or not whole.
    """
    found = stored_model(kept)
    if found is None or found.model_id != model_id:
        raise ModelError(f"{kept}: is not the model {model_id[:12]} of the output; restore it, or delete the output")
    return model_from_bytes(found.files, device, where=found.uri)


def read_files(directory: Location) -> dict[str, bytes]:
    """The content of a model directory's config.json and ema.safetensors, by name.

    Raises:
        StorageError: One of them is missing, or cannot be read.
    """
    return {name: (directory / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
