"""Files and objects behind one name: a `Location` is a URI that any process can read and write.

Local paths and every fsspec protocol work; `s3://` honours the standard AWS environment variables
(`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, ...) and rides out faults (pipelines/storage/s3.py). Two writes
matter to the rest of the tree: `write_bytes` replaces an object as a whole, and `create` has exactly one
winner among racing writers.
"""

import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from pipelines.cli.errors import StorageError
from pipelines.cli.paths import absolute_path, path_of_file_uri, with_variables
from pipelines.storage.errors import clear_errors, is_conditional_refusal

S3_PROTOCOLS = ("s3", "s3a")
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp", re.DOTALL)
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}
# No store completes an upload of several parts under a condition reliably: S3 takes so much in one part.
_LARGEST_PUT = 5 * 2**30
_CREATE_ATTEMPTS = 3


@dataclass(frozen=True)
class Location:
    """A file, object, directory or prefix, named by its canonical `uri` (an absolute path when local)."""

    uri: str

    @classmethod
    def parse(cls, uri: "str | os.PathLike[str] | Location") -> "Location":
        """Make a location from a path or URI.

        Local paths become absolute, `~` and variables are expanded (pipelines/cli/paths.py).

        Raises:
            StorageError: The URI is empty, of an unknown protocol, carries credentials, or names a variable that is not
                set.
            ConfigError: There is no home directory for `~` to stand for.
        """
        if isinstance(uri, Location):
            return uri
        text = os.fspath(uri)
        if not text:
            raise StorageError("location = '': must not be empty; give a path or a URI such as s3://bucket/prefix")
        text = text if text.startswith("file:/") else with_variables(text)
        if text.startswith("file:/"):
            return cls(absolute_path(path_of_file_uri(text)))
        protocol, separator, rest = text.partition("://")
        if not separator or protocol == "local":
            return cls(absolute_path(rest if separator else text))
        bucket = rest.split("/", 1)[0]
        if "@" in bucket:
            raise StorageError(
                f"location = {protocol}://...@{bucket.split('@')[-1]}: must not carry credentials; "
                "set them in the environment (AWS_ACCESS_KEY_ID, ...)"
            )
        if protocol not in fsspec.available_protocols():
            raise StorageError(f"location = {text!r}: unknown protocol {protocol!r}; use a path or s3://bucket/prefix")
        if not bucket:
            raise StorageError(f"location = {text!r}: the bucket is missing; write {protocol}://bucket/prefix")
        if protocol not in S3_PROTOCOLS:
            try:
                fsspec.get_filesystem_class(protocol)
            except ImportError as error:
                needed = f"ddpm-pipeline[{_EXTRAS[protocol]}]" if protocol in _EXTRAS else "its driver"
                reason = f"no driver for this protocol ({str(error).splitlines()[0]})"
                raise StorageError(f"location = {text!r}: {reason}; install {needed}") from error
        return cls(f"{protocol}://{rest.rstrip('/')}")

    @property
    def protocol(self) -> str:
        """`file`, `s3`, ..."""
        protocol, separator, _ = self.uri.partition("://")
        return protocol if separator else "file"

    @property
    def is_local(self) -> bool:
        """Whether this is a path of this machine's (or a mounted) file system."""
        return self.protocol == "file"

    @property
    def local_path(self) -> Path:
        """The path of a local location.

        Raises:
            StorageError: It is none.
        """
        if not self.is_local:
            raise StorageError(f"location = {self.uri}: must be a directory of this machine")
        return Path(self.path)

    @property
    def fs(self) -> Any:
        """The fsspec file system, one per process and protocol."""
        with clear_errors("open", self.uri):
            return _filesystem(self.protocol)

    @property
    def path(self) -> str:
        """What `fs` calls this location: a path, or `bucket/key`."""
        return self.uri if self.is_local else self.uri.partition("://")[2]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Location":
        """The location without its last part."""
        return Location(self.uri.rsplit("/", 1)[0] or "/")

    def __truediv__(self, child: str) -> "Location":
        return Location(f"{self.uri.rstrip('/')}/{child}")

    def __str__(self) -> str:
        return self.uri

    def read_bytes(self) -> bytes:
        """The whole content.

        Raises:
            StorageError: Missing or unreadable.
        """
        with clear_errors("read", self.uri):
            return self._read()

    def write_bytes(self, data: bytes) -> None:
        """Replace the content as a whole: a reader sees the old or the new bytes, also after a crash.

        Raises:
            StorageError: Unwritable: refused, no such bucket, disk full.
        """
        with clear_errors("write", self.uri):
            if self.is_local:
                with self._synced_temporary(data) as temporary:
                    temporary.replace(self.path)
                _sync_directory(Path(self.path).parent)
            else:
                self.fs.pipe_file(self.path, data)

    def create(self, data: bytes) -> bool:
        """Write unless something is there already; of any number of racing writers exactly one succeeds.

        A refusal is followed by reading back, because a store may refuse the retry of a write whose
        acknowledgement was lost.

        Returns:
            True when the stored content is `data` now, False when another writer's other content is there.

        Raises:
            StorageError: Unwritable: refused, no such bucket, disk full.
        """
        with clear_errors("write", self.uri):
            if self.is_local:
                with self._synced_temporary(data) as temporary:
                    try:
                        os.link(temporary, self.path)
                    except FileExistsError:
                        return self.read_bytes() == data
                _sync_directory(Path(self.path).parent)
                return True
            options = {"chunksize": _LARGEST_PUT} if self.protocol in S3_PROTOCOLS else {}
            for _ in range(_CREATE_ATTEMPTS):
                try:
                    self.fs.pipe_file(self.path, data, mode="create", **options)
                    return True
                except OSError as error:
                    if not is_conditional_refusal(error):
                        raise
                with suppress(FileNotFoundError):  # deleted since
                    return bool(self._read() == data)
        raise StorageError(f"{self.uri}: is created and deleted by others all the time; let one run have it")

    def exists(self) -> bool:
        """Whether an object or directory is here (object stores have no empty directories)."""
        with clear_errors("look up", self.uri):
            if self.is_local:
                return Path(self.path).exists()
            try:  # not `fs.exists`, which takes some errors for a no
                self.fs.info(self.path)
            except FileNotFoundError:
                return False
            return True

    def size(self) -> int:
        """Size in bytes.

        Raises:
            StorageError: Missing or unreadable.
        """
        with clear_errors("look up", self.uri):
            return int(self.fs.info(self.path)["size"])

    def version(self) -> str:
        """A text that changes when the content is replaced (from size and time, or the store's ETag).

        Raises:
            StorageError: Missing or unreadable.
        """
        with clear_errors("look up", self.uri):
            return str(self.fs.ukey(self.path))

    def open(self, mode: str = "rb", **options: Any) -> IO[Any]:
        """A file object of fsspec's; `options` go to its `open` (`block_size`, `cache_type`).

        Raises:
            StorageError: Missing, unreadable or unwritable when it is opened.
        """
        with clear_errors("open", self.uri):
            opened: IO[Any] = self.fs.open(self.path, mode, **options)
            return opened

    def sizes(self) -> dict[str, int]:
        """Name and size in bytes of each direct child, sorted by name; empty when there is none."""
        with clear_errors("list", self.uri):
            try:
                entries = self.fs.ls(self.path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        children = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry for entry in entries}
        children.pop(self.name, None)  # what some stores list for the prefix itself
        return {name: int(children[name]["size"] or 0) for name in sorted(children) if not temporary_target(name)}

    def list(self) -> list[str]:
        """Names of the direct children, sorted; empty when there is none."""
        return list(self.sizes())

    def find(self) -> dict[str, int]:
        """Path (as `fs` has it) and size in bytes of this file, or of every file below here at any depth."""
        with clear_errors("list", self.uri):
            found = _files(self.fs.find(self.path, detail=True))
        # Some stores take doubled slashes for one, and list what is there under the name with one.
        listed = re.sub("/+", "/", self.path)
        if listed == self.path or any(path.startswith(self.path) for path in found):
            return found
        return {self.path + path.removeprefix(listed): size for path, size in found.items()}

    def glob(self) -> dict[str, int]:
        """Path (as `fs` has it) and size in bytes of the files that match this location as a pattern."""
        with clear_errors("list", self.uri):
            found = self.fs.glob(self.path, detail=True)
        return _files(found)

    def read_json(self) -> Any:
        """The content as JSON.

        Raises:
            StorageError: Missing, unreadable or not JSON.
        """
        try:
            return json.loads(self.read_bytes())
        except (ValueError, RecursionError) as error:
            raise StorageError(f"{self.uri}: is not JSON ({error}); it was damaged, restore or delete it") from error

    def write_json(self, value: Any) -> None:
        """Replace the content by `value` in the canonical form of `json_bytes`."""
        self.write_bytes(json_bytes(value))

    def delete(self) -> None:
        """Remove the file or object; nothing happens where there is none."""
        with clear_errors("delete", self.uri), suppress(FileNotFoundError):
            self.fs.rm_file(self.path)

    def upload_directory(self, directory: "str | os.PathLike[str]") -> None:
        """Copy the files of a local directory, at any depth, to below this location."""
        root = Path(directory)
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            (self / file.relative_to(root).as_posix()).write_bytes(file.read_bytes())

    def download_directory(self, directory: "str | os.PathLike[str]") -> None:
        """Copy every file below this location to a local directory.

        Raises:
            StorageError: There is nothing here, or it is unreadable.
        """
        files = self.find()
        if not files:
            raise StorageError(f"{self.uri}: cannot read: does not exist; check the spelling")
        for path in files:
            name = path.removeprefix(self.path.rstrip("/") + "/")
            Location(absolute_path(f"{directory}/{name}")).write_bytes((self / name).read_bytes())

    def _read(self) -> bytes:
        if self.is_local and Path(self.path).is_fifo():
            raise StorageError(f"{self.uri}: cannot read: is a named pipe, no file; remove it")
        # One request, so that the content is that of one moment: s3fs would ask for the size, then for ranges.
        options = {"max_concurrency": 1} if self.protocol in S3_PROTOCOLS else {}
        return bytes(self.fs.cat_file(self.path, **options))

    @contextmanager
    def _synced_temporary(self, data: bytes) -> Iterator[Path]:
        """A sibling file that holds `data` on the disk, removed on the way out."""
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def json_bytes(value: Any) -> bytes:
    """JSON in one canonical form (sorted keys, two spaces, final newline), so that equal values are equal bytes.

    Raises ValueError for NaN and infinities, which JSON does not have: what is unknown is null.
    """
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def forget_connections() -> None:
    """Make file systems anew at their next use, for a process whose AWS_... environment has changed."""
    for filesystem in _filesystems.values():
        type(filesystem).clear_instance_cache()
    _filesystems.clear()


def _files(found: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Sizes by path, without directories and the empty objects by which some tools mark them."""
    return {
        path: int(found[path]["size"] or 0)
        for path in sorted(found)
        if found[path]["type"] == "file" and not path.endswith("/")
    }


def temporary_target(name: str) -> str | None:
    """The name of the file that a local writer keeps under this name until it is whole; None for any other name."""
    match = _TEMPORARY.fullmatch(name)
    return match[1] if match else None


def _sync_directory(directory: Path) -> None:
    """Make a rename or link in `directory` survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# By process: the child of a fork inherits connections that its parent goes on using, but not the thread that serves
# them; it must not forget them either, because closing them would wait for that thread.
_filesystems: dict[tuple[int, str], Any] = {}


def _filesystem(protocol: str) -> Any:
    key = os.getpid(), protocol
    if key not in _filesystems:
        _filesystems[key] = _connect(protocol)
    return _filesystems[key]


def _connect(protocol: str) -> Any:
    if protocol not in S3_PROTOCOLS:
        # Other processes write, too: a remembered listing would hide their objects.
        return fsspec.filesystem(protocol, use_listings_cache=False)
    from pipelines.storage.s3 import PatientS3FileSystem

    return PatientS3FileSystem()
