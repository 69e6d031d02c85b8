"""Image bytes to uint8 arrays, and the reasons why some bytes are no usable image."""

import io
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from pipelines.data.ingest import icc, png

UInt8s = npt.NDArray[np.uint8]

# About 9,500 x 9,500, Pillow's own warning threshold: more is a decompression bomb, refused from its header.
MAX_PIXELS = 89_478_485
# What an uncompressed file of that many RGB pixels has.
MAX_FILE_BYTES = 2**28
_GREY_MODES = ("1", "L", "LA", "La")
# What Pillow converts to RGB by a fixed rule.
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV")
# Integers of more than 8 bits, from formats that say what their largest value is; Pillow has a PGM's as "I".
_DEEP_MODES = {"PNG": ("I;16",), "TIFF": ("I;16", "I;16B"), "JPEG2000": ("I;16",), "PPM": ("I",)}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}
ADAPTATIONS = {
    "transparent": "composited over the background",
    "sixteen_bit": "of 16 bits scaled to 8",
    "icc": "converted from their ICC profile to sRGB",
    "icc_ignored": "with an ICC profile that is damaged or of other channels, ignored",
    "exif_ignored": "with damaged EXIF, not turned",
    "png_chunks": "with damaged PNG metadata, left out",
}
"""What can happen to an image on its way to 8 bits of grey or sRGB, as a clause that follows a number of images."""


class RejectedImage(Exception):
    """An image that cannot be used; the message is the reason, as stored in rejected.parquet."""


@dataclass(frozen=True)
class PixelRules:
    """What is done where there is a choice.

    Attributes:
        background: sRGB of what shows through transparent pixels; a grey image stays grey over a grey one only.
        sixteen_bit: Whether grey of more than 8 bits is scaled or rejected.
    """

    background: tuple[int, int, int] = (255, 255, 255)
    sixteen_bit: Literal["scale", "refuse"] = "scale"


_DEFAULT = PixelRules()


def decode_image(
    payload: bytes | UInt8s,
    image_size: int | None,
    shape: tuple[int, int] | None,
    rules: PixelRules = _DEFAULT,
    adapted: Counter[str] | None = None,
) -> UInt8s:
    """Decode one image, keeping grey images grey.

    Args:
        payload: The encoded file (any format of Pillow's), or pixels uint8 [H, W] or [H, W, 3].
        image_size: Side in pixels to which the centred square is resized (Lanczos, antialiased); None keeps
            the size.
        shape: (H, W) that an image must have when it is not resized; None accepts any.
        rules: For transparent pixels and for 16 bits.
        adapted: Takes a count of 1 for each of `ADAPTATIONS` that the image needed.

    Returns:
        uint8 [H, W, C], C = 1 for grey images (and black-and-white ones) and 3 for all others. Of an animation the
        first frame is taken; grey of b > 8 bits becomes round(255 v / (2^b - 1)); colours of an embedded ICC profile
        become sRGB; transparent pixels are composited over the background; the EXIF orientation is applied.
        Damaged metadata is ignored.

    Raises:
        RejectedImage: Empty, not an image, truncated or damaged, a decompression bomb, of an unsupported
            mode, or of another size than `shape`.
    """
    done: Counter[str] = Counter()
    if isinstance(payload, np.ndarray):
        pixels = payload if image_size is None else _resized(Image.fromarray(payload), image_size)
    else:
        pixels = _decoded(payload, image_size, rules, done)
    if image_size is None and shape is not None and pixels.shape[:2] != shape:
        height, width = pixels.shape[:2]
        raise RejectedImage(f"size {height}x{width} is not {shape[0]}x{shape[1]}")
    if adapted is not None:
        adapted.update(done)
    return pixels.reshape(*pixels.shape[:2], -1)


def upright_size(payload: bytes, rules: PixelRules = _DEFAULT) -> tuple[int, int]:
    """(H, W) that `decode_image` would give without resizing, from the header alone.

    Raises:
        RejectedImage: The header is not that of a usable image.
    """
    done: Counter[str] = Counter()
    image = _opened(payload, rules, done)
    # Pillow turns a TIFF itself, and says so in its size from the start.
    is_on_its_side = image.format != "TIFF" and _turn(image, done) in _ON_ITS_SIDE
    return (image.width, image.height) if is_on_its_side else (image.height, image.width)


def with_channels(images: UInt8s, channels: int) -> UInt8s:
    """uint8 [..., C] with `channels` channels: grey is repeated, colour becomes Rec. 601 luma as in Pillow."""
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    red, green, blue = (images[..., channel].astype(np.uint32) for channel in range(3))
    # Pillow's own integers for L = 0.299 R + 0.587 G + 0.114 B.
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)[..., None]


def _decoded(payload: bytes, image_size: int | None, rules: PixelRules, done: Counter[str]) -> UInt8s:
    image = _opened(payload, rules, done)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            turn = _turn(image, done)
            pixels = _in_srgb(image, payload, rules, done)
            pixels = pixels if turn is None else pixels.transpose(turn)
    except MemoryError:
        raise  # this machine's trouble, not the image's
    # A decoder fed with damaged bytes raises nearly anything: OSError, SyntaxError, struct.error, ValueError.
    except Exception as error:  # noqa: BLE001
        raise RejectedImage(f"truncated or damaged ({_short(error)})") from None
    return np.asarray(pixels) if image_size is None else _resized(pixels, image_size)


def _opened(payload: bytes, rules: PixelRules, done: Counter[str]) -> Image.Image:
    """The image with its header read, of a size and mode that can be used."""
    if not payload:
        raise RejectedImage("empty (zero bytes)")
    if len(payload) > MAX_FILE_BYTES:
        raise RejectedImage(f"{len(payload):,} bytes, more than {MAX_FILE_BYTES:,}")
    try:
        with warnings.catch_warnings():
            # Its size is checked below, by one rule; other warnings are about metadata that is not used.
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(payload))
    except Image.DecompressionBombError:
        raise RejectedImage(f"decompression bomb (more than {MAX_PIXELS:,} pixels)") from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  as below
        is_png = payload.startswith(png.SIGNATURE)
        if is_png and (repaired := _without_damaged_metadata(payload)) != payload:
            done["png_chunks"] = 1
            return _opened(repaired, rules, done)
        if isinstance(error, UnidentifiedImageError):
            raise RejectedImage("damaged PNG header" if is_png else "not an image of a known format") from None
        raise RejectedImage(f"damaged header ({_short(error)})") from None
    if image.width * image.height > MAX_PIXELS:
        raise RejectedImage(f"decompression bomb ({image.width} x {image.height} pixels)")
    if _is_deep(image):
        if rules.sixteen_bit == "refuse":
            raise RejectedImage("16-bit grey, and sixteen_bit = refuse; convert it to 8-bit grey")
    elif image.mode not in _GREY_MODES + _COLOUR_MODES:
        raise RejectedImage(f"unsupported mode {image.mode}; convert it to 8-bit grey or RGB")
    return image


def _without_damaged_metadata(payload: bytes) -> bytes:
    try:
        return png.without_damaged_metadata(payload)
    except ValueError as error:
        raise RejectedImage(f"truncated or damaged ({error})") from None


def _turn(image: Image.Image, done: Counter[str]) -> Image.Transpose | None:
    """What brings the image upright by its EXIF orientation."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  as above; the pixels are whole
        done["exif_ignored"] = 1
        return None


def _in_srgb(image: Image.Image, payload: bytes, rules: PixelRules, done: Counter[str]) -> Image.Image:
    """A loaded image as 8-bit L or RGB."""
    is_grey, profile = image.mode in _GREY_MODES, image.info.get("icc_profile")
    if _is_deep(image):
        image, is_grey = _scaled_to_8_bits(image), True
        done["sixteen_bit"] = 1
    elif image.format == "PNG" and "transparency" in image.info:
        png.scale_transparency(image, payload)
    is_lab = image.mode == "LAB"  # which Pillow brings to sRGB itself
    if image.has_transparency_data:
        image = image.convert("LA" if is_grey else "RGBA")
        if image.getchannel("A").getextrema() == (255, 255):  # nothing shows through
            image = image.convert("L" if is_grey else "RGB")
    elif image.mode != "CMYK":
        # Also 1-bit images, which would resize without grey levels, and palettes.
        image = image.convert("L" if is_grey else "RGB")
    if profile and not is_lab:
        converted = icc.to_srgb(image, profile)
        if converted is None:
            done["icc_ignored"] = 1
        elif converted is not image:
            image = converted
            done["icc"] = 1
    if image.mode in ("LA", "RGBA"):
        done["transparent"] = 1
        return _composited(image, rules.background)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _composited(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """round(α image + (1 - α) background); LA stays grey over a grey background."""
    keeps_grey = image.mode == "LA" and len(set(background)) == 1
    ground = Image.new("L" if keeps_grey else "RGB", image.size, background[0] if keeps_grey else background)
    ground.paste(image.convert(ground.mode), mask=image.getchannel("A"))
    return ground


def _is_deep(image: Image.Image) -> bool:
    return image.mode in _DEEP_MODES.get(image.format or "", ())


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """round(255 v / (2^b - 1)) as L, or LA where one value is transparent."""
    values, bits = np.asarray(image).astype(np.uint32), 16
    tags = getattr(image, "tag_v2", {})
    if tags:
        bits = int(tags.get(_TIFF_BITS, (16,))[0])
        if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:  # not seen to by Pillow for this depth
            values = 2**bits - 1 - values
    largest = 2**bits - 1
    grey = Image.fromarray(((510 * values + largest) // (2 * largest)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _resized(image: Image.Image, size: int) -> UInt8s:
    """The centred square, resized to size x size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Not resize(box=...): its filter also takes in pixels around the box.
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def _short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
