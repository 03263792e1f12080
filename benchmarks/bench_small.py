"""Balanced test accuracy on small real sets at equal processor time: `plan`'s recommendation beside timm's models.

    pip install scikit-learn elpv-dataset
    python -m benchmarks.bench_small FOLDER [--sets fashion digits solar-cells] [--seeds 0 1 2] [--hours 0.05]

For each set and seed ``plan`` writes two recipes, and teacher and student are trained as by ``train --with-teacher``;
the model that the run recommends (best balanced validation accuracy) is scored on the test images. The others use the
same images, augmentation, size and batch, and as much processor time: timm's ResNet-18 with cross-entropy and a plain
timm ViT that of teacher and student together, timm's distilled DeiT with its TokenDistillationTask and the same teacher
that of the student. All weights are selected on the same validation images.

Processor time rather than wall time, in ``plan`` too, so that other work on the machine affects all equally. A row is
appended as soon as it is measured; existing rows are not measured again.
"""

import argparse
import copy
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks import harness
from benchmarks.peers import dense_target, distillation_task
from fastdeitlt import config
from fastdeitlt.config import Config
from fastdeitlt.core.batches import train_batches
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.data.sampler import plan_of
from fastdeitlt.data.sets import embedded
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.data.teacher_plan import teacher_plan_of
from fastdeitlt.evaluation.evaluate import OneHead, collect_logits
from fastdeitlt.evaluation.metrics import Result, score_heads
from fastdeitlt.evaluation.recommend import Recommendation
from fastdeitlt.models.saved import open_saved
from fastdeitlt.models.vit import create_student
from fastdeitlt.precision import autocast_dtype
from fastdeitlt.store.files import read_json
from fastdeitlt.store.manifest import preprocess_of
from fastdeitlt.teachers.views import teacher_batches
from fastdeitlt.tools.export import timm_architecture
from fastdeitlt.tools.plan import make_plan
from fastdeitlt.tools.plan_facts import Rates
from fastdeitlt.tools.plan_rules import choose
from fastdeitlt.train import train
from fastdeitlt.train_teacher import train_teacher

SETS = ("fashion", "digits", "solar-cells")
OURS, PEERS = "plan", ("timm resnet18, cross-entropy", "timm DeiT, TokenDistillationTask", "timm ViT")
CPU = torch.device("cpu")
MANY = 20
"""Factor on the hours passed to ``make_plan``, which leaves a busy machine time for its measurements."""
CHECKS = 10
"""Number of evaluations on validation images."""
Update = Callable[[Tensor, Tensor], Tensor]


def make_folder(name: str, folder: Path) -> Path:
    """Write a set as class folders, unless it exists."""
    place = folder / name
    if place.exists():
        return place
    if name == "fashion":
        root = embedded.unpack()
        for split in ("train", "val", "test"):
            for line in (root / f"{split}.txt").read_text(encoding="utf-8").splitlines():
                path, label = line.rsplit(" ", 1)
                target = place / split / label / Path(path).name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / path, target)
    else:
        script = harness.ROOT / "examples" / "another_dataset.py"
        subprocess.run([sys.executable, str(script), name, str(place)], check=True)
    return place


def ours(root: Path, folder: Path, seed: int, hours: float) -> dict[str, Any]:
    """Plan for hours of processor time and train.

    Returns recommendation, test accuracy and processor seconds.
    """
    wall, cpu = time.monotonic(), time.process_time()
    planned = make_plan(root, MANY * hours, name=folder.name)
    busy = (time.process_time() - cpu) / (time.monotonic() - wall)
    # images per second of processor time, independent of other work on the machine
    student_rates, teacher_rates = (
        {rung: rate / busy for rung, rate in rates.items()} for rates in (planned.rates.student, planned.rates.teacher)
    )
    rates = Rates(student_rates, teacher_rates, 0.0)
    student, teacher = choose(planned.facts, rates, hours, folder.name).configs
    common = {"train.seed": seed, "runs_dir": str(folder), "evaluate.analyze_images": 0}
    begun = time.process_time()
    best = train_teacher(config.build(config.flatten(teacher) | common))
    middle = time.process_time()
    run = train(config.build(config.flatten(student) | common | {"teacher.path": str(best)}))
    ended = time.process_time()
    results = read_json(run / "results.json")
    recommendation = Recommendation.from_json(results["recommendation"])
    heads = {**results["test"]["heads"], **results["teacher"]["heads"]}
    accuracies = {name: head["balanced_accuracy"] for name, head in heads.items()}
    return {
        "balanced": accuracies[recommendation.best.name], "recommended": recommendation.best.name, "heads": accuracies,
        "student": student.student.name, "epochs": [teacher.teacher_training.epochs, student.train.epochs],
        "cpu_s": ended - begun, "student_cpu_s": ended - middle, "run": str(run), "teacher": str(best),
        "teacher_run": str(best.parents[1]),
    }  # fmt: skip


def peer(name: str, mine: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train one of timm's models and return its test accuracy.

    On the images of our run, for its processor time.
    """
    run = Path(mine["run"])
    cfg = config.load(str(run / "config.yaml"))
    teacher_cfg = config.load(str(Path(mine["teacher_run"]) / "config.yaml"))
    sets = open_sets(cfg.data)
    assert sets.val is not None and sets.test is not None
    torch.manual_seed(seed)
    student = create_student(
        num_classes=sets.num_classes, **cfg.student.model_dump(include={"name", "img_size", "depth"})
    )
    architecture, options = timm_architecture(student)
    num_classes = sets.num_classes
    budget_s = mine["student_cpu_s"] if "Task" in name else mine["cpu_s"]
    begun = time.process_time()
    network: nn.Module
    optimizer: torch.optim.Optimizer
    if name.startswith("timm resnet18"):
        network = timm.create_model("resnet18", num_classes=num_classes)
        optimizer = torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)
        used, update = teacher_cfg, _cross_entropy(network)
    elif name == "timm ViT":
        network = timm.create_model(architecture.replace("_distilled", ""), num_classes=num_classes, **options)
        optimizer = torch.optim.AdamW(network.parameters(), cfg.optim.lr, betas=cfg.optim.betas, weight_decay=0.05)
        used, update = cfg, _cross_entropy(network)
    else:
        network = timm.create_model(architecture, num_classes=num_classes, **options)
        optimizer = torch.optim.AdamW(network.parameters(), cfg.optim.lr, betas=cfg.optim.betas, weight_decay=0.05)
        used, update = cfg, _distilled(network, mine["teacher"])
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(cfg.optim.ema_decay), use_buffers=True)
    best: tuple[float, dict[str, Tensor]] = (-1.0, {})
    peak, checked = optimizer.param_groups[0]["lr"], 0
    with closing(open_source(sets.train, cfg.data, CPU)) as source:
        for images_BCHW, target_BK in _batches(used, source, sets.train):
            done = (time.process_time() - begun) / budget_s
            if done >= (checked + 1) / CHECKS:
                checked += 1
                for model in (network, average.module):
                    accuracy = balanced_accuracy(model, sets.val, used, sets.train.counts)
                    if accuracy > best[0]:
                        best = accuracy, copy.deepcopy(model.state_dict())
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = peak * min(done / 0.05, 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))) + 1e-6
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast_dtype("bf16", CPU) is not None):
                loss = update(images_BCHW, target_BK)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(network)
    network.load_state_dict(best[1])
    return {
        "balanced": balanced_accuracy(network, sets.test, used, sets.train.counts),
        "validation": best[0],
        "cpu_s": budget_s,
    }


def _batches(cfg: Config, source: Any, images: LongTailSet) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of a teacher's or student's recipe, epoch after epoch.

    With dense targets.
    """
    num_classes = images.num_classes
    for epoch in count():
        if cfg.is_teachers:
            with closing(teacher_batches(cfg, source, images, teacher_plan_of(cfg, len(images)), epoch)) as steps:
                for step in steps:
                    for part in step.parts:
                        yield part.views[0], nn.functional.one_hot(part.labels_B, num_classes).float()
            continue
        micro_batches = (micro for step in plan_of(cfg, len(images)).steps(epoch) for micro in step.micro_batches)
        how: dict[str, Any] = {"mixing": cfg.mixup.on, "size": cfg.student.side}
        with closing(train_batches(micro_batches, source, images, cfg, **how)) as batches:
            for batch in batches:
                is_mixed = batch.partner_B is not None
                hard_BK = nn.functional.one_hot(batch.labels_B, num_classes).float()
                yield batch.images_BCHW, dense_target(batch, num_classes) if is_mixed else hard_BK


def _cross_entropy(network: nn.Module) -> Update:
    return lambda images_BCHW, target_BK: nn.functional.cross_entropy(network.train()(images_BCHW), target_BK)


def _distilled(network: nn.Module, teacher: str) -> Update:
    task = distillation_task(network, open_saved(teacher).model, CPU)
    return lambda images_BCHW, target_BK: task.train()(images_BCHW, target_BK)["loss"]


def balanced_accuracy(model: nn.Module, images: LongTailSet, cfg: Config, counts: list[int]) -> float:
    """Return the balanced accuracy in per cent, with our run's preprocessing."""
    size = cfg.teacher_training.img_size if cfg.is_teachers else cfg.student.side
    with closing(open_source(images, cfg.data, CPU, scored=True)) as source:
        logits_NK, _, labels_N = collect_logits(
            OneHead(model.eval()), source, images, preprocess_of(cfg, size), batch_size=256, device=CPU,
            autocast_dtype=autocast_dtype("bf16", CPU),
        )  # fmt: skip
    result: Result = score_heads({"TEACHER": logits_NK}, labels_N, counts)
    model.train()
    return result.heads["TEACHER"].balanced_accuracy


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of images and runs")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--hours", type=float, default=0.05, help="processor time for plan")
    parser.add_argument("--table", action="store_true", help="only print the existing results as a table")
    parser.add_argument("--one", nargs=2, metavar=("CONTESTANT", "JSON"), help="internal: one run in this process")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    rows_file = folder / "rows.jsonl"
    if options.one:
        contestant, file = options.one
        name, seed = options.sets[0], options.seeds[0]
        if contestant == OURS:
            result = ours(make_folder(name, folder), folder / f"{name}-{seed}", seed, options.hours)
        else:
            result = peer(contestant, json.loads(Path(file).read_text(encoding="utf-8")), seed)
        Path(f"{file}.out").write_text(json.dumps(result), encoding="utf-8")
        return 0
    if options.table:
        print(table([json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.sets:
            mine_file = folder / f"{name}-{seed}.json"
            for contestant in (OURS, *PEERS):
                result = _run(folder, name, seed, contestant, mine_file, options.hours, rows_file)
                print(f"{name} seed {seed} {contestant}: {result['balanced']:.1f} %", flush=True)
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Format Markdown, one row per set, one column per contestant.

    Mean and deviation over seeds, and the recommendations; the AVG of the recommended run's student.
    """
    columns = (OURS, "its student, AVG", *PEERS)
    lines = [
        f"| set | seeds | recommended | {' | '.join(columns)} |",
        "| --- | ---: | --- |" + " ---: |" * len(columns),
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        mine = [row for row in rows if row["set"] == name]
        plans = [row for row in mine if row["contestant"] == OURS]
        values = {
            contestant: [row["balanced"] for row in mine if row["contestant"] == contestant] for contestant in PEERS
        }
        values |= {OURS: [row["balanced"] for row in plans], columns[1]: [row["heads"]["AVG"] for row in plans]}
        cells = [_mean(values[column]) for column in columns]
        named = ", ".join(row["recommended"] for row in plans)
        lines.append(f"| {name} | {len(plans)} | {named} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else "-"


def _run(
    folder: Path, name: str, seed: int, contestant: str, mine_file: Path, hours: float, rows_file: Path
) -> dict[str, Any]:
    """Run one contestant in a new process, unless its row exists; return the row."""
    key = {"set": name, "seed": seed, "contestant": contestant}
    lines = rows_file.read_text(encoding="utf-8").splitlines() if rows_file.is_file() else []
    for row in map(json.loads, lines):
        if {part: row[part] for part in key} == key:
            return row
    command = [sys.executable, "-m", "benchmarks.bench_small", str(folder), "--sets", name, "--seeds", str(seed)]
    command += ["--hours", str(hours), "--one", contestant, str(mine_file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result = json.loads(Path(f"{mine_file}.out").read_text(encoding="utf-8"))
    if contestant == OURS:
        mine_file.write_text(json.dumps(result), encoding="utf-8")
    row = key | result | {"hours": hours} | harness.machine()
    with rows_file.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


if __name__ == "__main__":
    sys.exit(main())
