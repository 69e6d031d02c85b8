"""Threads of one operation spin only shortly while they wait for each other."""

import os
import subprocess
import sys

import pytest
from support.job_process import REPOSITORY

from pipelines import THREADS


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, "None 10000"),
        ({"GOMP_SPINCOUNT": "7"}, "None 7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
    ],
)
def test_waiting_threads_leave_the_processor_to_others_before_torch_is_loaded(given: dict[str, str], then: str) -> None:
    program = """
import os, sys
import pipelines.cli.console, pipelines.cli.config, pipelines.training.config
print("torch" in sys.modules, *map(os.environ.get, pipelines.THREADS))
"""
    environment = {name: value for name, value in os.environ.items() if name not in THREADS} | given
    shown = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert shown.stdout == f"False {then}\n", shown.stderr
