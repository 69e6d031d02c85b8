"""A report: one HTML file, whose head and end are the same for all (`report_base.html.j2`)."""

from pathlib import Path
from typing import Any

import jinja2


def rendered(template: Path, **values: Any) -> bytes:
    """The page of a template that extends `report_base.html.j2`, in UTF-8; every value is escaped that is not marked
    `safe`.

    `values` has what the base shows, `title`, `headline`, `notes` (sentences) and `provenance` (pairs of name and
    value), and what the template shows in its block `results`.

    Raises:
        jinja2.UndefinedError: A template shows what `values` has not.
    """
    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    return environment.get_template(template.name).render(values).encode()
