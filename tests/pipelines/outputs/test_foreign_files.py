"""Files of somebody else's in and around an output survive everything that the engine does there."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cli.errors import ConfigError, DataError, StorageError
from pipelines.outputs import shards as engine
from pipelines.outputs.shard_store import Store
from pipelines.outputs.shards import ShardedOutput, ShardOutput, ShardRecord
from pipelines.storage.location import Location

SHARDS, NEEDED = 4, 2


@dataclass(frozen=True)
class Layout:
    """The directories of one kind of output, as its job declares them."""

    directory: str = "data"
    passes: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()

    def output(self, at: Path) -> ShardedOutput:
        return ShardedOutput(Location.parse(at), {"seed": 1}, self.directory, self.passes, self.scratch)


LAYOUTS = {
    "sample": Layout(),
    "ingest": Layout(passes=("_work/decoded",), scratch=("units.parquet",)),
    "evaluate": Layout("terms", passes=("first_pass",)),
}
DIRECTORIES = (
    "",
    "data",
    "terms",
    "first_pass",
    "preview",
    "_work",
    "_work/decoded",
    "_work/records",
    "_work/records/data",
    "_work/records/terms",
    "_work/records/decoded",
    "deep/er",
    "../beside",
)
NAMES = (
    "thesis.txt",
    "part-of-my-thesis.txt",
    "part-0.parquet",
    "part-00000-3f2a.c000.snappy.parquet",
    "part-00001.png",
    "part-00099.parquet",
    "part-00099.json",
    ".part-00000.parquet.tmp",
    f".thesis.txt.{'0' * 32}.tmp",
    ".DS_Store",
    "request.json.bak",
)
FOREIGN = st.dictionaries(
    st.tuples(st.sampled_from(DIRECTORIES), st.sampled_from(NAMES)).map("/".join).map(lambda path: path.lstrip("/")),
    st.binary(max_size=8),
    min_size=1,
    max_size=6,
)
STAGES = ("begun", "half", "computed", "killed", "finished", "shard lost")


class Killed(BaseException):
    """What stands for SIGKILL: nothing in the tree handles it."""


def compute(index: int) -> ShardOutput:
    return ShardOutput(f"shard {index}".encode() * 50, rows=10)


def failing(index: int) -> ShardOutput:
    if index == 1:
        raise DataError("not this one")
    return compute(index)


def enough(records: Sequence[ShardRecord]) -> bool:
    return len(records) == NEEDED


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def make(output: ShardedOutput, at_stage: Callable[[str], None], kill_at: int) -> None:
    """Everything that can happen to an output: a failure, a resumption, shards beyond what is enough, a kill at the
    `kill_at`th removal of its files, the end of it, a lost shard."""
    output.begin(content="abc")
    at_stage("begun")
    for name in output.scratch:
        (output.work / name).write_bytes(b"scratch")
    with pytest.raises(DataError, match="not this one"):
        output.compute(lambda: failing, SHARDS)
    at_stage("half")
    assert output.committed() is None
    output.begin(content="abc")
    for into in output.passes:
        output.compute(lambda: compute, 2, into=into)
    records = output.compute(lambda: compute, SHARDS, enough=enough)
    # as another worker did before it was enough
    Store(lambda: compute, output.location, output.directory, ".parquet")(SHARDS - 1)
    at_stage("computed")
    calls = iter(range(10))

    def deadly(*arguments: object) -> None:
        if next(calls) == kill_at:
            raise Killed
        real(*arguments)

    real = engine.delete_files
    with suppress(Killed), mock.patch.object(engine, "delete_files", deadly):
        output.commit({"kind": "test"}, records)
    at_stage("killed")
    if output.committed() is None:
        output.commit({"kind": "test"}, output.compute(lambda: compute, SHARDS, enough=enough))
    manifest = output.committed()
    assert manifest is not None
    at_stage("finished")
    (output.shards / manifest["shards"][0]["name"]).delete()
    at_stage("shard lost")
    assert output.lost(manifest) == [0]
    output.restore(lambda: compute, [0], manifest)
    assert output.committed() == manifest


@settings(max_examples=25)
@given(st.sampled_from(sorted(LAYOUTS)), FOREIGN, st.sampled_from(STAGES), st.integers(0, 5))
def test_what_others_put_into_an_output_survives_and_changes_nothing(
    kind: str, foreign: dict[str, bytes], stage: str, kill_at: int
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        alone, disturbed = Path(scratch, "alone"), Path(scratch, "disturbed", "output")
        make(LAYOUTS[kind].output(alone), lambda reached: None, kill_at)

        def disturb(reached: str) -> None:
            if reached == stage:
                write(disturbed, foreign)

        make(LAYOUTS[kind].output(disturbed), disturb, kill_at)
        expected = {Path(disturbed, name).resolve(): content for name, content in foreign.items()}
        expected |= {disturbed / name: content for name, content in contents(alone).items()}
        found = {Path(scratch, "disturbed", name): data for name, data in contents(disturbed.parent).items()}
        assert found == {path.relative_to(path.anchor) and path: data for path, data in expected.items()}
        assert not (alone / "_work").exists()


@settings(max_examples=25)
@given(st.sampled_from(sorted(LAYOUTS)), FOREIGN)
def test_a_place_that_holds_something_else_is_refused_and_left_as_it_is(kind: str, foreign: dict[str, bytes]) -> None:
    inside = {name: content for name, content in foreign.items() if not name.startswith("../")}
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch, "output")
        write(at, foreign)
        before = contents(Path(scratch))
        output = LAYOUTS[kind].output(at)
        for step in (output.committed, output.begin):
            if inside:
                with pytest.raises(
                    ConfigError, match=r"must be empty, or hold an unfinished run.*; it holds '"
                ) as said:
                    step()
                named = str(said.value).split("it holds '")[1].split("'")[0]
                assert named in inside
                assert contents(Path(scratch)) == before
            else:
                step()


@pytest.mark.parametrize("place", ["data/part-00002.parquet", "data/part-00002.parquet/inside.txt"])
def test_a_file_where_a_shard_must_be_is_named_and_kept(tmp_path: Path, place: str) -> None:
    output = LAYOUTS["sample"].output(tmp_path / "out")
    output.begin()
    write(tmp_path / "out", {place: b"mine"})
    for _ in range(2):
        with pytest.raises(StorageError, match=r"data/part-00002\.parquet: (stands where|cannot read: is a directory)"):
            output.compute(lambda: compute, SHARDS)
        assert (tmp_path / "out" / place).read_bytes() == b"mine"
    shutil.move(tmp_path / "out" / "data" / "part-00002.parquet", tmp_path / "mine")
    output.commit({}, output.compute(lambda: compute, SHARDS))
    assert len(contents(tmp_path / "out")) == SHARDS + 1


def test_a_file_that_comes_to_stand_there_while_the_shard_is_computed_is_kept(tmp_path: Path) -> None:
    output = LAYOUTS["sample"].output(tmp_path / "out")
    output.begin()

    def slow(index: int) -> ShardOutput:
        write(tmp_path / "out", {"data/part-00000.parquet": b"mine"})
        return compute(index)

    with pytest.raises(StorageError, match="stands where this output's shard must be"):
        output.compute(lambda: slow, SHARDS)
    assert (tmp_path / "out/data/part-00000.parquet").read_bytes() == b"mine"
    assert not list((tmp_path / "out/_work/records").rglob("*.json"))


def test_what_is_kept_of_an_interrupted_run_is_what_was_stored(tmp_path: Path) -> None:
    output = LAYOUTS["ingest"].output(tmp_path / "out")
    output.begin()
    assert output.kept().startswith("nothing had been saved yet")
    output.compute(lambda: compute, 2, into="_work/decoded")
    output.compute(lambda: compute, 1)
    # killed before its object was there, and files of somebody else's
    write(tmp_path / "out", {"_work/records/data/part-00001.json": b"{}", "data/part-9.parquet": b"", "x.json": b""})
    assert output.kept() == "3 finished shard(s) are kept, run the same command to continue"


def test_an_unrecorded_shard_with_the_right_bytes_is_taken_for_what_it_is(tmp_path: Path) -> None:
    """As earlier versions, which stored the object before its record, leave it when they are killed between the two."""
    output = LAYOUTS["sample"].output(tmp_path / "out")
    output.begin()
    write(tmp_path / "out", {"data/part-00001.parquet": compute(1).data})
    output.commit({}, output.compute(lambda: compute, SHARDS))
    assert len(contents(tmp_path / "out")) == SHARDS + 1


def test_racing_runs_that_make_other_bytes_leave_a_record_that_is_true(tmp_path: Path) -> None:
    """As on other hardware: neither takes the other's shard for somebody else's file."""
    output = LAYOUTS["sample"].output(tmp_path / "out")
    output.begin()

    def other(index: int) -> ShardOutput:
        return ShardOutput(b"other", rows=10)

    def overtaken(index: int) -> ShardOutput:
        Store(lambda: other, output.location, "data", ".parquet")(index)
        return compute(index)

    (record,) = output.compute(lambda: overtaken, 1)
    assert record.sha256 == hashlib.sha256((tmp_path / "out/data/part-00000.parquet").read_bytes()).hexdigest()
    assert ShardRecord.read(output.work / "records" / "data" / "part-00000.json") == record


def test_a_killed_run_leaves_no_temporaries_behind(tmp_path: Path) -> None:
    output, own = LAYOUTS["ingest"].output(tmp_path / "out"), f"{'0123456789abcdef' * 2}.tmp"
    write(tmp_path / "out", {f"_work/.request.json.{own}": b"half"})
    output.begin()
    left = {
        f"data/.part-00003.parquet.{own}": b"half",
        f"_work/.units.parquet.{own}": b"half",
        f"_work/decoded/.part-00001.parquet.{own}": b"half",
        f"_work/records/data/.part-00001.json.{own}": b"half",
        f".manifest.json.{own}": b"half",
    }
    write(tmp_path / "out", left)
    output.commit({}, output.compute(lambda: compute, SHARDS))
    assert output.committed() is not None
    assert sorted(contents(tmp_path / "out"))[-1] == "manifest.json"
    assert len(contents(tmp_path / "out")) == SHARDS + 1


def test_the_same_holds_in_an_object_store(s3_prefix: str) -> None:
    root = Location.parse(f"{s3_prefix}/[out]?")  # names that could be taken for patterns
    foreign = dict.fromkeys(("thesis.txt", "data/part-of-my-thesis.txt", "_work/part-00000.json", "o/x"), b"mine")
    for directory in (root, root.parent / "o"):
        for name, content in foreign.items():
            (directory / name).write_bytes(content)
    layout = LAYOUTS["ingest"]
    with pytest.raises(ConfigError, match=r"out.*must be empty, .*it holds '_work/part-00000\.json'"):
        ShardedOutput(root, {"seed": 1}).begin()
    for name in foreign:
        (root / name).delete()

    def disturb(stage: str) -> None:
        if stage == "half":
            for name, content in foreign.items():
                (root / name).write_bytes(content)

    make(ShardedOutput(root, {"seed": 1}, layout.directory, layout.passes, layout.scratch), disturb, kill_at=1)
    own = {"manifest.json", "data/part-00000.parquet", "data/part-00001.parquet"}
    assert {path.removeprefix(f"{root.path}/") for path in root.find()} == own | foreign.keys()
    assert {path.removeprefix(f"{root.parent.path}/o/") for path in (root.parent / "o").find()} == foreign.keys()
