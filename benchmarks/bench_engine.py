"""What DeepSpeed costs beside the plain loop, and what a background checkpoint costs the step, in one process.

    python -m benchmarks.bench_engine [--rounds 20]

One rank, so no exchange over a network is in it: the rest is the engine's own work. A GPU takes DeiT-B at 224 px, 256
images in bf16 with a ResNet-50 teacher; a CPU a small student at 32 px in fp32. Everything eager and without CUDA
graphs, so that all engines run the same operators as in training.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import harness
from fastdeitlt import config
from fastdeitlt.config import Config
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.engine import Engine, build_engine
from fastdeitlt.core.joint import JointForward
from fastdeitlt.core.measure.timer import measure
from fastdeitlt.data.sampler import Plan
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.run.checkpoints import Checkpoints

STEPS = 10
"""Between checkpoints."""
KINDS = {"plain": ("plain", 0)} | {f"ZeRO-{stage}": ("deepspeed", stage) for stage in range(4)}


def settings(gpu: bool, kind: str, stage: int) -> Config:
    """The run of one candidate."""
    flat = {"train.engine": kind, "train.zero_stage": stage, "train.compile": False, "optim.clip_norm": 1.0}
    flat |= {"train.precision": "bf16" if gpu else "fp32", "train.batch_size": 256 if gpu else 16}
    return config.build(flat)


def engine_of(cfg: Config, device: torch.device) -> tuple[Engine, harness.Call]:
    """An engine and its whole step on one batch."""
    gpu, batch_size = device.type == "cuda", cfg.train.batch_size
    name, classes, size, depth = ("deit_base_distilled_patch16_224", 1000, 224, None) if gpu else (
        "deit_tiny_distilled_patch4_32", 10, 32, 4
    )  # fmt: skip
    torch.manual_seed(0)
    student = create_student(name, classes, depth=depth).to(device).train()
    teacher = Teacher(create_teacher("resnet50" if gpu else "resnet20", classes, "fastdeitlt"), classes).to(device)
    joint = JointForward(student, teacher, [5] * classes, cfg, device)
    engine = build_engine(joint, cfg, Plan(batch_size * 10, batch_size, 1, 1, 1))
    labels_B = torch.arange(batch_size, device=device) % classes
    images_BCHW = torch.randn(batch_size, 3, size, size, device=device)
    batch = Batch(images_BCHW, labels_B, labels_B.flip(0), torch.tensor(0.7, device=device))
    weights_K = torch.ones(classes, device=device)

    def step() -> None:
        engine.backward(engine.forward(batch, weights_K, None).loss)
        engine.step(1e-4)

    return engine, step


def saving(engine: Engine, step: harness.Call, found: Checkpoints, wait: bool) -> harness.Call:
    """``STEPS`` steps and a checkpoint of weights and optimizer, written in the background or waited for."""

    def call() -> None:
        for _ in range(STEPS):
            step()
        parts = {"model": engine.weights(), "optimizer": engine.optimizer_tensors()}
        found.save(1, parts, {"best": None}, wait=wait)

    return call


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="samples of each candidate")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    gpu = device.type == "cuda"
    eager = frozenset(KINDS)
    engines = {name: engine_of(settings(gpu, *what), device) for name, what in KINDS.items()}
    case = harness.Case("step", {name: step for name, (_, step) in engines.items()}, "plain", eager=eager)
    found = harness.rows("engine", case, measure(case.candidates, device, arguments.rounds, eager), device)
    with tempfile.TemporaryDirectory() as folder:
        plain, step = engines["plain"]
        kept = {way: Checkpoints(Path(folder) / way) for way in ("background", "waited for")}
        calls = {way: saving(plain, step, checkpoints, way != "background") for way, checkpoints in kept.items()}
        calls["none"] = lambda: [step() for _ in range(STEPS)]
        case = harness.Case(f"{STEPS} steps and a checkpoint", calls, "none", eager=frozenset(calls))
        found += harness.rows("engine", case, measure(case.candidates, device, arguments.rounds, case.eager), device)
        kept["background"].finish()
    for row in found:
        print(harness.line(row))
    print(f"rows appended to {harness.append('engine', found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
