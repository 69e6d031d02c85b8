"""What a request to S3 needs the right to, and whether a policy document gives it."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


def right_of(method: str, target: str) -> tuple[str, str, str | None] | None:
    """(action, resource without its ARN's beginning, prefix that is listed) of a request by path; None for the deletion
    of many objects, which the request's body names.

    From Amazon S3's table of actions (Service Authorization Reference).

    >>> right_of("GET", "/bucket?list-type=2&prefix=a/")
    ('s3:ListBucket', 'bucket', 'a/')
    >>> right_of("DELETE", "/bucket/a/b?uploadId=1")
    ('s3:AbortMultipartUpload', 'bucket/a/b', None)
    """
    parts = urlsplit(target)
    bucket, _, key = unquote(parts.path).removeprefix("/").partition("/")
    query = parse_qs(parts.query, keep_blank_values=True)
    if not key and method == "GET":
        return "s3:ListBucket", bucket, query.get("prefix", [""])[0]
    if not key and method == "HEAD":
        return "s3:ListBucket", bucket, None
    if not key and method == "POST":
        return None
    if method == "DELETE" and "uploadId" in query:
        return "s3:AbortMultipartUpload", f"{bucket}/{key}", None
    actions = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject", "DELETE": "s3:DeleteObject"}
    # POST begins and ends an upload of many parts.
    return actions.get(method, "s3:PutObject"), f"{bucket}/{key}", None


def allows(policy: Mapping[str, Any], action: str, resource: str, prefix: str | None) -> bool:
    """Whether a policy of Allow statements, with no condition but StringLikeIfExists on s3:prefix, allows it."""
    for entry in policy["Statement"]:
        conditions = entry.get("Condition", {})
        assert conditions.keys() <= {"StringLikeIfExists"}
        like = conditions.get("StringLikeIfExists", {}).get("s3:prefix")
        if (
            action in _listed(entry["Action"])
            and any(_matches(pattern.removeprefix("arn:aws:s3:::"), resource) for pattern in _listed(entry["Resource"]))
            and (like is None or prefix is None or any(_matches(pattern, prefix) for pattern in _listed(like)))
        ):
            return True
    return False


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _matches(pattern: str, text: str) -> bool:
    """As IAM matches: * is any text."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text, re.DOTALL) is not None
