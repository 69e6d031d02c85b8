"""What a rank reports, and what of it is kept until it has certainly arrived."""

import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipelines.training.reports import Reports


def test_records_go_in_order_and_once() -> None:
    sent: list[dict[str, Any]] = []
    reports = Reports(0, sent.append)
    before = time.time()
    reports.metrics(1, {"loss": 2.0})
    reports.say("hello")
    reports.metrics(2, {"loss": 1.0}, seconds=12.5)
    reports.record({"kind": "image", "path": "x"})
    reports.send(2)
    reports.send(2)
    (first, second) = sent
    assert second == {"records": []}
    stamp = first["records"][0].pop("timestamp_ms")
    assert int(before * 1000) <= stamp <= time.time() * 1000
    assert first["records"] == [
        {"kind": "metrics", "step": 1, "values": {"loss": 2.0}},
        {"kind": "event", "message": "hello"},
        {"kind": "metrics", "step": 2, "values": {"loss": 1.0}, "timestamp_ms": 12500},
        {"kind": "image", "path": "x"},
    ]


def test_rank_0_speaks_for_all_and_every_node_for_itself() -> None:
    sent: list[dict[str, Any]] = []
    reports = Reports(1, sent.append, lambda: {"system/node_1/cpu": 50.0})
    reports.metrics(1, {"loss": 2.0})
    reports.say("hello")
    reports.record({"kind": "image"})
    reports.send(7)
    assert sent == [{"records": [{"kind": "metrics", "step": 7, "values": {"system/node_1/cpu": 50.0}}]}]
    assert reports.unsure() == []


@given(st.lists(st.sampled_from(["record", "say", "send", "checkpoint"]), max_size=60))
def test_a_checkpoint_keeps_all_records_of_the_last_three_reports_and_since_the_one_before(acts: list[str]) -> None:
    reports, sends, saved_at = Reports(0, lambda report: None), 0, 0
    made: list[tuple[int, dict[str, Any]]] = []  # with the number of reports sent before each
    for number, act in enumerate([*acts, "checkpoint"]):
        if act == "record":
            made.append((sends, {"kind": "metrics", "step": number}))
            reports.record(made[-1][1])
        elif act == "say":
            reports.say("not repeated")
        elif act == "send":
            sends += 1
            reports.send(0)
        else:
            kept = reports.unsure()
            assert kept == [record for at, record in made if at >= saved_at - 3]
            saved_at = sends
