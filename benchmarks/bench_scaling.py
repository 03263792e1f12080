"""Scaling of cost: a step with batch, tokens and classes; sampler, lists, scoring and checkpoints with their sizes.

    python -m benchmarks.bench_scaling [--only NAME ...] [--rounds 5] [--small]

Each case is timed at several sizes and log(time) fitted to log(size) by least squares; the slope is the exponent.
Exits with 1 if an exponent is above its limit, 1.15 unless stated otherwise.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness, peers
from benchmarks.peers import Workload
from fastdeitlt.data.sampler import Plan
from fastdeitlt.data.sets.lists import read_list
from fastdeitlt.evaluation.metrics import score
from fastdeitlt.models import create_student
from fastdeitlt.store.checkpoint import save_model_folder

CPU = torch.device("cpu")
TINY = Workload("deit_tiny_distilled_patch8_32", 32, 10, 32, "resnet8", "fp32", CPU)
LINEAR = 1.15
Prepared = Callable[[int, Path], harness.Call]


@dataclass(frozen=True)
class Growth:
    """A scaling case.

    Args:
        sizes: sizes to measure, rising.
        prepare: (size, empty folder) -> the call to time.
        unit: unit of the sizes.
        limit: largest exponent that passes.
    """

    sizes: Sequence[int]
    prepare: Prepared
    unit: str
    limit: float = LINEAR


def step(size: int, folder: Path, field: str) -> harness.Call:
    """Return our eager step with one field of the workload changed."""
    changed: dict[str, Any] = {field: size}
    if field == "img_size":
        changed["student"] = f"deit_tiny_distilled_patch8_{size}"
    work = replace(TINY, **changed)
    return functools.partial(peers.ours(work, train__compile=False), work.batch(0))


def sampler(size: int, folder: Path) -> harness.Call:
    """Return a call that plans all micro-batches of an epoch of four virtual ranks."""
    plan = Plan(size, 128, 4, 3, 4)
    return lambda: sum(len(step.micro_batches) for step in plan.steps(0))


def lists(size: int, folder: Path) -> harness.Call:
    """Return a call that reads and checks a list file.

    It has ``size`` images in 1,000 classes.
    """
    path = folder / "train.txt"
    path.write_text("".join(f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG {i % 1000}\n" for i in range(size)))
    return lambda: read_list(path, folder)


def scoring(images: int, num_classes: int) -> harness.Call:
    """Return a call that computes all scores from the logits of both heads."""
    generator = torch.Generator().manual_seed(0)
    cls_NK, dist_NK = (torch.randn(images, num_classes, generator=generator) for _ in range(2))
    labels_N = torch.arange(images) % num_classes
    counts = np.geomspace(1000, 2, num_classes).astype(int).tolist()
    return lambda: score(cls_NK, dist_NK, labels_N, counts, None)


def checkpoint(size: int, folder: Path) -> harness.Call:
    """Return a call that saves a student of ``size`` blocks.

    With its hash and its manifest.
    """
    name = "deit_tiny_distilled_patch8_32"
    student = create_student(name, 10, depth=size)
    model = {"name": name, "num_classes": 10, "img_size": 32, "depth": size}
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "img_size": 32, "crop_pct": 1.0}
    manifest = {"kind": "student", "class_names": [str(i) for i in range(10)], "class_counts": [5] * 10,
                "dataset": "folder", "preprocess": preprocess, "model": model}  # fmt: skip
    return lambda: save_model_folder(folder / "model", student.state_dict(), manifest)


def growths(small: bool) -> dict[str, Growth]:
    """Return name -> scaling case; ``small`` keeps the two smallest sizes."""
    cases = {
        "step by batch": Growth((16, 32, 64, 128), functools.partial(step, field="batch_size"), "images"),
        # attention is quadratic in tokens; side 32, 64, 96, 128 has 18, 66, 146, 258 tokens
        "step by image side": Growth((32, 64, 96, 128), functools.partial(step, field="img_size"), "pixels", 2.3),
        "step by classes": Growth((10, 100, 1000, 8142), functools.partial(step, field="num_classes"), "classes"),
        "sampler by data set": Growth((12_406, 50_000, 115_846, 437_513, 2_686_843), sampler, "images"),
        "list reading by data set": Growth((2_500, 12_406, 50_000, 115_846, 437_513), lists, "images"),
        "scoring by images": Growth((1000, 4000, 16_000, 64_000), lambda n, _: scoring(n, 100), "images"),
        "scoring by classes": Growth((10, 100, 1000, 8142), lambda k, _: scoring(4000, k), "classes"),
        "checkpoint by blocks": Growth((3, 6, 12, 24), checkpoint, "blocks"),
    }
    return {name: replace(g, sizes=g.sizes[:2]) for name, g in cases.items()} if small else cases


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Return the slope of log(time) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def run(name: str, growth: Growth, rounds: int) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of one case, each with the exponent."""
    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for size in growth.sizes:
            place = Path(folder) / str(size)
            place.mkdir()
            calls[f"{size} {growth.unit}"] = growth.prepare(size, place)
        case = harness.Case(name, calls, baseline=next(iter(calls)), eager=frozenset(calls))
        rows = harness.rows("scaling", case, harness.measure(calls, CPU, rounds), CPU)
    slope = exponent(growth.sizes, [row["median_ms"] for row in rows])
    for size, row in zip(growth.sizes, rows, strict=True):
        yield row | {"size": size, "exponent": slope, "limit": growth.limit}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(growths(False)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="two sizes each, without a verdict or output")
    options = parser.parse_args(arguments)
    bad = 0
    for name, growth in growths(options.small).items():
        if options.only and name not in options.only:
            continue
        rows = list(run(name, growth, options.rounds))
        slope, worse = rows[0]["exponent"], rows[0]["exponent"] > growth.limit
        bad += worse
        times = ", ".join(f"{row['candidate']}: {row['median_ms']:.3g} ms" for row in rows)
        print(f"{name:26} exponent {slope:5.2f} (limit {growth.limit}){' TOO STEEP' if worse else ''}  {times}")
        if not options.small:
            harness.append("scaling", rows)
    return 1 if bad and not options.small else 0


if __name__ == "__main__":
    sys.exit(main())
