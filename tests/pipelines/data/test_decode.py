"""Decoding: pixels against Pillow's own, every way in which an image can be broken, and bounded memory."""

import io
import struct
import subprocess
import sys
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.data.decode import MAX_PIXELS, RejectedImage, decode_image, with_channels

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def bomb_png(width: int, height: int) -> bytes:
    """A valid PNG header of that size with a few bytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


def test_lossless_formats_give_back_their_pixels() -> None:
    for format in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(decode_image(encoded(Image.fromarray(PIXELS), format), None, (12, 20)), PIXELS)
    grey = decode_image(encoded(Image.fromarray(PIXELS[..., 0])), None, None)
    assert np.array_equal(grey, PIXELS[..., :1])


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3), ("CMYK", 3)]
)
def test_modes_become_grey_or_rgb(mode: str, channels: int) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    decoded = decode_image(encoded(image, "TIFF"), None, None)
    assert decoded.shape == (12, 20, channels)
    assert np.array_equal(decoded.squeeze(), np.asarray(image.convert("L" if channels == 1 else "RGB")))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    decoded = decode_image(encoded(Image.fromarray(PIXELS), exif=exif), None, None)
    assert np.array_equal(decoded, np.rot90(PIXELS, -1))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24))
def test_resizing_is_pillows_antialiased_resize_of_the_centred_square(height: int, width: int, size: int) -> None:
    pixels = RNG.integers(0, 256, (height, width, 3), np.uint8)
    side, image = min(height, width), Image.fromarray(pixels)
    left, top = (width - side) // 2, (height - side) // 2
    expected = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    assert np.array_equal(decode_image(encoded(image), size, None), np.asarray(expected))
    assert np.array_equal(decode_image(pixels, size, None), np.asarray(expected))


def test_shrinking_antialiases() -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = decode_image(encoded(Image.fromarray(stripes)), 8, None)
    # Picking nearest pixels would give 0 or 255; the inside of an antialiased result is the mean.
    assert np.all(np.abs(small[:, 1:-1].astype(int) - 127) < 8)


@given(st.binary(min_size=3, max_size=300))
def test_grey_from_colour_is_pillows_luma(data: bytes) -> None:
    pixels = np.frombuffer(data[: len(data) // 3 * 3], np.uint8).reshape(1, -1, 3)
    assert np.array_equal(with_channels(pixels, 1)[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))


def test_colour_from_grey_repeats_it() -> None:
    grey = PIXELS[..., :1]
    assert np.array_equal(with_channels(grey, 3), np.asarray(Image.fromarray(grey[..., 0]).convert("RGB")))
    assert with_channels(PIXELS, 3) is PIXELS


BROKEN = {
    "empty": (b"", r"empty \(zero bytes\)"),
    "text": (b"<html>not found</html>" * 9, "not an image"),
    "truncated PNG": (encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)))[:-4000], "truncated"),
    "truncated JPEG": (encoded(Image.fromarray(np.tile(PIXELS, (9, 9, 1))), "JPEG")[:-2000], "truncated"),
    "cut in the header": (encoded(Image.fromarray(PIXELS))[:12], "not an image|damaged header"),
    "16-bit": (encoded(Image.fromarray(np.full((4, 4), 40000, np.uint16))), "unsupported mode I;16"),
    "float": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unsupported mode F"),
    "bomb": (bomb_png(30_000, 30_000), "decompression bomb"),
    "smaller bomb": (bomb_png(MAX_PIXELS // 1000 + 1, 1000), "decompression bomb"),
    "wrong size": (encoded(Image.fromarray(PIXELS[:5])), "size 5x20 is not 12x20"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_are_rejected_with_the_reason(kind: str) -> None:
    payload, reason = BROKEN[kind]
    with pytest.raises(RejectedImage, match=reason) as raised:
        decode_image(payload, None, (12, 20))
    assert "\n" not in str(raised.value)


def test_damaged_bytes_are_an_image_or_rejected_never_an_error() -> None:
    rng = np.random.default_rng(1)
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        good = np.frombuffer(encoded(Image.fromarray(PIXELS), format), np.uint8)
        for _ in range(60):
            bad = good.copy()
            bad[rng.integers(0, len(bad), 4)] = rng.integers(0, 256, 4)
            with suppress(RejectedImage):
                assert decode_image(bad.tobytes(), 8, None).shape[:2] == (8, 8)


def test_a_bomb_is_refused_without_the_memory_to_decode_it() -> None:
    script = (
        "import resource, sys; from pipelines.data.decode import *; "
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode_image(sys.stdin.buffer.read(), None, None)\n"
        "except RejectedImage as reason: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base, reason)"
    )
    done = subprocess.run([sys.executable, "-c", script], input=bomb_png(30_000, 30_000), capture_output=True)
    grown, reason = done.stdout.decode().split(" ", 1)
    unit = 1 if sys.platform == "darwin" else 1024
    assert "decompression bomb" in reason
    assert int(grown) * unit < 64 * 2**20, "30,000 x 30,000 RGB pixels are 2,700 MB"
