"""Image files for the tests of readers: pictures, sets of them, and what Pillow makes of them."""

import functools
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastdeitlt.config import AugmentConfig, DataConfig
from fastdeitlt.data.augment import transform as augment
from fastdeitlt.data.pixels import reader
from fastdeitlt.data.pixels.request import CropRequest
from fastdeitlt.data.sets.types import LongTailSet

CPU = torch.device("cpu")
CLASSES = 3
SIZES = [(61, 43), (40, 90), (33, 33), (120, 31), (50, 64), (29, 77), (64, 64), (97, 52), (45, 38), (36, 100), (70, 51)]


def picture(height, width, seed=0):
    """Waves and noise: every pixel differs, no two images are alike."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + y / 5 + seed), np.cos(x / 7 - seed), np.sin(x / 3 + y / 2)], -1)
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    return Image.fromarray((127 + 100 * waves + noise).clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def _jpeg(*picture_of):
    return encoded(picture(*picture_of), quality=92)


def make_set(folder, contents=()):
    """Eleven JPEGs of odd sizes in three classes (labels 0, 1, 2, 0, ...), some with other contents by index."""
    paths = [f"{i:02d}.jpg" for i in range(len(SIZES))]
    for i, (height, width) in enumerate(SIZES):
        data = contents[i] if i in contents else _jpeg(height, width, i)
        if data is not None:
            (folder / paths[i]).write_bytes(data)
    labels = np.arange(len(SIZES)) % CLASSES
    return LongTailSet(paths, labels, np.bincount(labels).tolist(), str(folder))


def decoded_set(number=20, side=28, classes=4):
    """Noise that comes decoded; labels 0, 1, 2, ... in turn."""
    images_NHWC = np.random.default_rng(0).integers(0, 256, (number, side, side, 3), dtype=np.uint8)
    labels = np.arange(number) % classes
    return LongTailSet([str(i) for i in range(number)], labels, np.bincount(labels).tolist(), images_NHWC=images_NHWC)


def class_folders(root, sizes, side=20):
    """``sizes[place]`` images in each folder of ``root``; the settings that open them."""
    generator = np.random.default_rng(len(str(root)))
    for label, (place, number) in enumerate(sizes.items()):
        (root / place).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            pixels = generator.integers(40 * label, 40 * label + 50, (side, side + index, 3)) % 256
            Image.fromarray(pixels.astype(np.uint8)).save(root / place / f"{index}.png")
    return {"dataset": "folder", "root": str(root)}


def request(samples, size=24, epoch=0, copies=None):
    sample_B = np.asarray(samples)
    copy_B = np.zeros_like(sample_B) if copies is None else np.asarray(copies)
    draws = augment.draw(sample_B, copy_B, seed=7, epoch=epoch, cfg=AugmentConfig(), size=size)
    return CropRequest(sample_B, size, draws)


def deliver(images, requests, window=1, **options):
    """All crops, and the stream, closed."""
    stream = reader.Stream(images, DataConfig(num_threads=2, **options), CPU, window)
    try:
        return [crops for _, crops in stream.crops(requests)], stream
    finally:
        stream.close()


def assert_like_pillow(crops_BHWC, images, wanted):
    """The crops of a request are those Pillow makes of its boxes, up to what ``data.resize`` says of host crops."""
    difference = np.abs(crops_BHWC.numpy().astype(int) - pillow_crops(images, wanted))
    assert crops_BHWC.dtype == torch.uint8
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.01


def pillow_crops(images, wanted):
    crops = []
    for b, sample in enumerate(wanted.sample_B):
        image = Image.open(Path(images.root) / images.paths[sample]).convert("RGB")
        top, left, height, width = wanted.draws.boxes(np.array(image.size[::-1]))[b].tolist()
        box = image.crop((left, top, left + width, top + height))
        crops.append(np.asarray(box.resize((wanted.size, wanted.size), Image.Resampling.BICUBIC)))
    return np.stack(crops)


GOOD = encoded(picture(60, 80), quality=90)
