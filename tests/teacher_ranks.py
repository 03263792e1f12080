"""A teacher's step on a network without batch norm, and what a rank of two does: importable by the ranks."""

import os

import numpy as np
import torch
from torch import nn

from fastdeitlt import config, distributed
from fastdeitlt.config import Config
from fastdeitlt.data.teacher_plan import TeacherPlan
from fastdeitlt.store.checkpoint import load_tensors
from fastdeitlt.teachers.losses import build_loss
from fastdeitlt.teachers.step import LogitObjective, Step, build_optimizer
from fastdeitlt.teachers.views import Part, StepBatch
from fastdeitlt.train_teacher import train_teacher


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


def as_rank(rank: int, port: int, folder: str, cfgs: list[Config]) -> None:
    """A rank of two: flat steps with both perturbations, then whole trainings."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    distributed.start("cpu")
    after = {scope: flat_step("ldam", "sam", 2, ranks=2, scope=scope) for scope in ("global", "rank")}
    torch.save(after, f"{folder}/flat-{rank}")
    for index, cfg in enumerate(cfgs):
        torch.save(load_tensors(train_teacher(cfg)), f"{folder}/run{index}-{rank}")
    distributed.stop()
