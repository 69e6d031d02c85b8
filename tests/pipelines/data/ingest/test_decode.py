"""Decoding: pixels against Pillow's own, every way in which an image can be broken, and bounded memory."""

import io
import struct
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.data.ingest.decode import (
    MAX_PIXELS,
    PixelRules,
    RejectedImage,
    decode_image,
    upright_size,
    with_channels,
)

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


def ifd(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """A little-endian TIFF directory of one entry."""
    entry = struct.pack("<HHI", tag, kind, count) + value
    return b"II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)


UPRIGHT = struct.pack("<HH", 1, 0)
DAMAGED_EXIF = {
    "header twice": b"Exif\0\0Exif\0\0" + ifd(0x0112, 3, 1, UPRIGHT),
    "no TIFF": b"Exif\0\0" + bytes(20),
    "cut off": b"Exif\0\0II*\0",
    "empty": b"Exif\0\0",
    "orientation is text": b"Exif\0\0" + ifd(0x0112, 2, 4, b"abc\0"),
    "offset outside": b"Exif\0\0II*\0" + struct.pack("<I", 2**31),
    "no EXIF at all": b"\x00\x08\x00\x02\x01\x12\x00\x03",
}


@pytest.mark.parametrize("kind", DAMAGED_EXIF)
def test_damaged_exif_turns_nothing_and_rejects_nothing(kind: str) -> None:
    exif, plain = DAMAGED_EXIF[kind], encoded(Image.fromarray(PIXELS), "JPEG", quality=95)
    jpeg = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    assert np.array_equal(decode_image(jpeg, None, None), decode_image(plain, None, None))
    png = encoded(Image.fromarray(PIXELS))
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    assert np.array_equal(decode_image(png[:33] + chunk + png[33:], None, None), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_size_is_known_from_the_header(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encoded(Image.fromarray(PIXELS), format, exif=exif)
    assert upright_size(payload) == decode_image(payload, None, None).shape[:2]


def transparent_images() -> dict[str, tuple[bytes, int]]:
    """Ways to say that the left half of a black image is transparent; with the channels of the result."""
    black, alpha = np.zeros((4, 8), np.uint8), np.repeat([[0] * 4 + [255] * 4], 4, axis=0).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([black, black, black, alpha]))
    grey_alpha = Image.merge("LA", (Image.fromarray(black), Image.fromarray(alpha)))
    indices = Image.fromarray(np.where(alpha == 0, 1, 0).astype(np.uint8))
    indices.putpalette([0, 0, 0, 90, 80, 70])
    # Where a value and not a channel is transparent, the pixels below it have that value.
    values = np.where(alpha == 0, 17, 0)
    deep = Image.fromarray((values * 257).astype(np.uint16))
    found = {
        "RGBA PNG": (encoded(rgba), 3),
        "RGBA WebP": (encoded(rgba, "WEBP", lossless=True), 3),
        "RGBA TIFF": (encoded(rgba, "TIFF"), 3),
        "LA PNG": (encoded(grey_alpha), 1),
        "palette, one index": (encoded(indices, transparency=1), 3),
        "palette, alpha for each": (encoded(indices, transparency=b"\xff\x00"), 3),
        "GIF": (encoded(indices, "GIF", transparency=1), 3),
        "grey value": (encoded(Image.fromarray(values.astype(np.uint8)), transparency=17), 1),
        "black and white": (encoded(Image.fromarray(alpha == 0), transparency=255), 1),
        "RGB value": (encoded(Image.fromarray(np.dstack([values] * 3).astype(np.uint8)), transparency=(17,) * 3), 3),
        "16-bit grey value": (encoded(deep, transparency=17 * 257), 1),
    }
    for depth, row in ((2, b"\0\x55\0"), (4, b"\0\x11\x11\0\0")):  # 1 of 3, and of 15
        found[f"{depth}-bit grey value"] = (raw_png(8, 4, depth, 0, row * 4, struct.pack(">H", 1)), 1)
    rows = (b"\0" + struct.pack(">3H", 4369, 4369, 4369) * 4 + bytes(24)) * 4
    found["16-bit RGB value"] = raw_png(8, 4, 16, 2, rows, struct.pack(">3H", 4369, 4369, 4369)), 3
    return found


def raw_png(width: int, height: int, depth: int, colour_type: int, rows: bytes, transparent: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return (b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress(rows))) + chunk(
        b"IEND", b""
    )


TRANSPARENT = transparent_images()


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_the_background_shows_through_what_is_transparent(kind: str) -> None:
    payload, channels = TRANSPARENT[kind]
    adapted: Counter[str] = Counter()
    for background in ((255, 255, 255), (128, 128, 128)):
        decoded = decode_image(payload, None, None, PixelRules(background), adapted)
        assert decoded.shape == (4, 8, channels)
        assert (decoded[:, :4] == background[0]).all()
        assert (decoded[:, 4:] == 0).all()
    coloured = decode_image(payload, None, None, PixelRules((10, 20, 30)))
    assert (coloured[:, :4] == (10, 20, 30)).all()
    assert (coloured[:, 4:] == 0).all()
    assert adapted["transparent"] == 2


@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(0, 255)] * 3))
def test_compositing_is_the_mean_weighted_by_alpha(seed: int, background: tuple[int, int, int]) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 4), np.uint8)
    decoded = decode_image(encoded(Image.fromarray(pixels)), None, None, PixelRules(background))
    alpha = pixels[..., 3:] / 255
    expected = alpha * pixels[..., :3] + (1 - alpha) * np.array(background)
    assert np.abs(decoded - expected).max() <= 0.51


def test_an_alpha_channel_without_transparent_pixels_changes_nothing() -> None:
    adapted: Counter[str] = Counter()
    opaque = Image.fromarray(np.dstack([PIXELS, np.full((12, 20), 255, np.uint8)]))
    assert np.array_equal(decode_image(encoded(opaque), None, None, PixelRules((1, 2, 3)), adapted), PIXELS)
    assert not adapted


def grey_tiff(samples: bytes, width: int, bits: int, photometric: int = 1) -> bytes:
    """A TIFF of one row."""
    entries = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1)]
    entries.append((279, len(samples)))
    directory = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(samples))
        + samples
        + struct.pack("<H", len(entries))
        + directory
        + bytes(4)
    )


DEEP = np.arange(0, 65536, 7, dtype=np.uint16)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("PNG", encoded(Image.fromarray(DEEP[None]))),
        ("TIFF", encoded(Image.fromarray(DEEP[None]), "TIFF")),
        ("compressed TIFF", encoded(Image.fromarray(DEEP[None]), "TIFF", compression="tiff_deflate")),
        ("TIFF, big-endian", encoded(Image.frombytes("I;16B", (len(DEEP), 1), DEEP.astype(">u2").tobytes()), "TIFF")),
        ("TIFF, white is zero", grey_tiff((65535 - DEEP).tobytes(), len(DEEP), 16, photometric=0)),
        ("PGM", b"P5 %d 1 65535\n" % len(DEEP) + DEEP.astype(">u2").tobytes()),
    ],
)
def test_16_bits_are_scaled_by_the_rule_or_refused(kind: str, payload: bytes) -> None:
    adapted: Counter[str] = Counter()
    decoded = decode_image(payload, None, None, adapted=adapted)
    assert np.array_equal(decoded[0, :, 0], np.round(DEEP * 255.0 / 65535).astype(np.uint8))
    assert adapted == {"sixteen_bit": 1}
    with pytest.raises(RejectedImage, match=r"^16-bit grey, and sixteen_bit = refuse"):
        decode_image(payload, None, None, PixelRules(sixteen_bit="refuse"))


def test_12_bits_fill_the_range_too() -> None:
    values = np.arange(0, 4096, 5)[:818]
    packed = "".join(f"{value:03x}" for value in values)
    decoded = decode_image(grey_tiff(bytes.fromhex(packed), len(values), 12), None, None)
    assert np.array_equal(decoded[0, :, 0], np.round(values * 255 / 4095).astype(np.uint8))


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
    "cut in the header": (encoded(Image.fromarray(PIXELS))[:12], "the PNG file ends within a chunk"),
    "32-bit": (encoded(Image.fromarray(np.full((4, 4), 40000, np.int32)), "TIFF"), "unsupported mode I;"),
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
        "import resource, sys; from pipelines.data.ingest.decode import *; "
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode_image(sys.stdin.buffer.read(), None, None)\n"
        "except RejectedImage as reason: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base, reason)"
    )
    done = subprocess.run([sys.executable, "-c", script], input=bomb_png(30_000, 30_000), capture_output=True)
    grown, reason = done.stdout.decode().split(" ", 1)
    unit = 1 if sys.platform == "darwin" else 1024
    assert "decompression bomb" in reason
    assert int(grown) * unit < 64 * 2**20, "30,000 x 30,000 RGB pixels are 2,700 MB"
