"""Rows per second of the training stream, beside plain pyarrow reading of the same files.

    uv run benchmarks/stream.py [--rows 200000] [--size 32] [--batch_size 128] [--rounds 3]

(a) plain: pyarrow reads every shard's image column, memory-mapped, nothing shuffled, nothing batched.
(b) shuffled: the stream's own read function in one process: random row groups, shuffled rows, no Ray.
(c) stream: the whole training stream through Ray Data as a training worker consumes it: reads ahead in Ray
    tasks, shuffled, split, delivered in global batches. Timed after the first batch; the time to the first
    batch of a Ray that is already running is printed by itself.

Rounds are interleaved (a, b, c, a, b, c, …) because the machine's speed drifts; ratios are of medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from random_data import make_data

from pipelines.cluster import connection
from pipelines.data.dataset import PreparedDataset
from pipelines.data.stream import StreamPlan, micro_batches, read_window, start_stream


def plain(dataset: PreparedDataset) -> float:
    """Rows/s of pyarrow alone."""
    start, rows = time.perf_counter(), 0
    for shard in dataset.shards:
        file = pq.ParquetFile((dataset.location / "data" / shard.name).path, memory_map=True)
        rows += file.read(columns=["image"]).num_rows
    return rows / (time.perf_counter() - start)


def shuffled(dataset: PreparedDataset, plan: StreamPlan) -> float:
    """Rows/s of reading windows in training order in this process."""
    start, rows = time.perf_counter(), 0
    for window in range(plan.num_windows):
        rows += len(read_window(plan, dataset, window).ids)
    return rows / (time.perf_counter() - start)


def streamed(dataset: PreparedDataset, plan: StreamPlan) -> tuple[float, float]:
    """(Seconds to the first batch, rows/s after it) of the training stream on one rank."""
    start = time.perf_counter()
    rows, first = 0, 0.0
    for batch in micro_batches(start_stream(plan, 0, 1)[0], 0, 0, dataset.image_shape):
        if not first:
            first = time.perf_counter()
        rows += len(batch.rows.ids)
    return first - start, (rows - plan.batch_size) / (time.perf_counter() - first)


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        dataset = make_data(Path(directory) / "data", options.rows, (options.size, options.size, 3))
        steps = options.epochs * options.rows // options.batch_size
        plan = StreamPlan.of(dataset, 0, options.batch_size, steps, 64 << 20)
        one_epoch = StreamPlan.of(dataset, 0, options.batch_size, options.rows // options.batch_size, 64 << 20)
        connection.connect()
        streamed(dataset, one_epoch)  # warm-up: Ray's worker processes, the page cache
        table: dict[str, list[float]] = {"plain": [], "shuffled": [], "stream": [], "first": []}
        for _ in range(options.rounds):
            table["plain"].append(plain(dataset))
            table["shuffled"].append(shuffled(dataset, one_epoch))
            first, rate = streamed(dataset, plan)
            table["stream"].append(rate)
            table["first"].append(first)
        connection.disconnect()
    middle = {name: statistics.median(values) for name, values in table.items()}
    side = options.size
    print(f"{options.rows:,} rows of {side}x{side}x3, global batch {options.batch_size}, medians of {options.rounds}")
    for name, text in (("plain", "pyarrow alone"), ("shuffled", "read + shuffle"), ("stream", "training stream")):
        print(f"  {text:<16} {middle[name]:>12,.0f} rows/s   {middle[name] / middle['plain']:.2f} x pyarrow")
    print(f"  first batch after {middle['first']:.2f} s on a running Ray")


if __name__ == "__main__":
    main()
