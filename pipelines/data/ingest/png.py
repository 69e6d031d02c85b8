"""What Pillow leaves undone for PNG files: metadata with a wrong checksum, the transparent colour of some depths."""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BIT_DEPTH = 24  # where it stands in the file


class _Chunk(NamedTuple):
    kind: bytes
    raw: bytes
    is_whole: bool


def without_damaged_metadata(payload: bytes) -> bytes:
    """The file without the ancillary chunks whose checksum is wrong.

    Transparency is no metadata: its chunk must be whole, like the critical ones. Pixels carry a checksum of their own
    (zlib's), which the decoder checks, so that of IDAT is left alone.

    Raises:
        ValueError: It ends within a chunk, or the checksum of IHDR, PLTE or tRNS is wrong; says which.
    """
    kept = [SIGNATURE]
    for chunk in _chunks(payload):
        is_critical = chunk.kind[:1].isupper()
        if not chunk.is_whole and chunk.kind != b"IDAT" and (is_critical or chunk.kind == b"tRNS"):
            raise ValueError(f"wrong checksum in the PNG chunk {chunk.kind.decode('ascii', 'replace')}")
        if chunk.is_whole or is_critical:
            kept.append(chunk.raw)
    return b"".join(kept)


def scale_transparency(image: Image.Image, payload: bytes) -> None:
    """Bring the transparent colour of a grey or RGB image to the 8 bits that Pillow gives its pixels."""
    depth, colour = payload[_BIT_DEPTH], image.info["transparency"]
    if image.mode == "L" and depth in (2, 4):
        image.info["transparency"] = colour * (255 // (2**depth - 1))
    elif image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _chunks(payload: bytes) -> Iterator[_Chunk]:
    start = len(SIGNATURE)
    while start < len(payload):
        if len(payload) - start < 12:
            raise ValueError("the PNG file ends within a chunk")
        length, kind = struct.unpack_from(">I4s", payload, start)
        stop = start + 12 + length
        if stop > len(payload):
            raise ValueError("the PNG file ends within a chunk")
        checksum = int.from_bytes(payload[stop - 4 : stop])
        yield _Chunk(kind, payload[start:stop], zlib.crc32(payload[start + 4 : stop - 4]) == checksum)
        if kind == b"IEND":
            return
        start = stop
