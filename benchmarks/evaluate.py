"""Evaluation speed side by side: the whole job and the scoring against the bare network, K time steps against all T.

    uv run benchmarks/evaluate.py --model ~/ddpm/runs/fashion_mnist --data ~/ddpm/data/fashion_mnist/test
    uv run benchmarks/evaluate.py --preset cifar10 --device cuda --batch 256      # random weights, random images

(1) Network evaluations/s. Bare: the network alone on ready-made x_t and t; no noise, no scores. Scoring:
`evaluate_images` in this process. Job: the whole job with one worker and as many CPU threads, at its own rate, from its
first actor's first work to the last stored shard: reading, baselines, Parquet, digests and records are in it, the start
of Ray and the report are not. Scoring and job are divided by the mean of the bare turns before and after them.

(2) Seconds until the mean over the same images is known to `--halfwidth` (bits/dim, half of its 95 % interval over the
draws). Ours: the stratified estimator in this process, with K = 2, 4, 8, ... time steps per image until it is; the time
is that of the last K, and that of all K tried is printed too. Loop: what published scripts do, batch by batch every t
from T - 1 down to 0, one draw of noise each; every `--every`-th t is timed, and the time scaled up to all of them. The
loop takes as long whatever half-width is asked for, and does not know its own.

All get the same network, images, batch size, precision and threads, in turns: bare, scoring, job, bare, ours, loop, bare
... Random weights predict hardly any noise, which makes the terms equal and K small: measure (2) with a trained model.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_data import make_data
from train import PRESETS

from ddpm_core.diffusion import p_mean_variance, q_posterior, q_sample
from ddpm_core.estimators import GROUP_SIZE, replicate_values, stratified_design
from ddpm_core.likelihood import decoder_bpd, prior_bpd, timestep_proposal, x_0_of
from ddpm_core.model import Model, model_from_bytes, save_model
from ddpm_core.schedule import NoiseSchedule
from ddpm_core.uncertainty import MeanStatistics
from ddpm_core.unet import UNet, count_parameters
from pipelines.data.dataset import PreparedDataset, UInt8s
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.job import evaluate
from pipelines.evaluation.results import half_width
from pipelines.evaluation.terms import evaluate_images
from pipelines.models import find_model
from pipelines.tracking.spool import iter_records

SHARD_SIZE = 64


@torch.inference_mode()
def bare(model: Model, args: argparse.Namespace) -> float:
    """Evaluations/s of the network alone."""
    network, eps_fn = model.unet.config, model.eps_fn(args.dtype)
    x_t = torch.randn(args.batch, network.in_channels, *network.height_width, device=model.device)
    t = torch.randint(model.schedule.num_timesteps, (args.batch,), device=model.device)
    start = time.perf_counter()
    for _ in range(args.calls):
        eps_pred = eps_fn(x_t, t)
    eps_pred.sum().item()  # a GPU has then finished
    return args.calls * args.batch / (time.perf_counter() - start)


def score(model: Model, images: UInt8s, args: argparse.Namespace, seed: int, k: int) -> tuple[float, torch.Tensor]:
    """Seconds, and the replicates [n, 2] of each image's bits/dim by the stratified estimator."""
    request = {"seed": seed, "sigma2": "beta_tilde", "dtype": args.dtype, "batch_size": args.batch}
    positions = torch.arange(len(images))
    start = time.perf_counter()
    design = stratified_design(positions, seed, timestep_proposal(model.schedule), k)
    scores = evaluate_images(model, images, positions, design, request)
    prior = prior_bpd(model.schedule, x_0_of(torch.tensor(images).permute(0, 3, 1, 2)))
    values = replicate_values(design, prior, scores["term"])
    return time.perf_counter() - start, values


def job(model: str, data: PreparedDataset, args: argparse.Namespace) -> float:
    """Evaluations/s of the whole job, by its own record."""
    with tempfile.TemporaryDirectory() as scratch:
        config = EvaluateConfig(
            model,
            data.location.uri,
            f"{scratch}/evaluation",
            timesteps_per_image=args.timesteps_per_image,
            num_images=args.job_shards * SHARD_SIZE,
            dtype=args.dtype,
            batch_size=args.batch,
            shard_size=SHARD_SIZE,
            num_workers=1,
            cpus_per_worker=args.threads,
            gpus_per_worker=float(args.device == "cuda"),
            root=scratch,
        )
        evaluate(config)
        (spool,) = Path(scratch).glob("spool/*/spool.jsonl")
        records = [record.payload["values"] for record in iter_records(spool) if record.kind == "metrics"]
        rates = [values["perf/images_per_second"] for values in records if "perf/images_per_second" in values]
        return float(rates[-1]) * (args.timesteps_per_image + 2)


def ours(model: Model, images: UInt8s, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Double K until the half-width is reached."""
    k, total = 2, 0.0
    while True:
        seconds, values = score(model, images, args, seed, k)
        total += seconds
        statistics_of = MeanStatistics.of(values, GROUP_SIZE)
        half = half_width(statistics_of.given_images)
        assert half is not None  # there are two replicates
        if half <= args.halfwidth or 2 * k >= model.schedule.num_timesteps:
            return {"seconds": seconds, "total": total, "K": k, "half": half, "mean": statistics_of.mean}
        k *= 2


@torch.inference_mode()
def loop(model: Model, images: UInt8s, args: argparse.Namespace) -> float:
    """Seconds of the loop over all t, by those of every `--every`-th; per t only the one term that is wanted there."""
    schedule, eps_fn = model.schedule, model.eps_fn(args.dtype)
    steps = range(schedule.num_timesteps - 1, -1, -args.every)
    bits_per_dim = torch.zeros(len(images), device=model.device)
    start = time.perf_counter()
    levels = torch.tensor(images, device=model.device).permute(0, 3, 1, 2).contiguous()
    for part, total in zip(levels.split(args.batch), bits_per_dim.split(args.batch), strict=True):
        x_0 = x_0_of(part).float()
        total += prior_bpd(schedule, x_0)
        for step in steps:
            t = torch.full((len(part),), step, device=model.device)
            x_t = q_sample(schedule, x_0, t, torch.randn_like(x_0))
            reverse = p_mean_variance(schedule, eps_fn(x_t, t), x_t, t, "beta_tilde", clip_x_0=True)
            if step == 0:
                total += decoder_bpd(part, reverse.mean, reverse.variance.sqrt())
                continue
            true = q_posterior(schedule, x_0, x_t, t)
            ratio = true.variance / reverse.variance
            nats = 0.5 * (ratio - 1.0 - ratio.log() + (true.mean - reverse.mean).square() / reverse.variance)
            total += nats.flatten(1).mean(1) / np.log(2.0)
    bits_per_dim.sum().item()
    return (time.perf_counter() - start) * schedule.num_timesteps / len(steps)


def shown(values: list[float], digits: int = 3) -> str:
    """The median, and all of them."""
    return f"{statistics.median(values):.{digits}f}  ({', '.join(f'{value:.{digits}f}' for value in values)})"


def main() -> None:
    """Take turns, and print rates, seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory of a model or of a training; default: random weights")
    parser.add_argument("--preset", choices=PRESETS, default="fashion", help="network of the random weights")
    parser.add_argument("--data", help="prepared data set; default: random images")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; of the job, of its one worker")
    parser.add_argument("--batch", type=int, default=64, help="evaluations per network call")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timesteps_per_image", type=int, default=48, help="K of the scoring and of the job")
    parser.add_argument("--calls", type=int, default=25, help="network calls per turn of bare and of scoring, or so")
    parser.add_argument("--job-shards", type=int, default=2, help=f"shards of {SHARD_SIZE} images per job; 0: no job")
    parser.add_argument("--images", type=int, default=64, help="images of (2), a multiple of 16; 0: no (2)")
    parser.add_argument("--halfwidth", type=float, default=0.02, help="bits/dim")
    parser.add_argument("--every", type=int, default=20, help="of the loop, the time steps that are timed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        if args.model is None:
            torch.manual_seed(0)
            network, args.model = PRESETS[args.preset], f"{directory}/model"
            save_model(args.model, UNet(network).state_dict(), network, NoiseSchedule.linear(), {})
        model = model_from_bytes(find_model(args.model, None, Path(directory)).files, args.device)
        network, evaluations = model.unet.config, args.timesteps_per_image + 2
        scored, shape = -(-args.calls * args.batch // evaluations), (*network.height_width, network.in_channels)
        rows = max(scored, args.images, args.job_shards * SHARD_SIZE)
        data = PreparedDataset.open(args.data) if args.data else make_data(Path(directory) / "data", rows, shape)
        images, _ = data.read_rows(np.arange(max(scored, args.images)))
        score(model, images[:2], args, 0, 2)  # warm-up
        found: dict[str, list[float]] = {name: [] for name in ("bare", "scoring", "job", "ours", "tried", "loop")}
        around, precision = [], []
        for seed in range(args.rounds):
            before = bare(model, args)
            found["scoring"].append(
                scored * evaluations / score(model, images[:scored], args, seed, evaluations - 2)[0]
            )
            if args.job_shards:
                found["job"].append(job(args.model, data, args))
            found["bare"] += [before, bare(model, args)]
            around.append(statistics.mean(found["bare"][-2:]))
            if args.images:
                reached = ours(model, images[: args.images], args, seed)
                found["ours"].append(reached["seconds"])
                found["tried"].append(reached["total"])
                precision.append(f"K = {reached['K']}: {reached['mean']:.3f}±{reached['half']:.3f}")
                found["loop"].append(loop(model, images[: args.images], args))
    size, what = (
        "x".join(map(str, shape)),
        f"batch {args.batch}, {args.dtype}, {args.device}, {args.threads} CPU thread(s)",
    )
    print(f"{count_parameters(model.unet):,} parameters, {size}, {what}; medians (all rounds)")
    print(f"\n(1) evaluations/s, {evaluations} per image; bare {shown(found['bare'], 1)}")
    for name in ("scoring", "job"):
        if found[name]:
            ratios = [rate / reference for rate, reference in zip(found[name], around, strict=True)]
            print(f"  {name:8} {shown(found[name], 1)}\n  {name} / bare: {shown(ratios)} x")
    if args.images:
        print(f"\n(2) seconds to ±{args.halfwidth} bits/dim for the mean of {args.images} images")
        print(f"  ours     {shown(found['ours'], 1)}  [{'; '.join(precision)}]")
        print(f"  ours, with every smaller K tried: {shown(found['tried'], 1)}")
        subset = "" if args.every == 1 else f", {args.every} times that of every {args.every}th t"
        print(f"  loop over {model.schedule.num_timesteps} t {shown(found['loop'], 1)}{subset}")
        for name, text in (("ours", "ours"), ("tried", "ours with every K tried")):
            ratios = [seconds / own for seconds, own in zip(found["loop"], found[name], strict=True)]
            print(f"  loop / {text}: {shown(ratios, 1)} x")


if __name__ == "__main__":
    main()
