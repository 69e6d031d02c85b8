"""Evaluation speed side by side: the whole job and the scoring against the bare network, K time steps against all T.

    uv run benchmarks/evaluate.py --model ~/ddpm/runs/fashion_mnist --data ~/ddpm/data/fashion_mnist/test
    uv run benchmarks/evaluate.py --preset cifar10 --device cuda --batch 256 --calls 100 --images 0

(1) Network evaluations/s. Bare: the network alone on ready-made x_t and t. Scoring: `evaluate_images` in this process.
Job: the whole job, one worker, at its own rate, from its first actor's first work to the last stored shard: reading,
baselines, Parquet, digests and records are in it, the start of Ray and the report are not. Scoring and job are divided
by the mean of the bare turns before and after them.

(2) Seconds until the mean over the same images is known to `--halfwidth` (bits/dim, half of its 95 % interval over the
draws). Ours: the stratified estimator in this process, with K = 2, 4, 8, ... time steps per image until it is; the time
is that of the last K, and that of all K tried is printed too. Loop: what published scripts do, batch by batch every t
from T - 1 down to 0, one draw of noise each; every `--every`-th t is timed, and the time scaled up to all of them. The
loop takes as long whatever half-width is asked for, and does not tell its own.

All have the same network, images, batch size, precision and threads, and take turns. Without --model the weights are
random, which does for (1); their terms are so large that (2) needs a K of hundreds: give it a trained model, or leave
it out with --images 0. Compare the ratios, not the rates.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from random_data import make_data
from train import PRESETS

from ddpm_core.likelihood.decoder import decoder_bpd
from ddpm_core.likelihood.designs import GROUP_SIZE
from ddpm_core.likelihood.intervals import MeanStatistics
from ddpm_core.likelihood.terms import prior_bpd, x_0_of
from ddpm_core.model import Model, model_from_bytes, save_model
from ddpm_core.parameterizations import EpsDenoiser
from ddpm_core.process.base import q_sample
from ddpm_core.process.discrete import DiscreteProcess, discrete
from pipelines.cluster.config import GpuClusterConfig
from pipelines.cluster.precision import DTYPE_OF
from pipelines.data.dataset import PreparedDataset, UInt8s
from pipelines.evaluation.config import EvaluateConfig, OdeConfig
from pipelines.evaluation.job import evaluate
from pipelines.evaluation.request import EvaluateRequest
from pipelines.evaluation.results import half_width
from pipelines.evaluation.terms import bound_for, evaluate_images, stratified_over
from pipelines.models.find import find_model
from pipelines.tracking.spool import iter_records

SHARD_SIZE = 64


@torch.inference_mode()
def bare(model: Model, args: argparse.Namespace) -> float:
    """Evaluations/s of the network alone."""
    denoiser = model.denoiser.in_precision(args.precision)
    z_t = torch.randn(args.batch, *denoiser.image_shape, device=denoiser.device)
    t = torch.randint(discrete(denoiser.process).num_timesteps, (args.batch,), device=denoiser.device)
    start = time.perf_counter()
    for _ in range(args.calls):
        prediction = denoiser(z_t, t)
    prediction.eps.sum().item()  # a GPU has then finished
    return args.calls * args.batch / (time.perf_counter() - start)


def score(model: Model, images: UInt8s, args: argparse.Namespace, seed: int, k: int) -> tuple[float, MeanStatistics]:
    """Seconds, and the mean bits/dim, by the stratified estimator."""
    request = EvaluateRequest(
        model_id=model.model_id,
        dataset_id="none",
        estimator="stratified",
        timesteps_per_image=k,
        draws=None,
        sigma2="beta_tilde",
        num_images=len(images),
        target_halfwidth=None,
        seed=seed,
        dtype=DTYPE_OF[args.precision],
        device=args.device,
        by_label=False,
        train_dataset_id=None,
        ode=OdeConfig(),
        batch_size=args.batch,
        shard_size=SHARD_SIZE,
    )
    start, positions = time.perf_counter(), torch.arange(len(images))
    bound = bound_for(request, model)
    design = stratified_over(bound.denoiser.process, positions, seed, k)
    evaluated = evaluate_images(bound, images, positions, design, request)
    found = MeanStatistics.of(evaluated.replicates, GROUP_SIZE)
    return time.perf_counter() - start, found


def job(model: str, data: PreparedDataset, args: argparse.Namespace) -> float:
    """Evaluations/s of the whole job, by its own record."""
    with tempfile.TemporaryDirectory() as scratch:
        config = EvaluateConfig(
            model,
            data.location.uri,
            f"{scratch}/evaluation",
            timesteps_per_image=args.timesteps_per_image,
            num_images=args.job_shards * SHARD_SIZE,
            precision=args.precision,
            batch_size=args.batch,
            shard_size=SHARD_SIZE,
            cluster=GpuClusterConfig(
                num_workers=1, cpus_per_worker=args.threads, gpus_per_worker=float(args.device == "cuda")
            ),
            root=scratch,
        )
        evaluate(config)
        (spool,) = Path(scratch).glob("spool/*/spool.jsonl")
        records = [record.payload["values"] for record in iter_records(spool) if record.kind == "metrics"]
        rate = [values["images_per_second"] for values in records if "images_per_second" in values][-1]
        return float(rate) * (args.timesteps_per_image + 2)


def ours(model: Model, images: UInt8s, args: argparse.Namespace, seed: int) -> tuple[float, float, str]:
    """Seconds of the K that reaches the half-width, of all K tried, and what was found."""
    k, total = 2, 0.0
    while True:
        seconds, found = score(model, images, args, seed, k)
        total += seconds
        half = half_width(found.given_images) or math.inf
        if half <= args.halfwidth or 2 * k >= discrete(model.denoiser.process).num_timesteps:
            return seconds, total, f"K = {k}: {found.mean:.3f}±{half:.3f}"
        k *= 2


@torch.inference_mode()
def loop(model: Model, images: UInt8s, args: argparse.Namespace) -> float:
    """Seconds, scaled to all t; at each t only the term that it needs, where published scripts compute both."""
    denoiser, sums = model.denoiser.in_precision(args.precision), []
    process = discrete(denoiser.process)
    steps = range(process.num_timesteps - 1, -1, -args.every)
    start = time.perf_counter()
    for levels in torch.tensor(images, device=denoiser.device).permute(0, 3, 1, 2).contiguous().split(args.batch):
        x_0 = x_0_of(levels).float()
        sums.append(prior_bpd(process, x_0))
        for step in steps:
            t = torch.full((len(x_0),), step, device=denoiser.device)
            z_t, back = q_sample(process.at(t), x_0, torch.randn_like(x_0)), process.step(t, t - 1)
            mean, variance = denoiser(z_t, t).clipped().posterior_mean(back), back.posterior_variance_clipped
            if step == 0:
                sums[-1] += decoder_bpd(levels, mean, variance.sqrt())
            else:
                true = back.posterior(z_t, x_0)
                ratio, error = true.variance / variance, (true.mean - mean).square()
                nats = 0.5 * (ratio - 1.0 - ratio.log() + error / variance)
                sums[-1] += nats.flatten(1).mean(1) / math.log(2.0)
    torch.cat(sums).mean().item()
    return (time.perf_counter() - start) * process.num_timesteps / len(steps)


def shown(values: list[float], digits: int = 1) -> str:
    """The median, and all of them."""
    return f"{statistics.median(values):.{digits}f}  ({', '.join(f'{value:.{digits}f}' for value in values)})"


def main() -> None:
    """Take turns, and print rates, seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory of a model or of a training; default: random weights")
    parser.add_argument("--preset", choices=PRESETS, default="fashion", help="network of the random weights")
    parser.add_argument("--data", help="prepared data set; default: random images")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; of the job, of its one worker")
    parser.add_argument("--batch", type=int, default=64, help="evaluations per network call")
    parser.add_argument("--rounds", type=int, default=3, help="turns of everything")
    parser.add_argument("--timesteps_per_image", type=int, default=48, help="K of the scoring and of the job")
    parser.add_argument("--calls", type=int, default=25, help="network calls in a turn of bare and of scoring")
    parser.add_argument("--job-shards", type=int, default=4, help=f"shards of {SHARD_SIZE} images per job; 0: no job")
    parser.add_argument("--images", type=int, default=64, help="images of (2); 0: no (2)")
    parser.add_argument("--halfwidth", type=float, default=0.02, help="bits/dim")
    parser.add_argument("--every", type=int, default=20, help="of the loop, every how many t are timed; 1: all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bares, reached, turns = [], [], {name: [] for name in ("scoring", "job", "ours", "tried", "loop")}
    with tempfile.TemporaryDirectory() as directory:
        if args.model is None:
            torch.manual_seed(0)
            config, args.model = PRESETS[args.preset], f"{directory}/model"
            denoiser = EpsDenoiser.build(config, DiscreteProcess.linear())
            save_model(args.model, denoiser.named_weights(), denoiser, {})
        model = model_from_bytes(find_model(args.model, None, Path(directory)).files, args.device)
        channels, height, width = model.denoiser.image_shape
        k, shape = args.timesteps_per_image, (height, width, channels)
        scored = max(2, args.calls * args.batch // (k + 2))
        rows = max(scored, args.images, args.job_shards * SHARD_SIZE)
        data = PreparedDataset.open(args.data) if args.data else make_data(Path(directory) / "data", rows, shape)
        images, _ = data.read_rows(np.arange(max(scored, args.images)))
        score(model, images[:2], args, 0, 2)  # warm-up
        for seed in range(args.rounds):
            bares.append(bare(model, args))
            turns["scoring"].append(scored * (k + 2) / score(model, images[:scored], args, seed, k)[0])
            if args.job_shards:
                turns["job"].append(job(args.model, data, args))
            bares.append(bare(model, args))
            if args.images:
                *seconds, found = ours(model, images[: args.images], args, seed)
                reached.append(found)
                seconds.append(loop(model, images[: args.images], args))
                for name, value in zip(("ours", "tried", "loop"), seconds, strict=True):
                    turns[name].append(value)
    size = sum(parameter.numel() for parameter in model.denoiser.parameters())
    print(f"{size:,} parameters, {'x'.join(map(str, shape))}, batch {args.batch}, {args.precision}, ", end="")
    print(f"{args.device}, {args.threads} CPU thread(s); medians, and all rounds")
    print(f"\n(1) evaluations/s, {k + 2} per image\n  bare     {shown(bares)}")
    for name in ("scoring", "job")[: 1 + bool(args.job_shards)]:
        ratios = [2 * rate / (a + b) for rate, a, b in zip(turns[name], bares[::2], bares[1::2], strict=True)]
        print(f"  {name:8} {shown(turns[name])}\n  {name} / bare: {shown(ratios, 3)}")
    if args.images:
        scaled = "" if args.every == 1 else f", {args.every} times that of every {args.every}th t"
        print(f"\n(2) seconds for the mean of {args.images} images to ±{args.halfwidth} bits/dim: {'; '.join(reached)}")
        for name, text in (("ours", "ours, the last K"), ("tried", "ours, all K tried")):
            ratios = [loop_over_t / own for loop_over_t, own in zip(turns["loop"], turns[name], strict=True)]
            print(f"  {text:18} {shown(turns[name])}\n  loop / {text}: {shown(ratios)}")
        print(f"  loop over all t    {shown(turns['loop'])}{scaled}")


if __name__ == "__main__":
    main()
