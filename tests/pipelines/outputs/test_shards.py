"""The shard engine: one result whatever the workers, kills and races; one commit; clear refusals."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.cli.console import Interrupted
from pipelines.cli.errors import ClusterError, DataError, RequestMismatchError, StorageError
from pipelines.cluster.actor_pool import ActorPool, run_on_actors
from pipelines.outputs.progress import Progress, made
from pipelines.outputs.shard_store import Store
from pipelines.outputs.shards import ShardedOutput, ShardOutput, ShardRecord
from pipelines.storage.location import Location

SHARDS = 9


@dataclass(frozen=True)
class Squares:
    """A deterministic compute function that writes down each of its calls, and can be told to fail or die."""

    log: str
    fail_at: int | None = None
    die_at: int | None = None
    deaths: int = 0

    def __call__(self) -> Callable[[int], ShardOutput]:
        return self._compute

    def _compute(self, index: int) -> ShardOutput:
        calls = Path(self.log) / str(index)
        with calls.open("a") as file:
            file.write("called\n")
        if index == self.fail_at:
            raise DataError(f"shard {index}: cannot be computed")
        if index == self.die_at and len(calls.read_text().split()) <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return ShardOutput(f"{index}^2 = {index * index}".encode() * 1000, rows=index, extra={"square": index * index})

    def calls(self) -> dict[int, int]:
        return {int(path.name): len(path.read_text().split()) for path in Path(self.log).iterdir()}


@pytest.fixture
def squares(tmp_path: Path) -> Squares:
    (tmp_path / "log").mkdir()
    return Squares(str(tmp_path / "log"))


def output(tmp_path: Path, name: str = "output", **request: object) -> ShardedOutput:
    return ShardedOutput(Location.parse(tmp_path / name), {"seed": 1, "size": {"h": 8}, **request})


def contents(result: ShardedOutput) -> dict[str, bytes]:
    root = Path(result.location.path)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def finish(result: ShardedOutput, factory: Squares, pool: ActorPool | None = None) -> dict[str, bytes]:
    result.begin()
    records = result.compute(factory, SHARDS, pool=pool)
    result.commit({"kind": "squares"}, records)
    return contents(result)


def test_the_manifest_records_every_shard_and_the_request(tmp_path: Path, squares: Squares) -> None:
    result = output(tmp_path)
    assert result.committed() is None
    files = finish(result, squares)
    manifest = result.committed()
    assert manifest is not None
    assert (manifest["kind"], manifest["request"]) == ("squares", {"seed": 1, "size": {"h": 8}})
    assert [shard["square"] for shard in manifest["shards"]] == [i * i for i in range(SHARDS)]
    assert [shard["rows"] for shard in manifest["shards"]] == list(range(SHARDS))
    assert [len(files[f"data/{shard['name']}"]) for shard in manifest["shards"]] == [
        shard["bytes"] for shard in manifest["shards"]
    ]
    assert len(files) == SHARDS + 1, "nothing but shards and manifest remains"


def test_a_resumed_run_computes_only_what_is_missing(tmp_path: Path, squares: Squares) -> None:
    whole = finish(output(tmp_path, "whole"), squares)
    result, seen = output(tmp_path), []
    broken = Squares(str(tmp_path / "log2"), fail_at=5)
    Path(broken.log).mkdir()
    result.begin()
    with pytest.raises(DataError, match="shard 5: cannot be computed"):
        result.compute(broken, SHARDS)
    (result.location / "data" / "part-00001.parquet").delete()
    (result.location / "data" / "part-00002.parquet").write_bytes(b"cut")
    assert result.committed() is None
    mended = Squares(str(tmp_path / "log3"))
    Path(mended.log).mkdir()
    result.begin()
    records = result.compute(mended, SHARDS, on_progress=seen.append)
    result.commit({"kind": "squares"}, records)
    assert set(mended.calls()) == {1, 2, 5, 6, 7, 8}
    assert seen[0] == Progress(3, SHARDS, 0 + 3 + 4, rate=0.0)
    assert (seen[-1].shards, seen[-1].rows) == (SHARDS, sum(range(SHARDS)))
    assert all(progress.rate > 0 for progress in seen[1:])
    assert contents(result) == whole


@dataclass(frozen=True)
class Slow:
    """Makes half of each shard's rows, and the rest when the driver has heard of it."""

    heard: str

    def __call__(self) -> Callable[[int], ShardOutput]:
        return self._compute

    def _compute(self, index: int) -> ShardOutput:
        made(5.0)
        deadline = time.monotonic() + 60
        while not Path(self.heard).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return ShardOutput(b"content", rows=10)


@pytest.mark.ray
def test_the_driver_hears_of_a_shard_that_an_actor_is_making(ray_cluster: None, tmp_path: Path) -> None:
    heard, seen = tmp_path / "heard", []

    def hear(progress: Progress) -> None:
        seen.append((progress.shards, progress.rows, progress.making, progress.rate > 0))
        if progress.making:
            heard.touch()

    result = output(tmp_path)
    result.begin()
    result.compute(Slow(str(heard)), 1, pool=ActorPool(1), on_progress=hear)
    assert seen[0] == (0, 0, 0.0, False)
    assert (0, 0, 5.0, True) in seen
    assert seen[-1] == (1, 10, 0.0, True)


def test_another_request_is_refused_naming_the_fields(tmp_path: Path, squares: Squares) -> None:
    output(tmp_path).begin(content="abc")
    output(tmp_path).begin(content="abc")
    with pytest.raises(RequestMismatchError, match=r"unfinished .*seed: 1 -> 2.*delete it to start over"):
        output(tmp_path, seed=2).begin(content="abc")
    with pytest.raises(RequestMismatchError, match=r"content: 'abc' -> 'new'"):
        output(tmp_path).begin(content="new")
    finish(output(tmp_path, "done"), squares)
    with pytest.raises(RequestMismatchError, match=r"finished .*added: None -> True; size\.h: 8 -> 16"):
        output(tmp_path, "done", size={"h": 16}, added=True).committed()


def test_an_output_of_another_team_is_refused_with_its_name(
    tmp_path: Path, squares: Squares, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "vision")
    output(tmp_path).begin()
    finish(output(tmp_path, "done"), squares)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "speech")
    for asked in (output(tmp_path, seed=2).begin, output(tmp_path, seed=2).committed):
        with pytest.raises(RequestMismatchError, match=r"unfinished .*\(seed: 1 -> 2\), begun by vision; ask for"):
            asked()
    with pytest.raises(RequestMismatchError, match=r"finished .*\(seed: 1 -> 2\), begun by vision; ask for"):
        output(tmp_path, "done", seed=2).committed()
    # The same request is the same output, whoever asks: who began it stays its owner.
    finish(output(tmp_path), squares)
    assert (output(tmp_path).committed() or {})["owner"] == "vision"


def test_racing_runs_commit_one_manifest_of_equal_content(tmp_path: Path, squares: Squares) -> None:
    result, outcomes, barrier = output(tmp_path), [], threading.Barrier(3)
    result.begin()
    records = result.compute(squares, SHARDS)

    def commit(fields: dict[str, str]) -> None:
        barrier.wait()
        try:
            outcomes.append(result.commit(fields, records)["kind"])
        except StorageError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=commit, args=({"kind": kind},)) for kind in ("same", "same", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manifest = result.committed()
    assert manifest is not None
    assert outcomes.count(manifest["kind"]) == (2 if manifest["kind"] == "same" else 1)
    assert sum("another run committed different content" in text for text in outcomes) == 3 - outcomes.count(
        manifest["kind"]
    )


def test_what_a_kill_left_after_the_commit_is_cleaned_up(tmp_path: Path, squares: Squares) -> None:
    result = output(tmp_path)
    whole = finish(result, squares)
    (result.work / "records/data/part-00000.json").write_bytes(b"{}")
    assert result.committed() is not None
    assert contents(result) == whole


def test_a_lost_shard_is_made_again_and_must_come_out_equal(tmp_path: Path, squares: Squares) -> None:
    result = output(tmp_path)
    whole = finish(result, squares)
    manifest = result.committed()
    assert manifest is not None
    assert result.lost(manifest) == []
    (result.location / "data" / "part-00003.parquet").delete()
    (result.location / "data" / "part-00005.parquet").write_bytes(b"cut")
    assert result.lost(manifest) == [3, 5]
    assert list(result.recompute(squares, [3, 5], manifest)) == [(3, True), (5, True)]
    assert result.lost(manifest) == [3, 5], "compared, not restored"
    assert list(result.recompute(squares, [3, 5], manifest, restore=True)) == [(3, True), (5, True)]
    assert contents(result) == whole
    manifest["shards"][4]["sha256"] = "0" * 64
    (result.location / "data" / "part-00004.parquet").delete()
    assert list(result.recompute(squares, [4], manifest, restore=True)) == [(4, False)]
    assert result.lost(manifest) == [4], "what came out different is not written"


def test_a_shard_that_another_run_has_finished_is_taken_over(tmp_path: Path, squares: Squares) -> None:
    result, other = output(tmp_path), Squares(str(tmp_path / "log2"))
    Path(other.log).mkdir()

    def meanwhile(progress: Progress) -> None:
        if progress.shards == 2:  # shards 0 and 1 are there: another run does the rest
            output(tmp_path).compute(other, SHARDS)

    result.begin()
    records = result.compute(squares, SHARDS, on_progress=meanwhile)
    assert [record.rows for record in records] == list(range(SHARDS))
    assert (set(squares.calls()), set(other.calls())) == ({0, 1}, set(range(2, SHARDS)))


def test_no_shards_is_a_valid_output(tmp_path: Path, squares: Squares) -> None:
    result = output(tmp_path)
    assert result.compute(squares, 0) == []


def test_an_object_store_holds_the_same(tmp_path: Path, s3_prefix: str, squares: Squares) -> None:
    local = finish(output(tmp_path), squares)
    remote = ShardedOutput(Location.parse(s3_prefix), output(tmp_path).request)
    remote.begin()
    remote.begin()
    with pytest.raises(RequestMismatchError, match="seed: 1 -> 3"):
        ShardedOutput(remote.location, {"seed": 3}).begin()
    records = remote.compute(squares, SHARDS)
    remote.commit({"kind": "squares"}, records)
    assert {name: (remote.location / name).read_bytes() for name in local} == local
    assert [path for path in remote.location.find() if "_work" in path] == []


@pytest.mark.ray
@pytest.mark.parametrize("size", [(1, 3), None])
def test_any_number_of_actors_writes_the_same_bytes(
    ray_cluster: None, tmp_path: Path, squares: Squares, size: tuple[int, int] | None
) -> None:
    alone = finish(output(tmp_path, "alone"), squares)
    together = finish(output(tmp_path, "together"), squares, ActorPool(size))
    assert together == alone


@pytest.mark.ray
def test_an_actor_that_dies_is_replaced_and_the_result_is_the_same(
    ray_cluster: None, tmp_path: Path, squares: Squares
) -> None:
    alone = finish(output(tmp_path, "alone"), squares)
    mortal = Squares(str(tmp_path / "log2"), die_at=4, deaths=2)
    Path(mortal.log).mkdir()
    assert finish(output(tmp_path, "together"), mortal, ActorPool(2)) == alone
    assert mortal.calls()[4] == 3, "killed twice, then computed"


@pytest.mark.ray
def test_a_shard_that_always_kills_its_actor_ends_the_job(ray_cluster: None, tmp_path: Path) -> None:
    deadly = Squares(str(tmp_path / "log"), die_at=4, deaths=10**6)
    Path(deadly.log).mkdir()
    result = output(tmp_path)
    result.begin()
    with pytest.raises(ClusterError, match="Ray gave up"):
        result.compute(deadly, SHARDS, pool=ActorPool(2))
    assert 1 < deadly.calls()[4] < 20
    assert result.committed() is None


@pytest.mark.ray
def test_an_error_in_an_actor_arrives_unchanged_and_is_not_retried(ray_cluster: None, tmp_path: Path) -> None:
    failing = Squares(str(tmp_path / "log"), fail_at=2)
    Path(failing.log).mkdir()
    with pytest.raises(DataError, match=r"^shard 2: cannot be computed$"):
        output(tmp_path).compute(failing, SHARDS, pool=ActorPool(2))
    assert failing.calls()[2] == 1


@pytest.mark.ray
def test_a_defect_in_an_actor_arrives_with_its_trace(ray_cluster: None, tmp_path: Path) -> None:
    missing_directory = Squares(str(tmp_path / "not-there"))
    with pytest.raises(RuntimeError, match=r"FileNotFoundError at index \d.*\n(.*\n)*.*_compute"):
        output(tmp_path).compute(missing_directory, SHARDS, pool=ActorPool(1))


def test_enough_ends_at_the_same_shard_in_any_order_and_leaves_no_other(tmp_path: Path, squares: Squares) -> None:
    """What lies there already, beyond what is enough too, changes nothing."""
    files = []
    for name, before in (("fresh", []), ("resumed", [1, 7, 8, 2])):
        result = output(tmp_path, name)
        result.begin()
        for index in before:
            list(run_on_actors(Store(squares, result.location, "data", ".parquet"), [index], None, name))
        seen: list[int] = []

        def enough(records: Sequence[ShardRecord], seen: list[int] = seen) -> bool:
            seen.append(len(records))
            return sum(record.rows for record in records) >= 6

        records = result.compute(squares, SHARDS, enough=enough)
        assert [record.extra["square"] for record in records] == [0, 1, 4, 9]
        assert seen == [1, 2, 3, 4]
        result.commit({}, records)
        files.append(contents(result))
    assert files[0] == files[1]
    assert len(files[0]) == 4 + 1


@pytest.mark.ray
@pytest.mark.slow
def test_enough_ends_a_computation_on_actors(ray_cluster: None, tmp_path: Path, squares: Squares) -> None:
    result = output(tmp_path)
    result.begin()
    records = result.compute(squares, 64, pool=ActorPool(2), enough=lambda records: len(records) == 3)
    assert [record.rows for record in records] == [0, 1, 2]
    assert len(squares.calls()) < 64


def test_shards_may_lie_in_another_directory(tmp_path: Path, squares: Squares) -> None:
    result = ShardedOutput(Location.parse(tmp_path / "output"), {"seed": 1}, "terms")
    files = finish(result, squares)
    assert sorted(files)[1] == "terms/part-00000.parquet"
    manifest = result.committed()
    assert manifest is not None
    assert result.lost(manifest) == []
    (tmp_path / "output" / "terms" / "part-00004.parquet").unlink()
    assert result.lost(manifest) == [4]
    assert list(result.recompute(squares, [4], manifest, restore=True)) == [(4, True)]
    assert result.lost(manifest) == []


def test_an_interrupted_run_says_truly_how_much_is_kept(tmp_path: Path, squares: Squares) -> None:
    result = output(tmp_path)
    assert result.kept() == "nothing had been saved yet, run the same command to start again"
    result.begin()

    def interrupt(progress: Progress) -> None:
        if progress.shards == 4:
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        result.compute(squares, SHARDS, on_progress=interrupt)
    assert result.kept() == "4 finished shard(s) are kept, run the same command to continue"
    records = result.compute(squares, SHARDS)
    result.commit({}, records)
    assert result.kept() == "everything had been finished"
