"""A bad image in an otherwise good source ends nothing: it is left out, and listed with the reason."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.image_files import images, png, png_of_header, write, write_tar

from pipelines.cli.errors import DataError
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest


def animation() -> bytes:
    sink = io.BytesIO()
    frames = [Image.new("L", (8, 8), level) for level in (10, 200)]
    frames[0].save(sink, "GIF", save_all=True, append_images=frames[1:])
    return sink.getvalue()


def cmyk() -> bytes:
    sink = io.BytesIO()
    Image.new("CMYK", (8, 8), (10, 20, 30, 40)).save(sink, "TIFF")
    return sink.getvalue()


# Content of the image, and what rejected.parquet says of it.
BAD = {
    "bomb.png": (png_of_header(60_000, 60_000), "decompression bomb"),
    "comment.png": (png_of_header(8, 8, bytes(72), bytes(2**27)), "damaged header (Decompressed data too large"),
    "empty.png": (b"", "empty (zero bytes)"),
    "fraction.tiff": (png(mode="F"), "unsupported mode F"),
    "large.png": (png(1, 16, 16), "size 16x16 is not 8x8"),
    "one.png": (png(1, 1, 1), "size 1x1 is not 8x8"),
    "program.png": (b"\x7fELF" + bytes(100), "not an image of a known format"),
    "short.png": (png()[:60], "truncated or damaged"),
    "sum.png": (png()[:29] + bytes(4) + png()[33:], "truncated or damaged (wrong checksum in the PNG chunk IHDR)"),
    "zero.png": (png_of_header(0, 8), "damaged PNG header"),
}
# Unusual ones that are taken: the first frame; colours by Pillow's rule.
GOOD = {"animation.gif": animation(), "cmyk.tiff": cmyk()}


def fill_folder(source: Path, bad: dict[str, bytes]) -> None:
    images(source, 90)
    write(source, {**GOOD, **bad})


def fill_tar(source: Path, bad: dict[str, bytes]) -> None:
    source.mkdir()
    good = [(f"{index:03d}.png", png(index)) for index in range(90)]
    write_tar(source / "a.tar", sorted([*good, *GOOD.items(), *bad.items()]))


def fill_parquet(source: Path, bad: dict[str, bytes]) -> None:
    source.mkdir()
    contents = [*(png(index) for index in range(90)), *GOOD.values(), *bad.values()]
    pq.write_table(pa.table({"image": pa.array(contents, pa.binary())}), source / "a.parquet")


@pytest.mark.parametrize("fill", [fill_folder, fill_tar, fill_parquet])
def test_each_is_left_out_and_listed_up_to_the_limit_and_refused_beyond(tmp_path: Path, fill) -> None:
    fill(tmp_path / "source", {name: content for name, (content, _) in BAD.items()})
    source, output = str(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(DataError, match=r"10 of 102 images \(9.8%\) cannot be used, more than max_rejected_fraction"):
        ingest(IngestConfig(source, str(output), max_rejected_fraction=0.05))
    assert not (output / "manifest.json").exists()
    data = ingest(IngestConfig(source, str(output), max_rejected_fraction=0.1)).dataset
    assert (data.num_rows, data.rejected, data.image_shape) == (92, 10, (8, 8, 3))
    listed = pq.read_table(output / "rejected.parquet").to_pylist()
    wanted = [reason for _, reason in BAD.values()]
    assert len(listed) == len(wanted)
    assert all(row["reason"].startswith(reason) for row, reason in zip(listed, wanted, strict=True))


def test_hidden_files_and_foreign_members_are_no_part_of_a_source(tmp_path: Path) -> None:
    """What archiving tools add, also links and names that would be refused of an image."""
    link = tarfile.TarInfo("docs/latest")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    foreign = [("./._0.png", b"resource fork"), ("__MACOSX/._0.png", b"resource fork"), ("readme\n.txt", b"x")]
    (tmp_path / "source").mkdir()
    write_tar(tmp_path / "source" / "a.tar", [("./0.png", png()), *foreign, link])
    (tmp_path / "source" / ".cache").symlink_to("/tmp")
    assert ingest(IngestConfig(str(tmp_path / "source"), str(tmp_path / "out"))).dataset.num_rows == 1
