"""The watcher against a real HTTP server that speaks the instance metadata service's protocol, version 2."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import psutil
import pytest
from support.metadata_service import SpotInstance

from pipelines.cli.config import parse
from pipelines.cli.errors import ClusterError, ConfigError
from pipelines.cluster.spot_notice import MetadataService, Notice, Raylet, SpotNoticeConfig, watch


@pytest.fixture
def instance():
    with SpotInstance() as instance:
        yield instance


@pytest.fixture
def raylet():
    """A process that can end, under the name of a node that is not there."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield Raylet(psutil.Process(process.pid), "ab" * 28, "127.0.0.1:1")
    process.kill()
    process.wait()


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_question_needs_a_token_and_a_missing_answer_is_none(instance):
    service = MetadataService(instance.address)
    assert service.get("spot/instance-action") is None
    assert service.get("instance-life-cycle") == "spot"
    assert instance.log == ["PUT token", "GET spot/instance-action 404", "GET instance-life-cycle 200"]


def test_an_expired_token_is_renewed(instance):
    service = MetadataService(instance.address)
    assert service.get("instance-life-cycle") == "spot"
    instance.expire_tokens()
    assert service.get("instance-life-cycle") == "spot"
    assert instance.log[2:] == ["GET instance-life-cycle 401", "PUT token", "GET instance-life-cycle 200"]


def test_a_token_that_is_always_refused_is_an_error(instance):
    instance.refuse_tokens = True
    with pytest.raises(OSError, match="401"):
        MetadataService(instance.address).get("instance-life-cycle")
    assert instance.log.count("PUT token") == 2


def test_no_proxy_is_asked(instance, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert MetadataService(instance.address).get("instance-life-cycle") == "spot"


def test_a_notice_is_read():
    notice = Notice.parse('{"action": "terminate", "time": "2026-11-22T08:22:00Z"}')
    assert notice == Notice("terminate", datetime(2026, 11, 22, 8, 22, tzinfo=UTC))
    in_a_minute = Notice("stop", datetime.now(UTC) + timedelta(seconds=60))
    assert 0 < in_a_minute.seconds_left <= 60


@pytest.mark.parametrize(
    "text",
    ["", "no json", "[]", '{"action": "terminate"}', '{"action": "stop", "time": "2026-11-22T08:22:00"}'],
)
def test_what_is_no_notice_is_refused(text):
    with pytest.raises(ValueError, match="is no notice"):
        Notice.parse(text)


def test_the_watch_ends_with_the_raylet(instance, raylet, capsys):
    raylet.process.kill()
    watch(raylet, MetadataService(instance.address), poll_seconds=0.05)
    assert lines(capsys) == ["the raylet has ended: nothing to watch for"]


def test_hiccups_are_survived_and_each_event_is_one_line(instance, raylet, capsys):
    # One answer each, in turn: 503 twice, a cut connection, half a body, no notice; then the raylet ends.
    instance.answers = [503, 503, "cut", "half", 404]
    instance.recommendation = '{"noticeTime": "2026-11-22T08:00:00Z"}'
    instance.when_asked(lambda: instance.log.count("GET spot/instance-action 404") > 1, raylet.process.kill)
    watch(raylet, MetadataService(instance.address), poll_seconds=0.05)
    said = lines(capsys)
    assert [line.partition(" (")[0] for line in said] == [
        "the metadata service cannot be used",
        "the metadata service cannot be used",
        "the metadata service cannot be used",
        'rebalance recommendation {"noticeTime": "2026-11-22T08:00:00Z"}: an interruption is likelier now, '
        "nothing is drained",
        "the metadata service answers again",
        "the raylet has ended: nothing to watch for",
    ]
    assert "503" in said[0]


def test_a_service_that_is_not_there_is_survived(raylet, capsys):
    raylet.process.kill()
    watch(raylet, MetadataService("http://127.0.0.1:1"), poll_seconds=0.05)
    said = lines(capsys)
    assert len(said) == 2
    assert "Connection refused" in said[0]
    assert said[1] == "the raylet has ended: nothing to watch for"


def test_a_damaged_notice_is_asked_for_again(instance, raylet, capsys):
    instance.notice = '{"action": "term'
    instance.when_asked(lambda: instance.log.count("GET spot/instance-action 200") > 2, raylet.process.kill)
    watch(raylet, MetadataService(instance.address), poll_seconds=0.05)
    assert [line[:35] for line in lines(capsys)] == [
        "the metadata service cannot be used",
        "the raylet has ended: nothing to wa",
    ]


def test_a_notice_for_a_raylet_that_has_ended_needs_no_drain(instance, raylet, capsys):
    """The GCS is away too, as when the whole cluster is stopped."""
    instance.notice = json.dumps({"action": "stop", "time": "2001-01-01T00:00:00Z"})
    raylet.process.kill()
    raylet.process.wait()
    watch(raylet, MetadataService(instance.address), poll_seconds=0.05)
    assert lines(capsys)[-1] == "the raylet has ended: nothing to drain"


def test_no_such_raylet_is_refused(raylet):
    with pytest.raises(ClusterError, match=rf"raylet_pid = {raylet.process.pid}: no raylet runs here; start it first"):
        Raylet.find(raylet.process.pid)


@pytest.mark.parametrize(
    ("argument", "value"), [("poll_seconds", "0"), ("poll_seconds", "61"), ("metadata", "169.254.169.254")]
)
def test_bad_options_are_refused(argument, value):
    with pytest.raises(ConfigError, match=rf"{argument} = .*must"):
        parse(SpotNoticeConfig, [f"--{argument}", value], "")
