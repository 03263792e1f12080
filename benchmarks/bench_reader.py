"""Images per second from JPEG files to augmented batches: ours beside timm, torchvision v2 and a plain DALI pipeline.

    pip install scikit-image scikit-learn        # for their sample photos
    python -m benchmarks.bench_reader [--threads 1 2] [--rounds 7] [--images 512] [--device cpu]

The photos are cropped, scaled to 500 x 375 and compressed to about ImageNet's file size. For each number of threads the
process is bound to as many cores. timm has the same recipe as ours; torchvision v2 and DALI have their own RandAugment
with other distributions. The stages are timed in one thread.
"""

import argparse
import dataclasses
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks import harness
from fastdeitlt import config
from fastdeitlt.core.batches import train_batches
from fastdeitlt.data.augment import transform as augment
from fastdeitlt.data.pixels.decoder import Decoder
from fastdeitlt.data.pixels.files import read_encoded
from fastdeitlt.data.pixels.reader import Stream
from fastdeitlt.data.pixels.resize import crop_resize
from fastdeitlt.data.pixels.source import Source, open_source
from fastdeitlt.data.sampler import MicroBatch, Plan
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.run import process

SIZE = 224
BATCH = 64
CLASSES = 8
NUM_STAGED = 128
"""Images of a call of a stage."""
PACKAGES = ("timm", "torchvision", "pillow", "nvidia-dali-cuda130")
CPU = torch.device("cpu")
CFG = config.Config(mixup=config.MixupConfig(prob=0))
TIMM_RECIPE: dict[str, Any] = {
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "interpolation": "bicubic",
    "re_prob": 0.25,
    "re_mode": "pixel",
    "color_jitter": 0.3,
    "is_training": True,
}


def make_photos(folder: Path, num_images: int) -> LongTailSet:
    """Write JPEGs of crops of sample photos in class folders."""
    photos = sample_photos()
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


def sample_photos() -> list[Image.Image]:
    """Return the sample photos of scikit-image and scikit-learn.

    Raises:
        SystemExit: one of them is not installed.
    """
    if not (harness.installed("skimage") and harness.installed("sklearn")):
        sys.exit("photos: scikit-image or scikit-learn is not installed. pip install scikit-image scikit-learn")
    import skimage.data
    from sklearn.datasets import load_sample_images

    samples = Path(skimage.data.__file__).parent
    names = ("coffee.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg")
    photos = [Image.open(samples / name).convert("RGB") for name in names]
    return photos + [Image.fromarray(pixels) for pixels in load_sample_images().images]


def one_pass(num_images: int, batch: int) -> list[MicroBatch]:
    """Return micro-batches with each image once, in a fixed random order."""
    order = np.random.default_rng(0).permutation(num_images)
    parts = [order[start : start + batch] for start in range(0, num_images, batch)]
    return [MicroBatch(0, i, 0, part, np.zeros_like(part)) for i, part in enumerate(parts)]


def ours(source: Source, images: LongTailSet, virtual_ranks: int = 0) -> None:
    """Draw, crop and augment each image once.

    With virtual ranks, one real rank's repeated augmentation.
    """
    if virtual_ranks:
        steps = Plan(len(images), BATCH, 1, 3, virtual_ranks).steps(0)
        micro_batches = [micro for step in steps for micro in step.micro_batches]
    else:
        micro_batches = one_pass(len(images), BATCH)
    total = 0
    for batch in train_batches(micro_batches, source, images, CFG, mixing=False, size=SIZE):
        total += len(batch.images_BCHW)
    if batch.images_BCHW.is_cuda:
        torch.cuda.synchronize()
    assert total == len(images)


def allow_posterize_to_black() -> None:
    """Replace timm's posterize, whose 0 bits at level 10 are refused by Pillow 13."""
    from timm.data import auto_augment

    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep ``bits`` bits, at least 1."""
    return ImageOps.posterize(image, max(bits, 1))


def timm_loader(
    images: LongTailSet, threads: int, size: int = SIZE, batch: int = BATCH, device: torch.device = CPU
) -> Iterable[Any]:
    """Build timm's create_loader; for a GPU with its prefetcher and pinned memory."""
    from timm.data import ImageDataset, create_loader

    gpu = device.type == "cuda"
    workers: dict[str, Any] = {"num_workers": threads, "persistent_workers": True, "device": device}
    workers |= {"use_prefetcher": gpu, "pin_memory": gpu}
    return create_loader(ImageDataset(images.root), (3, size, size), batch, **TIMM_RECIPE, **workers)


def torchvision_loader(images: LongTailSet, threads: int) -> Iterable[Any]:
    """Build a loader of torchvision v2 on uint8 tensors."""
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
    """Build a pipeline of DALI's reader, decoder and rand_augment."""
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


def loaders(images: LongTailSet, threads: int, device: torch.device, stack: ExitStack) -> harness.Case:
    """Return the case of one pass over the set by each candidate."""
    timm, torchvision = timm_loader(images, threads), torchvision_loader(images, threads)
    for loader in (timm, torchvision):  # fork their workers before other threads start
        list(loader)
    data = config.DataConfig(num_threads=threads, residency="device")
    stream = stack.enter_context(closing(Stream(images, data, device)))
    shared = stack.enter_context(closing(Stream(images, data, device, window=4)))
    resident = stack.enter_context(closing(open_source(images, data, device)))
    dali = dali_pipeline(images, threads)
    candidates: dict[str, harness.Call] = {
        "timm": lambda: [len(batch) for batch, _ in timm],
        "torchvision v2": lambda: [len(batch) for batch, _ in torchvision],
        "plain DALI": lambda: [len(dali.run()[0]) for _ in range(len(images) // BATCH)],
        "stream": lambda: ours(stream, images),
        "stream, 4 virtual ranks": lambda: ours(shared, images, 4),
        "resident": lambda: ours(resident, images),
    }
    return harness.Case(f"{threads} threads, {len(images)} images", candidates, baseline="timm", images=len(images))


def stages(images: LongTailSet, stack: ExitStack) -> harness.Case:
    """Return the case of our stages and timm's transform on the same files."""
    from timm.data import create_transform

    sample_B = np.arange(NUM_STAGED)
    paths = [os.path.join(images.root, images.paths[i]) for i in sample_B]
    files = [read_encoded(path) for path in paths]
    draws = augment.draw(sample_B, sample_B * 0, seed=0, epoch=0, cfg=CFG.augment, size=SIZE)
    boxes_B4 = draws.boxes(np.array([(file.height, file.width) for file in files]))
    regions_B4 = np.concatenate([np.zeros_like(boxes_B4[:, :2]), boxes_B4[:, 2:]], 1)
    decoder = stack.enter_context(closing(Decoder(1, CPU)))
    pixels = decoder(files, boxes_B4)
    crops_BHWC = crop_resize(pixels, regions_B4, SIZE)
    no_erase = augment.Draws(**vars(draws) | {"erase_B4": np.zeros_like(draws.erase_B4)})
    only_flip = augment.Draws(**vars(no_erase) | {"op_B2": np.full_like(draws.op_B2, -1)})
    transform = create_transform(SIZE, **TIMM_RECIPE)
    candidates: dict[str, harness.Call] = {
        "timm, all": lambda: torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]),
        "read file and header": lambda: [read_encoded(path) for path in paths],
        "draw": lambda: augment.draw(sample_B, sample_B * 0, seed=0, epoch=0, cfg=CFG.augment, size=SIZE),
        "decode region": lambda: decoder(files, boxes_B4),
        "resize": lambda: crop_resize(pixels, regions_B4, SIZE),
        "flip, normalise": lambda: augment.apply(crops_BHWC, only_flip, CFG.augment),
        "flip, ops, normalise": lambda: augment.apply(crops_BHWC, no_erase, CFG.augment),
        "flip, ops, normalise, erase": lambda: augment.apply(crops_BHWC, draws, CFG.augment),
    }
    return harness.Case(f"stages, {NUM_STAGED} images", candidates, baseline="timm, all", images=NUM_STAGED)


def stored_size_error(images: LongTailSet) -> dict[str, Any]:
    """Return the difference of crops of a set stored at a short side of 256 pixels."""
    order = np.arange(256)
    micro_batches = [MicroBatch(0, 0, 0, order, np.zeros_like(order))]
    unchanged = config.AugmentConfig(rand_ops=0, erase_prob=0, mean=(0, 0, 0), std=(1, 1, 1))
    plain = CFG.model_copy(update={"augment": unchanged})
    crops = []
    for short_side in (0, 256):
        data = config.DataConfig(residency="host", stored_short_side=short_side)
        with closing(open_source(images, data, CPU)) as source:
            (batch,) = train_batches(micro_batches, source, images, plain, mixing=False, size=SIZE)
        crops.append(batch.images_BCHW)
    error = (crops[0] - crops[1]).flatten(1)
    levels, psnr = error.abs().mean(1) * 255, -10 * error.square().mean(1).log10()
    row = {"op": "reader", "case": "stored at short side 256 instead of 375", "candidate": "crops of 224"}
    return row | {"mean_grey_levels": round(float(levels.mean()), 2), "psnr_db": round(float(psnr.median()), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=512, help="a multiple of 256")
    parser.add_argument("--device", default="cpu", help="device of the crops of our sources")
    args = parser.parse_args()
    process.keep_freed_memory()  # as every command does
    torch.set_num_threads(1)
    allow_posterize_to_black()
    multiprocessing.set_start_method("fork")  # Python 3.14's fork server would keep its workers on the first core
    device, cores = torch.device(args.device), os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
        photos = Path(folder) / "photos"
        photos.mkdir()
        images = make_photos(photos, args.images)
        file_kb = sum((photos / path).stat().st_size for path in images.paths) / len(images) / 1000
        facts = {"file_kb": round(file_kb, 1), "batch": BATCH} | {name: version(name) for name in PACKAGES}
        for threads in (*args.threads, 0):
            os.sched_setaffinity(0, sorted(cores)[: max(threads, 1)])
            with ExitStack() as stack:
                case = loaders(images, threads, device, stack) if threads else stages(images, stack)
                harness.run("reader", dataclasses.replace(case, facts=facts), CPU, args.rounds)
        error = stored_size_error(images)
    print(error)
    harness.append("reader", [error | facts])


if __name__ == "__main__":
    main()
