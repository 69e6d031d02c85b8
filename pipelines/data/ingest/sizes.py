"""The one size of the images of a source, where they are to keep it, and what is said when there are several."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from pipelines.cli.errors import DataError
from pipelines.data.ingest.decode import PixelRules, RejectedImage, decode_image, upright_size
from pipelines.data.ingest.formats import Format, Item
from pipelines.data.ingest.sources import split_units

# The largest image_size, squared.
_MAX_KEPT_PIXELS = 4096**2
_PROBED = 100
_NAMED_SIZES = 3
_OTHER_SIZE = re.compile(r"size (\d+)x(\d+) is not ")

Size = tuple[int, int]


def probe(source: str, images: Format, items: Sequence[Item], rules: PixelRules, max_rejected_fraction: float) -> Size:
    """(H, W) of the first readable image among the first 100: the size that all must have.

    Raises:
        DataError: None of them can be read, it is too large, or so many of them have another size that the source
            cannot be used.
    """
    found: Size | None = None
    sizes: Counter[Size] = Counter()
    reason = "none"
    for image in images.read(next(split_units(items, _PROBED))):
        try:
            if found is None:
                height, width, _ = decode_image(image.payload, None, None, rules).shape
                found = height, width
                if height * width > _MAX_KEPT_PIXELS:
                    raise DataError(
                        f"source = {source}: {image.source} has {height} x {width} pixels, more than "
                        f"{_MAX_KEPT_PIXELS:,}; give image_size"
                    )
            if not isinstance(image.payload, bytes):  # pixels, of one size
                return found
            sizes[upright_size(image.payload, rules)] += 1
        except RejectedImage as error:
            reason = f"{image.source}: {error}"
    if found is None:
        raise DataError(f"source = {source}: none of its first images can be read (last: {reason}); repair the source")
    total = sum(item.stop - item.start for item in items)
    if sizes.total() - sizes[found] > max_rejected_fraction * total:
        raise mixed_sizes(source, sizes, "" if total <= _PROBED else f" among the first {_PROBED}")
    return found


def sizes_of(reasons: Sequence[str], kept: Size, num_kept: int) -> Counter[Size]:
    """How many images have which size, from the reasons for rejections; empty where few are about the size."""
    matches = [match for reason in reasons if (match := _OTHER_SIZE.match(reason))]
    sizes = Counter((int(match[1]), int(match[2])) for match in matches)
    return sizes + Counter({kept: num_kept}) if len(matches) * 2 >= len(reasons) else Counter()


def mixed_sizes(source: str, sizes: Mapping[Size, int], where: str = "") -> DataError:
    """The refusal of images of several sizes."""
    commonest = Counter(sizes).most_common(_NAMED_SIZES)
    named = ", ".join(f"{height}x{width} ({count:,})" for (height, width), count in commonest)
    others = len(sizes) - len(commonest)
    return DataError(
        f"source = {source}: holds images of {len(sizes):,} sizes{where}: {named}"
        f"{f' and {others:,} more' if others else ''} (H x W); give --image_size N (such as 64) to crop and resize "
        "all of them to N x N"
    )
