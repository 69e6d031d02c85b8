"""Images in uncompressed tar archives, as WebDataset writes them and as `tar` does."""

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any, ClassVar

from pipelines.cli.errors import DataError
from pipelines.data.ingest.decode import MAX_FILE_BYTES
from pipelines.data.ingest.formats import (
    ALL_IMAGES,
    NO_OPTIONS,
    NOT_WANTED,
    PARALLEL_REQUESTS,
    Item,
    Options,
    RawImage,
    Scan,
)
from pipelines.data.ingest.recognise import (
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    LeftOut,
    no_image,
    no_image_bytes,
    require_plain_name,
    unwanted,
)
from pipelines.storage.location import Location

_MAX_LABEL_BYTES = 2**24
_MAX_WORD = 200
_ZEROS_AT_ONCE = 2**16
LABEL_NAMES = "DDPM.label_names"
"""The key of an archive's global header (pax) that has the names of labels 0, 1, ..., as a JSON list."""


@dataclass(frozen=True)
class TarArchives:
    """Uncompressed tar files: images, each with its label in `key.cls` or `key.json` beside it.

    The key is WebDataset's: the path up to the first dot of its last part. Of several images of one key, `key.png` is
    the sample and `key.mask.png` is left out; both `key.jpg` and `key.png` are refused unless `image_column` says
    which. Where no image is plainly `key.SUFFIX`, all are samples.

    Labels that are numbers may have names, as a JSON list in the archive's global header (`LABEL_NAMES`).
    """

    base: Location
    options: Options = NO_OPTIONS
    is_encoded: ClassVar[bool] = True

    def scan(self, files: Sequence[str]) -> Scan:
        """See `Format.scan`."""
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as scanners:
            scans = list(scanners.map(lambda file: _ArchiveScan(self.base / file, file, self.options).run(), files))
        left_out = LeftOut()
        for scan in scans:
            left_out.include(scan.left_out)
        items = [item for scan in scans for item in scan.items]
        labels = [label for scan in scans for label in scan.labels]
        label_files = sum(scan.label_files for scan in scans)
        labels_from = ".cls and .json files beside the images" if label_files else "none: no .cls or .json gives one"
        words = sorted({label for label in labels if isinstance(label, str)})
        numbers = {word: number for number, word in enumerate(words)}
        if words and (plain := next((i for i, label in enumerate(labels) if isinstance(label, int)), None)) is not None:
            word = next(i for i, label in enumerate(labels) if isinstance(label, str))
            raise DataError(
                f"source = {self.base}: labels are words ({items[word].name}: {labels[word]!r}) and numbers "
                f"({items[plain].name}: {labels[plain]}); make them one kind, or give label_column = none"
            )
        labelled = [
            item._replace(label=numbers[label] if isinstance(label, str) else label)
            for item, label in zip(items, labels, strict=True)
        ]
        return Scan(
            labelled,
            tuple(words) or _one_list(scans),
            NOT_WANTED if self.options.no_labels else labels_from,
            label_files,
            left_out,
        )

    def read(self, items: Sequence[Item]) -> Iterator[RawImage]:
        """See `Format.read`."""
        opened, file = "", None
        for item in items:
            if file is None or item.file != opened:
                if file is not None:
                    file.close()
                opened, file = item.file, (self.base / item.file).open("rb")
            file.seek(item.offset)
            yield RawImage(file.read(item.size), item.label, f"{item.file}/{item.name}")
        if file is not None:
            file.close()


@dataclass
class _ArchiveScan:
    """The scan of one archive: an item and a label (number, word or none) for each image, in order."""

    location: Location
    file: str
    options: Options
    items: list[Item] = field(default_factory=list)
    labels: list[int | str | None] = field(default_factory=list)
    label_files: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    names: tuple[str, ...] | None = None
    # Keys of samples with images and of labels alone; the plain image of each key.
    _keys: dict[bool, set[str]] = field(default_factory=lambda: {True: set(), False: set()})
    _plain: dict[str, str] = field(default_factory=dict)

    def run(self) -> "_ArchiveScan":
        """Read every header, and the labels."""
        names: set[str] = set()
        group: list[tarfile.TarInfo] = []
        try:
            # Small blocks: a scan jumps from header to header.
            with self.location.open("rb", block_size=2**16) as stream:
                for header, member in _members(stream):
                    if self.options.label_column in (None, "cls", "label"):
                        self.names = self.names or _names_in(header.get(LABEL_NAMES))
                    if (reason := self._unused(stream, member)) is not None:
                        self.left_out.add(reason, self._path(member))
                        continue
                    _require_plain_member(self.location, member)
                    if member.name in names:
                        raise DataError(f"{self.location}: holds {member.name!r} twice; repack it with different names")
                    names.add(member.name)
                    if group and _key(member.name) != _key(group[0].name):
                        self._add(stream, group)
                        group = []
                    group.append(member)
                if group:
                    self._add(stream, group)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise DataError(
                f"{self.location}: not a readable uncompressed tar ({error}); repack or replace it"
            ) from error
        if apart := sorted(self._keys[True] & self._keys[False]):
            raise DataError(
                f"{self.location}: the label of {apart[0]!r} does not lie beside its image; repack it in order"
            )
        self.items = [item._replace(start=row, stop=row + 1) for row, item in enumerate(self.items)]
        return self

    def _unused(self, stream: IO[bytes], member: tarfile.TarInfo) -> str | None:
        """Why the member is no part of a sample; None when it is an image or a label file."""
        suffix = PurePosixPath(member.name).suffix.lower()
        if (reason := unwanted(member.name)) is not None:
            return reason
        if suffix in LABEL_SUFFIXES:
            return "label file, as label_column = none" if self.options.no_labels else None
        if suffix in IMAGE_SUFFIXES:
            return None
        if (reason := no_image(member.name)) is not None:
            return reason
        if not member.isreg():
            return "link or special file"
        return no_image_bytes(member.name, _content(stream, member, HEAD_BYTES))

    def _add(self, stream: IO[bytes], group: list[tarfile.TarInfo]) -> None:
        """Take in the members of one key."""
        key = _key(group[0].name)
        labels = [member for member in group if member.name.lower().endswith(LABEL_SUFFIXES)]
        images = [member for member in group if member not in labels]
        self._keys[bool(images)].add(key)
        chosen = self._chosen(key, images)
        label = self._label(stream, labels) if chosen else None
        if not chosen:
            for member in labels:
                self.left_out.add("label file without an image beside it", self._path(member))
        for member in chosen:
            self.items.append(Item(self.file, 0, 1, None, member.name, member.offset_data, member.size))
            self.labels.append(label)

    def _chosen(self, key: str, images: list[tarfile.TarInfo]) -> list[tarfile.TarInfo]:
        """Which images of one key are samples."""
        column = self.options.image_column
        if column == ALL_IMAGES:
            return images
        if column is not None:
            chosen = [member for member in images if _extension(member.name) == column.lower().removeprefix(".")]
            reason = f"image of another suffix, as image_column = {column}"
        else:
            plain = [member for member in images if "." not in _extension(member.name)]
            for member in plain:
                other = self._plain.setdefault(key, member.name)
                if other != member.name:
                    raise DataError(
                        f"{self.location}: {other!r} and {member.name!r} are images of one key; choose with "
                        f"image_column = {_extension(other)}, {_extension(member.name)} or {ALL_IMAGES}"
                    )
            chosen = plain or images
            reason = "further image of its key, the name up to the first dot (image_column chooses)"
        for member in images:
            if member not in chosen:
                self.left_out.add(reason, self._path(member))
        return chosen

    def _label(self, stream: IO[bytes], members: list[tarfile.TarInfo]) -> int | str | None:
        """The label of a sample: that of the first file that gives one."""
        found: int | str | None = None
        for member in members:
            if found is not None:
                self.left_out.add("further label file of an image", self._path(member))
                continue
            content = _content(stream, member, member.size)
            try:
                found = _parse_label(member.name, content, self.options.label_column)
            except (ValueError, RecursionError):
                text = content.decode("utf-8", "replace")
                raise DataError(
                    f"{self.location}/{member.name}: {text[:40]!r} gives no label, an integer or a word; correct it, "
                    "or give label_column = none"
                ) from None
            if isinstance(found, str):
                require_plain_name(f"{self.location}/{member.name}", found)
            if found is None:
                self.left_out.add("label file that gives no label", self._path(member))
            else:
                self.label_files += 1
        return found

    def _path(self, member: tarfile.TarInfo) -> str:
        return f"{self.file}/{member.name}"


def _names_in(text: str | None) -> tuple[str, ...] | None:
    """The names in a header's value; None where it is no list of names."""
    try:
        names = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    plain = isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)
    return tuple(names) if plain and names else None


def _one_list(scans: Sequence["_ArchiveScan"]) -> tuple[str, ...] | None:
    """The names that all archives give which give any."""
    named = [scan for scan in scans if scan.names is not None]
    if other := next((scan for scan in named if scan.names != named[0].names), None):
        raise DataError(f"{other.location}: names other classes than {named[0].file}; ingest it alone")
    return named[0].names if named else None


def _members(stream: IO[bytes]) -> Iterator[tuple[Mapping[str, str], tarfile.TarInfo]]:
    """Every member that is no directory, with its archive's global header; also of archives that were appended to each
    other, as `tar -i` reads them."""
    while True:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if not member.isdir():
                    yield archive.pax_headers, member
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for it
            raise tarfile.ReadError(f"no end mark, or a damaged header, at byte {archive.offset:,}")
        # What fills up the last record, and then nothing or another archive.
        while zeros := stream.read(_ZEROS_AT_ONCE):
            if rest := zeros.lstrip(b"\0"):
                past = stream.tell() - len(rest) - archive.offset
                stream.seek(archive.offset + past // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE)
                break
        else:
            return


def _content(stream: IO[bytes], member: tarfile.TarInfo, size: int) -> bytes:
    """The first `size` bytes of a plain member."""
    stream.seek(member.offset_data)
    return stream.read(min(size, member.size))


def _parse_label(name: str, content: bytes, column: str | None) -> int | str | None:
    """The label in a file beside an image: an integer (also from text), a word, or none.

    Raises:
        ValueError: It is a number that is none of a class, more than a word, or cannot be read.
    """
    if name.lower().endswith(".cls"):
        value: Any = content.decode("utf-8-sig") if column in (None, "cls") else None
    else:
        found = json.loads(content)
        value = found.get(column or "label") if isinstance(found, dict) else None
    if value is None or isinstance(value, list | dict):
        return None
    text = str(int(value) if isinstance(value, bool) else value).strip()
    if not text:
        return None
    try:
        number = int(text)
    except ValueError:
        try:
            fraction = float(text)
        except ValueError:
            if len(text) > _MAX_WORD:
                raise
            return text
        if not fraction.is_integer():
            raise
        number = int(fraction)
    if abs(number) >= 2**63:
        raise ValueError
    return number


def _require_plain_member(location: Location, member: tarfile.TarInfo) -> None:
    """Refuse what would lead an unpacking tool astray, although nothing is unpacked here, and what is too large."""
    require_plain_name(str(location), member.name)
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{location}: member {member.name!r} leads out of the archive; repack it with relative names")
    if not member.isreg() or member.issparse():
        raise DataError(
            f"{location}: member {member.name!r} is a link or no plain file; repack it with the file itself"
        )
    limit = _MAX_LABEL_BYTES if path.suffix.lower() in LABEL_SUFFIXES else MAX_FILE_BYTES
    if member.size > limit:
        raise DataError(f"{location}: member {member.name!r} has {member.size:,} bytes, more than {limit:,}; remove it")


def _key(name: str) -> str:
    """WebDataset's key: the path up to the first dot of its last part."""
    path = PurePosixPath(name)
    return str(path.parent / path.name.split(".", 1)[0])


def _extension(name: str) -> str:
    """What follows the key's dot, in small letters: `mask.png`."""
    return PurePosixPath(name).name.partition(".")[2].lower()
