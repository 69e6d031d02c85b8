"""The spool: nothing that was appended is lost, doubled, reordered or torn, whatever happens to the writers."""

import json
import math
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cli.errors import DDPMError, StorageError
from pipelines.tracking.spool import Spool, SpoolLock, SpoolState, iter_records, read_records

texts = st.text(max_size=40)
numbers = st.floats(allow_nan=False, allow_infinity=False)
payloads = st.dictionaries(texts, numbers, max_size=5)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(payloads, max_size=20), piece=st.integers(1, 2000))
def test_what_is_appended_is_read_back_in_order_in_any_pieces(tmp_path_factory, values, piece):
    spool = Spool(tmp_path_factory.mktemp("spool") / "s.jsonl")
    for step, value in enumerate(values):
        spool.append("metrics", step=step, values=value)
    read, offset = [], 0
    while True:
        records, end, unreadable = read_records(spool.path, offset, piece)
        assert unreadable == 0
        read += records
        if end == offset:
            break
        offset = end
    assert [(record.payload["step"], record.payload["values"]) for record in read] == list(enumerate(values))
    assert [record.timestamp_ms for record in read] == sorted(record.timestamp_ms for record in read)
    for record in read:  # the offsets of a record address that record
        again, end, _ = read_records(spool.path, record.start, 1)
        assert (again, end) == ([record], record.end)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 400))
def test_a_line_torn_at_any_byte_costs_that_line_only(tmp_path_factory, cut):
    spool = Spool(tmp_path_factory.mktemp("spool") / "s.jsonl")
    for step in range(5):
        spool.append("metrics", step=step, values={"train/loss": 0.5})
    content = spool.path.read_bytes()
    kept = content[: max(0, len(content) - cut)]
    spool.path.write_bytes(kept)
    whole = kept.count(b"\n")
    assert [r.payload["step"] for r in iter_records(spool.path)] == list(range(whole))
    spool.append("metrics", step=99, values={})
    only_the_newline_was_lost = kept.endswith(b"}}")
    expected = [*range(whole + only_the_newline_was_lost), 99]
    assert [r.payload["step"] for r in iter_records(spool.path)] == expected


def test_several_processes_append_without_mixing(tmp_path):
    path = tmp_path / "s.jsonl"
    code = (
        "import sys\nfrom pipelines.tracking.spool import Spool\nspool = Spool(sys.argv[1])\n"
        "for i in range(400): spool.append('metrics', step=i, values={sys.argv[2]: i, 'pad': 'x' * (i * 7 % 900)})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, path, str(n)]) for n in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    _, _, unreadable = read_records(path, 0, 1 << 30)
    assert unreadable == 0
    for n in range(4):
        assert [r.payload["step"] for r in iter_records(path) if str(n) in r.payload["values"]] == list(range(400))


def test_a_full_disk_never_raises_and_the_spool_recovers(tmp_path):
    # RLIMIT_FSIZE tears a line in the middle and then refuses, as a full disk does.
    code = """
import logging, pickle, resource, sys
from pipelines.tracking.spool import Spool
logging.basicConfig(format="LOG %(message)s", stream=sys.stdout)
spool = Spool(sys.argv[1])
spool.append("metrics", step=0, values={})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (spool.path.stat().st_size + 30, hard))
for step in (1, 2, 3): spool.append("metrics", step=step, values={})
print("waiting", spool.flush(), "in a copy", pickle.loads(pickle.dumps(spool)).flush())
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
spool.append("metrics", step=4, values={})
print("waiting", spool.flush())
"""
    path = tmp_path / "s.jsonl"
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.splitlines()[-2:] == ["waiting 3 in a copy 0", "waiting 0"]
    assert out.stdout.count("LOG") == 1
    assert str(path) in out.stdout
    records, _, unreadable = read_records(path, 0)
    assert [r.payload["step"] for r in records] == [0, 1, 2, 3, 4]
    assert unreadable == 1


def test_a_directory_that_is_gone_never_raises(tmp_path, caplog):
    spool = Spool(tmp_path / "gone" / "s.jsonl")
    spool.append("metrics", step=0, values={})
    assert spool.flush() == spool.flush() == 1
    assert len(caplog.records) == 1, "waiting for room is not told again with every try"
    assert read_records(spool.path, 0) == ([], 0, 0)
    spool.path.parent.mkdir()
    assert spool.flush() == 0
    assert [record.payload["step"] for record in iter_records(spool.path)] == [0]


def test_scalars_of_numpy_survive_and_what_json_does_not_have_is_null(tmp_path):
    spool = Spool(tmp_path / "s.jsonl")
    spool.append("metrics", step=np.int64(3), values={"a": np.float32(0.5), "b": math.nan, "c": math.inf})
    (record,) = iter_records(spool.path)
    assert record.payload["step"] == 3
    assert record.payload["values"]["a"] == 0.5
    assert record.payload["values"] == {"a": 0.5, "b": None, "c": None}
    assert "NaN" not in spool.path.read_text()


@pytest.mark.parametrize(("kind", "payload"), [("metric", {}), ("metrics", {"step": 1}), ("image", {"key": "k"})])
def test_an_undefined_record_is_refused_at_once(tmp_path, kind, payload):
    with pytest.raises(ValueError, match=f"spool record '{kind}': lacks "):
        Spool(tmp_path / "s.jsonl").append(kind, **payload)


@pytest.mark.parametrize("line", [b"not json", b"[1]", b'{"kind": "metrics"}', b'{"kind": "x", "timestamp_ms": 1}'])
def test_foreign_lines_are_counted_and_skipped(tmp_path, line):
    spool = Spool(tmp_path / "s.jsonl")
    spool.path.write_bytes(line + b"\n\n")
    spool.append("note", markdown="x")
    records, end, unreadable = read_records(spool.path, 0)
    assert ([record.kind for record in records], unreadable) == (["note"], 1)
    assert end == spool.path.stat().st_size


def test_a_record_may_bring_its_own_time(tmp_path):
    spool = Spool(tmp_path / "s.jsonl")
    spool.append("metrics", step=1, values={}, timestamp_ms=1234)
    assert [record.timestamp_ms for record in iter_records(spool.path)] == [1234]


def test_a_spool_can_be_sent_to_another_process(tmp_path):
    spool = Spool(tmp_path / "s.jsonl")
    pickle.loads(pickle.dumps(spool)).append("note", markdown="from there")
    assert [record.payload for record in iter_records(spool.path)] == [{"markdown": "from there"}]


def test_state_survives_and_a_useless_one_is_replaced_by_a_fresh_one(tmp_path):
    spool = Spool(tmp_path / "s.jsonl")
    spool.append("note", markdown="x")
    state = SpoolState("http://a", run_id="r", offset=10, last_step={"m": 4}, deferred=[3])
    state.save(spool.path)
    assert SpoolState.load(spool.path, "http://a") == state
    assert SpoolState.load(spool.path, "http://b") == SpoolState("http://b")
    stored = SpoolState.path_for(spool.path)
    for damaged in ("", "{", "[]", '{"offset": 1}', json.dumps({**json.loads(stored.read_text()), "offset": 10**6})):
        stored.write_text(damaged)
        assert SpoolState.load(spool.path, "http://a") == SpoolState("http://a")


def test_one_owner_until_it_ends_even_by_sigkill(tmp_path):
    path = tmp_path / "s.jsonl"
    code = (
        "import sys, pathlib\nfrom pipelines.tracking.spool import SpoolLock\n"
        "lock = SpoolLock(pathlib.Path(sys.argv[1]))\nprint('locked', flush=True)\nsys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(DDPMError, match=rf"another job \(pid {owner.pid}\) is running"):
            SpoolLock(path)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
    SpoolLock(path).release()


def test_a_spool_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"tracking spool .*cannot be written"):
        SpoolLock(Path(tmp_path / "file" / "s.jsonl"))
