"""The checkpoint store: one small object commits, damage of any kind is found, a full disk harms nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.small_disk import small_disk

from pipelines.cli.errors import CheckpointError, StorageError
from pipelines.data.ledger import Ledger
from pipelines.models.checkpoints import CheckpointStore, CheckpointWriter
from pipelines.training.ledger_report import newest_ledger

STATE = {"config": {"seed": 0}, "dataset": {"id": "abc", "num_rows": 8}}


def files(step: int) -> dict[str, bytes]:
    ledger = Ledger()
    ledger.add(np.zeros(8, np.int64), np.arange(8))
    weights = np.random.default_rng(step).bytes(5000)
    return {"weights.safetensors": weights, "model/ema.safetensors": weights[:999], "ledger.parquet": ledger.to_bytes()}


def store_with(run: str | Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore.open(str(run))
    for step in steps:
        store.save(step, files(step), STATE)
    return store


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    store = store_with(tmp_path, 100, 200)
    assert store.steps() == [100, 200]
    newest = store.newest()
    assert newest is not None
    assert (newest.step, newest.state["dataset"]) == (200, STATE["dataset"])
    assert {name: newest.read(name) for name in newest.state["files"]} == files(200)
    assert (newest.model / "ema.safetensors").read_bytes() == files(200)["model/ema.safetensors"]
    found, ledger = newest_ledger(store)
    assert (found.state, ledger.rows(0)) == (newest.state, 8)


def test_only_the_commit_makes_a_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore.open(str(tmp_path))
    assert store.newest() is None
    with pytest.raises(CheckpointError, match="holds no checkpoint; name a run that has one"):
        newest_ledger(store)
    digests = store.write(100, files(100))
    assert store.steps() == []
    assert store.newest() is None
    assert store.kept() == "nothing had been saved yet, run the same command to start again"
    store.commit(100, {**STATE, "format": 1, "step": 100, "files": digests})
    assert store.newest().step == 100
    assert store.kept() == "step 100 is kept, run the same command to continue"
    store.write(100, files(1))  # a second upload to the same step takes the commit away before it begins
    assert store.newest() is None


def test_names_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    store = store_with(tmp_path, 100, 200, 300)
    strangers = [tmp_path / "checkpoints" / name for name in ("step-00000100.bak", "step-final", "notes")]
    for directory in strangers:
        directory.mkdir()
        (directory / "state.json").write_text("{}")
    store.prune(keep=2)
    assert store.steps() == [200, 300]
    assert all((directory / "state.json").exists() for directory in strangers)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit(**changes: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes})) and None


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("weights.safetensors", flip_a_bit, "weights.safetensors: holds 5,000 bytes that are not the 5,000 bytes"),
        ("weights.safetensors", truncate, "holds 4,999 bytes that are not the 5,000 bytes committed"),
        ("ledger.parquet", Path.unlink, "ledger.parquet: is missing"),
        ("model/ema.safetensors", flip_a_bit, "model/ema.safetensors: holds"),
        ("state.json", truncate, None),  # the final newline: still the same JSON
        ("state.json", lambda path: path.write_bytes(path.read_bytes()[:200]), "state.json: is not JSON"),
        ("state.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "state.json: is not JSON"),
        ("state.json", lambda path: path.write_bytes(b""), "state.json: is not JSON"),
        ("state.json", edit(format=99), "state.json: is not the commit of a checkpoint of step 300, format 1"),
        ("state.json", edit(step=200), "state.json: is not the commit of a checkpoint of step 300"),
    ],
)
def test_damage_falls_back_to_the_checkpoint_before_and_is_told(tmp_path, name, damage, told) -> None:
    store = store_with(tmp_path, 100, 200, 300)
    damage(tmp_path / "checkpoints/step-00000300" / name)
    lines: list[str] = []
    newest = store.newest(lines.append)
    if told is None:
        assert (newest.step, lines) == (300, [])
        return
    assert newest.step == 200
    (line,) = lines
    assert line.startswith("checkpoint of step 300 is corrupt and passed over: ")
    assert told in line
    # Training reaches the step again and repairs it.
    store.save(300, files(300), STATE)
    assert store.newest(pytest.fail).step == 300


def test_several_damaged_checkpoints_and_none_left(tmp_path: Path) -> None:
    store = store_with(tmp_path, 100, 200, 300)
    lines: list[str] = []
    for step in (300, 200):
        flip_a_bit(tmp_path / f"checkpoints/step-{step:08d}/weights.safetensors")
    assert store.newest(lines.append).step == 100
    flip_a_bit(tmp_path / "checkpoints/step-00000100/weights.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no intact checkpoint, only 3 corrupt \(.*step-00000300"):
        store.newest(lines.append)
    assert len(lines) == 2 + 3


def test_a_store_that_cannot_be_read_is_no_corrupt_checkpoint(tmp_path: Path) -> None:
    store = store_with(tmp_path, 100)
    weights = tmp_path / "checkpoints/step-00000100/weights.safetensors"
    weights.unlink()
    weights.mkdir()  # stands for any failure of the store: to begin anew because of it would lose the run
    with pytest.raises(StorageError, match=r"weights\.safetensors: cannot read"):
        store.newest(pytest.fail)


def test_pruning_keeps_the_newest_and_sweeps_what_kills_left_before_them(tmp_path: Path) -> None:
    store = store_with(tmp_path, 200, 300, 400)
    store.write(100, files(100))
    store.write(500, files(500))  # being uploaded right now
    store.prune(keep=2)
    assert store.location.list() == ["step-00000300", "step-00000400", "step-00000500"]
    store.prune(keep=1)
    store.prune(keep=1)
    assert store.steps() == [400]
    assert store.newest().step == 400
    CheckpointStore.open(str(tmp_path / "empty")).prune(keep=2)


def test_what_others_put_into_a_checkpoint_survives_pruning(tmp_path: Path) -> None:
    store = store_with(tmp_path, 100, 200, 300)
    store.write(150, files(150))
    foreign = {
        tmp_path / "checkpoints" / name: name.encode()
        for name in (
            "step-00000100/notes.txt",
            "step-00000100/model/my-own.safetensors",
            "step-00000150/.notes.tmp",
            "step-00000200/deep/er/weights.safetensors",
            "step-00000050/state.json",
            "step-00000400/state.json",
        )
    }
    for path, content in foreign.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    leftover = tmp_path / f"checkpoints/step-00000150/.weights.safetensors.{'0' * 32}.tmp"
    leftover.touch()
    store.prune(keep=1)
    assert store.steps() == [50, 300, 400]
    kept = {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "step-00000300" not in str(path)
    }
    assert kept == foreign


def test_the_writer_saves_in_order_and_prunes(tmp_path: Path) -> None:
    store = CheckpointStore.open(str(tmp_path))
    writer = CheckpointWriter(store, keep=2)
    state = {**STATE, "records": [1]}
    for step in (1, 2, 3):
        writer.save(step, files(step), state)
        state["records"].append(2)  # the caller goes on: what was handed over must not change
    writer.wait()
    writer.wait()
    assert store.steps() == [2, 3]
    assert [store.load(step).state["records"] for step in (2, 3)] == [[1, 2], [1, 2, 2]]


def test_a_full_disk_is_told_at_the_next_save_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    with small_disk(tmp_path, "64k") as disk:
        store = CheckpointStore.open(str(disk))
        writer = CheckpointWriter(store, keep=2)
        writer.save(100, files(100), STATE)
        writer.save(200, {**files(200), "optimizer.safetensors": bytes(2**17)}, STATE)
        with pytest.raises(StorageError, match=r"optimizer\.safetensors: cannot write: the disk is full"):
            writer.wait()
        assert store.newest(pytest.fail).step == 100
        writer.save(200, files(200), STATE)  # there is room again
        writer.wait()
        assert store.newest(pytest.fail).step == 200


def test_round_trip_through_object_storage(s3_prefix: str) -> None:
    store = store_with(s3_prefix, 100, 200, 300)
    store.write(400, files(400))
    assert store.steps() == [100, 200, 300]
    store.prune(keep=2)
    assert store.directory(100).find() == {}  # an object store may go on listing the name for a while
    assert len(store.directory(400).find()) == 3
    lines: list[str] = []
    damaged = store.directory(300) / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    newest = store.newest(lines.append)
    assert newest.step == 200
    assert newest.read("weights.safetensors") == files(200)["weights.safetensors"]
    assert "holds 4,999 bytes" in lines[0]
    (store.directory(200) / "ledger.parquet").delete()
    with pytest.raises(CheckpointError, match="only 2 corrupt"):
        store.newest(lines.append)
    assert "ledger.parquet: is missing" in lines[-1]
