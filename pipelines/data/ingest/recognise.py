"""What a file or member of an archive is, by its name and, where that says nothing, by its first bytes."""

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipelines.cli.errors import DataError


def _suffixes(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


IMAGE_SUFFIXES = _suffixes(
    "apng avif avifs bmp dib gif j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpo pbm pgm png pnm ppm qoi tga tif tiff "
    "webp"
)
LABEL_SUFFIXES = (".cls", ".json")
# What `no_image_bytes` has to see of a file.
HEAD_BYTES = 64
# Images that Pillow does not read; of a camera's raw file it would read the small preview.
_UNREAD_SUFFIXES = _suffixes(
    "3fr arw cr2 cr3 crw dng erf heic heics heif hif jxl jxr kdc mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw svg "
    "svgz x3f"
)
# Known to be no images (or copies and halves of some), so that no request is spent on each of a million of them.
_OTHER_SUFFIXES = _suffixes(
    "7z avi bak bin bz2 cfg cls crdownload csv db doc docx gz h5 htm html ini ipynb jpg_original json jsonl lock log "
    "lst m4v mat md mov mp3 mp4 npy npz orig parquet part partial pdf pickle pkl pt pth py rar rst safetensors sh "
    "sqlite tar tgz tmp toml tsv txt wav xml xmp xz yaml yml zip zst"
)
_SYSTEM_NAMES = frozenset({"__macosx", ".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini"})
_SYSTEM = "made by macOS or Windows, no image"
_HIDDEN = "hidden (the name begins with a dot)"
_HEIF = "HEIC"
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|II\*\0|MM\0\*|RIFF....WEBP|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|"
    rb"qoif|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|P[1-6]\s",
    re.DOTALL,
)
# Control characters, line separators, those that turn the direction of text, and bytes that are not UTF-8.
_NOT_PLAIN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass
class LeftOut:
    """What of a source is not used: by reason the count, and the name of the first."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count `count` more, of which `name` is the first."""
        before, first = self.reasons.get(reason, (0, name))
        self.reasons[reason] = before + count, first

    def include(self, other: "LeftOut") -> None:
        """Count what `other` has counted, too."""
        for reason, (count, first) in other.reasons.items():
            self.add(reason, first, count)

    @property
    def count(self) -> int:
        """Files, members and rows in all."""
        return sum(count for count, _ in self.reasons.values())

    def __str__(self) -> str:
        listed = [f"{count:,} {reason}: {first}" for reason, (count, first) in self.reasons.items()]
        return "; ".join(listed[:3]) + ("; ..." if len(listed) > 3 else "")


def is_image(file: str) -> bool:
    """Whether the name has an image's suffix, and is not a hidden or a system's file."""
    return PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES and unwanted(file) is None


def unwanted(file: str) -> str | None:
    """The reason why a file of this name is no part of any source, whatever is in it; None for all others."""
    parts = PurePosixPath(file).parts
    if any(part.lower() in _SYSTEM_NAMES or part.startswith("._") for part in parts):
        return _SYSTEM
    return _HIDDEN if any(part.startswith(".") and part != ".." for part in parts) else None


def no_image(file: str) -> str | None:
    """The reason why a file of this name is no usable image; None where only its bytes can tell."""
    suffix = PurePosixPath(file).suffix.lower()
    if suffix in _UNREAD_SUFFIXES:
        return _unread(suffix.removeprefix(".").upper())
    if suffix in _OTHER_SUFFIXES or suffix.endswith("~"):
        return f"no image (*{suffix})"
    return None


def no_image_bytes(file: str, head: bytes) -> str | None:
    """The reason why a file with these first `HEAD_BYTES` is no usable image; None when Pillow will read it."""
    if head[4:8] == b"ftyp":  # ISO 14496-12: the size of the box, its kind, the major brand, a version, further brands
        size = min(int.from_bytes(head[:4]), len(head))
        brands = {head[start : start + 4] for start in (8, *range(16, size, 4))}
        if brands & {b"avif", b"avis"}:
            return None
        if brands & _HEIF_BRANDS:
            return _unread(_HEIF)
    if _MAGIC.match(head):
        return None
    suffix = PurePosixPath(file).suffix.lower()
    return f"no image (*{suffix})" if suffix else "no image (no suffix)"


def require_plain_name(where: str, name: str) -> None:
    """Refuse a name that could write to a terminal more than itself; a DataError that begins with `where`."""
    if _NOT_PLAIN.search(name):
        raise DataError(f"{where}: the name {name!r} holds control characters, or is not UTF-8; rename it")


def _unread(kind: str) -> str:
    return f"{kind} image, which is not read; convert it to JPEG or PNG"
