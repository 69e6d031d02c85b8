"""Ingest ends with an account of everything found, and a finished data set knows the source it was made from."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from support.image_files import png, write, write_tar

from pipelines.cli.errors import DataError
from pipelines.data.dataset import PreparedDataset
from pipelines.data.ingest.account import account_rows, source_content
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import IngestSummary, ingest
from pipelines.data.ingest.request import IngestRequest, request_of
from pipelines.data.ingest.sources import open_source
from pipelines.data.opening import ensure_embedded
from pipelines.storage.location import Location


def run(at: Path, **options: Any) -> IngestSummary:
    return ingest(IngestConfig(str(at / "in"), str(at / "out"), max_rejected_fraction=0.5, **options))


def manifest(at: Path) -> dict[str, Any]:
    return dict(json.loads((at / "out/manifest.json").read_text()))


def test_an_account_of_a_folder(tmp_path: Path) -> None:
    files = {
        **{f"{label}/{index}.png": png(index) for label in ("cat", "dog") for index in range(3)},
        "loose.png": png(9),
        "cat/broken.png": png()[:60],
        "readme.txt": b"x",
        "dog/x.heic": b"\0\0\0\x18ftypheic",
        "dog/y.heic": b"\0\0\0\x18ftypheic",
    }
    write(tmp_path / "in", files)
    account = run(tmp_path).account
    assert (
        account
        == manifest(tmp_path)["account"]
        == {
            "found": len(files),
            "used": 7,
            "rejected": 1,
            "label_files": 0,
            "left_out": [
                {
                    "reason": "HEIC image, which is not read; convert it to JPEG or PNG",
                    "count": 2,
                    "first": "dog/x.heic",
                },
                {"reason": "no image (*.txt)", "count": 1, "first": "readme.txt"},
            ],
            "labels_from": "the first folder level",
            "unlabelled": 1,
        }
    )
    assert account is not None
    assert account_rows(account) == [
        ("found", "11 = 7 used + 1 rejected + 3 left out"),
        ("left out", "2 HEIC image, which is not read; convert it to JPEG or PNG (first: dog/x.heic)"),
        ("left out", "1 no image (*.txt) (it is readme.txt)"),
        ("labels from", "the first folder level (1 of the images have none)"),
    ]


def test_an_account_of_archives_counts_their_members(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    members = [
        ("0.png", png(0)),
        ("0.cls", b"1"),
        ("0.txt", b"x"),
        ("._1.png", b"x"),
        ("1.png", png(1)),
        ("2.png", b""),
    ]
    write_tar(tmp_path / "in/a.tar", members)
    write(tmp_path / "in", {"notes.md": b"x"})
    account = run(tmp_path).account
    assert account is not None
    parts = [account["used"], account["rejected"], account["label_files"]]
    assert parts == [2, 1, 1]
    assert account["found"] == sum(parts) + sum(entry["count"] for entry in account["left_out"]) == len(members) + 1


def test_a_long_list_of_reasons_is_cut_in_the_summary_and_whole_in_the_manifest(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.png": png(), **{f"x.kind{index}": b"x" for index in range(20)}})
    account = run(tmp_path).account
    assert account is not None
    assert len(account["left_out"]) == 20
    rows = account_rows(account)
    assert len(rows) < 12
    assert ("left out", "more, for 12 other reasons, all in manifest.json") in rows


def test_a_source_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", {f"{index}.png": png(index) for index in range(4)})
    first = run(tmp_path)
    assert (first.already_complete, first.not_compared) == (False, None)
    again = run(tmp_path)
    assert (again.already_complete, again.not_compared, again.account) == (True, None, first.account)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    write(tmp_path / "in", {"4.png": png(4)})
    changed = r"in: has changed since .*/out was made from it \(4 files then, 5 now\); ingest it into another output"
    with pytest.raises(DataError, match=changed):
        run(tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    (tmp_path / "in/4.png").unlink()
    assert run(tmp_path).already_complete
    write(tmp_path / "in", {"notes.txt": b"what is no image is no change"})
    assert run(tmp_path).already_complete
    write(tmp_path / "in", {"0.png": png(0, 16, 16)})
    with pytest.raises(DataError, match="has changed since"):
        run(tmp_path)


def test_labels_that_came_later_are_a_change(tmp_path: Path) -> None:
    pixels = struct.pack(">BBBB3I", 0, 0, 8, 3, 4, 8, 8) + bytes(256)
    write(tmp_path / "in", {"train-images-idx3-ubyte": pixels})
    run(tmp_path)
    assert run(tmp_path).already_complete
    write(tmp_path / "in", {"train-labels-idx1-ubyte": struct.pack(">BBBBI", 0, 0, 8, 1, 4) + bytes(4)})
    with pytest.raises(DataError, match="has changed since"):
        run(tmp_path)


def test_a_source_that_is_gone_cannot_be_compared(tmp_path: Path) -> None:
    write(tmp_path / "in", {"0.png": png(0)})
    run(tmp_path)
    shutil.rmtree(tmp_path / "in")
    again = run(tmp_path)
    assert again.already_complete
    assert "nothing is there" in str(again.not_compared)


def test_a_data_set_from_before_there_were_accounts(tmp_path: Path) -> None:
    """Its manifest has no `account` and no `source_files`; its request is the same, and so are its bytes."""
    write(tmp_path / "in", {f"{label}/{index}.png": png(index) for label in ("cat", "dog") for index in range(3)})
    run(tmp_path)
    stored = manifest(tmp_path)
    assert stored["request"].keys() == {"source", "format", "image_size", "channels", "shard_mib"}
    for key in ("account", "source_files"):
        del stored[key]
    (tmp_path / "out/manifest.json").write_text(json.dumps(stored))
    again = run(tmp_path)
    assert (again.already_complete, again.account, again.not_compared) == (True, None, None)
    assert PreparedDataset.open(str(tmp_path / "out")).label_names == ("cat", "dog")
    write(tmp_path / "in", {"cat/9.png": png(9)})
    with pytest.raises(DataError, match=r"has changed since .*, or this version of the software reads it differently"):
        run(tmp_path)


def test_fingerprints_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Digests made by the version before accounts: unfinished and finished outputs of it are continued and compared."""
    ensure_embedded("embedded://digits/test", tmp_path / "out")
    wanted = "0c06bd6d6195bd8bf3797d1b5ab20d03d624b30547336c584f13e1840d78a0e7"
    assert manifest(tmp_path)["source_content"] == wanted
    write(tmp_path / "folder", {"cat/0.png": b"x", "dog/1.jpg": b"xy", "loose.png": b"xyz"})
    members = [("c/0.cls", b"7"), ("c/0.png", b"x"), ("c/1.png", b"xy"), ("c/1.mask.png", b"xyz"), ("c/2.v2.png", b"x")]
    (tmp_path / "tar").mkdir()
    write_tar(tmp_path / "tar/a.tar", members)
    for name, digest in (
        ("folder", "bf67aefff64822c177392b6cc8cb77ec03ed4fc0836ea6f5adfc811a334d4caf"),
        ("tar", "927014e21ec55b333680fab995fa51d16f71fb8772c27b9ace518efb92f40e4d"),
    ):
        source = open_source(str(tmp_path / name))
        assert source_content(source, source.format.scan(list(source.files))) == digest


def test_choices_are_part_of_the_request_where_they_are_given() -> None:
    def stored(**fields: Any) -> dict[str, Any]:
        return request_of(IngestConfig("a", "b", **fields)).to_json()

    plain = stored()
    assert stored(split="train") == {**plain, "split": "train"}
    assert stored(image_column="x", label_column="none") == {
        **plain,
        "image_column": "x",
        "label_column": "none",
    }
    assert stored(background="#FFF", sixteen_bit="scale") == plain
    every = stored(background="black", sixteen_bit="refuse", image_size=8, channels=3)
    assert every == {**plain, "background": "#000000", "sixteen_bit": "refuse", "image_size": 8, "channels": 3}
    path = Location.parse("/out/manifest.json")
    assert [IngestRequest.from_json(request, path).to_json() for request in (plain, every)] == [plain, every]
    with pytest.raises(DataError, match=r"request\.sixteen_bit = 'keep': must be one of scale, refuse or null"):
        IngestRequest.from_json({**plain, "sixteen_bit": "keep"}, path)


def test_object_storage_is_recognised_and_compared_in_the_same_way(s3_prefix: str, tmp_path: Path) -> None:
    source = Location.parse(s3_prefix) / "in"
    for name, content in (("train/0.png", png(0)), ("train/1", png(1)), ("train/2.txt", b"x"), ("test/3.png", png(3))):
        (source / name).write_bytes(content)
    config = IngestConfig(source.uri, s3_prefix + "/out", split="train")
    account = ingest(config).account
    assert account is not None
    assert (account["found"], account["used"]) == (4, 2)
    assert {entry["first"] for entry in account["left_out"]} == {"train/2.txt", "test/3.png"}
    (source / "test/4.png").write_bytes(png(4))
    assert ingest(config).already_complete, "of another split"
    (source / "train/4.png").write_bytes(png(4))
    with pytest.raises(DataError, match=r"has changed since .*/out was made from it \(2 files then, 3 now\)"):
        ingest(config)
