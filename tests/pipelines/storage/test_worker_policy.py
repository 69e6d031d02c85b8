"""The policy of deploy/aws/stack.yaml for storage allows what the project asks of S3, and nothing else."""

import pytest
from support.cloudformation import STACK

from pipelines.storage.location import Location
from pipelines.storage.ownership import delete_files, first_file

POLICY = STACK.policies["StorageAccess"]
# Which action each request needs (Amazon S3 User Guide, "Required permissions for Amazon S3 API operations").
ACTIONS = {
    "CompleteMultipartUpload": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "PutObject": "s3:PutObject",
    "UploadPart": "s3:PutObject",
}


def use_everything(root: Location) -> None:
    """Each method of a location on an object that is there, and on one that is not."""
    there, absent = root / "a/there.json", root / "a/absent.json"
    there.write_json({"n": 1})
    assert there.create(there.read_bytes())
    assert not there.create(b"other")
    assert (root / "a/new").create(b"new")
    for location, exists in ((there, True), (absent, False), (root / "a", True), (root / "b", False)):
        assert location.exists() is exists
    assert there.size() > 0
    assert there.version()
    with there.open("rb") as file:
        assert file.read(1) == b"{"
    with (root / "a/large").open("wb", block_size=5 * 2**20) as file:  # as objects of more than 100 MiB are written
        file.write(bytes(11 * 2**20))
    assert (root / "a").list() == ["large", "new", "there.json"]
    assert len((root / "a").find()) == 3
    assert len((root / "a/*.json").glob()) == 1
    there.delete()
    absent.delete()
    assert first_file(root) == "a/large"
    delete_files(root, ["a/large", "a/new", "b/gone"])


@pytest.mark.slow
def test_the_policy_allows_what_storage_asks_and_nothing_else(s3_prefix):
    root = Location.parse(s3_prefix)
    bucket, _, prefix = root.path.partition("/")
    operations, keys = set(), set()

    def note(model, params, **more):
        operations.add(model.name)
        if model.name == "ListObjectsV2":
            keys.add(params["query_string"].get("prefix"))
        elif model.name != "DeleteObjects":  # its keys are in the body
            keys.add(params["url_path"].partition("?")[0].removeprefix("/").removeprefix(f"{bucket}/"))

    events = root.fs.connect().meta.events
    events.register("before-call.s3", note, unique_id="note")
    try:
        use_everything(root)
    finally:
        events.unregister("before-call.s3", unique_id="note")
    allowed = {action for entry in POLICY["Statement"] for action in [entry["Action"]] if isinstance(action, str)}
    allowed |= {
        action for entry in POLICY["Statement"] if isinstance(entry["Action"], list) for action in entry["Action"]
    }
    # Of an upload that fails half-way.
    assert {ACTIONS[operation] for operation in operations} == allowed - {"s3:AbortMultipartUpload"}
    assert {"HeadObject", "ListObjectsV2", "UploadPart", "DeleteObjects"} <= operations
    assert None not in keys  # no listing of the whole bucket
    assert [key for key in keys if not key.startswith(f"{prefix}/")] == []
