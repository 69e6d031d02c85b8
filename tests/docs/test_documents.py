"""The documents hold together: links lead somewhere, the README is short, and what it repeats is what they say."""

import re
from pathlib import Path

import pytest
from PIL import Image
from support.sample_runs import save_tiny_model

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
FOLDERS = "(?:ddpm_core|pipelines|jobs|tests|benchmarks|configs|deploy)"
MAX_README_WORDS = 1250
MAX_LINE = 120


def prose_of(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    found = re.findall(r"^#+ (.+)$", prose_of(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(document.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            broken.append(target)
    assert not broken


def test_every_file_and_module_that_is_named_exists() -> None:
    named: set[str] = set()
    for document in DOCUMENTS:
        text = re.sub(r"\]\([^)]*\)", "", document.read_text())  # links are looked at above
        named |= set(re.findall(rf"(?<![\w/.]){FOLDERS}/[\w/.-]*\w", text))
        modules = re.findall(r"python -m ((?:pipelines|ddpm_core)[\w.]*\w)", text)
        named |= {f"{module.replace('.', '/')}.py" for module in modules}
    assert len(named) > 30
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_prose_has_short_lines(document: Path) -> None:
    lines = prose_of(document.read_text()).splitlines()
    assert [line for line in lines if len(line) > MAX_LINE and not line.startswith("|")] == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, left = set[Path](), [REPOSITORY / "README.md"]
    while left:
        page = left.pop()
        reached.add(page)
        targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose_of(page.read_text()))
        found = {(page.parent / target).resolve() for target in targets if "://" not in target}
        pages = {p for p in found if p.suffix == ".md"}
        pages |= {p for directory in found if directory.is_dir() for p in directory.glob("*.md")}
        left += pages - reached - set(left)
    assert set(DOCUMENTS) <= reached


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().split()) <= MAX_README_WORDS


def test_the_numbers_of_the_readme_are_rows_of_the_page_of_numbers() -> None:
    part = (REPOSITORY / "README.md").read_text().split("## Numbers\n")[1].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("|")][2:]
    page = (REPOSITORY / "docs/numbers.md").read_text().splitlines()
    assert len(rows) >= 3
    assert [row for row in rows if not any(line.startswith(row) for line in page)] == []


def test_every_test_that_proves_a_guarantee_exists() -> None:
    page = (REPOSITORY / "docs/guarantees.md").read_text()
    tests = list((REPOSITORY / "tests").rglob("test_*.py"))
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)(?:::(\w+))?`", page)
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not any(path.as_posix().endswith(f"/{file}") and f"def {name}" in path.read_text() for path in tests)
    ]
    assert len(named) >= 30
    assert missing == []


def test_a_model_is_used_in_python_as_the_page_on_sampling_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (REPOSITORY / "docs/jobs/sample.md").read_text().split("## In Python")[1]
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    directory = tmp_path / "RUN/checkpoints/step-00003000/model"
    save_tiny_model(directory, timesteps=100)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert Image.open("sample.png").size == (8, 8)
