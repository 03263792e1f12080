"""Training time to a stated accuracy: ours beside timm's distillation task.

    python -m benchmarks.bench_time_to_accuracy FOLDER [--target 60] [--seeds 0 1 2] [--only NAME ...]

The recipe is the quick start's: the embedded images, its teacher (trained once, in FOLDER), network, augmentation,
optimizer, schedule, and autocast in bfloat16 where the processor has instructions for it. A run ends with the first
epoch whose average weights reach the target, a balanced accuracy in per cent of the validation images. Its time is that
of the training epochs, without start and evaluation. Each run has a new process, and contestants take turns for each
seed. Re-weighting, which timm's task does not support, is never reached: a run that gets there first fails.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.bench_reader import allow_posterize_to_black
from benchmarks.bench_small import balanced_accuracy, make_folder
from benchmarks.peers import distillation_task
from fastdeitlt import config
from fastdeitlt.core.assemble import assemble, open_data
from fastdeitlt.core.optim import learning_rate, parameter_groups
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.models import create_student, load_teacher
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.precision import autocast_dtype
from fastdeitlt.run import process
from fastdeitlt.teachers.opening import settled_teacher
from fastdeitlt.tools.export import timm_architecture
from fastdeitlt.train_teacher import train_teacher

RECIPE, TEACHER = "quickstart", "teacher/quickstart"
CPU = torch.device("cpu")
BASELINE = "timm"
OURS = "ours"
TIMM = {BASELINE: False, "timm, compiled": True}
"""Contestant -> whether its task is compiled."""
SHOWN = ("seconds", "images", "images_per_s")
Epoch = tuple[float, int, float]
"""Seconds, images, and balanced validation accuracy in per cent of the average weights after the epoch."""


def timm_epochs(folder: Path, teacher: Path, seed: int, workers: int, compiled: bool) -> Iterator[Epoch]:
    """Train with timm's loader, Mixup, distillation task and moving average."""
    import timm
    from timm.data import ImageDataset, Mixup, create_loader

    allow_posterize_to_black()
    torch.manual_seed(seed)
    cfg = config.load(RECIPE)
    a, m, o = cfg.augment, cfg.mixup, cfg.optim
    sets = open_sets(cfg.data)
    assert sets.val is not None
    num_classes = sets.num_classes
    loader = create_loader(
        ImageDataset(str(make_folder("fashion", folder) / "train")), (3, cfg.student.side, cfg.student.side),
        cfg.train.batch_size, is_training=True, scale=a.crop_scale, ratio=a.crop_ratio, hflip=a.flip_prob,
        auto_augment=f"rand-m{a.rand_magnitude:g}-mstd{a.rand_std}-inc1", interpolation="bicubic",
        mean=a.mean, std=a.std, num_workers=workers, persistent_workers=True, use_prefetcher=False, pin_memory=False,
    )  # fmt: skip
    mix = Mixup(m.mixup_alpha, m.cutmix_alpha, None, m.prob, m.switch_prob, "batch", True, m.smoothing, num_classes)
    architecture, options = timm_architecture(create_student(num_classes=num_classes, **cfg.student.architecture))
    student = timm.create_model(architecture, num_classes=num_classes, **options)
    cnn = Teacher(load_teacher(teacher, "", num_classes).network, num_classes, img_size=cfg.teacher.img_size)
    task = distillation_task(student, cnn, CPU)
    task.setup_ema(decay=o.ema_decay)
    network = task.trainable_module
    groups = parameter_groups(network, o.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.0), betas=o.betas, eps=o.eps, fused=True)
    if compiled:
        task.compile()
    update = _update(task, optimizer, o.clip_norm, autocast_dtype(cfg.train.precision, CPU))
    for epoch in range(cfg.loss.drw_epoch):
        task.train()
        begun, done = time.perf_counter(), 0
        for i, (images_BCHW, labels_B) in enumerate(loader):
            rate = learning_rate(epoch + i / len(loader), cfg)
            for group in optimizer.param_groups:
                group["lr"].fill_(rate)
            update(*mix(images_BCHW, labels_B))
            done += len(images_BCHW)
        seconds = time.perf_counter() - begun
        average = task.get_eval_model(ema=True)
        assert average is not None
        yield seconds, done, balanced_accuracy(average, sets.val, cfg, sets.train.counts)


def _update(
    task: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, dtype: torch.dtype | None
) -> Callable[[Tensor, Tensor], None]:
    def update(images_BCHW: Tensor, target_BK: Tensor) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = task(images_BCHW, target_BK)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(task.trainable_module.parameters(), clip_norm)  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()  # type: ignore[operator]

    return update


def our_epochs(folder: Path, teacher: Path, seed: int) -> Iterator[Epoch]:
    """Train with the parts and process settings of our command."""
    process.keep_freed_memory()
    gc.set_threshold(*process.GC_THRESHOLDS)
    cfg = config.load(RECIPE, [f"train.seed={seed}", f"teacher.path={teacher}"])
    data = open_data(cfg, CPU)
    assert data.sets.val is not None
    choose = partial(settled_teacher, cfg, data.images, data.source, device=CPU, run_folder=folder)
    parts = assemble(cfg, data, CPU, choose)
    assert parts.ema
    average, take_step = copy.deepcopy(parts.student), parts.step()
    for epoch in range(cfg.loss.drw_epoch):
        phase, steps = parts.phase(epoch), list(data.plan.steps(epoch))
        begun = time.perf_counter()
        with closing(parts.batches(steps, phase)) as batches:
            for step in steps:
                rate = learning_rate(step.clock, cfg, data.plan.virtual_ranks)
                take_step(batches, len(step.micro_batches), phase, rate)
        seconds = time.perf_counter() - begun
        average.load_state_dict(parts.ema.state)
        accuracy = balanced_accuracy(average, data.sets.val, cfg, data.images.counts)
        yield seconds, len(steps) * cfg.train.batch_size, accuracy


def run(folder: Path, contestant: str, seed: int, target: float, workers: int) -> dict[str, Any]:
    """Train one contestant until the target; return its row.

    Raises:
        RuntimeError: the target is not reached before re-weighting.
    """
    teacher = folder / "teacher" / "checkpoints" / "best"
    epochs = (
        timm_epochs(folder, teacher, seed, workers, TIMM[contestant])
        if contestant in TIMM
        else our_epochs(folder, teacher, seed)
    )
    seconds, images, accuracies = 0.0, 0, list[float]()
    with suppress(StopIteration):
        while not accuracies or accuracies[-1] < target:
            spent, seen, accuracy = next(epochs)
            seconds, images, accuracies = seconds + spent, images + seen, [*accuracies, accuracy]
    epochs.close()  # type: ignore[attr-defined]
    if accuracies[-1] < target:
        raise RuntimeError(
            f"{contestant}, seed {seed}: got {max(accuracies):.1f} %, expected {target} before re-weighting"
        )
    row = {"op": "time_to_accuracy", "contestant": contestant, "seed": seed, "target": target, "seconds": seconds}
    precision = str(autocast_dtype(config.load(RECIPE).train.precision, CPU) or torch.float32).removeprefix("torch.")
    row |= {"images": images, "images_per_s": images / seconds, "accuracies": accuracies, "workers": workers}
    return row | {"precision": precision}


def table(rows: list[dict[str, Any]]) -> str:
    """Format Markdown: means over seeds, and ratios of the mean seconds."""
    lines = ["| contestant | seconds of each seed | mean | images | images/s | ratio |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    names = dict.fromkeys(row["contestant"] for row in rows)
    means = {
        name: [statistics.mean(r[key] for r in rows if r["contestant"] == name) for key in SHOWN] for name in names
    }
    for name, (seconds, images, rate) in means.items():
        each = ", ".join(f"{row['seconds']:.0f}" for row in rows if row["contestant"] == name)
        ratio = f"{means[BASELINE][0] / seconds:.2f}" if BASELINE in means else "-"
        lines.append(f"| {name} | {each} | {seconds:.0f} | {images:,.0f} | {rate:.0f} | {ratio} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of images and runs")
    parser.add_argument("--target", type=float, default=60.0, help="balanced validation accuracy in per cent")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[*TIMM, OURS], default=[BASELINE, OURS], metavar="NAME")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of timm's loader")
    parser.add_argument("--one", type=Path, metavar="FILE", help="internal: one run in this process, its row to FILE")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    if options.one:
        row = run(folder, options.only[0], options.seeds[0], options.target, options.workers)
        options.one.write_text(json.dumps(row), encoding="utf-8")
        return 0
    train_teacher(config.load(TEACHER, [f"runs_dir={folder}", "name=teacher"]))  # nothing if it exists
    rows = []
    for seed in options.seeds:
        for name in options.only:
            file = folder / "row.json"
            command = [sys.executable, "-m", "benchmarks.bench_time_to_accuracy", str(folder), "--one", str(file)]
            command += ["--only", name, "--seeds", str(seed), "--target", str(options.target)]
            command += ["--workers", str(options.workers)]
            environment = os.environ | ({"GOMP_SPINCOUNT": process.SPINS} if name == OURS else {})
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
            rows.append(json.loads(file.read_text(encoding="utf-8")))
            print(f"{name}, seed {seed}: {rows[-1]['seconds']:.0f} s, {rows[-1]['images']:,} images", flush=True)
    print(table(rows))
    print(f"rows appended to {harness.append('time_to_accuracy', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
