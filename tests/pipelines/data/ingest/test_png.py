"""PNG files with wrong checksums: whole without their metadata, refused where pixels depend on what is damaged."""

import io
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pipelines.data.ingest.decode import RejectedImage, decode_image
from pipelines.data.ingest.png import SIGNATURE, without_damaged_metadata

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def chunk(kind: bytes, data: bytes, wrong: bool = False) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong)


HEADER = struct.pack(">IIBBBBB", 9, 6, 8, 2, 0, 0, 0)
ROWS = zlib.compress(b"".join(b"\0" + row.tobytes() for row in PIXELS))
METADATA = {
    b"tEXt": b"Title\0x",
    b"pHYs": struct.pack(">IIB", 3000, 3000, 1),
    b"eXIf": b"garbage",
    b"gAMA": struct.pack(">I", 45455),
    b"iCCP": b"name\0\0" + zlib.compress(b"garbage"),
    b"tIME": bytes(7),
}


def png(before: bytes = b"", after: bytes = b"", header: bytes | None = None, data: bytes | None = None) -> bytes:
    return (
        SIGNATURE
        + (header or chunk(b"IHDR", HEADER))
        + before
        + (data or chunk(b"IDAT", ROWS))
        + after
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_with_a_wrong_checksum_is_left_out(kind: bytes) -> None:
    damaged, other = chunk(kind, METADATA[kind], wrong=True), chunk(b"tEXt", b"Author\0y")
    for payload in (png(damaged + other), png(after=other + damaged)):
        adapted: Counter[str] = Counter()
        assert np.array_equal(decode_image(payload, None, None, adapted=adapted), PIXELS)
        assert without_damaged_metadata(payload).count(other) == 1
        assert kind + METADATA[kind] not in without_damaged_metadata(payload)
    adapted.clear()
    decode_image(png(damaged), None, None, adapted=adapted)
    assert adapted["png_chunks"] == 1


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        (png(header=chunk(b"IHDR", HEADER, wrong=True)), "wrong checksum in the PNG chunk IHDR"),
        (png(chunk(b"PLTE", bytes(6), wrong=True)), "wrong checksum in the PNG chunk PLTE"),
        (png(chunk(b"tRNS", bytes(6), wrong=True)), "wrong checksum in the PNG chunk tRNS"),
        (png(chunk(b"tEXt", b"x", wrong=True))[:60], "the PNG file ends within a chunk"),
        (png(data=chunk(b"IDAT", ROWS[:-30])), "truncated or damaged"),
        (png(chunk(b"tEXt", b"a\0b", wrong=True), data=chunk(b"IDAT", ROWS[:-30])), "truncated or damaged"),
    ],
)
def test_what_pixels_depend_on_must_be_whole(payload: bytes, match: str) -> None:
    with pytest.raises(RejectedImage, match=match):
        decode_image(payload, None, None)


def test_a_bit_of_the_pixels_that_has_flipped_is_noticed() -> None:
    stored = zlib.compress(b"".join(b"\0" + row.tobytes() for row in PIXELS), 0)
    flipped = bytearray(stored)
    flipped[50] ^= 1
    assert np.array_equal(decode_image(png(data=chunk(b"IDAT", stored)), None, None), PIXELS)
    with pytest.raises(RejectedImage, match="truncated or damaged"):
        decode_image(png(chunk(b"tEXt", b"a\0b", wrong=True), data=chunk(b"IDAT", bytes(flipped))), None, None)


@given(st.dictionaries(st.text("abcXYZ", min_size=1, max_size=9), st.text(max_size=30), max_size=4))
def test_a_whole_file_is_left_as_it_is(texts: dict[str, str]) -> None:
    info, sink = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in texts.items():
        info.add_itxt(key, value)
    Image.fromarray(PIXELS).save(sink, "PNG", pnginfo=info)
    assert without_damaged_metadata(sink.getvalue()) == sink.getvalue()
