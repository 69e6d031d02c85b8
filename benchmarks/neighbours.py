"""Time of exact nearest neighbours, beside scikit-learn's brute force on the same float32 features.

    OMP_NUM_THREADS=1 uv run benchmarks/neighbours.py [--rows 20000] [--dimensions 64 512] [--k 10] [--rounds 3]

Every row's k nearest others of the same set. Rounds are interleaved because the machine's speed drifts; ratios are
medians over rounds, of wall-clock time and of CPU time, which other processes disturb less. scikit-learn's distances
are those of a float64 product; where both disagree about a neighbour is counted, too.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from sklearn.neighbors import NearestNeighbors

from ddpm_core.sets.neighbours import Neighbours


def ours(features: np.ndarray, k: int, block: int) -> np.ndarray:
    """Ids [n, k], the base in blocks."""
    ids = np.arange(len(features))
    found = Neighbours(features, k, ids)
    for start in range(0, len(features), block):
        found.add(ids[start : start + block], features[start : start + block])
    return found.ids


def theirs(features: np.ndarray, k: int) -> np.ndarray:
    """The same by scikit-learn."""
    model = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(features)
    return model.kneighbors(return_distance=False)


def timed(function: Callable[[], np.ndarray]) -> tuple[float, float, np.ndarray]:
    """Seconds of wall-clock and CPU time, and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = function()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def main() -> None:
    """Run the rounds and print a line for each number of dimensions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--block", type=int, default=4096, help="rows of the base given at a time")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for d in options.dimensions:
        # Spread unevenly over dimensions, as features are.
        features = np.random.default_rng(0).standard_normal((options.rows, d), dtype=np.float32)
        features *= np.linspace(1.0, 0.05, d, dtype=np.float32)
        rounds = []
        for _ in range(options.rounds):
            wall, cpu, found = timed(lambda features=features: ours(features, options.k, options.block))
            their_wall, their_cpu, other = timed(lambda features=features: theirs(features, options.k))
            rounds.append((wall, their_wall, wall / their_wall, cpu, their_cpu, cpu / their_cpu))
        wall, their_wall, ratio, cpu, their_cpu, cpu_ratio = (
            statistics.median(column) for column in zip(*rounds, strict=True)
        )
        print(
            f"{options.rows:,} x {options.rows:,} x {d}, k = {options.k}, medians of {options.rounds}: "
            f"wall {wall:.1f} s, scikit-learn {their_wall:.1f} s, {ratio:.2f} x; "
            f"CPU {cpu:.1f} s, {their_cpu:.1f} s, {cpu_ratio:.2f} x; {int((found != other).sum())} neighbours differ",
            flush=True,
        )


if __name__ == "__main__":
    main()
