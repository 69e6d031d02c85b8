"""Checks every shape annotation of ddpm_core while its tests run, and shares the reference values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

# Before the first import of ddpm_core: from here on a wrong shape or dtype raises.
install_import_hook("ddpm_core", "beartype.beartype")

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """Independent float64 (decoder: 60-digit) values; the file's "about" describes them."""
    return json.loads((DATA / "ddpm_reference.json").read_text())


@pytest.fixture(scope="session")
def modern_reference() -> dict[str, Any]:
    """The same of models since: each part's "about" describes it."""
    return json.loads((DATA / "modern_reference.json").read_text())


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
