"""What faults cost: seconds of reads and writes in an object store, healthy beside 20 % faulty requests.

    uv run benchmarks/storage.py [--small 200] [--large 8] [--faulty 0.2] [--threads 1] [--rounds 3]

SeaweedFS runs on this machine. (a) direct: no proxy; (b) healthy: through the fault proxy, which passes everything on;
(c) faulty: a share of the requests, drawn by a seed, is answered 503 or 500, reset, broken off halfway or done without
an acknowledgement, in equal parts. Small objects have 32 KiB, large ones 16 MiB; every byte read is compared.

Rounds are interleaved (a, b, c, a, b, c, …) because the machine's speed drifts; ratios are of medians.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the store and the proxy are those of the tests

from support.fault_proxy import FaultProxy, mixed
from support.s3_store import S3Store

from pipelines.storage.location import Location, forget_connections

SIZES = {"small": 32 * 2**10, "large": 16 * 2**20}


def timed(do: Callable[[int], None], count: int, threads: int) -> float:
    """Seconds of doing it `count` times in so many threads."""
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for done in [pool.submit(do, index) for index in range(count)]:
            done.result()
        return time.perf_counter() - start


def measure(root: Location, counts: dict[str, int], threads: int) -> dict[str, float]:
    """Seconds of the writes, reads and ranged reads of objects of every size."""
    seconds = {}
    for kind, count in counts.items():
        data = os.urandom(SIZES[kind])

        def write(index: int, kind: str = kind, data: bytes = data) -> None:
            (root / f"{kind}-{index}").write_bytes(data)

        def read(index: int, kind: str = kind, data: bytes = data) -> None:
            if (root / f"{kind}-{index}").read_bytes() != data:
                raise SystemExit("wrong content")

        def read_ranges(index: int, kind: str = kind, data: bytes = data) -> None:
            with (root / f"{kind}-{index}").open("rb", cache_type="none") as opened:
                half = len(data) // 2
                if opened.read(half) + opened.read(half) != data:
                    raise SystemExit("wrong content")

        for name, do in {"write": write, "read": read, "two ranges": read_ranges}.items():
            seconds[f"{kind}, {name}"] = timed(do, count, threads)
    return seconds


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=200)
    parser.add_argument("--large", type=int, default=8)
    parser.add_argument("--faulty", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    counts = {"small": arguments.small, "large": arguments.large}
    with tempfile.TemporaryDirectory() as directory:
        store = S3Store(Path(directory))
        proxy = FaultProxy(store.port, seed=1)
        os.environ.update(store.environment)
        times: dict[tuple[str, str], list[float]] = defaultdict(list)
        try:
            for _ in range(arguments.rounds):
                for way, endpoint, share in (
                    ("direct", store.endpoint, 0.0),
                    ("healthy", proxy.endpoint, 0.0),
                    ("faulty", proxy.endpoint, arguments.faulty),
                ):
                    os.environ["AWS_ENDPOINT_URL"] = endpoint
                    forget_connections()
                    root = Location.parse(f"s3://{store.bucket}/{uuid.uuid4().hex}")
                    (root / "first").write_bytes(b"")  # connects
                    proxy.set_rules(mixed(share) if share else [])
                    for what, seconds in measure(root, counts, arguments.threads).items():
                        times[what, way].append(seconds)
            injected = proxy.counts()
        finally:
            proxy.close()
            store.close()
    print(f"{'':20} {'direct':>12} {'healthy':>12} {'faulty':>12} {'faulty : healthy':>18}")
    for what in dict.fromkeys(what for what, _ in times):
        count = counts[what.split(",")[0]]
        each = [statistics.median(times[what, way]) / count * 1e3 for way in ("direct", "healthy", "faulty")]
        print(f"{what:20} {each[0]:9.1f} ms {each[1]:9.1f} ms {each[2]:9.1f} ms {each[2] / each[1]:18.2f}")
    faults = ", ".join(f"{name} {injected[name]}" for name in ("503", "500", "reset", "truncate", "lost_ack"))
    print(f"{injected['requests']} requests through the proxy; faults: {faults}")


if __name__ == "__main__":
    main()
