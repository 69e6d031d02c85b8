"""Reports: what every page has, and that a page shows nothing unescaped and nothing that is missing."""

from pathlib import Path

import jinja2
import pytest

from pipelines.outputs.report import rendered

BASE = {"title": "A <title>", "headline": "3 & 4", "notes": ["one", "<two>"], "provenance": [("model", "<m>")]}


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "page.html.j2"
    path.write_text('{% extends "report_base.html.j2" %}\n{% block results %}\n<p>{{ found }}</p>\n{% endblock %}\n')
    return path


def test_a_page_has_its_results_between_the_headline_and_the_notes(template: Path) -> None:
    page = rendered(template, found="§ <5>", **BASE).decode()
    parts = ["<title>A &lt;title&gt;", "<style>", "<h1>3 &amp; 4</h1>", "<p>§ &lt;5&gt;</p>"]
    parts += ["<li>one</li>", "<li>&lt;two&gt;</li>", "<td>model</td><td><code>&lt;m&gt;</code></td>", "</html>"]
    places = [page.index(part) for part in parts]
    assert places == sorted(places)


@pytest.mark.parametrize("missing", ["found", *BASE])
def test_what_a_page_shows_must_be_given(template: Path, missing: str) -> None:
    values = {name: value for name, value in {"found": 1, **BASE}.items() if name != missing}
    with pytest.raises(jinja2.UndefinedError, match=f"'{missing}' is undefined"):
        rendered(template, **values)
