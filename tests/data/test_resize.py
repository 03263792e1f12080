"""Resizing equals Pillow's, on the host and in the batched form for devices."""

from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from fastdeitlt.data.pixels.resize import centre_crop, columns_first, crop_resize, resize_batched
from fastdeitlt.store.manifest import Preprocess

PILLOW = int(PIL.__version__.split(".")[0])
PHOTO = np.array(Image.open(Path(__file__).parents[1] / "data" / "photos" / "astronaut.jpg"))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


@hypothesis.given(*[st.integers(1, 70)] * 4)
def test_batched_resize_equals_pillow(height: int, width: int, out_height: int, out_width: int) -> None:
    hypothesis.assume(PILLOW >= 13 or not columns_first(height, width, out_height, out_width))
    image = noise(height, width)
    (resized,) = resize_batched([torch.from_numpy(image)], [(out_height, out_width)])
    assert np.array_equal(resized.numpy(), pillow(image, out_height, out_width))


def test_batched_resize_takes_images_of_any_sizes_at_once() -> None:
    sizes, shapes = [(9, 40), (40, 9), (24, 24), (60, 33), (1, 5)], [(24, 24), (24, 24), (24, 24), (12, 50), (24, 24)]
    images = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    resized = resize_batched([torch.from_numpy(image) for image in images], shapes)
    for image, shape, ours in zip(images, shapes, resized, strict=True):
        assert PILLOW < 13 or np.array_equal(ours.numpy(), pillow(image, *shape))


def test_crop_resize_crops_before_it_resizes() -> None:
    boxes = np.array([[0, 0, 144, 180], [10, 20, 31, 9], [143, 179, 1, 1], [5, 100, 100, 60]], np.int32)
    crops = crop_resize([torch.from_numpy(PHOTO)] * 4, boxes, 40, exact=True)
    for crop, (y, x, h, w) in zip(crops, boxes.tolist(), strict=True):
        assert np.array_equal(crop.numpy(), pillow(PHOTO[y : y + h, x : x + w], 40, 40))
    stacked = torch.from_numpy(np.stack([PHOTO] * 4))
    assert torch.equal(crops, crop_resize(stacked, boxes, 40, exact=True))


@pytest.mark.parametrize("source", ["photo", "noise"])
def test_fast_crops_are_pillows_up_to_rounding(source: str) -> None:
    image = PHOTO if source == "photo" else noise(144, 180)
    boxes = [[0, 0, 144, 180], [10, 20, 60, 50], [3, 4, 140, 70], [5, 100, 30, 60], [0, 0, 9, 9], [143, 179, 1, 1]]
    for size in (32, 57):
        images = [torch.from_numpy(image)] * len(boxes)
        fast, exact = (crop_resize(images, np.array(boxes), size, exact=exact).int() for exact in (False, True))
        assert (fast - exact).abs().max() <= 2
        assert (fast != exact).float().mean() < 0.01


@pytest.mark.parametrize("shape", [(60, 43), (43, 60), (33, 33), (40, 200)])
def test_centre_crop_equals_torchvision(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    compose = transforms.Compose(
        [transforms.Resize(37, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32)]
    )
    expected = np.asarray(compose(Image.fromarray(image)))
    ours = centre_crop([torch.from_numpy(image), torch.from_numpy(PHOTO)], 37, 32)
    assert ours.shape == (2, 32, 32, 3)
    assert np.array_equal(ours[0].numpy(), expected)


@pytest.mark.parametrize("size", [28, 32, 96, 160, 224, 384])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
def test_the_centre_crop_is_that_of_timm(size: int, crop_pct: float) -> None:
    transform = create_transform(size, interpolation="bicubic", crop_pct=crop_pct, mean=(0, 0, 0), std=(1, 1, 1))
    preprocess = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), img_size=size, crop_pct=crop_pct)
    (crop,) = centre_crop([torch.from_numpy(PHOTO)], preprocess.resize, size)
    expected_HWC = (transform(Image.fromarray(PHOTO)) * 255).round().to(torch.uint8).permute(1, 2, 0)
    assert torch.equal(crop, expected_HWC)
