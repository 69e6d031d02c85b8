"""Whether GPUs give what CPUs give: what an operator runs first on a new cluster or machine, and can send to us.

    uv run benchmarks/gpu_check.py                                            # this machine
    python benchmarks/gpu_check.py --root s3://BUCKET/ddpm/gpu-check --num_workers 2    # as a job of the cluster

The jobs are those of a user: a training of the embedded digits that ends half-way and is continued, samples, and
bits/dim, once with `cluster.gpus_per_worker 1` and once with 0. Both begin with the same weights and get the same
images, times and noise, so that only rounding tells them apart; the tolerances leave room for the TF32 of convolutions.
Two workers use NCCL. Exits with 1 where a check fails.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ray
import torch

from pipelines.sampling.sample_set import SampleSet
from pipelines.storage.location import Location

IMAGES = 64


@dataclass
class Check:
    """The jobs of one root, and what was found so far."""

    root: str
    num_workers: int
    steps: int
    failed: list[str] = field(default_factory=list)

    def run(self, job: str, gpus: int, **options: object) -> float:
        """One job; returns its seconds."""
        # Only trainings may have their root in a store.
        home = self.root if job == "train" or Location.parse(self.root).is_local else "~/ddpm"
        fixed = {"root": home, "cluster.num_workers": self.num_workers, "cluster.gpus_per_worker": gpus}
        words = [f"--{name.replace('__', '.')}={value}" for name, value in {**fixed, **options}.items()]
        began = time.monotonic()
        subprocess.run([sys.executable, f"jobs/{job}.py", *words], check=True, stdout=sys.stderr)
        return time.monotonic() - began

    def report(self, what: str, found: float, limit: float, detail: str) -> None:
        """One line of the table."""
        good = found <= limit
        self.failed += [] if good else [what]
        print(f"{'ok    ' if good else 'FAILED'}  {what}: {found:.2e} (at most {limit:g}); {detail}", flush=True)

    def trained(self, where: str, gpus: int, parts: int) -> tuple[float, float, str]:
        """Validation bits/dim, seconds, and run of a training that is made in so many parts."""
        name, seconds = f"gpu-check-{where}", 0.0
        for part in range(1, parts + 1):
            steps = self.steps * part // parts
            every = {"checkpoint.every_steps": steps, "validation.every_steps": steps, "grid.every_steps": steps}
            seconds += self.run("train", gpus, name=name, precision="fp32", train__steps=steps, **every)
        run = Location.parse(self.root) / "runs" / name
        return (run / "result.json").read_json()["validation"]["total"], seconds, run.uri

    def sampled(self, where: str, model: str, gpus: int) -> tuple[np.ndarray, float]:
        """Images (n, H, W, C) as uint8 by DDIM, and seconds."""
        output = f"{self.root}/samples/{where}"
        sampler = {"sampler.name": "ddim", "sampler.steps": 20}
        seconds = self.run("sample", gpus, model=model, output=output, num_images=IMAGES, precision="fp32", **sampler)
        return SampleSet.open(Location.parse(output)).read_images(0, IMAGES)[1], seconds

    def evaluated(self, where: str, model: str, gpus: int, precision: str) -> tuple[float, float]:
        """Bits/dim of the test digits, and seconds."""
        output = f"{self.root}/evaluations/{where}"
        data = {"data": "embedded://digits/test", "num_images": IMAGES, "timesteps_per_image": 32}
        seconds = self.run("evaluate", gpus, model=model, output=output, precision=precision, **data)
        results = (Location.parse(output) / "manifest.json").read_json()["results"]
        return results["means"][results["headline"]]["mean"], seconds


def machine(address: str | None) -> dict[str, object]:
    """What computes, to send with the table."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    ray.init(address=address or "local", log_to_driver=False, include_dashboard=False)
    resources = ray.cluster_resources()
    ray.shutdown()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
        "driver's GPUs": gpus,
        "ray": ray.__version__,
        "cluster": {name: amount for name, amount in sorted(resources.items()) if "node:" not in name},
    }


def main() -> None:
    """Run everything twice, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--root", default=str(Path("~/ddpm/gpu-check").expanduser()), help="empty; one place for all nodes"
    )
    parser.add_argument("--num_workers", type=int, default=1, help="each with a GPU")
    parser.add_argument("--steps", type=int, default=100, help="of the training")
    parser.add_argument("--without_gpus", action="store_true", help="CPUs in the place of GPUs: to try this program")
    args = parser.parse_args()
    check, gpus = Check(args.root, args.num_workers, args.steps), 0 if args.without_gpus else 1
    print(json.dumps(machine(os.environ.get("RAY_ADDRESS")), indent=1), flush=True)
    bound, seconds, model = check.trained("gpu", gpus, parts=2)
    expected, on_cpu, _ = check.trained("cpu", 0, parts=1)
    told = f"{bound:.4f} bits/dim in {seconds:.0f} s, CPU {expected:.4f} in {on_cpu:.0f} s"
    check.report("training, stopped and continued", abs(bound / expected - 1), 1e-2, told)
    images, seconds = check.sampled("gpu", model, gpus)
    expected_images, on_cpu = check.sampled("cpu", model, 0)
    levels = float(np.abs(images.astype(float) - expected_images).mean())
    check.report("samples, mean difference in levels of 255", levels, 0.5, f"{seconds:.0f} s, CPU {on_cpu:.0f} s")
    expected, on_cpu = check.evaluated("cpu-fp32", model, 0, "fp32")
    for precision, limit in (("fp32", 1e-3), ("bf16", 2e-2)):
        bound, seconds = check.evaluated(f"gpu-{precision}", model, gpus, precision)
        told = f"{bound:.4f} bits/dim in {seconds:.0f} s, CPU fp32 {expected:.4f} in {on_cpu:.0f} s"
        check.report(f"evaluation in {precision}", abs(bound / expected - 1), limit, told)
    if check.failed:
        sys.exit(f"failed: {', '.join(check.failed)}")
    print("all as on CPUs")


if __name__ == "__main__":
    main()
