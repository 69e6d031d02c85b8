"""The lines that docs/operations.md explains are those that the code prints."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/operations.md").read_text()
# What separates a field's name and its value from the rest of a line; and what varies in it.
MARKS = re.compile(r"[=:;'\"(){}`]")
VARIES = re.compile(rf"<[^>]*>|\.\.\.|\$NAME|{MARKS.pattern}")


def literals(tree: ast.Module) -> Iterator[str]:
    """The strings of a module without its docstrings; what is formatted into them is a zero byte."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)


@cache
def printed() -> str:
    """All strings of the code, one after the other."""
    files = [path for name in ("ddpm_core", "pipelines", "jobs") for path in (REPOSITORY / name).rglob("*.py")]
    text = "\n".join(each for path in files for each in literals(ast.parse(path.read_text())))
    return " ".join(MARKS.sub(" \0 ", text).split())


def lines() -> list[str]:
    """What stands in code in the first column of the tables of messages."""
    parts = (
        PAGE.split("## When something fails")[1].split("\n## ")[0],
        PAGE.split("**When AWS takes")[1].split("To take a machine")[0],
    )
    rows = [row.split(" | ")[0] for part in parts for row in part.splitlines() if row.startswith("|")]
    return [span for row in rows for span in re.findall(r"`+([^`]+)`+", row)]


def unknown(piece: str) -> str | None:
    """What of a line's fixed part is in no string of the code; a line may be put together from two strings."""
    words = piece.split()
    for middle in range(len(words), 0, -1):
        parts = (" ".join(words[:middle]), " ".join(words[middle:]))
        if all(part in printed() for part in parts):
            return None
    return piece


def test_the_lines_that_are_explained_are_lines_that_are_printed() -> None:
    pieces = [piece for line in lines() for piece in VARIES.split(line) if len(piece.split()) > 1]
    assert [piece for piece in pieces if unknown(piece)] == []
    assert len(pieces) > 80


def test_an_invented_line_is_noticed() -> None:
    assert unknown("Ray gave up computing shards")
