"""Every image that Pillow reads is used, whatever its file is called; all else is counted by reason and named."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.image_files import write
from support.source_reading import read, scan

from pipelines.cli.errors import DataError
from pipelines.data.ingest.decode import decode_image
from pipelines.data.ingest.recognise import HEAD_BYTES, LeftOut, no_image_bytes

FORMATS = {
    "AVIF": "avif",
    "BMP": "bmp",
    "GIF": "gif",
    "JPEG": "jfif",
    "JPEG2000": "jp2",
    "PNG": "apng",
    "PPM": "pnm",
    "QOI": "qoi",
    "TGA": "tga",
    "TIFF": "tif",
    "WEBP": "webp",
}
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def encoded(format: str, level: int = 100) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (16, 16), (level, level, level)).save(sink, format)
    return sink.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_images_are_known_by_their_suffix_and_without_one_by_their_bytes(tmp_path: Path, format: str) -> None:
    names = [f"a.{FORMATS[format]}", f"b.{FORMATS[format].upper()}"]
    names += [] if format == "TGA" else ["c", "d.2024-05-01", "e.image"]  # TGA begins with nothing in particular
    write(tmp_path, {name: encoded(format) for name in names})
    images, _ = read(tmp_path)
    assert [image.source for image in images] == names
    assert all(decode_image(image.payload, None, None).shape == (16, 16, 3) for image in images)


def test_what_is_left_out_is_counted_by_reason_and_the_first_named(tmp_path: Path) -> None:
    heic = "HEIC image, which is not read; convert it to JPEG or PNG"
    write(
        tmp_path,
        {
            "a.jpg": encoded("JPEG"),
            "b.HEIC": HEIC,
            "c": HEIC,  # known by its bytes
            "d.cr2": encoded("TIFF"),  # a raw file is a TIFF of a small preview
            "e.txt": b"text",
            "f.TXT": encoded("PNG"),
            "g": b"text",
            "h.strange": b"",
            "._a.jpg": bytes(100),
            "__MACOSX/a.jpg": bytes(100),
            ".DS_Store": b"Bud1",
            "x/Thumbs.db": bytes(10),
            ".cache/i.jpg": encoded("JPEG"),
        },
    )
    found, left_out = scan(tmp_path)
    assert [item.file for item in found.items] == ["a.jpg"]
    assert left_out.reasons == {
        heic: (2, "b.HEIC"),
        "CR2 image, which is not read; convert it to JPEG or PNG": (1, "d.cr2"),
        "no image (*.txt)": (2, "e.txt"),
        "no image (no suffix)": (1, "g"),
        "no image (*.strange)": (1, "h.strange"),
        "made by macOS or Windows, no image": (4, ".DS_Store"),
        "hidden (the name begins with a dot)": (1, ".cache/i.jpg"),
    }
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"no images among its 12 file\(s\) \(.*2 HEIC image, which is not read"):
        scan(tmp_path)


def test_avif_is_known_by_any_of_its_brands() -> None:
    head = encoded("AVIF")[:HEAD_BYTES]
    assert no_image_bytes("a", head) is None
    assert no_image_bytes("a", head.replace(b"ftypavif", b"ftypmif1")) is None
    assert no_image_bytes("a", HEIC[:HEAD_BYTES]) is not None


@given(st.text("abcdefghij \n", max_size=80))
def test_no_text_is_taken_for_an_image(text: str) -> None:
    for start in ("", "BM", "P", "P5", "GIF8", "II*", "RIFF", "qoi"):
        assert no_image_bytes("a", (start + "x" + text).encode()[:HEAD_BYTES]) == "no image (no suffix)"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.text(max_size=3)), max_size=20))
def test_accounts_add_up(entries: list[tuple[str, int, str]]) -> None:
    whole, first, second = LeftOut(), LeftOut(), LeftOut()
    for index, (reason, count, name) in enumerate(entries):
        whole.add(reason, name, count)
        (first if index < len(entries) // 2 else second).add(reason, name, count)
    first.include(second)
    assert first.reasons == whole.reasons
    assert first.count == sum(count for _, count, _ in entries)
