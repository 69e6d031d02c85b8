"""What a comparison of two sets answers."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ddpm_core.sets import NUM_GROUPS, fewest_images
from pipelines.cli.config import digest
from pipelines.data.dataset import Int64s
from pipelines.data.hold_out import HoldOut
from pipelines.outputs.request import Request
from pipelines.quality.extractors.request import ExtractorRequest
from pipelines.quality.features import FeatureRequest

Role = Literal["samples", "reference", "train", "unseen"]
Space = Literal["features", "pixels"]

ROLES_OF_MEMORY: tuple[Role, ...] = ("train", "samples", "unseen")
FEWEST = 2 * NUM_GROUPS
"""Images of a side, at least; of a class as well."""
# Raised when other numbers come out of the same features: they are not compared.
_METHOD = 1
MOST_FEATURES = 4096
"""For a covariance: the moments of the groups, and their decompositions, grow with its square."""


def has_covariance(num_features: int, num_images: int) -> bool:
    """Whether the covariances of so many images have full rank, without any one group, and fit into memory."""
    return num_features <= MOST_FEATURES and num_images >= fewest_images(num_features)


@dataclass(frozen=True)
class SideRequest:
    """The images of one role.

    Attributes:
        dataset_id: Content hash of their set.
        num_images: Of the whole set.
        every: As `HoldOut` has it.
        part: Of the set's rows: all, those that are held out, or the others, which are trained on.
    """

    dataset_id: str
    num_images: int
    every: int = 0
    part: Literal["all", "held_out", "trained"] = "all"

    @cached_property
    def rows(self) -> Int64s:
        """Their ids, ascending."""
        held_out = HoldOut(self.num_images, self.every).ids
        if self.part == "held_out":
            return held_out
        ids = np.arange(self.num_images, dtype=np.int64)
        return ids if self.part == "all" else np.delete(ids, held_out)


@dataclass(frozen=True)
class ClassRequest:
    """A class that is compared by itself: its label, and how many images of each side have it."""

    label: int
    num_samples: int
    num_reference: int


@dataclass(frozen=True)
class QualityRequest(Request):
    """The values that determine every number of a comparison.

    Attributes:
        samples: What is judged.
        reference: What it should look like.
        extractor: Of the features that are compared.
        neighbours: k of precision, recall, density and coverage.
        classes: Those that are also compared by themselves.
        batch_size: Images in one call of the extractor.
        shard_size: Images in one object of features.
        block_size: Images whose neighbours are searched at a time.
        device: What computes features.
        method: Of the numbers.
        train: Images that the samples' model was trained on; None where memorisation is not looked for.
        unseen: Images that it was not trained on.
        resize: Kernel by which the images of all sets are brought to one shape; None where they are as they were.
        pixels: The extractor of pixels, in which memorisation is looked for besides; None where `extractor` is it.
    """

    samples: SideRequest
    reference: SideRequest
    extractor: ExtractorRequest
    neighbours: int
    classes: tuple[ClassRequest, ...]
    batch_size: int
    shard_size: int
    block_size: int
    device: Literal["cpu", "cuda"]
    method: int = _METHOD
    resize: str | None = None
    train: SideRequest | None = None
    unseen: SideRequest | None = None
    pixels: ExtractorRequest | None = None

    def side(self, role: Role) -> SideRequest:
        """That of a role which is asked for."""
        side: SideRequest | None = getattr(self, role)
        assert side is not None, f"{role} is not asked for"
        return side

    def features(self, role: Role, space: Space = "features") -> FeatureRequest:
        """The features of a role's set."""
        extractor = self.extractor if space == "features" else self.pixels
        assert extractor is not None, "asked for pixels where the features are no others"
        side = self.side(role)
        return FeatureRequest(
            side.dataset_id, side.num_images, extractor, self.batch_size, self.shard_size, self.device, self.resize
        )

    def dimensions(self, space: Space) -> int:
        """Numbers for each image."""
        extractor = self.extractor if space == "features" or self.pixels is None else self.pixels
        return extractor.num_features

    @property
    def headline(self) -> Literal["fd", "kid"]:
        """The number that the comparison is about: the Fréchet distance or, with too few images for it, KID."""
        fewest = min(len(self.samples.rows), len(self.reference.rows))
        return "fd" if has_covariance(self.extractor.num_features, fewest) else "kid"

    @property
    def spaces(self) -> tuple[Space, ...]:
        """In which memorisation is looked for."""
        return ("features",) if self.pixels is None else ("features", "pixels")

    @property
    def feature_sets(self) -> list[tuple[Role, Space]]:
        """All features that are compared."""
        found: list[tuple[Role, Space]] = [("samples", "features"), ("reference", "features")]
        if self.train is not None:
            of_memory = [(role, space) for space in self.spaces for role in ROLES_OF_MEMORY]
            found += [each for each in of_memory if each not in found]
        return found

    @property
    def protocol(self) -> dict[str, Any]:
        """How a number was measured: two are comparable where all of this is the same."""
        stored = self.to_json()
        return {
            "method": self.method,
            "extractor": stored["extractor"],
            "resize": self.resize,
            "num_samples": len(self.samples.rows),
            "num_reference": len(self.reference.rows),
            "reference_id": self.reference.dataset_id,
            "neighbours": self.neighbours,
        }

    @property
    def memory_stamp(self) -> str:
        """The same for the numbers of memorisation, which the training images and the unseen ones decide as well."""
        stored = self.to_json()
        return digest([self.protocol, stored.get("train"), stored.get("unseen")])[:8]

    @property
    def stamp(self) -> str:
        """Eight hexadecimal digits that stand for the protocol in the names of numbers."""
        return digest(self.protocol)[:8]
