"""Bad image folders, bad names in them, and bad image files that are all a source has."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from bad_inputs.files import REJECTED, ingest, prepared, source_case
from bad_inputs.harness import Case
from support.image_files import images, png, png_of_header, write

from pipelines.cli.config import digest


def _link(name: str, target: str):
    def make(source: Path) -> None:
        images(source)
        images(source.parent / "elsewhere")
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(target)

    return make


def _special(make_special):
    def make(source: Path) -> None:
        images(source)
        make_special(source / "b.png")

    return make


def _socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


def _named(name: bytes):
    def make(source: Path) -> None:
        images(source)
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_bytes(png())

    return make


def _only(content: bytes | Callable[[], bytes]):
    """Content of some size is made when it is needed, not by every process that reads this module."""
    return lambda source: write(source, {"a.png": content() if callable(content) else content})


def _sparse(source: Path) -> None:
    images(source)
    with (source / "b.png").open("wb") as file:
        file.truncate(100 * 2**30)


def _one_of_four(source: Path) -> None:
    images(source, 3)
    write(source, {"z.png": png()[:60]})


def _sixteen_bit_refused(at: Path) -> list[str]:
    write(at / "source", {"a.png": png(mode="I;16")})
    return ingest("source", "--sixteen_bit", "refuse")


def _wrong_header() -> bytes:
    whole = bytearray(png())
    whole[29] ^= 1
    return bytes(whole)


def _mixed_sizes(source: Path) -> None:
    images(source)
    write(source, {"b.png": png(1, 9, 7), "c.png": png(2, 9, 7)})


def _splits(source: Path) -> None:
    for split in ("train", "test"):
        images(source / split / "cat")


def _snapshots(source: Path) -> None:
    for revision in ("0123abcd", "4567cdef"):
        images(source / "datasets--someone--digits" / "snapshots" / revision)


def _added(at: Path) -> list[str]:
    write(at / "out", prepared())
    images(at / "source", 21)
    manifest = json.loads((at / "out/manifest.json").read_text())
    manifest["request"]["source"] = str(at / "source")
    manifest["request_sha256"] = digest(manifest["request"])
    (at / "out/manifest.json").write_text(json.dumps(manifest))
    return ingest("source")


def _output_inside(at: Path) -> list[str]:
    images(at / "source")
    return ["ingest.py", "--source", "source", "--output", "source/prepared"]


def _output_is_source(at: Path) -> list[str]:
    images(at / "source")
    return ["ingest.py", "--source", "source", "--output", "source"]


_LINK = "is a symbolic link (to"
_NOT_FOLLOWED = "which is not followed; put the file itself there"
_NONE = "none of its first images can be read (last: a.png: "


def _folder(name: str, make, *says: str, leaves: tuple[str, ...] = ()) -> Case:
    return source_case("Image folder", name, make, *says, leaves=leaves)


def _image(name: str, content: bytes | Callable[[], bytes], *says: str) -> Case:
    return source_case("Image", name, _only(content), _NONE, *says)


CASES = [
    Case("Image folder", "missing", lambda at: ingest("source"), ("source = source: nothing is there",)),
    _folder("empty", lambda source: None, "source = source: nothing is there"),
    _folder(
        "no images", lambda source: write(source, {"notes.txt": b"x"}), "no images among its 1 file(s)", "notes.txt"
    ),
    _folder(
        "images and archives",
        lambda source: write(source, {"a.png": png(), "b.tar": b""}),
        "holds files of the formats tar, folder; choose one with `format`",
    ),
    _folder(
        "images that are not read",
        lambda source: write(source, {"a.heic": b"x", "b.CR2": b"x"}),
        "no images among its 2 file(s) (1 HEIC image, which is not read; convert it to JPEG or PNG: a.heic; 1 CR2",
    ),
    _folder("folders of two splits", _splits, "holds the splits test, train; choose one with split = train"),
    Case(
        "Image folder",
        "a split that is not there",
        lambda at: (_splits(at / "source"), ingest("source", "--split", "dev"))[1],
        ("holds no split 'dev', but the splits test, train; correct `split`",),
    ),
    Case(
        "Image folder",
        "a column of a folder",
        lambda at: (images(at / "source"), ingest("source", "--image_column", "x"))[1],
        ("image_column = 'x': a source of format folder has no such choice; leave it out",),
        2,
    ),
    _folder("two snapshots of the Hub's cache", _snapshots, "holds 2 snapshots of the Hub's; name one, such as"),
    Case(
        "Image folder",
        "images added since it was ingested",
        _added,
        ("source = source: has changed since ", "out was made from it (20 files then, 21 now); ingest it into another"),
    ),
    _folder("symbolic link to a file outside", _link("b.png", "../elsewhere/000.png"), "'b.png'", _LINK, _NOT_FOLLOWED),
    _folder("symbolic link to a system file", _link("b.png", "/etc/passwd"), f"'b.png' {_LINK} '/etc/passwd')"),
    _folder("symbolic link to a directory outside", _link("b", "../elsewhere"), f"'b' {_LINK} '../elsewhere')"),
    _folder("symbolic link to its own directory", _link("b", "."), f"'b' {_LINK} '.')"),
    _folder("symbolic link to itself", _link("b.png", "b.png"), f"'b.png' {_LINK} 'b.png')"),
    _folder("symbolic link to nothing", _link("b.png", "gone.png"), f"'b.png' {_LINK} 'gone.png')"),
    _folder("named pipe", _special(os.mkfifo), "'b.png' is a named pipe, no file"),
    _folder("socket", _special(_socket), "'b.png' is a socket, no file"),
    _folder("symbolic link to a device", _link("b.png", "/dev/zero"), f"'b.png' {_LINK} '/dev/zero')"),
    _folder("name with a line break", _named(b"b\nerror: all is lost.png"), "b\\nerror: all is lost.png", "rename it"),
    _folder("name with a terminal's control sequence", _named(b"b\x1b[2J\x1b]0;x\x07.png"), "b\\x1b[2J", "rename it"),
    _folder("name that is not UTF-8", _named(b"caf\xe9.png"), "caf\\udce9.png", "rename it"),
    _folder("name that reverses the text", _named("b\u202egnp.png".encode()), "b\\u202egnp.png", "rename it"),
    _folder("file of 100 GiB (sparse)", _sparse, "b.png: has 107,374,182,400 bytes, an image file at most"),
    _folder(
        "one image of four truncated",
        _one_of_four,
        "1 of 4 images (25.0%) cannot be used, more than max_rejected_fraction = 0.01",
        "z.png: truncated or damaged",
        "out/rejected.parquet",
        leaves=REJECTED,
    ),
    _folder(
        "images of several sizes",
        _mixed_sizes,
        "holds images of 2 sizes: 8x8 (4), 9x7 (2) (H x W); give --image_size N",
    ),
    _image("zero bytes", b"", "empty (zero bytes)"),
    _image("text", b"this is no image", "not an image of a known format"),
    _image("a program with an image's name", b"\x7fELF" + bytes(100), "not an image of a known format"),
    _image("truncated", png()[:60], "truncated or damaged"),
    _image("decompression bomb, 60,000 x 60,000 pixels", png_of_header(60_000, 60_000), "decompression bomb"),
    _image("decompression bomb, 2^31 x 2^31 pixels", png_of_header(2**31 - 1, 2**31 - 1), "a.png: "),
    _image(
        "decompression bomb in a comment (256 MiB)", lambda: png_of_header(8, 8, bytes(72), bytes(2**28)), "a.png: "
    ),
    _image("0 x 8 pixels", png_of_header(0, 8), "a.png: "),
    _image("no pixels behind the header", png_of_header(8, 8), "truncated or damaged"),
    Case("Image", "16 bits, with sixteen_bit = refuse", _sixteen_bit_refused, (_NONE, "sixteen_bit = refuse")),
    _image("wrong checksum of the header", _wrong_header(), "wrong checksum in the PNG chunk IHDR"),
    _image("floating-point pixels", png(mode="F"), "unsupported mode F"),
    source_case(
        "Image",
        "9,000 x 9,000 pixels, without image_size",
        _only(lambda: png_of_header(9_000, 9_000, bytes(9_001 * 9_000))),
        "a.png has 9000 x 9000 pixels, more than 16,777,216; give image_size",
    ),
    Case(
        "Image folder",
        "output inside the source",
        _output_inside,
        ("output = source/prepared: lies in the source source; choose a place beside it",),
        2,
    ),
    Case(
        "Image folder", "output is the source", _output_is_source, ("output = source: is the source source; choose",), 2
    ),
]
