"""What the Hugging Face Hub's own tools have downloaded is read from where it lies; no other link is followed."""

import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.image_files import png
from support.source_reading import read, scan

from pipelines.cli.errors import DataError


def table(first: int, rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array([png(first + row) for row in range(rows)])}), sink)
    return sink.getvalue()


def cache(root: Path, revision: str, files: dict[str, bytes]) -> Path:
    """A repository in the cache with one snapshot; returns the snapshot."""
    repository = root / "datasets--someone--digits"
    snapshot = repository / "snapshots" / revision
    for name, content in files.items():
        blob, link = repository / "blobs" / hashlib.sha256(content).hexdigest(), snapshot / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(repository).parts) - 1), "blobs", blob.name))
    return snapshot


FILES = {
    "data/train-00000-of-00001.parquet": table(0, 6),
    "data/test-00000-of-00001.parquet": table(10, 3),
    "README.md": b"text",
}


def test_a_snapshot_is_read_from_where_it_lies(tmp_path: Path) -> None:
    snapshot = cache(tmp_path / "hub", "0123abcd", FILES)
    (tmp_path / "shortcut").symlink_to(snapshot)
    wanted = [png(index) for index in range(6)]
    with pytest.raises(DataError, match="holds the splits test, train"):
        read(snapshot)
    for source in (snapshot, snapshot / "data", snapshot.parents[1], tmp_path / "hub", tmp_path / "shortcut"):
        assert [image.payload for image in read(source, split="train")[0]] == wanted
    for source in (snapshot / "data/train-*.parquet", snapshot / "data/train-00000-of-00001.parquet"):
        assert [image.payload for image in read(source)[0]] == wanted
    _, left_out = scan(snapshot.parents[1], split="train")
    assert left_out.reasons["of the Hub's cache, read by its name in snapshots/"][0] == len(FILES)


def test_images_in_a_cache_are_read_once(tmp_path: Path) -> None:
    snapshot = cache(tmp_path, "0123abcd", {f"cat/{index}.png": png(index) for index in range(4)})
    for source in (snapshot, tmp_path):
        assert len(read(source)[0]) == 4
    cache(tmp_path, "4567cdef", {"cat/9.png": png(9)})
    with pytest.raises(DataError, match=r"holds 2 snapshots of the Hub's; name one, such as .*/snapshots/4567cdef"):
        read(tmp_path)
    assert len(read(snapshot)[0]) == 4


@pytest.mark.parametrize(
    "target",
    [
        "/etc/passwd",
        "../../../secret.png",
        "../../../models--other/blobs/x",
        "../../blobs/outwards",
        "../../blobs/gone",
        "../../blobs/deeper/x",
        "b.png",
    ],
)
def test_links_that_leave_the_blobs_are_refused(tmp_path: Path, target: str) -> None:
    snapshot = cache(tmp_path, "0123abcd", {"a.png": png(0)})
    for path in (tmp_path / "secret.png", tmp_path / "models--other/blobs/x", snapshot.parents[1] / "blobs/deeper/x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(1))
    (snapshot.parents[1] / "blobs" / "outwards").symlink_to(tmp_path / "secret.png")
    (snapshot / "b.png").symlink_to(target)
    with pytest.raises(DataError, match=r"'b.png' is a symbolic link \(to '.*'\), which is not followed"):
        read(snapshot)
