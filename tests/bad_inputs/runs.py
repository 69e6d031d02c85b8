"""Bad training runs: checkpoints, ledgers, spools; and outputs that are in the way."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bad_inputs.datasets import data_set
from bad_inputs.files import Build, ingest, prepared
from bad_inputs.harness import Case
from bad_inputs.model_files import model_files
from bad_inputs.models import sample
from support.image_files import images, write

Json = dict[str, Any]
STATE = "checkpoints/step-00000004/state.json"


def checkpoint(
    run: Path,
    change: Callable[[Json], object] = lambda state: None,
    ledger: bytes | None = None,
    dataset: Json | None = None,
    labels: bytes | None = None,
) -> None:
    """A run whose one checkpoint, of step 4, has used 16 of 20 rows; `change` alters its commit. With `labels`, its
    classes are balanced."""
    from pipelines.data.ledger import Ledger
    from pipelines.models.checkpoints import CheckpointStore

    used = Ledger()
    used.add(np.zeros(16, np.int64), np.arange(16))
    files = {"ledger.parquet": used.to_bytes() if ledger is None else ledger, "weights.safetensors": b"weights"}
    state: Json = {"dataset": dataset or {"id": "d" * 64, "num_rows": 20}, "config": {"train": {"batch_size": 4}}}
    if labels is not None:
        files["labels.parquet"] = labels
        state["config"]["data"] = {"balance_classes": True}
    CheckpointStore.open(str(run)).save(4, files, state)
    content = json.loads((run / STATE).read_bytes())
    change(content)
    (run / STATE).write_text(json.dumps(content))


def _ledger(name: str, make: Callable[[Path], object], *says: str) -> Case:
    def build(at: Path) -> list[str]:
        make(at / "run")
        return ["ledger", "run"]

    return Case("Training run", name, build, says)


def _state(name: str, change: Callable[[Json], object], *says: str) -> Case:
    return _ledger(name, lambda run: checkpoint(run, change), *says)


def _ledger_of(used: list[tuple[int, int]]) -> bytes:
    """A ledger of (pass, id) pairs."""
    from pipelines.data.ledger import Ledger

    ledger = Ledger()
    ledger.add(*np.array(used, np.int64).T)
    return ledger.to_bytes()


def _table(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def _damaged(name: str, content: bytes) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        checkpoint(run)
        (run / STATE).with_name(name).write_bytes(content)

    return make


def _train(make: Callable[[Path], object]) -> Build:
    def build(at: Path) -> list[str]:
        data_set(at / "data")
        make(at / "root" / "runs" / "digits")
        return ["train.py", "--root", "root", "--data.train", "data", "--data.validation", "null"]

    return build


def _id_of_data() -> str:
    return str(json.loads(prepared()["manifest.json"])["dataset_id"])


def _other_config(at: Path) -> list[str]:
    return _train(lambda run: checkpoint(run, dataset={"id": _id_of_data(), "num_rows": 20}))(at)


def _spool(content: bytes) -> Build:
    def build(at: Path) -> list[str]:
        write(at, {"spool.jsonl": content})
        return ["tracker", "spool.jsonl"]

    return build


def _tracker(name: str, build: Build, *says: str) -> Case:
    return Case("Tracking spool", name, build, says)


def _start(**changed: Any) -> bytes:
    names = ("run_key", "experiment", "run_name", "tracking_uri", "artifact_root")
    return json.dumps({"kind": "start", "timestamp_ms": 1, **dict.fromkeys(names, "x"), **changed}).encode() + b"\n"


def _output(name: str, make: Callable[[Path], object], *says: str, code: int = 1) -> Case:
    """An ingest of good images into an output that is in the way."""

    def build(at: Path) -> list[str]:
        images(at / "source")
        make(at / "out")
        return ingest("source")

    return Case("Output", name, build, says, code)


def _below_a_file(at: Path) -> list[str]:
    images(at / "source")
    write(at, {"mine": b"mine"})
    return ["ingest.py", "--source", "source", "--output", "mine/out"]


def _above(at: Path) -> list[str]:
    for index in range(3):
        images(at / "out" / "data" / f"part-{index}")
    return ingest("out/data")


def _request(content: bytes) -> Callable[[Path], None]:
    return lambda out: write(out, {"_work/request.json": content})


def _sample_into(make: Callable[[Path], object]) -> Build:
    def build(at: Path) -> list[str]:
        write(at / "model", model_files())
        make(at / "out")
        return sample("model", "--precision", "fp32")  # auto depends on the machine

    return build


def _record(content: bytes) -> Build:
    """A sample set of which the record of the finished shard is damaged; a dry run meets it without Ray."""

    def build(at: Path) -> list[str]:
        from ddpm_core.model import load_model
        from pipelines.sampling.config import SampleConfig
        from pipelines.sampling.request import request_of

        write(at / "model", model_files())
        model = str(at / "model")
        request = request_of(SampleConfig(model, "out", 4, precision="fp32"), load_model(model))
        write(
            at / "out",
            {
                "_work/request.json": json.dumps(request.to_json()).encode(),
                "_work/records/data/part-00000.json": content,
                "data/part-00000.parquet": b"x",
            },
        )
        return sample("model", "--dry_run", "true")

    return build


_CORRUPT = "run/checkpoints: holds no intact checkpoint, only 1 corrupt ("
_NO_LEDGER = "run/checkpoints/step-00000004/ledger.parquet: cannot be read ("
_ONE_EPOCH: Json = {"epoch": pa.array([0], pa.int64()), "rows": pa.array([16], pa.int64())}

CASES = [
    Case("Training run", "no checkpoint", lambda at: ["ledger", "run"], ("run/checkpoints: holds no checkpoint;",)),
    _ledger("state.json of zero bytes", _damaged("state.json", b""), _CORRUPT, "state.json: is not JSON"),
    _ledger("state.json that is a list", _damaged("state.json", b"[]"), _CORRUPT, "is not the commit of a checkpoint"),
    _state("checkpoint of another step", lambda state: state.update(step=5), _CORRUPT, "a checkpoint of step 4"),
    _state("checkpoint without files", lambda state: state.pop("files"), _CORRUPT, "files = None: must give"),
    _state(
        "checkpoint with a file outside",
        lambda state: state["files"].update({"../../../etc/passwd": {"bytes": 1, "sha256": "0"}}),
        _CORRUPT,
        "must give bytes and sha256 of its files",
    ),
    _state("checkpoint without data set", lambda state: state.pop("dataset"), _CORRUPT, "dataset = None: must be"),
    _state(
        "checkpoint without a row count", lambda state: state["dataset"].pop("num_rows"), "run: ", "dataset.num_rows"
    ),
    _state("data set of no rows", lambda state: state["dataset"].update(num_rows=0), "run: ", "dataset.num_rows"),
    _state(
        "other batch size than trained with",
        lambda state: state["config"]["train"].update(batch_size=5),
        "run: epoch 0 used 16 distinct rows",
    ),
    _ledger("file cut off", _damaged("weights.safetensors", b"weig"), _CORRUPT, "holds 4 bytes that are not the 7"),
    _ledger(
        "file missing",
        lambda run: (_damaged("x", b"")(run), (run / STATE).with_name("ledger.parquet").unlink()),
        _CORRUPT,
        "ledger.parquet: is missing",
    ),
    _ledger("ledger that is no Parquet", lambda run: checkpoint(run, ledger=b"x" * 99), _NO_LEDGER, "restore"),
    _ledger("ledger without bitmaps", lambda run: checkpoint(run, ledger=_table(**_ONE_EPOCH)), _NO_LEDGER, "bitmap"),
    _ledger(
        "ledger with damaged bitmaps",
        lambda run: checkpoint(run, ledger=_table(**_ONE_EPOCH, bitmap=[b"garbage"])),
        _NO_LEDGER,
        "Could not deserialize bitmap",
    ),
    _ledger(
        "ledger with null bitmaps",
        lambda run: checkpoint(run, ledger=_table(**_ONE_EPOCH, bitmap=pa.array([None], pa.binary()))),
        _NO_LEDGER,
    ),
    _ledger(
        "balanced classes without the labels",
        lambda run: checkpoint(run, lambda state: state["config"].update(data={"balance_classes": True})),
        "its newest run/checkpoints/step-00000004/labels.parquet: is missing",
    ),
    _ledger(
        "labels that are no Parquet",
        lambda run: checkpoint(run, labels=b"x" * 99),
        "its newest labels.parquet: cannot be read (",
        "restore",
    ),
    _ledger(
        "labels of other rows",
        lambda run: checkpoint(run, labels=_table(label=[0] * 19)),
        "its newest labels.parquet: has 19 labels, of 20 rows",
    ),
    _ledger(
        "a row that balanced classes take once, used twice",
        lambda run: checkpoint(
            run,
            ledger=_ledger_of([(0, row) for row in range(14)] + [(1, 0), (1, 10)]),
            labels=_table(label=[0] * 10 + [1] * 5 + [-1] * 5),
        ),
        "run: epoch 0 used 1 row(s) more often than was due, 2 times",
    ),
    Case(
        "Training run",
        "of another data set",
        _train(lambda run: checkpoint(run, dataset={"id": "e" * 64, "num_rows": 20})),
        ("data.train = data: the data set has changed since the run's checkpoint of step 4 (id eeeeeeeeeeee ->",),
    ),
    Case(
        "Training run",
        "continued from corrupt checkpoints",
        _train(_damaged("weights.safetensors", b"weig")),
        ("digits/checkpoints: holds no intact checkpoint, only 1 corrupt (", "another `name`"),
    ),
    Case(
        "Training run",
        "result without a model",
        _train(lambda run: write(run, {"result.json": b'{"step": 1000}'})),
        ("digits/result.json: is not the result of a training; delete it",),
    ),
    Case(
        "Training run",
        "of another configuration",
        _other_config,
        ("name = 'digits': the run's checkpoint of step 4 was made with another config (",),
    ),
    _tracker(
        "missing", lambda at: ["tracker", "spool.jsonl"], "spool.jsonl: is not a tracking spool (no such file); give"
    ),
    _tracker(
        "a directory",
        lambda at: [(at / "spool.jsonl").mkdir() or "tracker", "spool.jsonl"],
        "spool.jsonl: is not a tracking spool (no such file); give",
    ),
    _tracker("zero bytes", _spool(b""), "spool.jsonl: is not a tracking spool (no start record)"),
    _tracker("random bytes", _spool(bytes(range(256)) * 50), "spool.jsonl: is not a tracking spool (no start record)"),
    _tracker(
        "another software's lines", _spool(b'{"kind": "log"}\n7\n[]\n'), "is not a tracking spool (no start record)"
    ),
    _tracker(
        "numbers for texts", _spool(_start(artifact_root=7)), "is not a tracking spool (its start record is damaged)"
    ),
    _output("a file", lambda out: out.write_bytes(b"mine"), "out", "a file is where a directory is needed"),
    _output(
        "files of something else",
        lambda out: write(out, {"data/part-of-my-thesis.txt": b"mine"}),
        "out: must be empty, or hold an unfinished run of the same request; it holds 'data/part-of-my-thesis.txt'",
        "choose another place",
        code=2,
    ),
    Case(
        "Output",
        "samples among files of something else",
        _sample_into(lambda out: write(out, {"thesis.txt": b"mine"})),
        ("out: must be empty, or hold an unfinished run of the same request; it holds 'thesis.txt'",),
        2,
    ),
    Case("Output", "above its source, named as shards are", _above, ("output = out: holds the source out/data;",), 2),
    Case(
        "Output",
        "samples inside the model",
        lambda at: [*_sample_into(lambda out: None)(at)[:-2], "--root", "root", "--output", "model/samples"],
        ("output = model/samples: lies in the model model; choose a place beside it",),
        2,
    ),
    Case(
        "Training run",
        "in a directory of something else",
        _train(lambda run: write(run, {"config.json": b'{"architectures": []}', "model.safetensors": b"mine"})),
        ("name = 'digits': root/runs/digits must be empty, or hold a run of this name; it holds 'config.json'",),
        2,
    ),
    Case("Output", "below a file", _below_a_file, ("mine/out", "a file is where a directory is needed"), 1),
    _output("request that is a list", _request(b"[1]"), "holds an unfinished output of another request", code=2),
    _output("request cut off", _request(b'{"source": '), "out/_work/request.json: is not JSON", "restore or delete it"),
    _output(
        "unfinished output of another request",
        _request(
            b'{"source": "/data/others", "format": "auto", "image_size": null, "channels": null, "shard_mib": 64}'
        ),
        "holds an unfinished output of another request (source: '/data/others' ->",
        code=2,
    ),
    _output(
        "finished output of another request",
        lambda out: data_set(out),
        "holds a finished output of another request (source: ",
        code=2,
    ),
    _output("damaged manifest", lambda out: write(out, {"manifest.json": b"{"}), "out/manifest.json: is not JSON"),
    _output(
        "manifest of something else",
        lambda out: write(out, {"manifest.json": b'{"name": "app"}'}),
        "out/manifest.json: request = None: must be a dict",
    ),
    Case(
        "Output",
        "samples into a data set",
        _sample_into(data_set),
        ("out: holds a finished output of another request (",),
        2,
    ),
    Case(
        "Output",
        "samples into a file",
        _sample_into(lambda out: out.write_bytes(b"mine")),
        ("a file is where a directory is needed",),
    ),
    Case(
        "Output",
        "record of a shard that is a list",
        _record(b"[]"),
        ("out/_work/records/data/part-00000.json: is not the record",),
    ),
    Case(
        "Output",
        "record of a shard that lacks fields",
        _record(b'{"name": "x"}'),
        ("is not the record of a shard", "delete it"),
    ),
    Case(
        "Output",
        "verified before it is finished",
        lambda at: ["verify.py", "out"],
        ("out: no finished output (no manifest.json)",),
    ),
]
