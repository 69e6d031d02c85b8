"""Colours of an embedded ICC profile to sRGB."""

import io
from collections.abc import Callable
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageCms

# A profile that changes no colour by more than this is sRGB under whatever name: pixels then stay as they are.
_SAME = 2
_TO_MODE = {"L": "RGB", "LA": "RGB", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB"}


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The image (mode L, LA, RGB, RGBA or CMYK) in sRGB; itself where its profile is sRGB.

    The intent is relative colorimetric with black point compensation. Grey stays grey, alpha stays, CMYK becomes RGB.

    Returns:
        None where the profile is damaged, or is not of the image's channels: it is to be ignored.
    """
    if image.mode == "LA":
        grey = to_srgb(image.getchannel("L"), profile)
        if grey is not None:
            grey = Image.merge("LA", (grey, image.getchannel("A")))
        return grey
    try:
        convert = _converter(profile, image.mode)
    except (ImageCms.PyCMSError, OSError):
        return None
    return image if convert is None else convert(image)


@lru_cache(16)
def _converter(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """What converts images of `mode`; None where it would change none.

    Raises:
        ImageCms.PyCMSError, OSError: There is no such transform.
    """
    exactly = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE  # it is asked for 256 pixels only
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        _TO_MODE[mode],
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION | exactly,
    )
    if mode == "CMYK":
        return transform.apply
    levels = range(0, 256, 15)
    colours = np.array([(level,) * 3 for level in range(256)] if mode == "L" else list(product(levels, repeat=3)))
    sample = Image.fromarray(colours.astype(np.uint8)[None]).convert(mode)
    changed = np.asarray(transform.apply(sample).convert("RGB"))[0]
    if np.abs(changed - colours).max() <= _SAME:
        return None
    if mode == "L":
        table = changed[:, 1].tolist()  # neutral: all three channels are alike
        return lambda image: image.point(table)
    return transform.apply
