"""Training throughput from JPEG files to new weights: timm's loader and task, ours streaming, ours resident.

    pip install scikit-image scikit-learn        # for their sample photos; without them the images are 1/f noise
    python -m benchmarks.bench_train [--images 512] [--rounds 7] [--workers 1] [--arrays]

Every round is one pass over the same photos (``bench_reader``) by each contestant in turn: RandAugment, crops, erasing,
Mixup or CutMix of each batch, student, teacher, joint loss, AdamW, moving average. timm has its create_loader with as
many worker processes as we have decoding threads, its Mixup, and its distillation task compiled; teacher, student and
precision are the same. "No data" is our step alone on one batch in memory, the upper bound. Each image is used once,
without repeated augmentation, which here needs one decode for three images. ``--arrays`` starts from
noise that is decoded already, without files, timm and DALI.
"""

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import bench_step, harness, peers
from benchmarks.bench_reader import CLASSES, allow_posterize_to_black, make_photos, one_pass, timm_loader
from benchmarks.peers import Step, Workload
from fastdeitlt import config
from fastdeitlt.core.batches import train_batches
from fastdeitlt.data.pixels.reader import Stream
from fastdeitlt.data.pixels.source import Source, open_source
from fastdeitlt.data.sets.types import LongTailSet

CASES = {
    "cpu": Workload("deit_tiny_distilled_patch8_64", 64, CLASSES, 32, "resnet8", "bf16", bench_step.CPU),
    "gpu": replace(bench_step.CASES["b16-224"], num_classes=CLASSES),
}
BASELINE = "timm"
SOURCE = (375, 500)
"""Height and width of decoded images: ImageNet's usual ones."""


def timm_epoch(work: Workload, images: LongTailSet, workers: int) -> harness.Call:
    """Return one pass of timm: loader, Mixup, compiled task."""
    from timm.data import Mixup

    loader = timm_loader(images, workers, work.img_size, work.batch_size, work.device)
    list(loader)  # fork the workers before other threads start
    mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=peers.SMOOTHING, num_classes=work.num_classes)
    update = peers.timm_update(work, compiled=True)

    def epoch() -> None:
        for images_BCHW, labels_B in loader:
            images_BCHW, target_BK = mix(images_BCHW.to(work.device), labels_B.to(work.device))
            loss = update(images_BCHW, target_BK)
        loss.item()

    return epoch


def our_epoch(step: Step, source: Source, work: Workload, images: LongTailSet) -> None:
    """Run one pass of ours: draw, crop, augment, mix, step."""
    micro_batches = one_pass(len(images), work.batch_size)
    for batch in train_batches(micro_batches, source, images, config.Config(), mixing=True, size=work.img_size):
        loss = step(batch)
    loss.item()


def our_steps(step: Step, work: Workload, num_steps: int) -> None:
    """Run ``num_steps`` steps on one batch in memory."""
    batch = work.batch(0, "ours, no data")
    for _ in range(num_steps):
        loss = step(batch)
    loss.item()


def contestants(work: Workload, images: LongTailSet, workers: int, stack: ExitStack) -> dict[str, harness.Call]:
    """Return timm, and ours with each residency; ours share one step and its weights."""
    timm = timm_epoch(work, images, workers)
    step = peers.ours(work)
    settings: dict[str, Any] = {"num_threads": workers}
    stream = stack.enter_context(closing(Stream(images, config.DataConfig(**settings), work.device)))
    resident = open_source(images, config.DataConfig(**settings, residency="device"), work.device)
    stack.enter_context(closing(resident))
    return {
        BASELINE: timm,
        "ours, streamed": partial(our_epoch, step, stream, work, images),
        "ours, resident": partial(our_epoch, step, resident, work, images),
        "ours, no data": partial(our_steps, step, work, len(images) // work.batch_size),
    }


def from_arrays(
    work: Workload, num_images: int, options: argparse.Namespace, stack: ExitStack
) -> dict[str, harness.Call]:
    """Return ours with a resident set of noise arrays, and without data.

    The step is that of ``bench_step``.
    """
    random = np.random.default_rng(0)
    images_NHWC = random.integers(256, size=(num_images, *SOURCE, 3), dtype=np.uint8)
    labels = np.arange(num_images) % work.num_classes
    counts = np.bincount(labels, minlength=work.num_classes).tolist()
    images = LongTailSet([str(i) for i in range(num_images)], labels, counts, images_NHWC=images_NHWC)
    cfg = config.DataConfig(num_threads=options.workers, residency="device")
    resident = stack.enter_context(closing(open_source(images, cfg, work.device)))
    step = peers.ours(work, train__compile=not options.small)
    return {
        "ours, resident": partial(our_epoch, step, resident, work, images),
        "ours, no data": partial(our_steps, step, work, num_images // work.batch_size),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="number of images, a multiple of the batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=1, help="worker processes of timm, decoding threads of ours")
    parser.add_argument("--arrays", action="store_true", help="measure only ours, on decoded images")
    parser.add_argument("--small", action="store_true", help="with --arrays: a tiny step, without compiling")
    options = parser.parse_args(arguments)
    work = CASES["gpu" if torch.cuda.is_available() else "cpu"]
    if options.arrays and work.device.type == "cuda":
        work = bench_step.CASES["b16-224"]
    if options.small:
        work = bench_step.CASES["dry"]
    num_images = options.images // work.batch_size * work.batch_size
    if options.arrays:
        with ExitStack() as stack:
            calls = from_arrays(work, num_images, options, stack)
            return measured(work, calls, f"{num_images} arrays", "ours, no data", options)
    allow_posterize_to_black()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
        photos = Path(folder) / "photos"
        photos.mkdir()
        content = "photos" if harness.installed("skimage") else "noise images"
        images = make_photos(photos, num_images)
        calls = contestants(work, images, options.workers, stack)
        return measured(work, calls, f"{num_images} {content}", BASELINE, options)


def measured(
    work: Workload, calls: dict[str, harness.Call], what: str, baseline: str, options: argparse.Namespace
) -> int:
    """Time passes over the images, print and append the rows."""
    num_images = options.images // work.batch_size * work.batch_size
    title, eager = f"{work.student}, {what}, {options.workers} workers", frozenset(calls)
    case = harness.Case(title, calls, baseline, eager=eager, images=num_images, facts=work.facts)
    print(f"rows appended to {harness.run('train', case, work.device, options.rounds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
