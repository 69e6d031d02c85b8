"""What the driver asks of an extractor, and what it is answered."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.cli.config import require
from pipelines.cli.errors import ModelError
from pipelines.models.kept import FoundModel
from pipelines.quality.extractors.config import OnnxConfig
from pipelines.quality.extractors.request import ExtractorRequest
from pipelines.storage.location import Location


@dataclass(frozen=True)
class Asking:
    """A user's `--features`.

    Attributes:
        features: As it is written: a name, or NAME:REST.
        image_shape: (H, W, C) of the images.
        onnx: How an ONNX model is to be called.
        any_weights: Whether an Inception network may have other weights than the FID's.
        field: The name of the field, for messages.
        tracking_uri: Of MLflow.
        root: Directory of the local MLflow database.
    """

    features: str
    image_shape: tuple[int, int, int]
    onnx: OnnxConfig
    any_weights: bool
    field: str
    tracking_uri: str | None
    root: Path

    @property
    def rest(self) -> str:
        """What is behind the first colon."""
        return self.features.partition(":")[2]

    def refuse_rest(self, name: str) -> None:
        """Raise ConfigError where something is behind a name that takes nothing."""
        require(":" not in self.features, self.field, self.features, f"takes nothing behind {name}; leave it out")

    def read(self, what: str) -> "File":
        """The file behind the colon. Raises ConfigError where there is none, StorageError where it cannot be read."""
        require(bool(self.rest), self.field, self.features, f"must name {what}, as {self.features.rstrip(':')}:FILE")
        location = Location.parse(self.rest)
        return File(location.uri, location.read_bytes())


@dataclass(frozen=True)
class File:
    """A file's content, and where it was read from."""

    uri: str
    content: bytes = field(repr=False)

    @property
    def sha256(self) -> str:
        """Hex digest of the content."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Asked:
    """An extractor that fits the images, and what a worker needs to load it.

    Attributes:
        request: Its identity.
        files: By the name under which the output keeps them.
        model: One of our own, which the output keeps.
        without_gpu: Why what is installed here cannot compute it on GPUs; None where it can.
    """

    request: ExtractorRequest
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    model: FoundModel | None = None
    without_gpu: str | None = None

    def keep(self, directory: Location) -> None:
        """Write what `load_extractor` reads to the output's `directory`, unless it is there."""
        if self.model is not None:
            self.model.keep(directory)
        for name, content in self.files.items():
            path = directory / name
            if not (path.exists() and path.size() == len(content) and path.read_bytes() == content):
                path.write_bytes(content)


def kept_content(directory: Location, name: str, sha256: str | None) -> bytes:
    """The content of a file that `Asked.keep` wrote. Raises StorageError if it is missing, ModelError if it is another
    one."""
    path = directory / name
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ModelError(f"{path}: is not the file {(sha256 or '')[:12]} of the output; restore it")
    return content
