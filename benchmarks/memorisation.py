"""Whether the alarm of jobs/quality.py knows a model that repeats its training images from one that does not.

    uv run benchmarks/memorisation.py

Two models of the embedded digits, the same but for their data: the first 140 images, and all 1,498. Samples of each are
compared with the test images, which neither has seen. The commands are those of a user.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.ingest.config import IngestConfig
from pipelines.data.ingest.job import ingest
from pipelines.data.opening import ensure_embedded
from pipelines.outputs.pictures import encode_png, to_picture


def few_digits(root: Path, count: int) -> str:
    """A prepared data set of the first digits."""
    _, images, _ = ensure_embedded("embedded://digits/train", str(root / "digits")).read_images(0, count)
    table = pa.table({"image": [encode_png(to_picture(image)) for image in images]})
    pq.write_table(table, root / "few.parquet")
    return ingest(IngestConfig(str(root / "few.parquet"), str(root / "few"))).dataset.location.uri


def run(job: str, **options: object) -> None:
    """One job, which says what it does."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('__', '.')}", str(value))]
    subprocess.run([sys.executable, f"jobs/{job}.py", *words], check=True, stdout=sys.stderr)


def main() -> None:
    """Train, sample, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500, help="of either training")
    parser.add_argument("--samples", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        for name, data in (("few", few_digits(home, 140)), ("all", "embedded://digits/train")):
            every = {"root": home / "ddpm", "cluster__num_workers": 1}
            run(
                "train",
                name=name,
                data__train=data,
                data__validation="null",
                batch_size=140,
                train__steps=args.steps,
                train__learning_rate=2e-3,
                **every,
            )
            samples, output = home / "samples" / name, home / "quality" / name
            run(
                "sample",
                model=home / "ddpm" / "runs" / name,
                output=samples,
                num_images=args.samples,
                sampler__name="ddim",
                **every,
            )
            run("quality", samples=samples, reference="embedded://digits/test", output=output, **every)
            for space, found in json.loads((output / "manifest.json").read_bytes())["results"]["memorisation"].items():
                shares = ", ".join(
                    f"{what} {found[what]['value']:.3f} ({found[what]['low']:.3f} to {found[what]['high']:.3f})"
                    for what in ("closer", "near", "near_by_ratio")
                )
                print(f"{name}, {space}: {'ALARM' if found['alarm'] else 'no alarm'}; {shares}", flush=True)


if __name__ == "__main__":
    main()
