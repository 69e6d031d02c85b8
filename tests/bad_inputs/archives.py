"""Bad tar archives. Nothing is ever unpacked: members are read where they lie, and their names are only shown."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from bad_inputs.files import source_case
from bad_inputs.harness import Case
from support.image_files import png, write_tar

GOOD = [(f"{index}.png", png(index)) for index in (1, 2, 0)]


def _tar(*members: tuple[str, bytes] | tarfile.TarInfo) -> Callable[[Path], None]:
    return lambda source: write_tar(source / "a.tar", [*GOOD, *members])


def _changed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(source: Path) -> None:
        write_tar(source / "a.tar", GOOD)
        (source / "a.tar").write_bytes(change((source / "a.tar").read_bytes()))

    return make


def _member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, target
    return found


def _declared(size: int) -> Callable[[Path], None]:
    """An archive whose last member is said to have `size` bytes, and has none."""
    member = tarfile.TarInfo("9.png")
    member.size = size
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in GOOD:
            found = tarfile.TarInfo(name)
            found.size = len(content)
            archive.addfile(found, io.BytesIO(content))
    end = sink.getvalue().rstrip(b"\0")
    whole = end + bytes(-len(end) % 512)
    return lambda source: (source / "a.tar").write_bytes(whole + member.tobuf(tarfile.GNU_FORMAT)) and None


def _sparse(source: Path) -> None:
    """A tar file of 100 GiB, most of it a hole, that is one image's content."""
    member = tarfile.TarInfo("9.png")
    member.size = 100 * 2**30
    with (source / "a.tar").open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(member.size + 10240)


def _mixed_labels(source: Path) -> None:
    write_tar(source / "a.tar", [("1.png", png(1)), ("1.cls", b"cat"), ("2.png", png(2)), ("2.cls", b"2")])


def _case(name: str, make: Callable[[Path], None], *says: str) -> Case:
    return source_case("Tar archive", name, make, *says)


_UNREADABLE = "source/a.tar: not a readable uncompressed tar ("
_OUT = "leads out of the archive; repack it with relative names"
_LINK = "is a link or no plain file; repack it with the file itself"

CASES = [
    _case("zero bytes", lambda source: (source / "a.tar").touch(), _UNREADABLE, "empty file"),
    _case("text", lambda source: (source / "a.tar").write_text("no archive" * 100) and None, _UNREADABLE),
    _case("compressed", _changed(gzip.compress), _UNREADABLE),
    _case("truncated in a member", _changed(lambda content: content[: 3 * 1024 - 100]), _UNREADABLE, "unexpected end"),
    _case(
        "damaged header",
        _changed(lambda content: content[:1024] + b"\xff" * 512 + content[1536:]),
        _UNREADABLE,
        "byte 1,024",
    ),
    _case("only a directory", lambda source: write_tar(source / "a.tar", [_member("d", tarfile.DIRTYPE)]), "no images"),
    _case("member that climbs out", _tar(("../../etc/cron.d/9.png", png())), "'../../etc/cron.d/9.png'", _OUT),
    _case("member with an absolute path", _tar(("/etc/cron.d/9.png", png())), "'/etc/cron.d/9.png'", _OUT),
    _case("member that climbs out on its way", _tar(("a/../../9.png", png())), "'a/../../9.png'", _OUT),
    _case("member that is a symbolic link", _tar(_member("9.png", tarfile.SYMTYPE, "/etc/passwd")), "'9.png'", _LINK),
    _case("member that is a hard link", _tar(_member("9.png", tarfile.LNKTYPE, "../secret")), "'9.png'", _LINK),
    _case("member that is a named pipe", _tar(_member("9.png", tarfile.FIFOTYPE)), "'9.png'", _LINK),
    _case("member that is a device", _tar(_member("9.png", tarfile.CHRTYPE)), "'9.png'", _LINK),
    _case("member with a line break in its name", _tar(("9\nerror: x.png", png())), "'9\\nerror: x.png'", "rename it"),
    _case("member with a control sequence in its name", _tar(("9\x1b[2J.png", png())), "'9\\x1b[2J.png'", "rename it"),
    _case("member twice", _tar(("1.png", png(1))), "source/a.tar: holds '1.png' twice; repack it"),
    _case("member declared longer than the archive", _declared(10**6), _UNREADABLE, "unexpected end of data"),
    _case("member declared as 8 EiB", _declared(2**63 - 1), "source/a.tar"),
    _case("member of 100 GiB (sparse file)", _sparse, "'9.png' has 107,374,182,400 bytes, more than 268,435,456"),
    _case("another file appended", _changed(lambda content: content + b"x" * 512), _UNREADABLE, "byte 10,240"),
    _case("the same archive appended", _changed(lambda content: content * 2), "holds '1.png' twice; repack it"),
    _case(
        "two images of one key",
        _tar(("0.jpg", png(5))),
        "'0.png' and '0.jpg' are images of one key; choose with image_column = png, jpg or all",
    ),
    _case(
        "label that is a text",
        _tar(("0.cls", b"cat" * 99)),
        "gives no label, an integer or a word; correct it, or give",
    ),
    _case("labels that are words and numbers", _mixed_labels, "words (1.png: 'cat') and numbers (2.png: 2)"),
    _case("label that is a fraction", _tar(("0.json", b'{"label": 3.7}')), "3.7", "gives no label"),
    _case("label that is infinite", _tar(("0.json", b'{"label": Infinity}')), "Infinity", "gives no label"),
    _case("label beyond 64 bits", _tar(("0.cls", b"9" * 30)), "gives no label"),
    _case("label in malformed JSON", _tar(("0.json", b'{"label": 3')), "gives no label"),
    _case("label in JSON 100,000 brackets deep", _tar(("0.json", b"[" * 100_000)), "gives no label"),
    _case(
        "label of 20 MiB", _tar(("0.json", bytes(20 * 2**20))), "'0.json' has 20,971,520 bytes, more than 16,777,216"
    ),
]
