"""The images of a side of a comparison, wherever they come from."""

import re
from typing import Protocol

from pipelines.cli.config import digest
from pipelines.cli.console import event
from pipelines.cli.errors import ConfigError, DataError
from pipelines.data.dataset import Int64s, PreparedDataset, UInt8s
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest
from pipelines.data.opening import open_dataset
from pipelines.outputs.manifest import MANIFEST
from pipelines.sampling.kind import SAMPLE_SET
from pipelines.sampling.sample_set import SampleSet
from pipelines.storage.location import Location


class ImageSet(Protocol):
    """Images with dense ids: a `PreparedDataset` or a `SampleSet`, whose docstrings say more."""

    @property
    def location(self) -> Location:
        """Where it lies."""
        ...

    @property
    def dataset_id(self) -> str:
        """Hash of its content."""
        ...

    @property
    def num_rows(self) -> int:
        """Ids are 0..num_rows-1."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        ...

    def read_images(self, start: int, stop: int) -> tuple[Int64s, UInt8s, Int64s]:
        """Ids int64 [n], images uint8 [n, H, W, C] and labels int64 [n] (-1: none) of ids start..stop-1."""
        ...


def open_image_set(root: Location, store: Location | None, field: str, uri: str) -> PreparedDataset | SampleSet:
    """The sample set or the prepared data set at `uri`; anything else is ingested into `store`, once.

    Args:
        root: Takes the embedded data sets.
        store: Takes what is ingested; None in a dry run, which ingests nothing.
        field: Whose value `uri` is, for messages.
        uri: Of a sample set, a prepared data set, or a source that ingest reads.

    Raises:
        ConfigError: It would have to be ingested, in a dry run.
        DataError: There is nothing that can be read as images.
        StorageError: It cannot be read, or `store` not be written.
    """
    if uri.startswith("embedded://"):
        known = root / "data" / uri.removeprefix("embedded://")
        if store is None and not (known / MANIFEST).exists():
            raise _not_in_a_dry_run(field, uri)
        return open_dataset(root, field, uri)
    location = Location.parse(uri)
    if (location / MANIFEST).exists():
        return SampleSet.open(location) if _is_sample_set(location) else open_dataset(root, field, uri)
    if store is None:
        raise _not_in_a_dry_run(field, uri)
    name = re.sub(r"[^\w.-]", "_", location.name)
    target = store / "ingested" / f"{name}-{digest(location.uri)[:12]}"
    try:
        summary = ingest(IngestConfig(uri, target.uri))
    except (ConfigError, DataError) as error:
        raise DataError(f"{field} = {uri}: {error}; or prepare it with jobs/ingest.py, and name its output") from error
    if not summary.already_complete:
        event(f"{field} = {uri}: {summary.dataset.num_rows:,} images ingested into {target}")
    return summary.dataset


def _not_in_a_dry_run(field: str, uri: str) -> ConfigError:
    return ConfigError(
        f"dry_run = True: {field} = {uri}: is not prepared, and would be ingested first; do so with jobs/ingest.py"
    )


def reopen(uri: str, dataset_id: str) -> PreparedDataset | SampleSet:
    """The set of images at `uri`, which must still be the one of this content.

    Raises:
        DataError: It is another one, or not whole.
        StorageError: It cannot be read.
    """
    location = Location.parse(uri)
    if not _is_sample_set(location):
        return PreparedDataset.reopen(uri, dataset_id, "compared")
    samples = SampleSet.open(location)
    if samples.dataset_id != dataset_id:
        raise DataError(f"{uri}: is not the sample set {dataset_id[:12]} that was compared; restore it")
    return samples


def _is_sample_set(location: Location) -> bool:
    content = (location / MANIFEST).read_json()
    return isinstance(content, dict) and content.get("format") == SAMPLE_SET.format
