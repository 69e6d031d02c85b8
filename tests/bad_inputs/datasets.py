"""Bad prepared data sets: manifests that lie, and shards that are not what the manifest says."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bad_inputs.files import Build, prepared
from bad_inputs.harness import Case
from bad_inputs.model_files import model_files
from support.image_files import write

SHARD = "data/part-00000.parquet"
Change = Callable[[dict[str, Any]], object]


def data_set(
    at: Path, change: Change = lambda manifest: None, files: Mapping[str, bytes] = {}, count: int = 20
) -> None:
    """A prepared data set of so many images in `at`, with other files or a changed manifest."""
    content = {**prepared(count), **files}
    manifest = json.loads(content["manifest.json"])
    change(manifest)
    write(at, {**content, "manifest.json": json.dumps(manifest).encode()})


def _train(change: Change = lambda manifest: None, **files: bytes) -> Build:
    def build(at: Path) -> list[str]:
        data_set(at / "data", change)
        write(at / "data", files)
        return ["train.py", "--root", "root", "--data.train", "data"]

    return build


def _evaluate(make: Callable[[Path], None], *options: str, kind: str = "eps") -> Build:
    def build(at: Path) -> list[str]:
        make(at / "data")
        write(at / "model", model_files(kind=kind))
        arguments = ["--model", "model", "--data", "data", "--output", "out", "--timesteps_per_image", "8"]
        return ["evaluate.py", *arguments, "--root", "root", *options]

    return build


def _pipe(at: Path) -> list[str]:
    command = _train()(at)
    (at / "data/manifest.json").unlink()
    os.mkfifo(at / "data/manifest.json")
    return command


def _manifest(text: bytes) -> Build:
    return _train(**{"manifest.json": text})


def _case(name: str, build: Build, *says: str, code: int = 1) -> Case:
    return Case("Data set", name, build, says, code)


def _shard(key: str, value: object) -> Build:
    return _train(lambda manifest: manifest["shards"][0].update({key: value}))


def _field(key: str, value: object) -> Build:
    return _train(lambda manifest: manifest.update({key: value}))


def with_shard(
    make: Callable[[pa.Table], pa.Table], label_names: list[str] | None = None, **options: Any
) -> Callable[[Path], None]:
    """A data set whose one shard was rewritten, with every digest and size as it must be."""

    def build(at: Path) -> None:
        from pipelines.data.dataset import Shard, dataset_id

        sink = io.BytesIO()
        pq.write_table(make(pq.read_table(io.BytesIO(prepared()[SHARD]))), sink, **options)
        content = sink.getvalue()
        digest = hashlib.sha256(content).hexdigest()

        def change(manifest: dict[str, Any]) -> None:
            manifest["shards"][0].update(bytes=len(content), sha256=digest)
            manifest["label_names"] = label_names
            shard = Shard("part-00000.parquet", 20, 0, len(content), digest)
            manifest["dataset_id"] = dataset_id(tuple(manifest["image_shape"]), [shard])

        data_set(at, change, {SHARD: content})

    return build


def labelled(labels: list[int | None], names: list[str] | None = None) -> Callable[[Path], None]:
    """A data set of 20 images with these labels, which are repeated."""
    column = pa.array((labels * 20)[:20], pa.int64())
    return with_shard(as_column("label", column), names)


def _train_on(make: Callable[[Path], None], *options: str, validation: Callable[[Path], None] | None = None) -> Build:
    def build(at: Path) -> list[str]:
        make(at / "data")
        if validation is not None:
            validation(at / "test")
        return ["train.py", "--root", "root", "--data.train", "data", *options]

    return build


def with_shape(height: int, width: int) -> Callable[[Path], None]:
    """The same pixels as images of another shape."""

    def build(at: Path) -> None:
        from pipelines.data.dataset import Shard, dataset_id

        def change(manifest: dict[str, Any]) -> None:
            shard = Shard(first_id=0, **manifest["shards"][0])
            shape = (height, width, 1)
            manifest.update(image_shape=shape, dataset_id=dataset_id(shape, [shard]))

        data_set(at, change)

    return build


def as_column(column: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(column), column, values)


def _verify_flipped(at: Path) -> list[str]:
    content = bytearray(prepared()[SHARD])
    content[500] ^= 1
    data_set(at / "data", files={SHARD: bytes(content)})
    return ["verify.py", "data"]


def _verify(change: Change) -> Build:
    def build(at: Path) -> list[str]:
        data_set(at / "data", change)
        return ["verify.py", "data"]

    return build


def _short_shard(at: Path) -> list[str]:
    data_set(at / "data", files={SHARD: prepared()[SHARD][:-1]})
    return ["train.py", "--root", "root", "--data.train", "data"]


def _lost_shard(at: Path) -> list[str]:
    data_set(at / "data")
    (at / "data" / SHARD).unlink()
    return ["train.py", "--root", "root", "--data.train", "data"]


def _binary(at: Path) -> None:
    data_set(at, files={SHARD: b"\0" * len(prepared()[SHARD])})


_NAME = "shards[0].name = "
_IS_NO_NAME = "must be a shard's, as part-00042.parquet, without a directory"
_FORMAT = "this software reads 'ddpm-prepared-data-set' version 1"

CASES = [
    _case("no manifest", lambda at: ["train.py", "--root", "root", "--data.train", "data"], "not a prepared data set"),
    _case("manifest of zero bytes", _manifest(b""), "data/manifest.json: is not JSON"),
    _case("manifest of 100,000 nested lists", _manifest(b"[" * 10**5), "data/manifest.json: is not JSON"),
    _case("manifest that is a named pipe", _pipe, "data/manifest.json: cannot read: is a named pipe"),
    _case("manifest cut off", _manifest(b'{"format": "ddpm-pre'), "data/manifest.json: is not JSON"),
    _case("manifest that is a list", _manifest(b"[]"), "data/manifest.json: format None version None", _FORMAT),
    _case("manifest with bytes that are no text", _manifest(b"\xff\xfe\x00"), "data/manifest.json: is not JSON"),
    _case("manifest of a sample set", _field("format", "ddpm-sample-set"), "'ddpm-sample-set' version 1", _FORMAT),
    _case("manifest of a later version", _field("version", 2), "version 2", _FORMAT),
    _case("no list of shards", _field("shards", None), "data/manifest.json: shards = None: must be a list"),
    _case("shard in a directory above", _shard("name", "../../etc/passwd"), f"{_NAME}'../../etc/passwd'", _IS_NO_NAME),
    _case("shard with an absolute path", _shard("name", "/etc/passwd"), f"{_NAME}'/etc/passwd'", _IS_NO_NAME),
    _case("shard in another store", _shard("name", "s3://bucket/x"), f"{_NAME}'s3://bucket/x'", _IS_NO_NAME),
    _case("shard with a control sequence", _shard("name", "a\x1b[2J"), f"{_NAME}'a\\x1b[2J'", _IS_NO_NAME),
    _case(
        "the same shard twice",
        _train(lambda manifest: manifest["shards"].append(manifest["shards"][0])),
        "shards[1].name = 'part-00000.parquet': must not be there twice",
    ),
    _case("negative rows", _shard("rows", -20), "shards[0].rows = -20: must be a whole number >= 0"),
    _case("rows that are no number", _shard("rows", "20"), "shards[0].rows = '20': must be a whole number"),
    _case("rows that are true", _shard("rows", True), "shards[0].rows = True: must be a whole number"),
    _case("rows that do not add up", _shard("rows", 21), "num_rows = 20: must be the shards' sum, 21"),
    _case("digest that is none", _shard("sha256", "abc"), "shards[0].sha256 = 'abc': must be 64 hexadecimal digits"),
    _case("images of no height", _field("image_shape", [0, 8, 1]), "image_shape = a list: must be [H, W, C]"),
    _case("images of four dimensions", _field("image_shape", [8, 8, 1, 1]), "image_shape = a list: must be [H, W, C]"),
    _case("images of 10^9 x 10^9 pixels", _field("image_shape", [10**9, 10**9, 1]), "image_shape", "1 to 65536"),
    _case("row groups of no rows", _field("rows_per_group", 0), "rows_per_group = 0: must be in 1..1048576"),
    _case("names of labels that are no list", _field("label_names", 7), "label_names = 7: must be null or a list"),
    _case("another image shape", _field("image_shape", [4, 16, 1]), "dataset_id", "must be the digest of image_shape"),
    _case("shard that is missing", _lost_shard, f"data/{SHARD}: is missing, the manifest records", "restore it"),
    _case("shard that is cut off", _short_shard, f"data/{SHARD}: has", "the manifest records", "restore it"),
    _case("shard of zeros", _evaluate(_binary), f"data/{SHARD}: cannot read row groups [0]", "restore the file"),
    _case(
        "shard with images of another size",
        _evaluate(with_shard(as_column("image", pa.array([bytes(32)] * 20, pa.binary(32))))),
        f"data/{SHARD}: column image is fixed_size_binary[32], not fixed_size_binary[64]",
    ),
    _case(
        "shard with images of any length",
        _evaluate(with_shard(as_column("image", pa.array([b"x"] * 20, pa.binary())))),
        f"data/{SHARD}: column image is binary, not fixed_size_binary[64]",
    ),
    _case(
        "shard with an image that is null",
        _evaluate(with_shard(as_column("image", pa.array([None] + [bytes(64)] * 19, pa.binary(64))))),
        "part-00000.parquet: 1 of 20 images are null; restore",
    ),
    _case("shard without images", _evaluate(with_shard(lambda table: table.drop(["image"]))), "column image is None"),
    _case(
        "shard with more rows than recorded",
        _evaluate(with_shard(lambda table: pa.concat_tables([table, table]))),
        "40 rows in 1 groups, the manifest says 20 in 1; restore the file",
    ),
    _case(
        "shard with smaller row groups",
        _evaluate(with_shard(lambda table: table, row_group_size=5)),
        "20 rows in 4 groups, the manifest says 20 in 1",
    ),
    Case(
        "Data set",
        "shard with a flipped bit",
        _verify_flipped,
        ("1 thing(s) wrong, the first:", "its sha256 is not the recorded one"),
        prints=True,
    ),
    _case(
        "manifest without its request, to verify",
        _verify(lambda manifest: manifest.pop("request")),
        "data/manifest.json: request = None: must be a dict",
    ),
    _case(
        "manifest without its rows, to verify",
        _verify(lambda manifest: manifest.pop("num_rows")),
        "data/manifest.json: does not have the fields of a data set (KeyError: 'num_rows')",
    ),
    _case(
        "manifest of an unknown kind, to verify",
        _verify(lambda manifest: manifest.update(format=["x"])),
        "format ['x'] is not of this software; give an output of its jobs",
    ),
    _case(
        "recompute of a data set",
        lambda at: [*_verify(lambda manifest: None)(at), "--recompute", "0.5"],
        "recompute = 0.5: a data set is made from its source",
        code=2,
    ),
    _case(
        "images of another shape than the model's",
        _evaluate(with_shape(4, 16)),
        "data = data: images are 4x16x1 (H x W x C), the model's are 8x8x1",
    ),
    _case(
        "labels asked for where there are none", _evaluate(data_set, "--by_label", "true"), "has no labels", "by_label"
    ),
    _case(
        "classes of data without labels",
        _train_on(data_set, "--network.num_classes", "auto"),
        "network.num_classes = 'auto': needs labels, which data has none of",
        code=2,
    ),
    _case(
        "balanced classes of data without labels",
        _train_on(data_set, "--data.balance_classes"),
        "data.balance_classes = True: needs labels, which data has none of",
        code=2,
    ),
    _case(
        "a label without a name",
        _train_on(labelled([0, 1, 2], ["cat", "dog"]), "--network.num_classes", "auto"),
        "data.train = data: has the label 2, and names of 2 classes only; ingest it again",
    ),
    _case(
        "fewer classes than are named",
        _train_on(labelled([0, 1], ["cat", "dog"]), "--network.num_classes", "1"),
        "network.num_classes = 1: must be auto, or 2: so many classes are named in data",
        code=2,
    ),
    _case(
        "fewer classes than labels",
        _train_on(labelled([0, 1, 2]), "--network.num_classes", "2"),
        "network.num_classes = 2: must be auto, or at least 3: data has the label 2",
        code=2,
    ),
    _case(
        "a label of a million millions",
        _train_on(labelled([0, 10**12]), "--network.num_classes", "auto"),
        "network.num_classes: 1000000000001 is not a whole number in 1..1,000,000",
        code=2,
    ),
    _case(
        "validation with other classes than the training",
        _train_on(
            labelled([0, 1], ["cat", "dog"]),
            *("--network.num_classes", "auto", "--data.validation", "test"),
            validation=labelled([0, 1], ["dog", "cat"]),
        ),
        "data.validation = test: calls class 0 'dog', the model 'cat'",
    ),
    _case(
        "validation with a label that the training has not",
        _train_on(
            labelled([0, 1]),
            *("--network.num_classes", "auto", "--data.validation", "test"),
            validation=labelled([0, 1, 2]),
        ),
        "data.validation = test: has the label 2, the model classes 0..1",
    ),
    _case(
        "more time steps than the model has",
        _evaluate(data_set, "--timesteps_per_image", "48"),
        "timesteps_per_image = 48: the model has T - 1 = 19 KL terms",
        code=2,
    ),
    _case(
        "a bound of more steps than the model has",
        _evaluate(data_set, "--num_timesteps", "21"),
        "num_timesteps: 21 is above the model's 20 time steps",
        code=2,
    ),
    _case(
        "more time steps than the bound has",
        _evaluate(data_set, "--num_timesteps", "8"),
        "timesteps_per_image = 8: T = 8 steps have 7 KL terms",
        code=2,
    ),
    _case(
        "sigma2 beta of a VDM",
        _evaluate(data_set, "--sigma2", "beta", kind="vdm"),
        "sigma2: 'beta' is no variance of a continuous process",
        "take it",
        code=2,
    ),
    _case(
        "variances that the network has not learned",
        _evaluate(data_set, "--sigma2", "learned"),
        "sigma2: 'learned' needs a model that predicts its variances; take beta or beta_tilde",
        code=2,
    ),
    _case(
        "every t of continuous time",
        _evaluate(data_set, "--estimator", "all", kind="vdm"),
        "estimator = all: continuous time has no T to sum over; take stratified or importance",
        code=2,
    ),
    _case(
        "the ODE of a model whose SNR ends at 0",
        _evaluate(data_set, "--ode.num_images", "1", "--ode.steps", "8", kind="v, zero terminal SNR"),
        "ode.num_images = 1: the model's SNR ends at 0, from where no flow leads; leave it out",
        code=2,
    ),
    _case(
        "more images than there are",
        _evaluate(data_set, "--num_images", "21"),
        "num_images = 21: data holds 20; ask for fewer",
        code=2,
    ),
]
