"""One rank of a gloo process group for test_objectives.py: `python gloo_rank.py RANK WORLD_SIZE DIRECTORY`.

PYTHONPATH must name the repository and tests.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from support.objective_cases import CASES, learner, saved, train

from pipelines.training.ranks import Ranks

# Before it is saved, and after; parts of a batch, two in some cases.
STEPS, MORE = 10, 3


def main(rank: int, world_size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    ranks = Ranks(rank, world_size)
    found = {}
    for number, (case, config) in enumerate(CASES.items()):
        accumulating = replace(config, train=replace(config.train, accumulate=1 + number % 2, grad_clip=0.5))
        trained = learner(accumulating, ranks)
        results = train(trained, 0, STEPS)
        files = saved(trained)
        results += train(trained, STEPS, STEPS + MORE)
        found[case] = {
            **{
                name: torch.stack([getattr(each, name) for each in results])
                for name in ("loss", "moments", "grad_norm")
            },
            "files": files,
            "end": saved(trained),
        }
    told = {"gathered": ranks.gather(rank * 10), "broadcast": ranks.broadcast(f"from rank {rank}")}
    torch.save({"cases": found, **told}, directory / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
