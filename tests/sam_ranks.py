"""A small problem for SAM, and the steps of a rank of two on it: importable by the ranks."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeitlt.teachers import SAM

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def problem(seed: int = 0, norm: bool = False) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers), torch.randn(12, 5), torch.randint(3, (12,))


def distributed_steps(rank: int, rendezvous: str, results: str) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    part = slice(6 * rank, 6 * rank + 6)
    after = {}
    for scope in ("global", "rank", "zero"):
        model, x, y = problem()
        shared = DistributedDataParallel(model)
        base = ZeroRedundancyOptimizer(shared.parameters(), torch.optim.SGD, **SGD) if scope == "zero" else None
        options = {} if base else SGD
        sam = SAM(shared.parameters(), base or torch.optim.SGD, 0.5, **options)
        for _ in range(2):
            with shared.no_sync() if scope == "rank" else nullcontext():
                F.cross_entropy(shared(x[part]), y[part]).backward()
            sam.first_step()
            F.cross_entropy(shared(x[part]), y[part]).backward()
            sam.second_step()
        after[scope] = [p.detach() for p in model.parameters()]
    torch.save(after, f"{results}-{rank}")
    destroy_process_group()
