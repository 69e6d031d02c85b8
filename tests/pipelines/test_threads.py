"""Threads of one operation sleep while they wait for each other."""

import os
import subprocess
import sys

import pytest
from job_process import REPOSITORY


@pytest.mark.parametrize(("given", "then"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_leave_the_processor_to_others_before_torch_is_loaded(given: str | None, then: str) -> None:
    program = """
import os, sys
import pipelines.console, pipelines.config, pipelines.training.config
print("torch" in sys.modules, os.environ["OMP_WAIT_POLICY"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    shown = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert shown.stdout == f"False {then}\n", shown.stderr
