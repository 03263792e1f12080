"""Two ranks on this machine, and small steps for them to take: importable by the ranks."""

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from fastdeitlt import config, distributed
from fastdeitlt.config import Config
from fastdeitlt.data.teacher_plan import TeacherPlan
from fastdeitlt.store.checkpoint import load_tensors
from fastdeitlt.teachers import SAM
from fastdeitlt.teachers.losses import build_loss
from fastdeitlt.teachers.step import LogitObjective, Step, build_optimizer
from fastdeitlt.teachers.views import Part, StepBatch
from fastdeitlt.train_teacher import train_teacher

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def spawn(work: Callable, *arguments: object) -> None:
    """Run ``work(rank, *arguments)`` in two processes that find each other as a launcher's ranks do."""
    torch.multiprocessing.spawn(_enter, (free_port(), work, arguments), nprocs=2)


def _enter(rank: int, port: int, work: Callable, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(rank, *arguments)


def problem(seed: int = 0, norm: bool = False) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small problem for SAM."""
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers), torch.randn(12, 5), torch.randint(3, (12,))


def sam_steps(rank: int) -> dict[str, list[Tensor]]:
    """The weights after two steps of a rank of two on half of the problem, by how the ranks share them."""
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
    return after


def flat_step(loss: str, sam: str, parts: int, ranks: int = 1, scope: str = "global") -> list[torch.Tensor]:
    """The weights after two steps of a network without batch norm on a batch that comes in parts."""
    rank = distributed.rank()
    cfg = config.load(
        "teacher/quickstart",
        [
            f"teacher_training.{name}"
            for name in (f"loss={loss}", f"sam={sam}", "sam_rho=0.5", f"sam_scope={scope}", "normed_head=false")
        ]
        + ["train.precision=fp32"],
    )
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    counts, cpu = [9, 5, 1], torch.device("cpu")
    objective = LogitObjective(network, build_loss(cfg.teacher_training, counts, cpu), per_image=loss == "focal")
    step = Step(objective, build_optimizer(network, cfg.teacher_training), cfg, cpu)
    images, labels = torch.randn(11, 3, 2, 2), torch.randint(3, (11,))
    plan = TeacherPlan(11, 11, 0, drop_last=False, rank=rank, world=ranks, accumulate=parts)
    own = [torch.from_numpy(part) for part in plan.parts(np.arange(11))]
    batch = StepBatch([Part([images[part]], labels[part]) for part in own], labels)
    for seed in range(2):
        loss_value = distributed.sum_over_ranks(step(batch, torch.tensor([0.3, 1.0, 4.0]), seed))
    return [loss_value, *(p.detach() for p in network.parameters())]


def train_teachers(rank: int, folder: str, cfgs: list[Config]) -> None:
    """Steps with both perturbations, then whole trainings."""
    distributed.start("cpu")
    torch.save(sam_steps(rank), f"{folder}/sam-{rank}")
    after = {scope: flat_step("ldam", "sam", 2, ranks=2, scope=scope) for scope in ("global", "rank")}
    torch.save(after, f"{folder}/flat-{rank}")
    for index, cfg in enumerate(cfgs):
        torch.save(load_tensors(train_teacher(cfg)), f"{folder}/run{index}-{rank}")
    distributed.stop()
