"""Configuration of the ingest job."""

from dataclasses import dataclass, field
from typing import Literal

from PIL import ImageColor

from pipelines.cli.config import require, require_place
from pipelines.cluster.config import ClusterConfig
from pipelines.data.ingest.decode import PixelRules
from pipelines.data.ingest.formats import Options


@dataclass(frozen=True)
class IngestConfig:
    """Which images to prepare, how, and where to."""

    source: str
    """Folder of image files, Parquet file(s), IDX file, tar file(s): path, URI or glob; or embedded://digits/train. One
    that has changed since the output was finished is refused."""
    output: str
    """Path or URI of the prepared data set; must be empty, or hold an unfinished run of the same request."""
    format: Literal["auto", "folder", "parquet", "idx", "tar"] = "auto"
    """Format of the source; auto recognises it by the files' names, and image files of other names by their bytes.
    Hidden files and those that macOS and Windows add are left out. tar: uncompressed; a key is the path up to the first
    dot of the file's name, key.cls or key.json beside key.jpg its label, key.mask.png no sample. idx: the labels lie
    beside, or in a folder `labels` next to it."""
    split: str | None = None
    """The split to take where a source holds several: train, test, validation, ..., or all to mix them. They are named
    by files (NAME-train.parquet, train-00000-of-00001.parquet) or folders (train/0000.parquet, train/CLASS/1.png)."""
    image_column: str | None = None
    """Parquet: the column of images; null takes `image` or `img`. tar: the suffix of the samples where several images
    share a key (jpg, mask.png), or all."""
    label_column: str | None = None
    """Parquet: the column of labels, integers or words; null takes `label`, `labels`, or the only one that is called
    ..._label or is a ClassLabel. tar: the field of key.json; null takes key.cls, or `label`. none: no labels, of any
    format."""
    label_names: tuple[str, ...] | None = None
    """Names of the labels 0, 1, ..., of a source whose labels are numbers without names, as those of IDX files are."""
    image_size: int | None = None
    """Side in pixels: the centred square is resized to it (antialiased). Null keeps the source's one size."""
    channels: Literal[1, 3] | None = None
    """1 (grey) or 3 (RGB); null makes grey images of all-grey sources and RGB of all others."""
    background: str = "white"
    """What shows through transparent pixels: a colour's name, or '#rrggbb'."""
    sixteen_bit: Literal["scale", "refuse"] = "scale"
    """Grey of 16 bits: scale makes round(v * 255 / 65535) of it, refuse rejects such images."""
    max_rejected_fraction: float = 0.01
    """Largest fraction of unreadable images, in [0, 1], with which the job still succeeds."""
    shard_mib: int = 64
    """Image bytes (MiB) per object of the prepared data set."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where images are decoded."""

    def __post_init__(self) -> None:
        require(bool(self.source), "source", self.source, "must be a path, a URI or a glob")
        require_place("output", self.output)
        names, rule = self.label_names, "must be different names that are not empty, one for each label 0, 1, ..."
        named = names is None or (len(names) > 0 and all(names) and len(set(names)) == len(names))
        require(named, "label_names", names, rule)
        wanted, rule = names is None or not self.options.no_labels, "label_column = none takes no labels; leave one out"
        require(wanted, "label_names", names, rule)
        size_holds = self.image_size is None or 1 <= self.image_size <= 4096
        require(size_holds, "image_size", self.image_size, "must be in 1..4096, or null to keep the size")
        _ = self.rules  # checks `background`
        fraction_holds = 0 <= self.max_rejected_fraction <= 1
        require(fraction_holds, "max_rejected_fraction", self.max_rejected_fraction, "must be in [0, 1]")
        require(1 <= self.shard_mib <= 2048, "shard_mib", self.shard_mib, "must be in 1..2048")

    @property
    def options(self) -> Options:
        """What the format is told."""
        return Options(self.image_column, self.label_column)

    @property
    def rules(self) -> PixelRules:
        """What is done to pixels where there is a choice."""
        try:
            red, green, blue, *alpha = ImageColor.getrgb(self.background)
        except ValueError:
            red, green, blue, alpha = 0, 0, 0, [0]
        require(not alpha, "background", self.background, "must be a colour's name, or '#rrggbb'")
        return PixelRules((red, green, blue), self.sixteen_bit)
