"""A report's figures, as files."""

import io
from collections.abc import Sequence
from typing import Any


def new_figure() -> Any:
    """An empty one of matplotlib's, of the size that a report has room for."""
    from matplotlib.figure import Figure  # half a second, and only at the end of a job

    return Figure(figsize=(5.2, 3.4), layout="constrained")


def figure_files(figure: Any, kinds: Sequence[str] = ("svg", "png")) -> dict[str, bytes]:
    """The same bytes for the same figure, by kind; the SVG from its own element on, to stand in a page."""
    import matplotlib

    files = {}
    with matplotlib.rc_context({"svg.hashsalt": "ddpm", "svg.fonttype": "none"}):
        for kind in kinds:
            sink = io.BytesIO()
            figure.savefig(sink, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
            files[kind] = sink.getvalue()
    files["svg"] = files["svg"][files["svg"].index(b"<svg") :]
    return files
