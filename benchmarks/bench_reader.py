"""Images a second from JPEG files to augmented batches: ours beside timm, torchvision v2 and a plain DALI pipeline.

    pip install scikit-image scikit-learn        # for their sample photos
    python -m benchmarks.bench_reader [--threads 1 2] [--rounds 5] [--images 768] [--device cpu] [--out FILE]

The photos are cropped, scaled to 500 x 375 and compressed to about ImageNet's file size. For each number of threads the
process is bound to as many cores, and the contestants take turns, so that a busy machine is busy for all of them.
timm has the same recipe as ours; torchvision v2 and DALI have their own RandAugment, which is another law.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from fastdeitlt import config
from fastdeitlt.data import augment
from fastdeitlt.data.batches import train_batches
from fastdeitlt.data.files import read_encoded
from fastdeitlt.data.longtail import LongTailSet
from fastdeitlt.data.reader import Decoder, Stream
from fastdeitlt.data.resident import Resident
from fastdeitlt.data.resize import crop_resize
from fastdeitlt.data.sampler import MicroBatch, Plan

SIZE = 224
BATCH = 64
CLASSES = 8
PACKAGES = ("torch", "torchvision", "timm", "pillow", "numpy", "nvidia-dali-cuda130")
CFG = config.Config(mixup=config.MixupConfig(prob=0))


def make_photos(folder: Path, num_images: int) -> LongTailSet:
    """Landscape and portrait JPEGs of crops of the sample photos, in class folders."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    samples = Path(skimage.data.__file__).parent
    names = ("coffee.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg")
    photos = [Image.open(samples / name).convert("RGB") for name in names]
    photos += [Image.fromarray(pixels) for pixels in load_sample_images().images]
    random = np.random.default_rng(0)
    paths = []
    for i in range(num_images):
        photo, size = photos[i % len(photos)], (500, 375) if i % 4 else (375, 500)
        height = min(photo.height, photo.width * size[1] / size[0]) * random.uniform(0.6, 1)
        width = height * size[0] / size[1]
        left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
        path = folder / str(i % CLASSES) / f"{i:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        box = (left, top, left + width, top + height)
        photo.resize(size, Image.Resampling.BICUBIC, box=box).save(path, quality=int(random.integers(94, 99)))
        paths.append(str(path.relative_to(folder)))
    labels = np.arange(num_images) % CLASSES
    return LongTailSet(paths, labels, np.bincount(labels).tolist(), str(folder))


def ours(source: Stream | Resident, images: LongTailSet, virtual_ranks: int = 0) -> int:
    """Draw, crop, augment; each image once, or with virtual ranks the repeated augmentation of one real rank."""
    if virtual_ranks:
        steps = Plan(len(images), BATCH, 1, 3, virtual_ranks).steps(0)
        micro_batches = [micro for step in steps for micro in step.micro_batches]
    else:
        order = np.random.default_rng(0).permutation(len(images))
        parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        micro_batches = [MicroBatch(0, i, 0, part, np.zeros_like(part)) for i, part in enumerate(parts)]
    total = 0
    for batch in train_batches(micro_batches, source, images, CFG, mixing=False, size=SIZE):
        total += len(batch.images_BCHW)
    if batch.images_BCHW.is_cuda:
        torch.cuda.synchronize()
    return total


def timm_loader(images: LongTailSet, threads: int) -> Iterable[Any]:
    """timm's create_loader with the recipe's arguments."""
    from timm.data import ImageDataset, auto_augment, create_loader

    # timm asks Pillow for 0 bits at level 10, which Pillow 13 refuses
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **_: ImageOps.posterize(image, max(bits, 1))
    recipe: dict[str, Any] = {
        "auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic", "re_prob": 0.25, "re_mode": "pixel"
    }  # fmt: skip
    return create_loader(
        ImageDataset(images.root), (3, SIZE, SIZE), BATCH, is_training=True, use_prefetcher=False, color_jitter=0.3,
        num_workers=threads, persistent_workers=True, pin_memory=False, **recipe,
    )  # fmt: skip


def torchvision_loader(images: LongTailSet, threads: int) -> Iterable[Any]:
    """torchvision v2 on uint8 tensors."""
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import InterpolationMode, v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(2, 9, fill=[124, 116, 104]),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(CFG.augment.mean, CFG.augment.std),
            v2.RandomErasing(0.25, value="random"),
        ]
    )
    dataset = ImageFolder(images.root, transform, loader=partial(decode_image, mode=ImageReadMode.RGB))
    return torch.utils.data.DataLoader(dataset, BATCH, True, num_workers=threads, persistent_workers=True)


def dali_pipeline(images: LongTailSet, threads: int) -> Any:
    """DALI's own reader, decoder and rand_augment."""
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.auto_aug.rand_augment import rand_augment
    from nvidia.dali.pipeline import pipeline_def

    def graph() -> Any:
        encoded, label = fn.readers.file(file_root=images.root, random_shuffle=True, initial_fill=len(images))
        pixels: Any = fn.decoders.image_random_crop(encoded, device="cpu", random_area=[0.08, 1.0])
        cubic = types.DALIInterpType.INTERP_CUBIC
        pixels = fn.resize(pixels, size=[SIZE, SIZE], interp_type=cubic, antialias=True)
        pixels = fn.flip(pixels, horizontal=fn.random.coin_flip())
        pixels = rand_augment(pixels, n=2, m=9, shape=(SIZE, SIZE), fill_value=118)
        mean, std = ([255 * v for v in values] for values in (CFG.augment.mean, CFG.augment.std))
        return fn.crop_mirror_normalize(pixels, mean=mean, std=std, output_layout="CHW"), label

    define: Any = pipeline_def(enable_conditionals=True)(graph)
    pipeline: Pipeline = define(batch_size=BATCH, num_threads=threads, device_id=None, seed=1)
    pipeline.build()
    return pipeline


def consume(loader: Iterable[Any]) -> int:
    """Run through a DataLoader."""
    return sum(len(images) for images, _ in loader)


def contestants(images: LongTailSet, threads: int, device: torch.device, stack: ExitStack) -> dict[str, Callable]:
    """Name -> one pass over the set, which returns how many images came."""
    timm, torchvision = timm_loader(images, threads), torchvision_loader(images, threads)
    for loader in (timm, torchvision):  # fork their workers before there are other threads
        consume(loader)
    data = config.DataConfig(num_threads=threads, residency="device")
    stream = stack.enter_context(closing(Stream(images, data, device)))
    shared = stack.enter_context(closing(Stream(images, data, device, share=4)))
    resident = stack.enter_context(closing(Resident(images, data, device)))
    plain_dali = dali_pipeline(images, threads)
    return {
        "timm": lambda: consume(timm),
        "torchvision v2": lambda: consume(torchvision),
        "plain DALI": lambda: sum(len(plain_dali.run()[0]) for _ in range(len(images) // BATCH)),
        "stream": lambda: ours(stream, images),
        "stream, 4 virtual ranks": lambda: ours(shared, images, 4),
        "resident": lambda: ours(resident, images),
    }


def race(images: LongTailSet, threads: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Rates of all contestants, taking turns, bound to ``threads`` cores; the ratio is the median over rounds."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        passes = contestants(images, threads, device, stack)
        for number in range(rounds + 1):
            for name, run in passes.items():
                began = time.perf_counter()
                count = run()
                if number:  # the first round warms up
                    rates.setdefault(name, []).append(count / (time.perf_counter() - began))
    os.sched_setaffinity(0, allowed)
    timm = np.array(rates["timm"])
    return [
        {"case": name, "threads": threads, "unit": "images/s", **summary(values), "ratio_to_timm":
         round(float(np.median(np.array(values) / timm)), 2)}
        for name, values in rates.items()
    ]  # fmt: skip


def stages(images: LongTailSet, rounds: int) -> list[dict[str, Any]]:
    """CPU milliseconds an image of each stage, one thread, 128 images."""
    sample_B = np.arange(128)
    paths = [os.path.join(images.root, images.paths[i]) for i in sample_B]
    files = [read_encoded(path) for path in paths]
    draws = augment.draw(sample_B, sample_B * 0, seed=0, epoch=0, cfg=CFG.augment, size=SIZE)
    boxes_B4 = draws.boxes(np.array([(file.height, file.width) for file in files]))
    regions_B4 = np.concatenate([np.zeros_like(boxes_B4[:, :2]), boxes_B4[:, 2:]], 1)
    with closing(Decoder(1, torch.device("cpu"))) as decoder:
        pixels = decoder(files, boxes_B4)
        crops_BHWC = crop_resize(pixels, regions_B4, SIZE)
        unmixed = [np.full_like(draws.op_B2, -1), np.zeros_like(draws.erase_B4)]
        plain = augment.Draws(**{**vars(draws), "op_B2": unmixed[0], "erase_B4": unmixed[1]})
        no_erase = augment.Draws(**{**vars(draws), "erase_B4": unmixed[1]})
        work: dict[str, Callable[[], Any]] = {
            "read file and header": lambda: [read_encoded(path) for path in paths],
            "draw": lambda: augment.draw(sample_B, sample_B * 0, seed=0, epoch=0, cfg=CFG.augment, size=SIZE),
            "decode region (DALI)": lambda: decoder(files, boxes_B4),
            "resize": lambda: crop_resize(pixels, regions_B4, SIZE),
            "flip, normalise": lambda: augment.apply(crops_BHWC, plain, CFG.augment),
            "flip, RandAugment, normalise": lambda: augment.apply(crops_BHWC, no_erase, CFG.augment),
            "flip, RandAugment, normalise, erase": lambda: augment.apply(crops_BHWC, draws, CFG.augment),
        }
        spent: dict[str, list[float]] = {}
        for number in range(rounds + 1):
            for name, run in work.items():
                began = time.process_time()
                run()
                if number:
                    spent.setdefault(name, []).append((time.process_time() - began) / len(paths) * 1e3)
    return [{"case": name, "threads": 1, "unit": "CPU ms/image", **summary(values)} for name, values in spent.items()]


def stored_size_error(images: LongTailSet) -> dict[str, Any]:
    """How far crops of a set stored at a short side of 256 pixels are from those at full size, in grey levels."""
    order = np.arange(min(256, len(images)))
    micro_batches = [MicroBatch(0, 0, 0, order, np.zeros_like(order))]
    plain = CFG.model_copy(
        update={"augment": config.AugmentConfig(rand_ops=0, erase_prob=0, mean=(0,) * 3, std=(1,) * 3)}
    )
    crops = []
    for short_side in (0, 256):
        data = config.DataConfig(residency="host", stored_short_side=short_side)
        with closing(Resident(images, data, torch.device("cpu"))) as source:
            (batch,) = train_batches(micro_batches, source, images, plain, mixing=False, size=SIZE)
        crops.append(batch.images_BCHW)
    error = (crops[0] - crops[1]).flatten(1)
    levels, psnr = error.abs().mean(1) * 255, -10 * error.square().mean(1).log10()
    row = {"case": "stored at short side 256, not full size", "unit": "grey levels"}
    return {**row, **summary(levels.tolist()), "psnr": round(float(psnr.median()), 1)}


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [20, 50, 80])
    return {"median": round(float(middle), 4), "p20": round(float(low), 4), "p80": round(float(high), 4)}


def environment() -> dict[str, Any]:
    """What a number means nothing without."""
    text = Path("/proc/cpuinfo").read_text()
    models = [line.split(": ")[1] for line in text.splitlines() if line.startswith("model name")] or ["unknown"]
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "machine": f"{models[0]}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": git.stdout.strip() or "unknown",
        "command": shlex.join(["python", "-m", "benchmarks.bench_reader", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second of data loaders.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=768, help="a multiple of 256")
    parser.add_argument("--device", default="cpu", help="where our sources put their crops")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reader.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
        photos = Path(folder) / "photos"
        photos.mkdir()
        images = make_photos(photos, args.images)
        size = sum((photos / path).stat().st_size for path in images.paths) / len(images)
        rows = [
            row for threads in args.threads for row in race(images, threads, args.rounds, torch.device(args.device))
        ]
        rows += [*stages(images, args.rounds), stored_size_error(images)]
    facts = environment() | {"mean_file_kb": round(size / 1000, 1), "batch": BATCH, "images": args.images}
    for row in rows:
        ratio = f"  {row['ratio_to_timm']:.2f} x timm" if "ratio_to_timm" in row else ""
        print(f"{row['case']:36} {row.get('threads', ''):>2} {row['median']:10.3f} {row['unit']}{ratio}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps({"benchmark": "reader", **row, **facts}) + "\n" for row in rows))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
