"""Opening a prepared data set by its URI; the embedded ones are prepared on first use."""

from pipelines.cli.errors import DataError
from pipelines.data.dataset import PreparedDataset
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest
from pipelines.storage.location import Location


def ensure_embedded(source: str, output: str | Location) -> PreparedDataset:
    """Prepare the embedded data set `source` (`embedded://digits/train`) at `output` unless it is there.

    Takes about a second, and no Ray.

    Raises:
        ConfigError: There is no such embedded data set.
        RequestMismatchError: `output` holds something else.
        StorageError: `output` cannot be written.
    """
    return ingest(IngestConfig(source, Location.parse(output).uri)).dataset


def open_dataset(root: Location, field: str, uri: str) -> PreparedDataset:
    """The prepared data set at `uri`; embedded ones are prepared under `root` on first use.

    Raises:
        DataError: There is none, or it holds no images; `field` is named.
        ConfigError: There is no such embedded data set.
        StorageError: It cannot be read, or not be written.
    """
    if uri.startswith("embedded://"):
        return ensure_embedded(uri, root / "data" / uri.removeprefix("embedded://"))
    dataset = PreparedDataset.open(uri)
    if dataset.num_rows == 0:
        raise DataError(f"{field} = {uri}: holds no images; ingest a source that has some")
    return dataset
