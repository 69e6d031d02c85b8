"""Storage through a proxy that injects faults: nothing fails, nothing is lost, nothing absent is made up."""

import multiprocessing
import pickle
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.fault_proxy import FaultProxy, Rule, mixed
from support.s3_store import S3Store

from pipelines.cli.errors import StorageError
from pipelines.storage import s3
from pipelines.storage.location import Location, forget_connections
from pipelines.storage.ownership import delete_files, first_file

LENGTH = 300_000


def content(name: object) -> bytes:
    return random.Random(str(name)).randbytes(LENGTH)


def read_ranges(file: Location) -> bytes:
    """The content through a file object, in pieces and out of order."""
    with file.open("rb", cache_type="none") as opened:
        opened.seek(LENGTH // 2)
        tail = opened.read()
        opened.seek(0)
        return opened.read(LENGTH // 3) + opened.read(LENGTH // 2 - LENGTH // 3) + tail


def says_missing(file: Location) -> bool:
    try:
        file.read_bytes()
    except StorageError as error:
        if "does not exist" not in str(error):
            raise
        return True
    return False


OPERATIONS: dict[str, Callable[[Location], Any]] = {
    "read": lambda root: (root / "there").read_bytes() == content("there"),
    "read ranges": lambda root: read_ranges(root / "there") == content("there"),
    "write": lambda root: (root / "written").write_bytes(content(1)) or (root / "written").read_bytes() == content(1),
    "create": lambda root: (root / "created").create(content(2)) and not (root / "there").create(b"other"),
    "read nothing": lambda root: says_missing(root / "gone"),
    "exists": lambda root: (root / "there").exists() and not (root / "gone").exists(),
    "size": lambda root: (root / "there").size() == LENGTH,
    "list": lambda root: "there" in root.list(),
    "find": lambda root: (root / "there").path in root.find() and (root / "there").path in (root / "t*").glob(),
    "delete": lambda root: (root / "there").delete() or not (root / "there").exists(),
    "delete files": lambda root: delete_files(root, ["there", "gone"]) or root.find() == {},
    "look for a file": lambda root: first_file(root) == "there",
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_three_faults_in_a_row_are_ridden_out(s3_proxy: FaultProxy, s3_prefix: str, operation: str) -> None:
    for fault in ("503", "500", "429", "reset", "truncate", "lost_ack"):
        root = Location.parse(s3_prefix) / fault
        (root / "there").write_bytes(content("there"))
        before = s3_proxy.counts()[fault]
        s3_proxy.set_rules([Rule(fault, count=3)])
        assert OPERATIONS[operation](root), fault
        assert s3_proxy.counts()[fault] - before == 3


@pytest.mark.parametrize("operation", ["read", "read ranges", "write"])
def test_a_store_that_falls_silent_is_asked_again(
    s3_proxy: FaultProxy, s3_prefix: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_READ_TIMEOUT_S", 1)
    forget_connections()
    root = Location.parse(s3_prefix)
    (root / "there").write_bytes(content("there"))
    before = s3_proxy.counts()["stall"]
    s3_proxy.set_rules([Rule("stall", count=1, seconds=60)])
    assert OPERATIONS[operation](root)
    assert s3_proxy.counts()["stall"] - before == 1


def test_hundreds_of_operations_at_a_quarter_faulty_requests(s3_proxy: FaultProxy, s3_prefix: str) -> None:
    """Writers replace, create, read, list and delete their own objects; every answer must be the right one."""
    root, writers, rounds = Location.parse(s3_prefix), 8, 6
    s3_proxy.set_rules(mixed(0.25))
    before = s3_proxy.counts()

    def work(me: int) -> None:
        mine = root / f"writer-{me}"
        for turn in range(rounds):
            file, other = mine / f"{turn}", mine / f"{turn}-created"
            file.write_bytes(content("first"))
            file.write_bytes(content((me, turn)))
            assert other.create(content((turn, me)))
            assert not other.create(b"too late")
            assert read_ranges(file) == content((me, turn))
            assert other.read_bytes() == content((turn, me))
            assert mine.sizes() == {
                name: LENGTH for n in range(turn + 1) for name in ([f"{n}", f"{n}-created"] if n == turn else [f"{n}"])
            }
            other.delete()
            assert not other.exists()

    with ThreadPoolExecutor(writers) as pool:
        for done in [pool.submit(work, me) for me in range(writers)]:
            done.result()
    assert len(root.find()) == writers * rounds
    injected = s3_proxy.counts() - before
    s3_proxy.set_rules([])
    faults = {fault: injected[fault] for fault in ("503", "500", "reset", "truncate", "lost_ack")}
    assert sum(faults.values()) > 0.15 * injected["requests"] > 75
    assert min(faults.values()) > 0


def test_a_race_of_creators_has_one_winner_who_knows_it(s3_proxy: FaultProxy, s3_prefix: str) -> None:
    racers, rounds = 6, 4
    s3_proxy.set_rules([Rule("lost_ack", 0.5, method="PUT"), *mixed(0.2)])
    for turn in range(rounds):
        file = Location.parse(s3_prefix) / f"manifest-{turn}"
        barrier = threading.Barrier(racers)

        def race(me: int, file: Location = file, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return file.create(f"writer {me}".encode())

        with ThreadPoolExecutor(racers) as pool:
            won = list(pool.map(race, range(racers)))
        assert won.count(True) == 1
        assert file.read_bytes() == f"writer {won.index(True)}".encode()


def test_an_upload_in_parts_survives_lost_acknowledgements(s3_proxy: FaultProxy, s3_prefix: str) -> None:
    file, data = Location.parse(s3_prefix) / "large", random.Random(0).randbytes(12 * 2**20)
    before = s3_proxy.counts()["lost_ack"]
    # The second one hits the completion: what is completed already cannot be completed again.
    rules = [
        Rule("lost_ack", method="PUT", path="partNumber=2", count=1),
        Rule("lost_ack", method="POST", path="uploadId=", count=1),
    ]
    s3_proxy.set_rules([*rules, *mixed(0.2)])
    file.fs.pipe_file(file.path, data, chunksize=5 * 2**20)
    s3_proxy.set_rules([])
    assert s3_proxy.counts()["lost_ack"] - before >= 2
    assert file.read_bytes() == data


def test_a_store_that_is_killed_and_restarted_only_makes_writers_wait(
    s3_server: object, s3_prefix: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if not isinstance(s3_server, S3Store):
        pytest.skip("the store given by DDPM_TEST_S3_BUCKET is not ours to kill")
    monkeypatch.setattr(s3, "_SILENCE_S", 0.5)
    root, acknowledged, stop = Location.parse(s3_prefix), [], threading.Event()

    def write(me: int) -> None:
        turn = 0
        while not stop.is_set():
            name = f"{me}-{turn}"
            (root / name).write_bytes(content(name))
            acknowledged.append(name)
            turn += 1

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 60
        while len(acknowledged) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(acknowledged) >= count

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, me) for me in range(3)]
        try:
            wait_for(20)
            s3_server.kill()
            at_kill = len(acknowledged)
            time.sleep(5)  # the outage
            s3_server.restart()
            wait_for(at_kill + 20)
        finally:
            stop.set()
        for writer in writers:
            writer.result()
    assert all((root / name).read_bytes() == content(name) for name in acknowledged)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("storage:")]
    assert len(told) == 2
    assert "trying again for up to 180 s" in told[0]
    assert "the store answers again after 0:" in told[1]


@pytest.mark.parametrize(
    ("operation", "requests"),
    [("read", 1), ("write", 1), ("create", 1), ("exists", 1), ("size", 1), ("list", 1), ("find", 1), ("delete", 1)],
)
def test_a_denial_is_final_at_once(s3_proxy: FaultProxy, s3_prefix: str, operation: str, requests: int) -> None:
    before = s3_proxy.counts()["requests"]
    s3_proxy.set_rules([Rule("403")])
    with pytest.raises(StorageError, match="permission denied"):
        OPERATIONS[operation](Location.parse(s3_prefix))
    assert s3_proxy.counts()["requests"] - before == requests


def test_what_is_missing_or_refused_is_told_at_once(
    s3_proxy: FaultProxy, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = s3_proxy.counts()["requests"]
    with pytest.raises(StorageError, match="does not exist"):
        (Location.parse(s3_prefix) / "gone").read_bytes()
    with pytest.raises(StorageError, match="the bucket does not exist"):
        Location.parse("s3://no-such-bucket/x").write_bytes(b"")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_connections()
    with pytest.raises(StorageError, match="refused the credentials"):
        (Location.parse(s3_prefix) / "x").write_bytes(b"")
    assert s3_proxy.counts()["requests"] - before == 3


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_store_that_stays_away_is_an_error_not_an_absence(
    s3_proxy: FaultProxy, s3_prefix: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDPM_STORAGE_PATIENCE_S", "0.2")
    forget_connections()
    s3_proxy.set_rules([Rule("503")])
    expected = (
        rf"the store {s3_proxy.endpoint} keeps failing \((SlowDown|503)\); look at its own logs \(tried for 0.2 s\)$"
    )
    with pytest.raises(StorageError, match=expected):
        OPERATIONS[operation](Location.parse(s3_prefix))
    with pytest.raises(StorageError, match=expected):
        Location.parse(s3_prefix).parent.exists()


def _read(uri: str, answers: Any) -> None:
    answers.put(Location.parse(uri).read_bytes())


def test_a_forked_process_has_connections_of_its_own_and_leaves_those_of_its_parent(
    s3_proxy: FaultProxy, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_READ_TIMEOUT_S", 1)
    forget_connections()
    file = Location.parse(s3_prefix) / "file"
    file.write_bytes(b"content")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_read, args=(file.uri, answers))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert answers.get() == b"content"
    before = s3_proxy.counts()["requests"]
    assert file.read_bytes() == b"content"
    assert s3_proxy.counts()["requests"] - before == 1, "the parent's connection had gone deaf"


def test_a_pickled_file_system_keeps_its_patience_and_carries_no_secret(
    s3_proxy: FaultProxy, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Location.parse(s3_prefix) / "file"
    file.write_bytes(b"content")
    pickled = pickle.dumps(file.fs)
    copy = pickle.loads(pickled)
    s3_proxy.set_rules([Rule("503", count=3)])
    assert copy.cat_file(file.path) == b"content"
    assert b"secret" not in pickled
