"""A model as it is kept beside samples: where it came from, and that it is the one that was stored."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.sample_runs import save_tiny_model

from pipelines.cli.errors import ModelError
from pipelines.models.find import find_model
from pipelines.models.kept import is_registry_reference, stored_model
from pipelines.storage.location import Location


def test_a_stored_model_says_where_it_came_from_and_is_checked(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "flowers")
    found, place = find_model(str(tmp_path / "flowers"), None, tmp_path), Location.parse(tmp_path / "copy")
    assert stored_model(place) is None
    found.keep(place)
    assert stored_model(place) == found
    scored = replace(found, score="3.0000 bits/dim")
    scored.keep(Location.parse(tmp_path / "scored"))
    assert stored_model(Location.parse(tmp_path / "scored")) == scored
    (place / "ema.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match=f"is not the model {found.model_id[:12]}"):
        stored_model(place)


def test_which_references_are_the_registrys() -> None:
    assert is_registry_reference("models:/a@b")
    assert is_registry_reference("runs:/a")
    assert not is_registry_reference("s3://bucket/models")
