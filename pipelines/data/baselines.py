"""Bits/dim without a model, to compare a model's with: independent pixels, and the files of lossless coders."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.data.dataset import Int64s, PreparedDataset, UInt8s
from pipelines.data.hold_out import HoldOut
from pipelines.outputs.pictures import to_picture

HISTOGRAM_IMAGES = 100_000
_CODERS: dict[str, dict[str, Any]] = {
    "png": {"optimize": True},
    "webp": {"lossless": True, "quality": 100, "method": 6},
}
# Of training images that are counted at the end of a training, a second or two; a count takes 1 KiB for each place.
_TRAINING_BYTES, _MAX_PLACES = 256 * 2**20, 2**18
_READ_IMAGES = 64


def level_counts(
    train: PreparedDataset, max_images: int = HISTOGRAM_IMAGES, hold_out: HoldOut | None = None
) -> npt.NDArray[np.uint32]:
    """How often each level occurs at each of the D places of (at most `max_images`) images, evenly chosen, without
    those that are held out: uint32 [D, 256]."""
    dimensions = int(np.prod(train.image_shape))
    wanted = min(train.num_groups, max(1, max_images // train.rows_per_group))
    counts = np.zeros((dimensions, 256), np.uint32)
    place = np.arange(dimensions)
    for group in np.unique(np.linspace(0, train.num_groups - 1, wanted).round().astype(int)):
        ids, images = train.read_groups([int(group)])
        if hold_out is not None:
            images = images[hold_out.is_trained(ids)]
        for image in images.reshape(len(images), -1):
            counts[place, image] += 1  # one image counts each place once
    return counts


def histogram_bpd(counts: npt.NDArray[np.uint32], images: UInt8s) -> npt.NDArray[np.float64]:
    """Bits/dim of images [n, H, W, C] if every pixel were independent of the others, with the distribution that the
    training images have at its place (add-one-half smoothing: Krichevsky and Trofimov 1981): float64 [n]."""
    flat = images.reshape(len(images), -1)
    total = counts.sum(axis=1, dtype=np.float64) + 128.0
    seen = counts[np.arange(flat.shape[1]), flat] + 0.5
    return np.asarray(np.log2(total / seen).mean(axis=1))


def coded_bpd(images: UInt8s, coder: str) -> npt.NDArray[np.float64]:
    """Bits/dim of images [n, H, W, C] as whole files, one each, as a user would store them; `coder` is 'png' or 'webp':
    float64 [n]."""
    sizes = []
    for image in images:
        sink = io.BytesIO()
        to_picture(image).save(sink, coder.upper(), **_CODERS[coder])
        sizes.append(len(sink.getvalue()))
    return np.array(sizes) * 8.0 / int(np.prod(images.shape[1:]))


def training_baselines(
    train: PreparedDataset, hold_out: HoldOut, validation: PreparedDataset, ids: Int64s
) -> dict[str, float]:
    """Mean bits/dim of the validation images `ids` int64 [n] by PNG and, with up to 2^18 values an image, by
    independent pixels as the images that are trained on have them (at most 100,000, and 256 MiB of them)."""
    values = int(np.prod(train.image_shape))
    max_images = min(HISTOGRAM_IMAGES, max(1, _TRAINING_BYTES // values))
    counts = level_counts(train, max_images, hold_out) if values <= _MAX_PLACES else None
    png, independent = [], []
    for start in range(0, len(ids), _READ_IMAGES):
        images, _ = validation.read_rows(ids[start : start + _READ_IMAGES])
        png.append(coded_bpd(images, "png"))
        if counts is not None:
            independent.append(histogram_bpd(counts, images))
    found = {"png": float(np.concatenate(png).mean())}
    return found | ({"independent_pixels": float(np.concatenate(independent).mean())} if independent else {})
