"""What each kind of model is worth: bits/dim and samples of the digits after the same steps, and the time of a step.

    uv run benchmarks/objectives.py --steps 1000 --output /tmp/objectives

Every kind has the default network, data, batch, learning rate and seed, and trains by the same `Learner` as the job.
A step of one follows a step of another, so that all meet the same load; the time is CPU time on one thread, in fp32.
Bits/dim is the validation's, of the averaged weights on all 299 test images, with its standard error.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from pipelines.cli.config import parse
from pipelines.data.opening import ensure_embedded
from pipelines.data.stream import StreamPlan, read_here
from pipelines.outputs.pictures import grid_png
from pipelines.training.config import DIGITS, DIGITS_TEST, TrainConfig
from pipelines.training.grid import sample_images
from pipelines.training.learner import Learner, build
from pipelines.training.ranks import ALONE
from pipelines.training.validation import validate

LEARNED_VARIANCE = ["--network.learned_variance", "true", "--diffusion.schedule", "cosine"]
VDM = ["--network.fourier_features", "[2,3,4,5,6,7]", "--diffusion.prediction", "residual_eps", "--train.loss", "vlb"]
KINDS = {
    "ε, L_simple": [],
    "ε, L_vlb (σ² = β)": ["--train.loss", "vlb"],
    "v, zero terminal SNR": ["--diffusion.prediction", "v", "--diffusion.zero_terminal_snr", "true"],
    "learned variances, L_hybrid": [*LEARNED_VARIANCE, "--train.loss", "hybrid"],
    "learned variances, L_vlb": [*LEARNED_VARIANCE, "--train.loss", "vlb"],
    "EDM": ["--diffusion.schedule", "edm", "--diffusion.prediction", "edm"],
    "VDM, γ linear": [*VDM, "--diffusion.schedule", "gamma_linear"],
    "VDM, γ learned": [*VDM, "--diffusion.schedule", "gamma_learned"],
    "VDM, γ and its ends learned": [*VDM, "--diffusion.schedule", "gamma_learned", "--diffusion.learned_ends", "true"],
}


def main() -> None:
    """Train all kinds in turns, then score and draw each."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--steps", type=int, default=1000)
    arguments.add_argument("--output", type=Path, default=None, help="where a grid of samples of each kind goes")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        train, test = (ensure_embedded(uri, f"{directory}/{i}") for i, uri in enumerate((DIGITS, DIGITS_TEST)))
        configs = {name: configured(flags, train.image_shape, given.steps) for name, flags in KINDS.items()}
        learners = {
            name: Learner(partial(build, config, train.image_shape), config, torch.device("cpu"))
            for name, config in configs.items()
        }
        plan = StreamPlan.of(train, 0, 64, given.steps, 64 << 20)
        seconds: dict[str, list[float]] = {name: [] for name in KINDS}
        for batch in read_here(plan, train, 0, 1, 0):
            for name, learner in learners.items():
                before = time.process_time()
                learner.step(batch)
                seconds[name].append(time.process_time() - before)
        plain = statistics.median(next(iter(seconds.values())))
        print("| Kind | bits/dim | Which bound | CPU time of a step |\n|---|---|---|---|")
        for name, learner in learners.items():
            model, config = learner.averaged(), configs[name]
            found = validate(model, test, config.validation, 0, torch.device("cpu"), ALONE)
            ratio = statistics.median(seconds[name]) / plain
            print(
                f"| {name} | {found.total:.3f} ± {found.standard_error:.3f} | {found.sigma2} | {ratio:.2f} × |",
                flush=True,
            )
            if given.output is not None:
                given.output.mkdir(parents=True, exist_ok=True)
                images = sample_images(model, config.grid, 0, torch.device("cpu"), ALONE)
                (given.output / f"{list(KINDS).index(name)}.png").write_bytes(grid_png(images))


def configured(flags: list[str], image_shape: tuple[int, int, int], steps: int) -> TrainConfig:
    """A training's configuration with all its fields."""
    config = parse(TrainConfig, [*flags, "--train.steps", str(steps), "--precision", "fp32"], "A training.")
    validation = replace(config.validation, num_images=299)
    return replace(config, network=config.network.for_images(image_shape), validation=validation)


if __name__ == "__main__":
    main()
