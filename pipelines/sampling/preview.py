"""The picture of a sample set's first images; with labels, of the first of each class."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ddpm_core.denoiser import NO_LABEL
from pipelines.data.ingest.decode import decode_image
from pipelines.outputs.pictures import grid_png, spread
from pipelines.outputs.shards import ShardRecord
from pipelines.sampling.labels import SampleLabels
from pipelines.sampling.request import SampleRequest
from pipelines.sampling.shard import decode_rows
from pipelines.storage.location import Location

_IMAGES = 64
_COLUMNS = 8


def preview_png(
    shards: Location,
    records: Sequence[ShardRecord],
    request: SampleRequest,
    labels: SampleLabels | None,
    label_names: Sequence[str],
) -> bytes:
    """A grid of stored images.

    Args:
        shards: Where the shards lie.
        records: Of all of them, in order.
        request: The sample set's.
        labels: Its labels, if it has any: the grid has a row with its name for each class, of more than 16 for those
            that are spread evenly over all.
        label_names: What the model's classes are called.
    """
    if labels is None:
        images = _read(shards, records, request, range(min(_IMAGES, request.num_images)))
        return grid_png(np.stack([*images.values()]))
    first = dict(sorted(labels.first_ids(_COLUMNS).items()))
    found = list(first.items())
    rows = {label: ids.tolist() for label, ids in (found[place] for place in spread(len(found)))}
    images = _read(shards, records, request, [index for ids in rows.values() for index in ids])
    columns, blank = max(map(len, rows.values())), np.zeros_like(next(iter(images.values())))
    cells = [images[ids[k]] if k < len(ids) else blank for ids in rows.values() for k in range(columns)]
    names = ["no label" if label == NO_LABEL else label_names[label] for label in rows]
    return grid_png(np.stack(cells), columns, row_names=names)


def _read(
    shards: Location, records: Sequence[ShardRecord], request: SampleRequest, ids: Sequence[int]
) -> dict[int, npt.NDArray[np.uint8]]:
    """The images [H, W, C] of some ids, by id in rising order."""
    found, wanted = {}, set(ids)
    for shard in sorted({index // request.shard_size for index in wanted}):
        content = (shards / records[shard].name).read_bytes()
        for row in decode_rows(content, request.format):
            if row.id in wanted:
                found[row.id] = decode_image(row.png, None, None)
    return found
