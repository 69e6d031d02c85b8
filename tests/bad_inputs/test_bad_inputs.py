"""Every bad input is refused in one clear line, at once, with little memory, and leaves nothing behind.

The table of all of them is docs/bad_inputs.md. This prints it and writes it anew:

    UPDATE_BAD_INPUTS=1 uv run pytest tests/bad_inputs -n 0 -s
"""

import functools
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bad_inputs import (
    archives,
    datasets,
    encoding,
    evaluation_labels,
    fields,
    folders,
    models,
    quality,
    recipes,
    runs,
    sample_labels,
    tables,
)
from bad_inputs.files import prepared
from bad_inputs.harness import MEMORY_BYTES, REPOSITORY, SECONDS, Case, Outcome, run
from bad_inputs.model_files import model_files

CASES: list[Case] = [
    case
    for area in (
        recipes,
        fields,
        folders,
        archives,
        tables,
        datasets,
        models,
        sample_labels,
        encoding,
        evaluation_labels,
        quality,
        runs,
    )
    for case in area.CASES
]
TABLE = REPOSITORY / "docs" / "bad_inputs.md"
HEAD = """# Bad inputs

What the jobs say to {count} bad inputs. `tests/bad_inputs` makes each of them, runs the job's own script on it in a
process that may take {mebibytes} MiB beyond its libraries and {seconds} seconds, and demands: the exit code (1, or 2
for usage and configuration), one `error:` line without control characters, nothing written but what an unfinished
output is made of, and no input touched. This page is made by that test: `UPDATE_BAD_INPUTS=1 uv run pytest
tests/bad_inputs -n 0 -s`.

Long lines are cut off; what libraries say stands in brackets and depends on their versions.

A bad image among good ones is no reason to refuse a source: it is listed, with the reason, in the `rejected.parquet` of
the data set, up to `max_rejected_fraction`.

| Area | Input | Exit code | `error:` line |
|---|---|---|---|
"""


@functools.cache
def outcome_of(case: Case) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="bad-input-") as directory:
        return run(case, Path(directory))


@pytest.fixture(scope="module", autouse=True)
def _in_parallel(request: pytest.FixtureRequest) -> None:
    """Have the selected cases run at the same time, as many as there are cores."""
    selected = [
        item.callspec.params["case"]
        for item in request.session.items
        if "_in_parallel" in item.fixturenames and hasattr(item, "callspec")
    ]
    prepared(), model_files()  # what most are made of, once
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(outcome_of, selected))


def test_there_are_many_and_none_twice() -> None:
    names = [(case.area, case.name) for case in CASES]
    assert len(names) == len(set(names)) >= 200


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
    assert case.prints == (outcome.stdout != "")
    assert case.litter(outcome) == []


def row(case: Case) -> str:
    """A row of the table."""
    message = outcome_of(case).message.replace("|", "\\|")
    message = message if len(message) <= 300 else f"{message[:300]}…"
    quoted = f"`` {message} ``" if "`" in message else f"`{message}`"
    return f"| {case.area} | {case.name} | {outcome_of(case).code} | {quoted} |"


def without_brackets(text: str) -> str:
    """The text without what libraries say, which changes with their versions."""
    return "\n".join(re.sub(r"\(.*", "", line) for line in text.splitlines())


def test_the_table_is_current() -> None:
    text = (
        HEAD.format(count=len(CASES), mebibytes=MEMORY_BYTES >> 20, seconds=SECONDS) + "\n".join(map(row, CASES)) + "\n"
    )
    print(text)
    if os.environ.get("UPDATE_BAD_INPUTS") == "1":
        TABLE.write_text(text)
    assert without_brackets(TABLE.read_text()) == without_brackets(text)
