"""Overhead of DeepSpeed over the plain loop, and of a background checkpoint on the step, in one process.

    python -m benchmarks.bench_engine [--rounds 20]

One rank, so without network communication. On a GPU DeiT-B at 224 px, 256 images in bf16 with a ResNet-50 teacher; on a
CPU a small student at 32 px in fp32. Eager and without CUDA graphs, so that all engines run the same operators.
"""

import argparse
import sys
import tempfile
from itertools import repeat
from pathlib import Path

import torch

from benchmarks import harness
from fastdeitlt import config
from fastdeitlt.config import Config
from fastdeitlt.core.assemble import Data, assemble
from fastdeitlt.core.engine import Engine
from fastdeitlt.data.sampler import plan_of
from fastdeitlt.models import create_teacher
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.run.checkpoints import Checkpoints
from fastdeitlt.tools.setup import step_of

STEPS = 10
"""Steps between checkpoints."""
KINDS = {"plain": ("plain", 0)} | {f"ZeRO-{stage}": ("deepspeed", stage) for stage in range(3)}


def settings(gpu: bool, kind: str, stage: int) -> Config:
    """Return the configuration of one candidate."""
    flat = {"train.engine": kind, "train.zero_stage": stage, "train.compile": False, "optim.clip_norm": 1.0}
    flat |= {"train.precision": "bf16" if gpu else "fp32", "train.batch_size": 256 if gpu else 16}
    flat |= {"augment.repeats": 1, "optim.ema_decay": 0.0}
    flat["student.name"] = "deit_base_distilled_patch16_224" if gpu else "deit_tiny_distilled_patch4_32"
    return config.build(flat | ({} if gpu else {"student.depth": 4}))


def step_with(cfg: Config, device: torch.device) -> tuple[Engine, harness.Call]:
    """Build an engine and its whole step on one batch."""
    arch, classes = ("resnet50", 1000) if device.type == "cuda" else ("resnet20", 10)
    data = Data([5] * classes, plan_of(cfg, 10 * cfg.train.batch_size))
    teacher = Teacher(create_teacher(arch, classes, "fastdeitlt"), classes).to(device)
    parts = assemble(cfg, data, device, lambda size: teacher)
    return parts.engine, step_of(parts, repeat(parts.noise_batch()))


def saving(engine: Engine, step: harness.Call, checkpoints: Checkpoints, wait: bool) -> harness.Call:
    """Return a call of ``STEPS`` steps and a checkpoint.

    It has weights and optimizer; the call optionally waits for the file.
    """

    def call() -> None:
        for _ in range(STEPS):
            step()
        parts = {"model": engine.weights(), "optimizer": engine.optimizer_tensors()}
        checkpoints.save(1, parts, {"best": None}, wait=wait)

    return call


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="samples per candidate")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    gpu = device.type == "cuda"
    engines = {name: step_with(settings(gpu, *what), device) for name, what in KINDS.items()}
    steps = {name: step for name, (_, step) in engines.items()}
    harness.run("engine", harness.Case("step", steps, "plain", eager=frozenset(KINDS)), device, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        plain, step = engines["plain"]
        kept = {way: Checkpoints(Path(folder) / way) for way in ("background", "waited for")}
        calls = {way: saving(plain, step, checkpoints, way != "background") for way, checkpoints in kept.items()}
        calls["none"] = lambda: [step() for _ in range(STEPS)]
        case = harness.Case(f"{STEPS} steps and a checkpoint", calls, "none", eager=frozenset(calls))
        print(f"rows appended to {harness.run('engine', case, device, arguments.rounds)}")
        kept["background"].finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
