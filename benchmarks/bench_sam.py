"""Teacher's training step with SAM beside plain SGD, from images on the device to new weights.

    python -m benchmarks.bench_sam [--case NAME ...] [--rounds 20] [--check]

One process, interleaved rounds, the same network, batch and precision. SAM runs the network forward and backward twice,
so twice SGD's time is the floor; the rest is the perturbation. ``davda54`` is the two-pass step of the usual
implementation, with a Python loop over the weights to perturb and another to restore them.
"""

import argparse
import sys

import torch
from torch import nn

from benchmarks import harness
from fastdeitlt import config
from fastdeitlt.config import Config
from fastdeitlt.teachers.step import Step, build_objective, build_optimizer
from fastdeitlt.teachers.views import Part, StepBatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CASES = {
    "resnet8-28": (CPU, "teacher/quickstart", ["train.precision=fp32"], 10),
    "resnet8-28-bf16": (CPU, "teacher/quickstart", ["train.precision=bf16"], 10),
    "resnet32-32": (CPU, "teacher/cifar10_lt_r100", ["train.compile=false", "train.precision=fp32"], 10),
    "resnet32-32-gpu": (GPU, "teacher/cifar10_lt_r100", [], 10),
    "resnet50-224": (GPU, "teacher/imagenet_lt", [], 1000),
}


def ours(cfg: Config, device: torch.device, batch: StepBatch, num_classes: int) -> harness.Call:
    """Return the trainer's step."""
    objective = build_objective(cfg.teacher_training, list(range(num_classes, 0, -1)), device)
    step = Step(objective, build_optimizer(objective.network, cfg.teacher_training), cfg, device)
    weights_K = torch.ones(num_classes, device=device)
    return lambda: step(batch, weights_K, 0)


def davda54_step(cfg: Config, device: torch.device, batch: StepBatch, num_classes: int) -> harness.Call:
    """Return davda54/sam's step: two passes and two loops over the weights.

    Both passes update batch-norm statistics.
    """
    t = cfg.teacher_training
    objective = build_objective(t, list(range(num_classes, 0, -1)), device)
    network: nn.Module = objective.network
    optimizer = torch.optim.SGD(network.parameters(), t.lr, momentum=t.momentum, weight_decay=t.weight_decay)
    weights_K, (part,) = torch.ones(num_classes, device=device), batch.parts
    dtype = torch.bfloat16 if cfg.train.precision == "bf16" else None

    def backward() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = objective(part.views[0], part.labels_B, weights_K)
        loss.backward()

    def step() -> None:
        backward()
        with torch.no_grad():
            grads = [p.grad for p in network.parameters() if p.grad is not None]
            norm = torch.stack([grad.norm(p=2) for grad in grads]).norm(p=2)
            kept = []
            for parameter in network.parameters():
                kept.append(parameter.detach().clone())
                parameter.add_(parameter.grad * (t.sam_rho / (norm + 1e-12)))
        optimizer.zero_grad()
        backward()
        with torch.no_grad():
            for parameter, weight in zip(network.parameters(), kept, strict=True):
                parameter.copy_(weight)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=sorted(CASES), help="default: the case of this device")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--check", action="store_true", help="run each step once, without timing or output")
    options = parser.parse_args(arguments)
    device = GPU if torch.cuda.is_available() else CPU
    for name in options.case or [name for name, (where, *_) in CASES.items() if where.type == device.type]:
        device, recipe, changes, num_classes = CASES[name]
        cfg = config.load(recipe, changes)
        size, count = cfg.teacher_training.img_size, cfg.teacher_training.batch_size
        images = torch.randn(count, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        labels_B = torch.arange(count, device=device) % num_classes
        batch = StepBatch([Part([images], labels_B)], labels_B)
        kinds = {
            kind: config.load(recipe, [*changes, f"teacher_training.sam={kind}"]) for kind in ("none", "sam", "asam")
        }
        calls = {
            {"none": "SGD", "sam": "SAM", "asam": "adaptive SAM"}[kind]: ours(kinds[kind], device, batch, num_classes)
            for kind in kinds
        }
        calls["davda54"] = davda54_step(kinds["sam"], device, batch, num_classes)
        if options.check:
            for call in calls.values():
                call()
            continue
        title, facts = f"{name}, batch {count}", {"precision": cfg.train.precision}
        case = harness.Case(title, calls, "SGD", eager=frozenset(calls), images=count, facts=facts)
        print(f"rows appended to {harness.run('sam', case, device, options.rounds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
