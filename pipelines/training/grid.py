"""A grid of samples, from the EMA weights, while training and at its end; with classes one row for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ddpm_core.denoiser import Denoiser, Labels
from pipelines.outputs.pictures import MAX_ROWS, grid_png, spread
from pipelines.storage.location import Location
from pipelines.training.config import GridConfig, TrainConfig
from pipelines.training.ranks import Ranks
from pipelines.training.reports import Reports
from pipelines.training.samples import sample_batches


@dataclass(frozen=True)
class Layout:
    """How samples are laid out.

    Attributes:
        num_images: How many there are.
        classes: The class of each row of the grid; empty for a model without labels.
    """

    num_images: int
    classes: tuple[int, ...] = ()

    @classmethod
    def of(cls, num_images: int, num_classes: int | None) -> "Layout":
        """About `num_images` samples, as many of each class, of at most 16 classes that are spread evenly over all.

        >>> Layout.of(64, 10)
        Layout(num_images=60, classes=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9))
        >>> Layout.of(4, 1000), Layout.of(64, None)
        (Layout(num_images=4, classes=(0, 333, 666, 999)), Layout(num_images=64, classes=()))
        """
        if num_classes is None:
            return cls(num_images)
        classes = tuple(spread(num_classes, min(num_images, MAX_ROWS)))
        return cls(len(classes) * round(num_images / len(classes)), classes)

    @property
    def columns(self) -> int | None:
        """Samples in a row; None without classes: any number."""
        return self.num_images // len(self.classes) if self.classes else None

    def labels(self, ids: torch.Tensor) -> Labels | None:
        """The class of each sample of `ids` int64 [n], that of the last one for ids beyond it; None without classes."""
        if self.columns is None:
            return None
        rows = (ids // self.columns).clamp(max=len(self.classes) - 1)
        return torch.tensor(self.classes, device=ids.device)[rows]


def sample_images(
    denoiser: Denoiser,
    config: GridConfig,
    seed: int,
    device: torch.device,
    ranks: Ranks,
) -> npt.NDArray[np.uint8]:
    """The samples of `Layout.of(config.num_images, ..)`, uint8 [n, H, W, C], the same on any number of ranks."""
    layout = Layout.of(config.num_images, denoiser.num_classes)
    drawn = sample_batches(denoiser, layout.num_images, config.sampler_steps, seed, device, ranks, layout.labels)
    return np.concatenate(ranks.gather_in_order(list(drawn)))[: layout.num_images]


class Grid:
    """The observer that draws a grid.

    Args:
        run: The run directory.
        config: The training's.
        label_names: What the classes are called; empty for a model without.
        averaged: Makes the denoiser with the averaged weights.
        device: Where it lies.
        ranks: All that the samples are divided among; rank 0 writes the picture.
        reports: Where it is told of.
    """

    doing = "sampling a grid"

    def __init__(
        self,
        run: Location,
        config: TrainConfig,
        label_names: Sequence[str],
        averaged: Callable[[], Denoiser],
        device: torch.device,
        ranks: Ranks,
        reports: Reports,
    ) -> None:
        self._run, self._config, self._label_names, self._averaged = run, config, label_names, averaged
        self._device, self._ranks, self._reports = device, ranks, reports

    def is_due(self, done: int) -> bool:
        """Whether to draw one after `done` steps."""
        return self._config.is_due(self._config.grid.every_steps, done)

    def observe(self, done: int) -> None:
        """Draw the grid after `done` steps. A collective."""
        denoiser = self._averaged()
        images = sample_images(denoiser, self._config.grid, self._config.seed, self._device, self._ranks)
        if self._ranks.rank == 0:
            path, layout = self.path(done), Layout.of(self._config.grid.num_images, denoiser.num_classes)
            names = [self._label_names[label] for label in layout.classes] or None
            path.write_bytes(grid_png(images, layout.columns, row_names=names))
            self._reports.record({"kind": "image", "key": "samples", "step": done, "path": path.uri})

    def path(self, done: int) -> Location:
        """Where the grid after `done` steps lies."""
        return self._run / "grids" / f"step-{done:08d}.png"
