"""What bad inputs are made of: small good files of every format, to be spoiled."""

import functools
import io
import json
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from bad_inputs.harness import Case
from PIL import Image

Build = Callable[[Path], list[str]]


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


def ingest(source: str, *options: str) -> list[str]:
    """The command line that ingests `source` into `out`."""
    return ["ingest.py", "--source", source, "--output", "out", *options]


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


# What an ingest that is refused after it has begun leaves: its work, with which the same command goes on.
UNFINISHED = ("out", "out/_work*")
REJECTED = (*UNFINISHED, "out/rejected.parquet")


def source_case(area: str, name: str, make: Callable[[Path], None], *says: str, leaves: tuple[str, ...] = ()) -> Case:
    """An ingest of the directory `source` that `make` fills."""

    def build(at: Path) -> list[str]:
        (at / "source").mkdir()
        make(at / "source")
        return ingest("source")

    return Case(area, name, build, says, leaves=leaves)


@functools.cache
def prepared() -> dict[str, bytes]:
    """A prepared data set of 20 images in one shard, by path."""
    from pipelines.config import digest
    from pipelines.data.ingest import IngestConfig
    from pipelines.data.ingest import ingest as run_ingest

    with tempfile.TemporaryDirectory() as scratch:
        images(Path(scratch) / "source", 20)
        run_ingest(IngestConfig(f"{scratch}/source", f"{scratch}/out"))
        files = read_tree(Path(scratch) / "out")
    manifest = json.loads(files["manifest.json"])
    manifest["request"]["source"] = "/data/images"  # not a path that is another one in every run
    manifest["request_sha256"] = digest(manifest["request"])
    return {**files, "manifest.json": json.dumps(manifest).encode()}


def read_tree(root: Path) -> dict[str, bytes]:
    """The content of every file below `root`, by path."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
