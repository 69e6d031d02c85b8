"""Locations: local files, a real S3 store, races, and one clear line for everything that goes wrong."""

import math
import pickle
import re
import socket
import ssl
import subprocess
import threading
import traceback
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.s3_store import READ_ONLY_KEY, READ_ONLY_SECRET, ExternalStore, S3Store
from support.small_disk import small_disk

from pipelines.cli.errors import StorageError
from pipelines.storage.location import Location, forget_connections, json_bytes
from pipelines.storage.ownership import delete_files, discard_temporaries, first_file


@pytest.fixture(params=["local", "s3", "gcs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return Location.parse(tmp_path if request.param == "local" else request.getfixturevalue(f"{request.param}_prefix"))


def test_written_content_is_read_back_and_replaced_as_a_whole(root: Location) -> None:
    file = root / "deep/er" / "file.bin"
    assert not file.exists()
    file.write_bytes(b"first, longer")
    file.write_bytes(b"second")
    assert file.exists()
    assert file.read_bytes() == b"second"
    assert file.size() == 6
    with file.open() as opened:
        opened.seek(3)
        assert opened.read() == b"ond"


def test_listing_names_direct_children_in_order(root: Location) -> None:
    for name in ("b", "a", "folder/inner", "c"):
        (root / name).write_bytes(name.encode())
    assert root.list() == ["a", "b", "c", "folder"]
    assert [root.sizes()[name] for name in "abc"] == [1, 1, 1]
    assert {path.rsplit("/", 1)[1]: size for path, size in root.find().items()} == {"a": 1, "b": 1, "c": 1, "inner": 12}
    assert [path.rsplit("/", 1)[1] for path in (root / "[ab]").glob()] == ["a", "b"]
    assert (root / "nothing").list() == []
    assert (root / "nothing").find() == {}


def test_deleting_is_idempotent(root: Location) -> None:
    (root / "tree/a").write_bytes(b"1")
    (root / "tree/b/c").write_bytes(b"2")
    (root / "tree/a").delete()
    (root / "tree/a").delete()
    assert [path.rsplit("/", 1)[1] for path in (root / "tree").find()] == ["c"]
    assert first_file(root / "tree") in ("b/c", "b"), "a store may name the first level only"
    assert first_file(root / "nothing") is None
    for _ in range(2):
        delete_files(root / "tree", ["a", "b/c", "gone", "no/such/place"])
        assert (root / "tree").find() == {}
        assert first_file(root / "tree") is None
        assert not root.is_local or not (root / "tree").exists(), "directories that are empty then go, too"


def test_directories_travel_both_ways(root: Location, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "inner").mkdir(parents=True)
    (source / "a").write_bytes(b"A")
    (source / "inner" / "b").write_bytes(b"B")
    (root / "up").upload_directory(source)
    (root / "up").download_directory(copy)
    assert (copy / "a").read_bytes() == b"A"
    assert (copy / "inner" / "b").read_bytes() == b"B"
    with pytest.raises(StorageError, match="does not exist"):
        (root / "elsewhere").download_directory(copy)


def test_conditional_create_keeps_the_first_content(root: Location) -> None:
    file = root / "manifest.json"
    assert file.create(b"mine")
    assert file.create(b"mine"), "a retry of a write whose acknowledgement was lost is no conflict"
    assert not file.create(b"theirs")
    assert file.read_bytes() == b"mine"


def test_conditional_create_has_one_winner_among_racing_threads(root: Location) -> None:
    racers, rounds = 8, 3
    for attempt in range(rounds):
        file, barrier, won = root / f"race-{attempt}", threading.Barrier(racers), [False] * racers

        def race(me: int, file: Location = file, barrier: threading.Barrier = barrier, won: list[bool] = won) -> None:
            barrier.wait()
            won[me] = file.create(f"writer {me}".encode())

        threads = [threading.Thread(target=race, args=(me,)) for me in range(racers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(won) == 1
        assert file.read_bytes() == f"writer {won.index(True)}".encode()


def test_reading_what_is_missing_or_not_json_names_it(root: Location) -> None:
    with pytest.raises(StorageError, match=r"gone: cannot read: does not exist"):
        (root / "gone").read_bytes()
    with pytest.raises(StorageError, match=r"gone: cannot look up: does not exist"):
        (root / "gone").size()
    (root / "text").write_bytes(b"{not json")
    with pytest.raises(StorageError, match="is not JSON"):
        (root / "text").read_json()
    (root / "good").write_json({"b": 1, "a": [2]})
    assert (root / "good").read_json() == {"a": [2], "b": 1}


@pytest.mark.skipif(find_spec("adlfs") is not None, reason="the driver that must be missing is installed")
@pytest.mark.parametrize("protocol", ["az", "abfs"])
def test_a_missing_driver_is_named_with_what_brings_it(protocol: str) -> None:
    with pytest.raises(
        StorageError, match=rf"location = '{protocol}://c/x': no driver .*; install ddpm-pipeline\[azure\]"
    ):
        Location.parse(f"{protocol}://c/x")


def test_missing_gcs_bucket_is_named(gcs_prefix: str) -> None:
    with pytest.raises(StorageError, match=r"gs://no-such-bucket/x: cannot write: does not exist"):
        Location.parse("gs://no-such-bucket/x").write_bytes(b"")


def test_missing_bucket_is_named(s3_prefix: str) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/x: cannot write: the bucket does not exist"):
        Location.parse("s3://no-such-bucket/x").write_bytes(b"")


@pytest.mark.parametrize(
    ("key", "secret", "match"),
    [
        ("unknownkeyid", "some-secret-value", "refused the credentials"),
        (None, "some-secret-value", "refused the credentials"),
        (READ_ONLY_KEY, READ_ONLY_SECRET, "permission denied"),
    ],
)
def test_refused_credentials_are_named_and_never_shown(
    s3_prefix: str,
    s3_server: S3Store | ExternalStore,
    monkeypatch: pytest.MonkeyPatch,
    key: str | None,
    secret: str,
    match: str,
) -> None:
    if key == READ_ONLY_KEY and isinstance(s3_server, ExternalStore):
        pytest.skip("the store given by DDPM_TEST_S3_BUCKET has no such read-only key")
    if key is not None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    forget_connections()
    with pytest.raises(StorageError, match=match) as raised:
        Location.parse(s3_prefix + "/x").write_bytes(b"")
    assert secret not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unreachable_endpoint_is_one_line(s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("DDPM_STORAGE_PATIENCE_S", "0.1")
    forget_connections()
    expected = (
        "/x: cannot read: the store http://127.0.0.1:9 cannot be reached; check AWS_ENDPOINT_URL and the network "
        "(tried for 0.1 s)"
    )
    with pytest.raises(StorageError) as raised:
        Location.parse(s3_prefix + "/x").read_bytes()
    assert str(raised.value) == f"{s3_prefix}{expected}"


def test_credentials_in_the_endpoint_are_refused_and_not_shown(s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://someone:hidden@127.0.0.1:9")
    forget_connections()
    for operation in (Location.parse(s3_prefix).read_bytes, Location.parse(s3_prefix).exists):
        with pytest.raises(StorageError, match=r"^AWS_ENDPOINT_URL = http://127.0.0.1:9: must not carry") as raised:
            operation()
        assert "hidden" not in "".join(traceback.format_exception(raised.value))


def test_an_endpoint_that_is_no_url_is_refused(s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9")
    forget_connections()
    with pytest.raises(StorageError, match=r"^AWS_ENDPOINT_URL: is no URL; write it as http://host:port"):
        Location.parse(s3_prefix).read_bytes()


def test_a_bucket_name_that_cannot_be_is_refused(s3_prefix: str) -> None:
    with pytest.raises(StorageError, match=r'^s3://no bucket/x: cannot read: Invalid bucket name "no bucket"'):
        Location.parse("s3://no bucket/x").read_bytes()


def test_a_certificate_that_is_not_trusted_is_refused_at_once(
    s3_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out certificate -days 1 -subj /CN=localhost"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{listener.getsockname()[1]}")
        forget_connections()

        def serve() -> None:
            with suppress(OSError):  # the client hangs up, and the listener is closed in the end
                while True:
                    connection, _ = listener.accept()
                    with suppress(OSError), context.wrap_socket(connection, server_side=True):
                        pass

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(StorageError, match="the store's certificate is not trusted; set AWS_CA_BUNDLE"):
            Location.parse(s3_prefix).read_bytes()


@pytest.mark.parametrize("value", ["soon", "0", "-1", "inf", "nan", ""])
def test_patience_is_a_positive_number(s3_prefix: str, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DDPM_STORAGE_PATIENCE_S", value)
    forget_connections()
    with pytest.raises(StorageError, match=r"DDPM_STORAGE_PATIENCE_S = .* must be a positive number of seconds"):
        Location.parse(s3_prefix).exists()


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        ("", "must not be empty"),
        ("ftpx://host/file", "unknown protocol 'ftpx'"),
        ("s3://", "the bucket is missing"),
        ("s3://key:secret@bucket/x", "must not carry credentials"),
    ],
)
def test_bad_uris_are_refused(uri: str, match: str) -> None:
    with pytest.raises(StorageError, match=match) as raised:
        Location.parse(uri)
    assert "secret" not in str(raised.value).replace("AWS_SECRET", "")


def test_parsing_makes_one_canonical_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = str(tmp_path / "a" / "b")
    for text in ("a/b", "a/b/", "~/a/b", f"file://{expected}", expected):
        assert Location.parse(text).uri == expected
    location = Location.parse("s3://bucket/key/")
    assert (location.uri, location.path, location.name) == ("s3://bucket/key", "bucket/key", "key")
    assert not location.is_local
    assert location.parent.uri == "s3://bucket"
    assert Location.parse(location) is location


@given(st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1), st.integers(1, 4))
def test_joining_and_parent_are_inverse_and_pickle_keeps_identity(name: str, depth: int) -> None:
    location = Location.parse("/root")
    for _ in range(depth):
        location = location / name
    assert location.name == name
    assert (location.parent / name) == location
    assert pickle.loads(pickle.dumps(location)) == location


@given(st.dictionaries(st.text(), st.integers()))
def test_json_bytes_do_not_depend_on_key_order(value: dict[str, int]) -> None:
    assert json_bytes(value) == json_bytes(dict(reversed(value.items())))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_json_has_no_infinity_and_no_nan(tmp_path: Path, value: float) -> None:
    location = Location.parse(tmp_path / "file.json")
    with pytest.raises(ValueError, match="JSON"):
        location.write_json({"error": value})
    assert not location.exists()


def test_a_killed_writer_leaves_nothing_visible(tmp_path: Path) -> None:
    foreign = {".part-00000.parquet.0123.tmp", f".thesis.txt.{'0' * 32}.tmp", ".part-00000.parquet.tmp"}
    for name in (f".part-00000.parquet.{'0123456789abcdef' * 2}.tmp", *foreign):
        (tmp_path / name).write_bytes(b"half")
    root = Location.parse(tmp_path)
    assert set(root.list()) == {".part-00000.parquet.0123.tmp", ".part-00000.parquet.tmp"}
    discard_temporaries(root, r"part-\d{5,}\.parquet")
    assert {path.name for path in tmp_path.iterdir()} == foreign


def test_full_disk_is_one_line_and_leaves_the_old_content(tmp_path: Path) -> None:
    with small_disk(tmp_path, "256k") as disk:
        file = Location.parse(disk / "file")
        file.write_bytes(b"old")
        for write in (file.write_bytes, (file.parent / "new").create):
            with pytest.raises(StorageError, match=r"cannot write: the disk is full"):
                write(bytes(2**20))
        assert file.read_bytes() == b"old"
        assert [path.name for path in disk.iterdir()] == ["file"]


def test_unwritable_places_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=re.escape("a file is where a directory is needed")):
        Location.parse(tmp_path / "file" / "below").write_bytes(b"")
    with pytest.raises(StorageError, match="is a directory"):
        Location.parse(tmp_path).read_bytes()
