"""Numbers in the documents that tests print: each stands in one place, or is compared with that place here."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
COUNT = rf"(\d[\d,]*|{'|'.join(WORDS)})"


def counts(what: str) -> dict[str, set[int]]:
    """By document: the numbers of `what`, a pattern, that it gives."""
    found: dict[str, set[int]] = {}
    for path in DOCUMENTS:
        text = re.sub(r"\s+", " ", path.read_text())
        for number in re.findall(rf"\b{COUNT} (?:{what})\b", text, re.IGNORECASE):
            value = WORDS.index(number.lower()) if number.lower() in WORDS else int(number.replace(",", ""))
            found.setdefault(path.name, set()).add(value)
    return found


def test_the_number_of_bad_inputs_is_that_of_their_table() -> None:
    table = (REPOSITORY / "docs" / "bad_inputs.md").read_text()
    rows = [line for line in table.splitlines() if re.match(r"\|.*\| [12] \| `", line)]
    assert counts("bad inputs") == {"bad_inputs.md": {len(rows)}}


def test_the_numbers_of_faults_are_those_of_their_table() -> None:
    table = (REPOSITORY / "docs" / "operations.md").read_text()
    table = table.split("<!-- faults -->")[1].split("<!-- end of faults -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    names = [row[0] for row in rows[2:]]
    (in_all,) = {int(number) for row in rows if row[0] == "Faults in all" for number in row[1:]}
    assert counts("random faults") == {"README.md": {in_all}, "numbers.md": {in_all}}
    assert counts("kinds(?= \\(workers)") == {"guarantees.md": {names.index("Faults in all")}}
