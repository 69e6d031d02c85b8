"""What bad inputs are made of: small good files of every format, to be spoiled."""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from bad_inputs.harness import Case
from support.image_files import images

Build = Callable[[Path], list[str]]


def ingest(source: str, *options: str) -> list[str]:
    """The command line that ingests `source` into `out`."""
    return ["ingest.py", "--source", source, "--output", "out", *options]


# What an ingest that is refused after it has begun leaves: its work, with which the same command goes on.
UNFINISHED = ("out", "out/_work*")
REJECTED = (*UNFINISHED, "out/rejected.parquet")


def source_case(area: str, name: str, make: Callable[[Path], None], *says: str, leaves: tuple[str, ...] = ()) -> Case:
    """An ingest of the directory `source` that `make` fills."""

    def build(at: Path) -> list[str]:
        (at / "source").mkdir()
        make(at / "source")
        return ingest("source")

    return Case(area, name, build, says, leaves=leaves)


@functools.cache
def prepared(count: int = 20) -> dict[str, bytes]:
    """A prepared data set of so many images in one shard, by path."""
    from pipelines.cli.config import digest
    from pipelines.data.ingest.config import IngestConfig
    from pipelines.data.ingest.job import ingest as run_ingest

    with tempfile.TemporaryDirectory() as scratch:
        images(Path(scratch) / "source", count)
        run_ingest(IngestConfig(f"{scratch}/source", f"{scratch}/out"))
        files = read_tree(Path(scratch) / "out")
    manifest = json.loads(files["manifest.json"])
    manifest["request"]["source"] = "/data/images"  # not a path that is another one in every run
    manifest["request_sha256"] = digest(manifest["request"])
    return {**files, "manifest.json": json.dumps(manifest).encode()}


def read_tree(root: Path) -> dict[str, bytes]:
    """The content of every file below `root`, by path."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
