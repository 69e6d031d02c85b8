"""Image bytes to uint8 arrays, and the reasons why some bytes are no usable image."""

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

UInt8s = npt.NDArray[np.uint8]

# About 9,500 x 9,500, Pillow's own warning threshold: more is a decompression bomb, refused from its header.
MAX_PIXELS = 89_478_485
# What an uncompressed file of that many RGB pixels has.
MAX_FILE_BYTES = 2**28
_GREY_MODES = ("1", "L", "LA", "La")
# What Pillow converts to RGB by a fixed rule. 16-bit and float modes have no range that could be assumed.
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV")


class RejectedImage(Exception):
    """An image that cannot be used; the message is the reason, as stored in rejected.parquet."""


def decode_image(payload: bytes | UInt8s, image_size: int | None, shape: tuple[int, int] | None) -> UInt8s:
    """Decode one image, keeping grey images grey.

    Args:
        payload: The encoded file (any format of Pillow's), or pixels uint8 [H, W] or [H, W, 3].
        image_size: Side in pixels to which the centred square is resized (Lanczos, antialiased); None keeps
            the size.
        shape: (H, W) that an image must have when it is not resized; None accepts any.

    Returns:
        uint8 [H, W, C], C = 1 for grey images (and black-and-white ones) and 3 for all others. Alpha is
        dropped, the EXIF orientation applied, and of an animation the first frame taken.

    Raises:
        RejectedImage: Empty, not an image, truncated or damaged, a decompression bomb, of an unsupported
            mode, or of another size than `shape`.
    """
    if isinstance(payload, np.ndarray):
        pixels = payload if image_size is None else _resized(Image.fromarray(payload), image_size)
    else:
        pixels = _decoded(payload, image_size)
    if image_size is None and shape is not None and pixels.shape[:2] != shape:
        height, width = pixels.shape[:2]
        raise RejectedImage(f"size {height}x{width} is not {shape[0]}x{shape[1]}")
    return pixels.reshape(*pixels.shape[:2], -1)


def with_channels(images: UInt8s, channels: int) -> UInt8s:
    """uint8 [..., C] with `channels` channels: grey is repeated, colour becomes Rec. 601 luma as in Pillow."""
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    red, green, blue = (images[..., channel].astype(np.uint32) for channel in range(3))
    # Pillow's own integers for L = 0.299 R + 0.587 G + 0.114 B.
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)[..., None]


def _decoded(payload: bytes, image_size: int | None) -> UInt8s:
    if not payload:
        raise RejectedImage("empty (zero bytes)")
    if len(payload) > MAX_FILE_BYTES:
        raise RejectedImage(f"{len(payload):,} bytes, more than {MAX_FILE_BYTES:,}")
    try:
        with warnings.catch_warnings():
            # Its size is checked below, by one rule; other warnings are about metadata that is not used.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(payload))
    except UnidentifiedImageError:
        raise RejectedImage("not an image of a known format") from None
    except Image.DecompressionBombError:
        raise RejectedImage(f"decompression bomb (more than {MAX_PIXELS:,} pixels)") from None
    except Exception as error:  # noqa: BLE001  as below
        raise RejectedImage(f"damaged header ({_short(error)})") from None
    if image.width * image.height > MAX_PIXELS:
        raise RejectedImage(f"decompression bomb ({image.width} x {image.height} pixels)")
    if image.mode not in _GREY_MODES + _COLOUR_MODES:
        raise RejectedImage(f"unsupported mode {image.mode}; convert it to 8-bit grey or RGB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            upright = ImageOps.exif_transpose(image)
            # Also 1-bit images, which would resize without grey levels, and palettes.
            pixels = upright.convert("L" if image.mode in _GREY_MODES else "RGB")
    except MemoryError:
        raise  # this machine's trouble, not the image's
    # A decoder fed with damaged bytes raises nearly anything: OSError, SyntaxError, struct.error, ValueError.
    except Exception as error:  # noqa: BLE001
        raise RejectedImage(f"truncated or damaged ({_short(error)})") from None
    return np.asarray(pixels) if image_size is None else _resized(pixels, image_size)


def _resized(image: Image.Image, size: int) -> UInt8s:
    """The centred square, resized to size x size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Not resize(box=...): its filter also takes in pixels around the box.
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def _short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
