"""What a prepared data set answers."""

from dataclasses import dataclass
from typing import Literal

from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.decode import PixelRules
from pipelines.data.ingest.sources import canonical_source
from pipelines.outputs.request import Request


@dataclass(frozen=True)
class IngestRequest(Request):
    """The values that determine the bytes of a prepared data set, with what the source holds.

    Attributes:
        source: As `canonical_source` writes it.
        format: Of the source.
        image_size: Side in pixels; null keeps the source's.
        channels: Null for grey images of all-grey sources, RGB of all others.
        shard_mib: Image bytes (MiB) per object.
        split: Where the source holds several.
        image_column: See `IngestConfig`.
        label_column: See `IngestConfig`.
        background: #rrggbb, where it is not the default.
        sixteen_bit: Where it is not the default.
        label_names: See `IngestConfig`.
    """

    source: str
    format: Literal["auto", "folder", "parquet", "idx", "tar"]
    image_size: int | None
    channels: int | None
    shard_mib: int
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    background: str | None = None
    sixteen_bit: Literal["scale", "refuse"] | None = None
    label_names: list[str] | None = None


def request_of(config: IngestConfig) -> IngestRequest:
    """The request that a job's fields make."""
    rules = config.rules
    usual_background = rules.background == PixelRules.background
    return IngestRequest(
        source=canonical_source(config.source),
        format=config.format,
        image_size=config.image_size,
        channels=config.channels,
        shard_mib=config.shard_mib,
        split=config.split,
        image_column=config.image_column,
        label_column=config.label_column,
        background=None if usual_background else "#{:02x}{:02x}{:02x}".format(*rules.background),
        sixteen_bit=None if config.sixteen_bit == PixelRules.sixteen_bit else config.sixteen_bit,
        label_names=None if config.label_names is None else list(config.label_names),
    )
