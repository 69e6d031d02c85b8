"""Tar archives: every image in them is used, refused or counted, whatever wrote them; labels lie beside."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.image_files import png, write_tar
from support.source_reading import labels_of, read, scan

from pipelines.cli.errors import DataError
from pipelines.data.ingest.formats_tar import LABEL_NAMES


def archive(members: list[tuple[str, bytes]], header: dict[str, str] | None = None) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT, pax_headers=header) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return sink.getvalue()


def test_web_dataset_tars_with_their_labels(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "shard-1.tar",
        [
            ("c/003.cls", b"7"),
            ("c/003.png", png(3)),
            ("c/004.png", png(4)),
            ("c/004.mask.png", png(9)),
            ("c/004.json", b'{"label": 5, "text": "x"}'),
            ("c/005.txt", b"no image"),
            ("c/006.v2.png", png(6)),
        ],
    )
    write_tar(tmp_path / "shard-0.tar", [("a.png", png(0)), ("a.json", b"{}"), ("b.png", png(1)), ("b.cls", b" 2\n")])
    images, names = read(tmp_path)
    assert [image.payload for image in images] == [png(0), png(1), png(3), png(4), png(6)]
    assert labels_of(images) == [None, 2, 7, 5, None]
    assert [image.source for image in images][1:3] == ["shard-0.tar/b.png", "shard-1.tar/c/003.png"]
    assert names is None
    found, left_out = scan(tmp_path)
    assert (found.labels_from, found.label_files) == (".cls and .json files beside the images", 3)
    assert left_out.reasons == {
        "label file that gives no label": (1, "shard-0.tar/a.json"),
        "further image of its key, the name up to the first dot (image_column chooses)": (
            1,
            "shard-1.tar/c/004.mask.png",
        ),
        "no image (*.txt)": (1, "shard-1.tar/c/005.txt"),
    }
    assert [image.payload for image in read(tmp_path, image_column="mask.png")[0]] == [png(9)]
    assert labels_of(read(tmp_path, label_column="none")[0]) == [None] * 5
    assert labels_of(read(tmp_path, label_column="text", image_column="mask.png")[0]) == [0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(0, 40), st.integers(0, 511))
def test_archives_appended_to_each_other_are_read_whole(
    tmp_path: Path, counts: list[int], more_zeros: int, odd_end: int
) -> None:
    """As `tar -i` reads what `cat a.tar b.tar` makes, whatever their records are filled up to."""
    members = [[(f"{part}-{index}.png", png(index)) for index in range(count)] for part, count in enumerate(counts)]
    joined = b"".join(archive(part) + bytes(512 * more_zeros) for part in members) + bytes(odd_end)
    (tmp_path / "a.tar").write_bytes(joined)
    images, _ = read(tmp_path)
    wanted = [member for part in members for member in part]
    assert [image.source for image in images] == [f"a.tar/{name}" for name, _ in wanted]
    assert [image.payload for image in images] == [content for _, content in wanted]


def test_what_follows_an_archive_and_is_none_is_refused(tmp_path: Path) -> None:
    whole = archive([("a.png", png(0))])
    for rest, match in (
        (b"x" * 2000, "no end mark, or a damaged header, at byte 10,240"),
        (archive([("b.png", png(1))])[:600], "unexpected end|no end mark"),
        (whole, "holds 'a.png' twice"),
    ):
        (tmp_path / "a.tar").write_bytes(whole + rest)
        with pytest.raises(DataError, match=match):
            read(tmp_path)


def test_names_with_dots(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("photo.jpg", png(0)), ("photo.1.jpg", png(1)), ("v1.5.png", png(2))])
    images, _ = read(tmp_path)
    assert [image.source for image in images] == ["a.tar/photo.jpg", "a.tar/v1.5.png"]
    assert list(scan(tmp_path)[1].reasons.values()) == [(1, "a.tar/photo.1.jpg")]
    assert len(read(tmp_path, image_column="all")[0]) == 3
    write_tar(tmp_path / "a.tar", [("v1.5.png", png(2)), ("v1.6.png", png(3)), ("v2", png(4)), ("v3.dat", b"x")])
    assert len(read(tmp_path)[0]) == 3
    assert scan(tmp_path)[1].reasons == {"no image (*.dat)": (1, "a.tar/v3.dat")}


@pytest.mark.parametrize("apart", [False, True])
def test_several_images_of_one_key_are_refused_and_chosen_by_suffix(tmp_path: Path, apart: bool) -> None:
    members = [
        (f"{index}.{suffix}", png(index + 5 * (suffix == "png"))) for index in range(3) for suffix in ("jpg", "png")
    ]
    if apart:
        members.sort(key=lambda member: member[0][-3:])
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(
        DataError, match=r"'0.jpg' and '0.png' are images of one key; choose with image_column = jpg, png"
    ):
        read(tmp_path)
    for choice, wanted in (("jpg", range(3)), (".PNG", range(5, 8))):
        assert [image.payload for image in read(tmp_path, image_column=choice)[0]] == [png(index) for index in wanted]
    assert scan(tmp_path, image_column="png")[1].reasons == {
        "image of another suffix, as image_column = png": (3, "a.tar/0.jpg")
    }
    assert len(read(tmp_path, image_column="all")[0]) == 6


def test_what_macos_adds_and_images_of_any_name(tmp_path: Path) -> None:
    sink = io.BytesIO()
    Image.new("L", (8, 8)).save(sink, "AVIF")
    members = [
        ("./._000.jpg", bytes(100)),
        ("./000.jpg", png(0)),
        ("./._000.cls", bytes(30)),
        ("./000.cls", b"1"),
        ("__MACOSX/000.jpg", bytes(10)),
        ("001", png(1)),
        ("002.AVIF", sink.getvalue()),
        ("003.heic", b"\0\0\0\x18ftypheic"),
        ("004.cls", b"4"),
    ]
    write_tar(tmp_path / "a.tar", members)
    images, _ = read(tmp_path)
    assert [image.source for image in images] == ["a.tar/./000.jpg", "a.tar/001", "a.tar/002.AVIF"]
    assert labels_of(images) == [1, None, None]
    found, left_out = scan(tmp_path)
    assert left_out.reasons == {
        "made by macOS or Windows, no image": (3, "a.tar/./._000.jpg"),
        "HEIC image, which is not read; convert it to JPEG or PNG": (1, "a.tar/003.heic"),
        "label file without an image beside it": (1, "a.tar/004.cls"),
    }
    assert len(members) == len(found.items) + found.label_files + left_out.count


@pytest.mark.parametrize(
    ("name", "content", "label"),
    [
        ("0.cls", b"3\n", 3),
        ("0.cls", b"\xef\xbb\xbf 3", 3),
        ("0.CLS", b"7", 7),
        ("0.cls", b"-1", -1),
        ("0.cls", b"3.0", 3),
        ("0.cls", b"", None),
        ("0.json", b'\xef\xbb\xbf{"label": 2}', 2),
        ("0.JSON", b'{"label": "2"}', 2),
        ("0.json", b'{"label": true}', 1),
        ("0.json", b'{"label": [1, 2]}', None),
        ("0.json", b'{"caption": "x"}', None),
        ("0.json", b'[{"bbox": [1, 2]}]', None),
        ("0.json", b'"word"', None),
        ("0.json", b"null", None),
    ],
)
def test_labels_and_sidecars_that_are_none(tmp_path: Path, name: str, content: bytes, label: int | None) -> None:
    write_tar(tmp_path / "a.tar", [("0.JPG", png(0)), (name, content), ("1.jpg", png(1))])
    images, names = read(tmp_path)
    assert (labels_of(images), names) == ([label, None], None)
    found, left_out = scan(tmp_path)
    assert (found.label_files, left_out.count) == ((0, 1) if label is None else (1, 0))


def test_words_become_class_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.jpg", png(0)), ("0.json", b'{"label": "dog"}'), ("1.jpg", png(1))])
    write_tar(tmp_path / "b.tar", [("0.jpg", png(2)), ("0.cls", " café\n".encode())])
    images, names = read(tmp_path)
    assert (labels_of(images), names) == ([1, None, 0], ("café", "dog"))
    write_tar(tmp_path / "c.tar", [("2.jpg", png(0)), ("2.cls", b"5")])
    with pytest.raises(DataError, match=r"words \(0.jpg: 'dog'\) and numbers \(2.jpg: 5\); .* label_column = none"):
        read(tmp_path)
    assert labels_of(read(tmp_path, label_column="none")[0]) == [None] * 4


@pytest.mark.parametrize("content", [b"3.5", b"nan", b"9" * 30, b"a" * 201, b"caf\xe9", b"a\x1b[2J"])
def test_labels_that_are_no_class_are_refused_and_can_be_left_out(tmp_path: Path, content: bytes) -> None:
    write_tar(tmp_path / "a.tar", [("0.jpg", png(0)), ("0.cls", content)])
    with pytest.raises(DataError, match=r"a\.tar/0\.cls\b"):
        read(tmp_path)
    assert len(read(tmp_path, label_column="none")[0]) == 1


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(archive([("a.png", png(0))])))
    with pytest.raises(DataError, match=r"a.tar: not a readable uncompressed tar"):
        read(tmp_path)


LABELLED = [("a.png", png(0)), ("a.cls", b"2"), ("b.png", png(1)), ("b.cls", b"-1")]


def test_numbers_have_the_names_of_the_archives_header(tmp_path: Path) -> None:
    names = ("cat", "große Ente", "T-shirt/top")
    (tmp_path / "0.tar").write_bytes(archive(LABELLED, {LABEL_NAMES: json.dumps(names)}))
    (tmp_path / "1.tar").write_bytes(archive([("c.png", png(3)), ("c.cls", b"0")]))
    images, found = read(tmp_path)
    assert (labels_of(images), found) == ([2, -1, 0], names)
    assert read(tmp_path, label_column="none")[1] is None
    (tmp_path / "2.tar").write_bytes(archive([("d.png", png(4))], {LABEL_NAMES: '["cat", "dog"]'}))
    with pytest.raises(DataError, match=r"2\.tar: names other classes than 0\.tar; ingest it alone"):
        read(tmp_path)


@pytest.mark.parametrize(
    "value", ["", "no JSON", "[" * 10_000, '{"0": "cat"}', "[1, 2, 3]", '["\\u001b[2J", "b"]', "[]"]
)
def test_a_header_that_lists_no_names_is_none(tmp_path: Path, value: str) -> None:
    (tmp_path / "0.tar").write_bytes(archive(LABELLED, {LABEL_NAMES: value}))
    images, names = read(tmp_path)
    assert (labels_of(images), names) == ([2, -1], None)
