"""Requests: what is stored of them, and what is told of one that was damaged."""

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from pipelines.cli.errors import ConfigError, DataError
from pipelines.outputs.request import Request
from pipelines.storage.location import Location

PATH = Location.parse("/out/manifest.json")


@dataclass(frozen=True)
class Part:
    rows: int
    every: float = 0.5

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ConfigError(f"rows = {self.rows}: must not be negative")


@dataclass(frozen=True)
class ToyRequest(Request):
    seed: int
    kind: Literal["a", "b"]
    share: float | None
    flag: bool
    name: str
    part: Part
    later: Part | None = None
    latest: int | None = None
    places: tuple[int, ...] | None = None


PLAIN = ToyRequest(3, "a", None, True, "x", Part(2))
STORED: dict[str, Any] = {
    "seed": 3,
    "kind": "a",
    "share": None,
    "flag": True,
    "name": "x",
    "part": {"rows": 2, "every": 0.5},
}


def test_a_field_with_default_none_is_stored_only_where_it_is_not() -> None:
    assert PLAIN.to_json() == STORED
    more = replace(PLAIN, share=1, later=Part(4, 1), latest=0, places=(3, 1))
    later = {"share": 1, "later": {"rows": 4, "every": 1}, "latest": 0, "places": [3, 1]}
    assert more.to_json() == {**STORED, **later}
    for request in (PLAIN, more):
        assert ToyRequest.from_json(json.loads(json.dumps(request.to_json())), PATH) == request


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": "3"}, "request.seed = '3': must be a whole number"),
        ({"seed": True}, "request.seed = True: must be a whole number"),
        ({"kind": "c"}, "request.kind = 'c': must be one of a, b"),
        ({"kind": ["a"]}, "request.kind = a list: must be one of a, b"),
        ({"share": "half"}, "request.share = 'half': must be a number or null"),
        ({"flag": 1}, "request.flag = 1: must be true or false"),
        ({"name": None}, "request.name = None: must be a text"),
        ({"part": 2}, "request.part = 2: must be an object"),
        ({"part": {"every": 0.5}}, "request.part.rows = None: must be there"),
        ({"part": {"rows": 2, "every": 0.5, "x": 1}}, "request.part.x = 1: is not known to this version"),
        ({"part": {"rows": -1, "every": 0.5}}, "request.part = a dict: does not hold together (rows = -1: must not"),
        ({"later": 1.5}, "request.later = 1.5: must be an object or null"),
        ({"places": 3}, "request.places = 3: must be a list or null"),
        ({"places": [3, "1"]}, "request.places[1] = '1': must be a whole number"),
        ({"sede": 3}, "request.sede = 3: is not known to this version"),
        ({"seed": ...}, "request.seed = None: must be there"),
        ({"share": ...}, "request.share = None: must be there"),
    ],
)
def test_damage_is_told_in_one_line_that_names_the_field(changed: dict[str, Any], told: str) -> None:
    stored = {name: value for name, value in {**STORED, **changed}.items() if value is not ...}
    with pytest.raises(DataError) as refusal:
        ToyRequest.from_json(stored, PATH)
    assert str(refusal.value).startswith(f"/out/manifest.json: {told}")
    assert str(refusal.value).endswith("; restore the file, or delete the output and make it again")
