"""One rank of a gloo process group for test_learner.py: `python gloo_rank.py RANK WORLD_SIZE DIRECTORY`.

PYTHONPATH must name the repository and tests/pipelines/training.
"""

import sys
from pathlib import Path

import test_learner as single
import torch
import torch.distributed as dist

from pipelines.data.stream import MicroBatch
from pipelines.training.learner import Learner
from pipelines.training.ranks import Ranks


def main(rank: int, world_size: int, directory: Path) -> None:
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    ranks = Ranks(rank, world_size)
    for accumulate in (1, 2):
        config = single.configured(accumulate=accumulate, grad_clip=0.5)
        learner = Learner(single.build, config, single.CPU, rank, world_size)
        results = []
        for step in range(4):
            whole = single.batch(step)
            rows = slice(0, 5) if rank == 0 else slice(5, 12)
            share = MicroBatch(step, whole.images[rows], whole.ids[rows], whole.epochs[rows])
            results.append(learner.step(share))
        torch.save(
            {
                "losses": torch.stack([result.loss for result in results]),
                "moments": torch.stack([result.moments for result in results]),
                "norms": torch.stack([result.grad_norm for result in results]),
                "weights": single.weights(learner),
                "gathered": ranks.gather(rank * 10),
                "broadcast": ranks.broadcast(f"from rank {rank}"),
            },
            directory / f"{accumulate}-{rank}.pt",
        )
    dist.destroy_process_group()


main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
