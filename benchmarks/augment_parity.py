"""Difference from timm's augmentation with the same draws: each operation at levels 0 to 10, then the whole chain.

    python -m benchmarks.augment_parity

Photos of tests/data at 224 x 224, in grey levels. The chain starts from the photos, with exact crops (as on a GPU) and
with fast ones (as on a host), without erasing, whose noise differs.
"""

import argparse
import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional

from benchmarks import harness
from benchmarks.bench_augment import PHOTOS
from fastdeitlt.config import AugmentConfig
from fastdeitlt.data.augment import transform as augment
from fastdeitlt.data.augment.randaugment import FUNCTIONS, OPS
from fastdeitlt.data.pixels.resize import crop_resize
from tests import timm_oracle

SIZE = 224
CHAINS = 200
CFG = AugmentConfig(erase_prob=0)


def photos(side: int = 0) -> list[np.ndarray]:
    """Return the test photos, resized to ``side`` x ``side`` unless 0."""
    images = [Image.open(path).convert("RGB") for path in PHOTOS]
    return [np.array(image.resize((side, side), Image.Resampling.BICUBIC) if side else image) for image in images]


def operation(op: int) -> dict[str, Any]:
    """Return the largest and mean difference, and the fraction that differs."""
    source, differences = np.stack(photos(SIZE)), []
    for level in range(11):
        for sign in (1.0, -1.0):
            each = (np.full(len(source), float(level)), np.full(len(source), sign))
            ours = FUNCTIONS[op](torch.from_numpy(source), *each).numpy().astype(int)
            theirs = np.stack([timm_oracle.operate(image, op, float(level), sign) for image in source])
            differences.append(np.abs(ours - theirs))
    found = np.stack(differences)
    return {"case": OPS[op], "max": int(found.max()), "mean": float(found.mean()), "share": float((found > 0).mean())}


def chain(exact: bool) -> dict[str, Any]:
    """Return the peak signal-to-noise ratio of crop, resize, flip and ops.

    At most 100 dB per image. The ops are RandAugment's.
    """
    sources = [photos()[i % len(PHOTOS)] for i in range(CHAINS)]
    draws = augment.draw(np.arange(CHAINS), np.zeros(CHAINS, int), seed=0, epoch=0, cfg=CFG, size=SIZE)
    boxes_B4 = draws.boxes(np.array([image.shape[:2] for image in sources]))
    crops = crop_resize([torch.from_numpy(image) for image in sources], boxes_B4, SIZE, exact=exact)
    std_C11 = torch.tensor(CFG.std).view(3, 1, 1)
    images = augment.apply(crops, draws, CFG)
    psnr, worst = [], 0.0
    for b, source in enumerate(sources):
        cubic = functional.InterpolationMode.BICUBIC
        image = functional.resized_crop(Image.fromarray(source), *boxes_B4[b].tolist(), [SIZE, SIZE], cubic)
        pixels = np.asarray(functional.hflip(image) if draws.flip_B[b] else image)
        for op, level, sign in zip(draws.op_B2[b], draws.level_B2[b], draws.sign_B2[b], strict=True):
            pixels = timm_oracle.operate(pixels, op, level, sign) if op >= 0 else pixels
        theirs = functional.normalize(functional.to_tensor(Image.fromarray(pixels)), CFG.mean, CFG.std)
        difference = ((images[b] - theirs) * std_C11 * 255).abs()
        worst = max(worst, difference.max().item())
        psnr.append(min(100.0, 10 * torch.log10(255**2 / difference.square().mean().clamp_min(1e-9)).item()))
    name = "whole chain, exact crops" if exact else "whole chain, fast host crops"
    return {"case": name, "max": round(worst), "median_psnr": float(np.median(psnr)), "worst_psnr": min(psnr)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    rows = [*map(operation, range(len(OPS))), chain(True), chain(False)]
    out = harness.ROOT / "benchmarks" / "results" / "augment_parity.jsonl"
    out.parent.mkdir(exist_ok=True)
    out.write_text("".join(json.dumps({"op": "augment_parity"} | row | harness.machine()) + "\n" for row in rows))
    for row in rows:
        print("  ".join(f"{value:.2g}" if isinstance(value, float) else f"{value!s:28}" for value in row.values()))


if __name__ == "__main__":
    main()
