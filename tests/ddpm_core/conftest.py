"""Checks every shape annotation of ddpm_core while its tests run, and shares the reference values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

# Before the first import of ddpm_core: from here on a wrong shape or dtype raises.
install_import_hook("ddpm_core", "beartype.beartype")

REFERENCE = Path(__file__).parents[1] / "data" / "ddpm_reference.json"


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """Independent float64 (decoder: 60-digit) values; the file's "about" describes them."""
    return json.loads(REFERENCE.read_text())


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
