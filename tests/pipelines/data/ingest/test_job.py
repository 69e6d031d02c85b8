"""Ingest: real files of every kind in, the same bytes out after kills and on any workers; clear refusals."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from pipelines.cli.config import digest
from pipelines.cli.errors import ConfigError, DataError, RequestMismatchError, StorageError
from pipelines.cluster.config import ClusterConfig
from pipelines.data.dataset import PreparedDataset
from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest
from pipelines.data.ingest.request import request_of
from pipelines.data.opening import ensure_embedded
from pipelines.storage.location import Location
from pipelines.verify.config import VerifyConfig
from pipelines.verify.job import verify

ROOT = Path(__file__).parents[4]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
RNG = np.random.default_rng(0)


def png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def write_folder(root: Path | Location, count: int, shape: tuple[int, ...] = (8, 8, 3)) -> np.ndarray:
    """`count` images in the folders class-0 and class-1; returns them in the order of their paths."""
    images = np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)
    location = Location.parse(root)
    for index, image in enumerate(images):
        (location / f"class-{2 * index // count}" / f"{index:05d}.png").write_bytes(png(image))
    return images


def files(root: str | Path) -> dict[str, bytes]:
    found = {path: path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}
    return {str(path.relative_to(root)): content for path, content in found.items()}


def rejected(root: str | Path) -> dict[str, str]:
    table = pq.read_table(Path(root) / "rejected.parquet")
    return dict(zip(table["source"].to_pylist(), table["reason"].to_pylist(), strict=True))


def run_job(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "jobs" / "ingest.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_a_folder_becomes_a_data_set(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "in", 40)
    calls: list[tuple[str, int, int, float]] = []
    result = ingest(IngestConfig(str(tmp_path / "in"), str(tmp_path / "out")), lambda *call: calls.append(call))
    data = result.dataset
    assert not result.already_complete
    assert (data.num_rows, data.image_shape, data.rejected) == (40, (8, 8, 3), 0)
    assert data.label_names == ("class-0", "class-1")
    ids, stored, labels = data.read_images(0, 40)
    assert np.array_equal(ids, np.arange(40))
    assert np.array_equal(stored, images)
    assert np.array_equal(labels, np.repeat([0, 1], 20))
    table = pq.read_table(tmp_path / "out/data")
    assert table["source"].to_pylist()[39] == "class-1/00039.png"
    assert set(files(tmp_path / "out")) == {"manifest.json", "rejected.parquet", "data/part-00000.parquet"}
    assert rejected(tmp_path / "out") == {}
    assert calls[0] == ("decode", 0, 40, 0.0)
    assert calls[-1][:3] == ("write", 40, 40)


def test_images_are_cropped_and_resized(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "in", 6, (20, 30, 3))
    data = ingest(IngestConfig(str(tmp_path / "in"), str(tmp_path / "out"), image_size=10)).dataset
    expected = Image.fromarray(images[4][:, 5:25]).resize((10, 10), Image.Resampling.LANCZOS)
    assert data.image_shape == (10, 10, 3)
    assert np.array_equal(data.read_images(4, 5)[1][0], np.asarray(expected))


@pytest.mark.parametrize(("channels", "expected"), [(None, 3), (3, 3), (1, 1)])
def test_one_colour_image_makes_the_set_rgb_unless_told(tmp_path: Path, channels: int | None, expected: int) -> None:
    greys = write_folder(tmp_path / "in", 30, (8, 8))
    colour = RNG.integers(0, 256, (8, 8, 3), np.uint8)
    (tmp_path / "in/class-9").mkdir()
    (tmp_path / "in/class-9/x.png").write_bytes(png(colour))
    config = IngestConfig(str(tmp_path / "in"), str(tmp_path / "out"), channels=channels)
    data = ingest(config).dataset
    _, stored, _ = data.read_images(0, 31)
    assert data.image_shape == (8, 8, expected)
    assert np.array_equal(stored[:30], np.repeat(greys[..., None], expected, axis=-1))
    if expected == 3:
        assert np.array_equal(stored[30], colour)


def test_an_all_grey_source_stays_grey(tmp_path: Path) -> None:
    greys = write_folder(tmp_path / "in", 5, (8, 8))
    data = ingest(IngestConfig(str(tmp_path / "in"), str(tmp_path / "out"))).dataset
    assert np.array_equal(data.read_images(0, 5)[1][..., 0], greys)


def break_images(root: Path) -> dict[str, str]:
    """Add one broken image of every kind; returns what its reason must contain."""
    (root / "class-0").mkdir(exist_ok=True)
    good = png(RNG.integers(0, 256, (64, 64, 3), np.uint8))
    huge = Image.new("1", (30_000, 30_000))
    huge.save(root / "class-0/bomb.png")
    (root / "class-0/0-empty.png").write_bytes(b"")
    (root / "class-0/page.jpg").write_bytes(b"<html>404</html>")
    (root / "class-0/truncated.png").write_bytes(good[: len(good) // 2])
    (root / "class-0/other-size.png").write_bytes(good)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(root / "class-0/fraction.tiff")
    return {
        "class-0/bomb.png": "decompression bomb",
        "class-0/0-empty.png": "empty (zero bytes)",
        "class-0/page.jpg": "not an image",
        "class-0/truncated.png": "truncated",
        "class-0/other-size.png": "size 64x64 is not 8x8",
        "class-0/fraction.tiff": "unsupported mode F",
    }


def test_broken_images_are_listed_with_reasons_and_ids_stay_dense(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "in", 60)
    expected = break_images(tmp_path / "in")
    config = IngestConfig(str(tmp_path / "in"), str(tmp_path / "out"), max_rejected_fraction=0.1)
    # The first file in order is broken: the size is that of the first readable one.
    data = ingest(config).dataset
    found = rejected(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(reason in found[name] for name, reason in expected.items())
    assert (data.num_rows, data.rejected) == (60, 6)
    assert np.array_equal(data.read_images(0, 60)[1], images)


def test_too_many_broken_images_fail_the_job_and_leave_no_data_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", 60)
    break_images(tmp_path / "in")
    config = IngestConfig(str(tmp_path / "in"), str(tmp_path / "out"), max_rejected_fraction=0.05)
    with pytest.raises(DataError, match=r"6 of 66 images \(9\.1%\) cannot be used, .* = 0\.05 .*class-0/0-empty"):
        ingest(config)
    assert len(rejected(tmp_path / "out")) == 6
    with pytest.raises(DataError, match="not a prepared data set"):
        PreparedDataset.open(str(tmp_path / "out"))
    # A higher limit is no other request: the decoded images are used.
    assert ingest(IngestConfig(config.source, config.output, max_rejected_fraction=0.1)).dataset.num_rows == 60


def test_a_source_without_any_readable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of its first images can be read \(last: a.png: empty"):
        ingest(IngestConfig(str(tmp_path / "in"), str(tmp_path / "out1")))
    with pytest.raises(DataError, match=r"1 of 1 images \(100.0%\) cannot be used"):
        ingest(IngestConfig(str(tmp_path / "in"), str(tmp_path / "out2"), image_size=8, max_rejected_fraction=1))


def write_photos(root: Path, sizes: list[tuple[int, int]]) -> None:
    for index, (height, width) in enumerate(sizes):
        (root / f"{index:05d}.png").write_bytes(png(np.full((height, width), index % 256, np.uint8)))


def test_mixed_sizes_are_the_reason_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_photos(tmp_path / "in", [(6, 9), (8, 7), (8, 7), (9, 6), (8, 7), (9, 6), (5, 5)])
    (tmp_path / "in" / "a.png").write_bytes(b"broken")
    config = IngestConfig(str(tmp_path / "in"), str(tmp_path / "out"))
    with pytest.raises(DataError) as raised:
        ingest(config)
    assert str(raised.value) == (
        f"source = {config.source}: holds images of 4 sizes: 8x7 (3), 9x6 (2), 6x9 (1) and 1 more (H x W); "
        "give --image_size N (such as 64) to crop and resize all of them to N x N"
    )
    # Nothing was begun, so the advice can be followed.
    done = ingest(IngestConfig(config.source, config.output, image_size=4, max_rejected_fraction=0.2))
    assert (done.dataset.num_rows, done.dataset.rejected) == (7, 1)


def test_sizes_that_differ_later_are_the_reason_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_photos(tmp_path / "in", [(6, 9)] * 101 + [(8, 7)] * 3)
    (tmp_path / "in" / "z.png").write_bytes(b"broken")
    with pytest.raises(
        DataError, match=r"holds images of 2 sizes: 6x9 \(101\), 8x7 \(3\) \(H x W\); give --image_size"
    ):
        ingest(IngestConfig(str(tmp_path / "in"), str(tmp_path / "out")))


def write_adapted(root: Path) -> None:
    root.mkdir()
    black = np.zeros((4, 4), np.uint8)
    clear, grey = np.dstack([black] * 4), black.astype(np.uint16)
    for name, pixels in (("a", clear), ("b", grey + 40_000), ("c", black + 7)):
        (root / f"{name}.png").write_bytes(png(pixels))


def test_what_was_done_to_pixels_follows_the_options_and_is_told(tmp_path: Path) -> None:
    write_adapted(tmp_path / "in")
    done = run_job("--source", tmp_path / "in", "--output", tmp_path / "out")
    assert "1 composited over the background" in done.stdout
    assert "1 of 16 bits scaled to 8" in done.stdout
    data = PreparedDataset.open(str(tmp_path / "out"))
    assert [image[0, 0].tolist() for image in data.read_images(0, 3)[1]] == [[255] * 3, [156] * 3, [7] * 3]
    options = {"background": "#102030", "sixteen_bit": "refuse", "max_rejected_fraction": 0.5}
    result = ingest(IngestConfig(str(tmp_path / "in"), str(tmp_path / "other"), **options))
    assert [image[0, 0].tolist() for image in result.dataset.read_images(0, 2)[1]] == [[16, 32, 48], [7] * 3]
    assert result.adapted == {"transparent": 1}
    assert "sixteen_bit = refuse" in rejected(tmp_path / "other")["b.png"]


def test_data_sets_from_before_these_options_are_found_and_their_unfinished_work_is_not_mixed(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", 4)
    config = IngestConfig(str(tmp_path / "in"), str(tmp_path / "out"), background="#FFF")
    assert request_of(config).to_json().keys() == {"source", "format", "image_size", "channels", "shard_mib"}
    ingest(config)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest.pop("adapted") == {}
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    again = ingest(config)
    assert (again.already_complete, again.adapted) == (True, None)
    with pytest.raises(RequestMismatchError, match=r"background: None -> '#000000'; sixteen_bit: None -> 'refuse'"):
        ingest(IngestConfig(config.source, config.output, background="black", sixteen_bit="refuse"))

    unfinished = IngestConfig(config.source, str(tmp_path / "unfinished"))
    begun = tmp_path / "unfinished/_work/request.json"
    pinned = {"source_content": manifest["source_content"]}  # what a run of an older version has written
    begun.parent.mkdir(parents=True)
    begun.write_text(json.dumps({**request_of(unfinished).to_json(), **pinned}))
    with pytest.raises(RequestMismatchError, match=r"unfinished output of another request \(decoding: None -> 2\)"):
        ingest(unfinished)


def test_running_again_is_a_no_op_even_without_the_source(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", 10)
    config = IngestConfig(str(tmp_path / "in"), str(tmp_path / "out"))
    first = ingest(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    (tmp_path / "in").rename(tmp_path / "moved")
    again = ingest(config)
    assert again.already_complete
    assert again.dataset == first.dataset
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_every_spelling_of_source_and_output_is_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "photos [1]", 4)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("PHOTOS", str(tmp_path / "photos [1]"))
    first = ingest(IngestConfig(str(tmp_path / "photos [1]"), str(tmp_path / "out")))
    monkeypatch.chdir(tmp_path / "elsewhere")
    for source in ("../photos [1]", "../elsewhere/../photos [1]/", "$PHOTOS", (tmp_path / "photos [1]").as_uri()):
        again = ingest(IngestConfig(source, "../out"))
        assert again.already_complete
        assert again.dataset == first.dataset
    assert list((tmp_path / "elsewhere").iterdir()) == []
    # What older versions recorded of a relative source.
    stored = json.loads((tmp_path / "out/manifest.json").read_text())
    stored["request"]["source"] = f"{tmp_path}/elsewhere/../photos [1]"
    stored["request_sha256"] = digest(stored["request"])
    (tmp_path / "out/manifest.json").write_text(json.dumps(stored))
    assert ingest(IngestConfig("../photos [1]", "../out")).already_complete
    with pytest.raises(RequestMismatchError, match="source: "):
        ingest(IngestConfig("../photos", "../out"))


def test_another_request_or_a_changed_source_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", 10)
    config = IngestConfig(str(tmp_path / "in"), str(tmp_path / "out"))
    ingest(config)
    with pytest.raises(RequestMismatchError, match=r"finished .*channels: None -> 1; image_size: None -> 16"):
        ingest(IngestConfig(config.source, config.output, image_size=16, channels=1))

    (tmp_path / "in/class-0/00000.png").write_bytes(b"")
    strict = IngestConfig(config.source, str(tmp_path / "unfinished"), image_size=8)
    with pytest.raises(DataError, match="1 of 10 images"):
        ingest(strict)
    write_folder(tmp_path / "in", 10)
    with pytest.raises(RequestMismatchError, match=r"unfinished .*source_content"):
        ingest(strict)
    with pytest.raises(RequestMismatchError, match=r"unfinished .*image_size: 8 -> 4"):
        ingest(IngestConfig(config.source, strict.output, image_size=4))


def test_an_output_used_again_in_one_process_is_not_mixed_up(tmp_path: Path) -> None:
    for count in (10, 12):
        images = write_folder(tmp_path / f"in-{count}", count)
        data = ingest(IngestConfig(str(tmp_path / f"in-{count}"), str(tmp_path / "out"))).dataset
        assert np.array_equal(data.read_images(0, count)[1], images)
        shutil.rmtree(data.location.path)


def test_racing_runs_make_one_data_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", 50)
    config, ids, barrier = IngestConfig(str(tmp_path / "in"), str(tmp_path / "out")), [], threading.Barrier(3)

    def race() -> None:
        barrier.wait()
        ids.append(ingest(config).dataset.dataset_id)

    threads = [threading.Thread(target=race) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 3
    assert len(set(ids)) == 1


@pytest.mark.ray
def test_small_shards_on_actors_hold_the_same_rows(ray_cluster: None, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "in", 300, (128, 128, 3))  # 341 such rows (16 MiB) make a unit
    more = RNG.integers(0, 256, (100, 128, 128, 3), np.uint8)
    for index, image in enumerate(more):
        (tmp_path / f"in/class-1/{1000 + index}.png").write_bytes(png(image))
    (tmp_path / "in/class-0/00007.png").write_bytes(b"")
    expected = np.delete(np.concatenate([images, more]), 7, axis=0)
    one = ingest(
        IngestConfig(str(tmp_path / "in"), str(tmp_path / "one"), cluster=ClusterConfig(num_workers=1), shard_mib=4)
    ).dataset
    many = ingest(
        IngestConfig(
            str(tmp_path / "in"), str(tmp_path / "many"), cluster=ClusterConfig(num_workers=(1, 3)), shard_mib=4
        )
    ).dataset
    assert [shard.rows for shard in one.shards[:-1]] == [80] * 4
    assert np.array_equal(one.read_images(0, 399)[1], expected)
    assert files(tmp_path / "one") == files(tmp_path / "many")
    assert many.dataset_id == one.dataset_id


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_job_continues_and_ends_in_the_same_bytes(ray_cluster: None, tmp_path: Path) -> None:
    write_folder(tmp_path / "in", 1500, (96, 96, 3))
    source, whole, output = (str(tmp_path / name) for name in ("in", "whole", "out"))
    ingest(IngestConfig(source, whole, cluster=ClusterConfig(num_workers=3), shard_mib=1))
    command = [sys.executable, "jobs/ingest.py", "--source", source, "--output", output, "--shard_mib", "1"]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    for stage in ("_work/decoded", "data"):
        shards = Location.parse(output) / stage
        job = [*command, "--cluster.num_workers", "2"]
        killed = subprocess.Popen(job, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        while not shards.list():
            assert killed.poll() is None, f"the job ended before its first {stage} shard was seen"
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        (shards / "part-of-my-thesis.txt").write_bytes(b"mine")
        assert not (Path(output) / "manifest.json").exists()
        with pytest.raises(DataError, match="not a prepared data set"):
            PreparedDataset.open(output)
    calls: list[tuple[str, int, int, float]] = []
    ingest(
        IngestConfig(source, output, cluster=ClusterConfig(num_workers=1), shard_mib=1),
        lambda *call: calls.append(call),
    )
    assert calls[0] == ("decode", 1500, 1500, 0.0), "nothing is decoded twice"
    assert next(done for stage, done, *_ in calls if stage == "write") > 0
    mine = {f"{stage}/part-of-my-thesis.txt": b"mine" for stage in ("_work/decoded", "data")}
    assert files(output) == files(whole) | mine


def test_object_storage_round_trip(s3_prefix: str, tmp_path: Path) -> None:
    images = write_folder(Location.parse(s3_prefix) / "in", 20)
    write_folder(tmp_path / "in", 20)
    config = IngestConfig(s3_prefix + "/in", s3_prefix + "/out")
    data = ingest(config).dataset
    assert np.array_equal(data.read_images(0, 20)[1], images)
    assert data.dataset_id == ingest(IngestConfig(str(tmp_path / "in"), str(tmp_path / "out"))).dataset.dataset_id
    names = sorted(path.split("/out/")[1] for path in data.location.find())
    assert names == ["data/part-00000.parquet", "manifest.json", "rejected.parquet"]
    assert ingest(config).already_complete
    with pytest.raises(StorageError, match="the bucket does not exist"):
        ingest(IngestConfig(s3_prefix + "/in", "s3://missing-bucket/out"))


def test_embedded_digits_need_no_ray_and_are_kept(tmp_path: Path) -> None:
    script = (
        "import sys; from pipelines.data.opening import ensure_embedded\n"
        "for split in ('train', 'test'): print(ensure_embedded(f'embedded://digits/{split}', sys.argv[1] + split))\n"
        "assert 'ray' not in sys.modules and 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path) + "/"], check=True, capture_output=True)
    train = ensure_embedded("embedded://digits/train", str(tmp_path / "train"))
    test = ensure_embedded("embedded://digits/test", str(tmp_path / "test"))
    assert (train.num_rows, test.num_rows, train.image_shape) == (1498, 299, (8, 8, 1))
    _, images, labels = train.read_images(0, 1498)
    assert (images.min(), images.max()) == (0, 255)
    assert set(labels.tolist()) == set(range(10))


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_fashion_mnist_is_read_whole(tmp_path: Path) -> None:
    import gzip

    source = FASHION_MNIST / "t10k-images-idx3-ubyte.gz"
    data = ingest(IngestConfig(str(source), str(tmp_path / "out"))).dataset
    raw = np.frombuffer(gzip.decompress(source.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28, 1)
    labels = gzip.decompress((FASHION_MNIST / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    _, images, stored_labels = data.read_images(0, 10_000)
    assert np.array_equal(images, raw)
    assert stored_labels.tolist() == list(labels)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("source", "", "source = '': must be"),
        ("output", "", "output = '': must be"),
        ("image_size", 0, "image_size = 0: must be in 1..4096"),
        ("background", "#12345", "background = '#12345': must be a colour's name, or '#rrggbb'"),
        ("background", "#12345678", "background = '#12345678': must be"),
        ("background", "", "background = '': must be"),
        ("max_rejected_fraction", 1.5, "max_rejected_fraction = 1.5: must be in"),
        ("shard_mib", 0, "shard_mib = 0: must be in"),
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: object, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        IngestConfig(**{"source": "a", "output": "b", field: value})


def test_the_job_ends_with_a_summary_and_its_refusals_are_one_line(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", 12)
    arguments = ["--source", tmp_path / "in", "--output", tmp_path / "out"]
    done = run_job(*arguments)
    assert done.returncode == 0, done.stderr
    assert "12 of 8x8x3" in done.stdout
    again = run_job(*arguments)
    assert (again.returncode, "already complete" in again.stderr) == (0, True)
    for extra, code, match in (
        (["--image_size", "16"], 2, "image_size: None -> 16"),
        (["--image_size", "0"], 2, "image_size"),
        (["--colour", "1"], 2, "colour"),
        (["--source", tmp_path / "missing", "--output", tmp_path / "other"], 1, "nothing is there"),
        (["--format", "zip"], 2, "format"),
    ):
        refused = run_job(*arguments, *extra)
        assert refused.returncode == code, refused.stderr
        assert match in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert not (tmp_path / "other").exists()


def test_the_manifest_says_how_the_data_set_was_made(tmp_path: Path) -> None:
    ensure_embedded("embedded://digits/test", str(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["request"]["source"] == "embedded://digits/test"
    assert manifest["decoded_by"].keys() == {"pillow", "pyarrow"}
    assert len(manifest["source_content"]) == 64


def parquet_images(count: int) -> bytes:
    rows = [
        {"image": {"bytes": png(np.full((8, 8), 10 * i, np.uint8)), "path": None}, "label": i} for i in range(count)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


# As pyarrow.dataset and Spark call them: an output's own shards are called much the same.
SPARK = ("part-0.parquet", "part-00000-3f2a.c000.snappy.parquet", "part-00000.parquet")


@pytest.mark.parametrize(
    ("source", "output", "how"),
    [
        ("set/data", "set", "holds"),
        ("set/data", "set/data", "is"),
        ("set/data", "set/data/new", "lies in"),
        ("set/data/", "set/data/../../link", "holds"),
        ("link/data", "set", "holds"),
        ("set/data", "link/data/new", "lies in"),
        ("set/data/part-0.parquet", "set", "holds"),
        ("set/*/*.parquet", "set/data", "lies in"),
        ("set/**", "set/new", "lies in"),
    ],
)
def test_an_output_that_overlaps_its_source_is_refused(tmp_path: Path, source: str, output: str, how: str) -> None:
    for name in SPARK:
        (Location.parse(tmp_path) / "set" / "data" / name).write_bytes(parquet_images(3))
    (tmp_path / "link").symlink_to("set")
    before = files(tmp_path)
    with pytest.raises(ConfigError, match=rf"^output = .*: {how} the source .*; choose a place beside it$"):
        ingest(IngestConfig(str(tmp_path / source), f"{tmp_path}/{output}"))
    assert files(tmp_path) == before


def test_an_output_may_lie_beside_the_files_of_a_glob(tmp_path: Path) -> None:
    (Location.parse(tmp_path) / "part-0.parquet").write_bytes(parquet_images(3))
    assert ingest(IngestConfig(f"{tmp_path}/*.parquet", f"{tmp_path}/out")).dataset.num_rows == 3
    with pytest.raises(ConfigError, match=r"output = .*: must be empty, .* holds 'part-0\.parquet', which is of none"):
        ingest(IngestConfig(f"{tmp_path}/*.parquet", str(tmp_path)))


@pytest.mark.parametrize(
    "spelling", ["{}/set", "{}//set/", "{}/set/new/..", "s3a{}/set", "{}/set/data", "{}/set/data/x"]
)
def test_an_output_that_overlaps_its_source_in_a_store_is_refused(s3_prefix: str, spelling: str) -> None:
    source = Location.parse(s3_prefix) / "set" / "data"
    for name in SPARK:
        (source / name).write_bytes(parquet_images(3))
    before = {path: Location(f"s3://{path}").read_bytes() for path in Location.parse(s3_prefix).find()}
    output = spelling.format(s3_prefix.removeprefix("s3") if spelling.startswith("s3a") else s3_prefix)
    with pytest.raises(ConfigError, match=r"^output = .*: (holds|is|lies in) the source .*; choose a place beside it$"):
        ingest(IngestConfig(source.uri, output))
    assert {path: Location(f"s3://{path}").read_bytes() for path in Location.parse(s3_prefix).find()} == before


def test_an_output_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", 10)
    (Location.parse(tmp_path) / "out" / "data" / "part-of-my-thesis.txt").write_bytes(b"thesis")
    result = run_job("--source", tmp_path / "in", "--output", tmp_path / "out")
    assert (result.returncode, result.stdout) == (2, "")
    assert "must be empty, or hold an unfinished run of the same request; it holds 'data/part-of-my" in result.stderr
    assert files(tmp_path / "out") == {"data/part-of-my-thesis.txt": b"thesis"}


def write_parquet(path: Path, images: list[bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = [{"image": {"bytes": image, "path": None}} for image in images]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none")


def a_data_set_of_two_shards(tmp_path: Path) -> tuple[IngestConfig, list[bytes], dict[str, bytes]]:
    images = [png(image) for image in RNG.integers(0, 256, (120, 8, 8), np.uint8)]
    images[5] = b"no image"
    write_parquet(tmp_path / "in/images.parquet", images)
    config = IngestConfig(str(tmp_path / "in"), str(tmp_path / "out"), shard_mib=1, channels=3, image_size=64)
    assert len(ingest(config).dataset.shards) == 2
    return config, images, files(tmp_path / "out")


def test_lost_shards_are_made_again_by_the_same_command_as_verify_says(tmp_path: Path) -> None:
    config, _, whole = a_data_set_of_two_shards(tmp_path)
    (tmp_path / "out/data/part-00001.parquet").unlink()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"part-00001\.parquet: is missing, .*run the jobs/ingest\.py command again"):
        PreparedDataset.open(config.output)
    result = ingest(config)
    assert (result.already_complete, result.restored) == (True, 1)
    assert files(tmp_path / "out") == {**whole, "notes.txt": b"mine"}
    assert verify(VerifyConfig(config.output)).problems == []
    damaged = tmp_path / "out/data/part-00000.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"part-00000.*its sha256.* delete what is left of it and run the command"):
        verify(VerifyConfig(config.output)).require_no_problems()
    damaged.unlink()
    options = ["--source", config.source, "--output", config.output, "--shard_mib", "1", "--channels", "3"]
    done = run_job(*options, "--image_size", "64")
    assert (done.returncode, "1 lost shard(s) made again" in done.stderr) == (0, True)
    assert files(tmp_path / "out") == {**whole, "notes.txt": b"mine"}


def test_a_lost_shard_is_not_made_again_from_another_source(tmp_path: Path) -> None:
    config, images, whole = a_data_set_of_two_shards(tmp_path)
    (tmp_path / "out/data/part-00001.parquet").unlink()
    left = files(tmp_path / "out")
    source = tmp_path / "in/images.parquet"
    write_parquet(source, images[:-1])
    with pytest.raises(DataError, match=r"^\S*part-00001\.parquet: is lost, and cannot be .* has changed since; rest"):
        ingest(config)
    source.unlink()
    with pytest.raises(DataError, match=r"^\S*part-00001\.parquet: is lost, and cannot be .* nothing is there"):
        ingest(config)
    assert files(tmp_path / "out") == left
    alike = next(image for image in iter(lambda: png(RNG.integers(0, 256, (8, 8), np.uint8)), None)
                 if len(image) == len(images[-1]))  # fmt: skip
    write_parquet(source, [*images[:-1], alike])
    with pytest.raises(StorageError, match=r"part-00001\.parquet: is lost, and came out different .*'pillow': "):
        ingest(config)
    broken = images[-1][:30] + bytes(len(images[-1]) - 30)
    write_parquet(source, [*images[:-1], broken])
    with pytest.raises(DataError, match=r"part-00001\.parquet: is lost, .*: 118 of its images can be used, 119 when"):
        ingest(config)
    assert (tmp_path / "out/rejected.parquet").read_bytes() == whole["rejected.parquet"]
    write_parquet(source, images)
    assert ingest(config).restored == 1
    assert files(tmp_path / "out") == whole
