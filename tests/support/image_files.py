"""Small image files and archives of them, good ones and ones whose header lies."""

import functools
import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


@functools.cache
def png(index: int = 0, height: int = 8, width: int = 8, mode: str = "L") -> bytes:
    """A small image of noise."""
    pixels = np.random.default_rng(index).integers(0, 256, (height, width, 4), np.uint8)
    sink = io.BytesIO()
    image = Image.fromarray(pixels).convert("L")
    image.convert("I").convert(mode).save(sink, "TIFF" if mode == "F" else "PNG")
    return sink.getvalue()


def png_of_header(width: int, height: int, data: bytes = b"", text: bytes = b"") -> bytes:
    """A grey PNG file that promises this size; `data` are its pixels as they are, `text` a compressed comment."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    comment = chunk(b"zTXt", b"comment\0\0" + zlib.compress(text, 9)) if text else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + comment + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def write(at: Path, files: dict[str, bytes]) -> None:
    """Write files by their path below `at`."""
    for name, content in files.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(content)


def images(at: Path, count: int = 4) -> None:
    """Good images in `at`."""
    write(at, {f"{index:03d}.png": png(index) for index in range(count)})


def write_tar(path: Path, members: Iterable[tuple[str, bytes] | tarfile.TarInfo]) -> None:
    """An archive of files by (name, content), or of members without content."""
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                found = tarfile.TarInfo(member[0])
                found.size = len(member[1])
                archive.addfile(found, io.BytesIO(member[1]))
