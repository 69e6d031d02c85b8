"""The model that a job uses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_core.kind import kind_of
from ddpm_core.model import Model, model_from_bytes
from pipelines.models.find import model_for
from pipelines.models.kept import FoundModel
from pipelines.storage.location import Location


@dataclass(frozen=True)
class UsedModel:
    """A model, and the files that it was read from with where they came from."""

    found: FoundModel
    model: Model

    @classmethod
    def read(
        cls,
        output: Location,
        reference: str,
        tracking_uri: str | None,
        root: Path,
        field: str = "model",
        directory: str = "model",
    ) -> "UsedModel":
        """The model of the job that makes `output`, which keeps it in `directory`; the other arguments and the errors
        are those of `find_model`."""
        found = model_for(output / directory, reference, tracking_uri, root, field)
        return cls(found, model_from_bytes(found.files, where=found.uri))

    @property
    def step(self) -> int | None:
        """The training step that it is of, where it says so."""
        step: int | None = self.model.extra.get("step")
        return step

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C), as data sets have it."""
        channels, height, width = self.model.denoiser.image_shape
        return height, width, channels

    @property
    def trained_on(self) -> dict[str, Any]:
        """`id`, `uri` and so on of the data set of its training; empty where it does not say."""
        return self.model.extra.get("dataset") or {}

    @property
    def held_out_every(self) -> int:
        """Of how many neighbouring rows of that data set its training held out one (`HoldOut.every`); 0: none."""
        section = self.model.extra.get("config")
        for name in ("data", "hold_out"):
            section = section.get(name) if isinstance(section, dict) else None
        return section if type(section) is int else 0

    @property
    def label_names(self) -> tuple[str, ...]:
        """See `Model.label_names`."""
        return self.model.label_names

    @property
    def lineage(self) -> dict[str, Any]:
        """What it says of its training."""
        return {name: self.model.extra.get(name) for name in ("step", "dataset", "code_version")}

    @property
    def described(self) -> str:
        """See `FoundModel.described`; and what kind of model it is."""
        return f"{self.found.described(self.step)}, {kind_of(self.model.config)}"
