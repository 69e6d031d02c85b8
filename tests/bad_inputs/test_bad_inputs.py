"""Every bad input is refused in one clear line, at once, with little memory, and leaves nothing behind.

The table of all of them is docs/bad_inputs.md. To make it anew, and to print it:

    UPDATE_BAD_INPUTS=1 uv run pytest tests/bad_inputs -s
"""

import functools
import tempfile
from pathlib import Path

import pytest
from bad_inputs import recipes
from bad_inputs.harness import REPOSITORY, Case, Outcome, run

CASES: list[Case] = [
    *recipes.CASES,
]
TABLE = REPOSITORY / "docs" / "bad_inputs.md"


@functools.cache
def outcome_of(case: Case) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="bad-input-") as directory:
        return run(case, Path(directory))


@pytest.mark.parametrize("case", CASES, ids=[f"{case.area}: {case.name}" for case in CASES])
def test_is_refused_in_one_clear_line(case: Case) -> None:
    outcome = outcome_of(case)
    assert outcome.code == case.code, outcome
    *before, last = outcome.stderr.removesuffix("\n").split("\n")
    assert last.startswith("error: "), outcome
    # No line breaks, and no sequence that a terminal obeys.
    assert all(line.isprintable() for line in (*before, last)), outcome
    assert not any(line.startswith(("error", "Traceback")) for line in before), outcome
    assert not outcome.message.startswith("unexpected"), outcome
    for text in case.says:
        assert text in outcome.message
    assert outcome.stdout == ""
    assert case.litter(outcome) == []
