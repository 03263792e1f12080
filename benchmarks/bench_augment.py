"""Augmentation: each RandAugment operation and the whole recipe beside timm's; on a GPU the fused kernels.

    python -m benchmarks.bench_augment [--rounds 20]

The same distributions for every candidate, on photos. On the CPU a case is a batch in one thread: timm on Pillow images
against ours on the uint8 batch, each operation, then the chain from crop to erased float batch. On a GPU, the chain
from crop to mixed bfloat16 images from the decoded set: the kernels against torch operations.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform

from benchmarks import harness
from benchmarks.bench_reader import allow_posterize_to_black
from fastdeitlt.config import AugmentConfig, MixupConfig
from fastdeitlt.data import mixup
from fastdeitlt.data.augment import transform as augment
from fastdeitlt.data.augment.randaugment import OPS, rand_augment
from fastdeitlt.data.augment.warps import FILL
from fastdeitlt.data.pixels.resize import crop_resize

PHOTOS = sorted((Path(__file__).resolve().parent.parent / "tests" / "data" / "photos").glob("*.jpg"))
OP_SHAPES = ((224, 8), (32, 16))
"""(side, images): the usual part of a batch with one operation."""
CHAIN_SHAPES = ((224, 32, (375, 500)), (32, 128, (28, 28)))
"""(side, images, source size): ImageNet's and the embedded set's."""
GPU_SHAPES = ((224, 256, (375, 500)), (224, 256, (32, 32)), (32, 1024, (32, 32)))
LEVEL = 9.13
TIMM = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC, "translate_const": 100}


def photos(batch: int, height: int, width: int) -> np.ndarray:
    """Return uint8 [B, H, W, 3]: the test photos, all different through noise."""
    rng = np.random.default_rng(0)
    sources = [np.asarray(Image.open(path).resize((width, height), Image.Resampling.BICUBIC)) for path in PHOTOS]
    images = [sources[i % len(sources)] + rng.normal(0, 4, (height, width, 3)) for i in range(batch)]
    return np.stack(images).clip(0, 255).astype(np.uint8)


def operation_cases() -> Iterable[harness.Case]:
    """Yield each operation at a usual level; ours runs on a copy of the batch."""
    theirs = auto_augment.rand_augment_transform("rand-m9-inc1-p1", dict(TIMM)).ops
    for side, batch in OP_SHAPES:
        images = photos(batch, side, side)
        pillow, crops = [Image.fromarray(image) for image in images], torch.from_numpy(images)
        level_B1, sign_B1 = np.full((batch, 1), LEVEL), np.resize([[1.0], [-1.0]], (batch, 1))
        for op, name in enumerate(OPS):
            op_B1 = np.full((batch, 1), op)

            def timm(op: int = op, pillow: list[Image.Image] = pillow) -> list[Image.Image]:
                return [theirs[op](image) for image in pillow]

            def fastdeitlt(crops=crops, op_B1=op_B1, level_B1=level_B1, sign_B1=sign_B1) -> None:
                rand_augment(crops.clone(), op_B1, level_B1, sign_B1)

            yield harness.Case(f"{name} {side} px B={batch}", {"timm": timm, "fastdeitlt": fastdeitlt}, "timm")


def chain_cases() -> Iterable[harness.Case]:
    """Yield the chain from decoded images to the float batch, before Mixup."""
    cfg = AugmentConfig()
    allow_posterize_to_black()
    for side, batch, size in CHAIN_SHAPES:
        images = photos(batch, *size)
        pillow, sources = [Image.fromarray(image) for image in images], list(torch.from_numpy(images))
        transform = create_transform(
            (3, side, side), is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
            color_jitter=None, re_prob=0.25, re_mode="pixel",
        )  # fmt: skip
        draws = augment.draw(np.arange(batch), np.zeros(batch, int), seed=0, epoch=0, cfg=cfg, size=side)
        boxes_B4 = draws.boxes(np.array(size))

        def timm(pillow=pillow, transform=transform) -> torch.Tensor:
            return torch.stack([transform(image) for image in pillow])

        def fastdeitlt(sources=sources, boxes_B4=boxes_B4, draws=draws, side: int = side) -> torch.Tensor:
            return augment.apply(crop_resize(sources, boxes_B4, side), draws, cfg)

        name = f"{size[0]} x {size[1]} to {side} px B={batch}"
        yield harness.Case(name, {"timm": timm, "fastdeitlt": fastdeitlt}, "timm")


def gpu_cases(
    device: torch.device, shapes: Sequence[tuple[int, int, tuple[int, int]]] = GPU_SHAPES
) -> Iterable[harness.Case]:
    """Yield the chain from the decoded set to the mixed batch, in bfloat16."""
    from fastdeitlt.kernels import augment as kernels

    cfg = AugmentConfig()
    for side, batch, size in shapes:
        pixels = torch.from_numpy(photos(batch, *size)).flatten().to(device)
        sizes_B2 = np.tile(np.array(size), (batch, 1))
        starts_B = np.arange(batch) * 3 * size[0] * size[1]
        draws = augment.draw(np.arange(batch), np.zeros(batch, int), seed=0, epoch=0, cfg=cfg, size=side)
        mix = mixup.draw(0, 0, 0, 0, MixupConfig(switch_prob=0), side)
        arguments = (pixels, starts_B, sizes_B2, draws, mix, cfg, side)
        candidates = {
            "torch": lambda a=arguments: kernels.reference(*a),
            "triton": lambda a=arguments: kernels.augment(*a),
        }
        crops = 3 * int(draws.boxes(sizes_B2)[:, 2:].prod(axis=1).sum())
        written = 2 * batch * 3 * side * side
        name = f"{size[0]} x {size[1]} to {side} px B={batch}"
        yield harness.Case(name, candidates, "torch", crops + written, eager=frozenset(candidates))


def cases(device: torch.device) -> Iterable[harness.Case]:
    """Yield the kernels on a GPU, else the operations and the chain on the CPU."""
    if device.type == "cuda":
        yield from gpu_cases(device)
        return
    torch.set_num_threads(1)
    yield from operation_cases()
    yield from chain_cases()


if __name__ == "__main__":
    sys.exit(harness.main("augment", cases, __doc__))
