"""ICC profiles: the colours of an independent computation, and everything else left as it is."""

import io
import struct
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.data.ingest.decode import PixelRules, decode_image

RNG = np.random.default_rng(0)
D50 = (0.9642, 1.0, 0.8249)
# Primaries in XYZ adapted to D50 by Bradford's matrix, as columns: Adobe RGB (1998) and sRGB (Lindbloom's tables).
ADOBE = np.array(
    [[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197], [0.0194811, 0.0608902, 0.7448387]]
)
SRGB = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
ADOBE_GAMMA = 563 / 256


def profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2.4."""
    offset, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12s4s28s",
        offset + len(body),
        bytes(4),
        0x02400000,
        kind,
        space,
        connection,
        bytes(12),
        b"acsp",
        bytes(28),
    )
    header += fixed(*D50)
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + body


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def xyz(values: object) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*values)  # type: ignore[misc]


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


COMMON = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78), b"wtpt": xyz(D50)}
ADOBE_RGB = profile(
    b"mntr",
    b"RGB ",
    b"XYZ ",
    {
        **COMMON,
        **{name + b"XYZ": xyz(ADOBE[:, index]) for index, name in enumerate((b"r", b"g", b"b"))},
        **{name + b"TRC": gamma(ADOBE_GAMMA) for name in (b"r", b"g", b"b")},
    },
)
LINEAR_GREY = profile(b"mntr", b"GRAY", b"XYZ ", {**COMMON, b"kTRC": gamma(1.0)})


def ink_profile() -> bytes:
    """CMYK whose lightness is that of paper times (1 - K) (1 - mean of CMY)."""
    nodes = b""
    for corner in range(16):
        c, m, y, k = (corner >> shift & 1 for shift in (3, 2, 1, 0))
        nodes += bytes([round(255 * (1 - k) * (1 - (c + m + y) / 3)), 128, 128])
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0\x04\x03\x02\0" + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + nodes + ramp * 3
    return profile(b"prtr", b"CMYK", b"Lab ", {**COMMON, b"A2B0": lut})


def encoded(image: Image.Image, icc: bytes | None, format: str = "PNG") -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, icc_profile=icc)
    return sink.getvalue()


def srgb_of(linear: np.ndarray) -> np.ndarray:
    """8-bit levels of linear sRGB."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def decoded(image: Image.Image, icc: bytes | None, format: str = "PNG") -> tuple[np.ndarray, Counter[str]]:
    adapted: Counter[str] = Counter()
    return decode_image(encoded(image, icc, format), None, None, adapted=adapted), adapted


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_adobe_rgb_becomes_srgb(format: str) -> None:
    pixels = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    found, adapted = decoded(Image.fromarray(pixels), ADOBE_RGB, format)
    expected = srgb_of((pixels / 255) ** ADOBE_GAMMA @ (np.linalg.inv(SRGB) @ ADOBE).T)
    inside = ((expected > 1) & (expected < 254)).all(axis=-1)  # of sRGB's gamut
    assert np.abs(found - expected)[inside].max() < 2
    assert inside.sum() > 100
    assert np.abs(pixels - expected)[inside].max() > 10, "so that leaving it would be noticed"
    assert adapted == {"icc": 1}


def test_grey_stays_grey() -> None:
    pixels = np.arange(256, dtype=np.uint8)[None]
    found, adapted = decoded(Image.fromarray(pixels), LINEAR_GREY)
    assert found.shape == (1, 256, 1)
    assert np.abs(found[0, :, 0] - srgb_of(pixels[0] / 255)).max() < 2
    assert adapted == {"icc": 1}
    deep, adapted = decoded(Image.fromarray(pixels.astype(np.uint16) * 257), LINEAR_GREY)
    assert np.array_equal(deep, found)
    assert adapted == {"icc": 1, "sixteen_bit": 1}


def test_cmyk_with_a_profile_is_converted_by_it() -> None:
    inks = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 128]]], np.uint8), "CMYK")
    found, adapted = decoded(inks, ink_profile(), "TIFF")
    assert np.abs(found[0, 0].astype(int) - 255).max() <= 1
    assert found[0, 1].max() <= 1
    # L* = 49.8 is a luminance of 0.1826; Pillow's own rule would give 127.
    assert np.abs(found[0, 2] - srgb_of(np.full(3, 0.1826))).max() < 3
    assert adapted == {"icc": 1}
    assert decoded(inks, None, "TIFF")[0][0, 2].tolist() == [127] * 3


def test_alpha_is_composited_after_the_conversion() -> None:
    pixels = RNG.integers(0, 256, (8, 8, 3), np.uint8)
    alpha = Image.fromarray(np.repeat([[0, 255] * 4], 8, axis=0).astype(np.uint8))
    opaque, transparent = Image.fromarray(pixels), Image.fromarray(pixels)
    transparent.putalpha(alpha)
    payload = encoded(transparent, ADOBE_RGB)
    found = decode_image(payload, None, None, PixelRules((9, 8, 7)))
    assert (found[:, ::2] == (9, 8, 7)).all()
    assert np.array_equal(found[:, 1::2], decoded(opaque, ADOBE_RGB)[0][:, 1::2])
    grey_alpha = Image.merge("LA", (Image.fromarray(pixels[..., 0]), alpha))
    found, adapted = decoded(grey_alpha, LINEAR_GREY)
    assert (found[:, ::2] == 255).all()
    assert np.array_equal(found[:, 1::2], decoded(Image.fromarray(pixels[..., 0]), LINEAR_GREY)[0][:, 1::2])
    assert adapted == {"icc": 1, "transparent": 1}


def test_srgb_changes_nothing() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    found, adapted = decoded(Image.fromarray(pixels), srgb)
    assert np.array_equal(found, pixels)
    assert not adapted


@pytest.mark.parametrize("icc", [b"garbage", ADOBE_RGB[:200], LINEAR_GREY, ink_profile()])
def test_a_profile_that_does_not_fit_is_ignored(icc: bytes) -> None:
    pixels = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    found, adapted = decoded(Image.fromarray(pixels), icc)
    assert np.array_equal(found, pixels)
    assert adapted == {"icc_ignored": 1}
