"""Each operation against timm on Pillow, at every level, on photos, text-like noise and flat images."""

from pathlib import Path

import numpy as np
import pytest
import timm_oracle
import torch
from PIL import Image

from fastdeitlt.data.augment import randaugment, warps
from fastdeitlt.data.augment.randaugment import FUNCTIONS, OPS, rand_augment

PHOTOS = Path(__file__).parents[1] / "data" / "photos"
SLIDES = ("shear_x", "shear_y", "translate_x", "translate_y")
DRAWN_LEVELS = (8.1234567, 8.77, 9.3131, 9.9713)


def images(height: int, width: int) -> np.ndarray:
    """Two photos, noise, a dark image of few values, a constant one: uint8 [5, H, W, 3]."""
    rng = np.random.default_rng(0)
    photos = [
        Image.open(path).resize((width, height), Image.Resampling.BICUBIC) for path in sorted(PHOTOS.glob("*.jpg"))
    ]
    return np.stack(
        [
            *map(np.asarray, photos),
            rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
            rng.integers(3, 9, (height, width, 3), dtype=np.uint8),
            np.full((height, width, 3), 100, np.uint8),
        ]
    )


def compare(op: int, levels: tuple[float, ...], height: int, width: int) -> np.ndarray:
    source, differences = images(height, width), []
    for level in levels:
        for sign in (1.0, -1.0):
            ours = FUNCTIONS[op](torch.from_numpy(source), np.full(5, float(level)), np.full(5, sign)).numpy()
            theirs = np.stack([timm_oracle.operate(image, op, float(level), sign) for image in source])
            differences.append(np.abs(ours.astype(int) - theirs))
    return np.stack(differences)


def test_operations_are_timms_in_timms_order() -> None:
    names = [name.replace("Increasing", "").replace("Rel", "") for name in (o.name for o in timm_oracle.POLICY.ops)]
    assert [name.replace("_", "") for name in OPS] == [name.lower() for name in names]


@pytest.mark.parametrize("op", range(15), ids=OPS)
def test_operation_equals_timm_at_drawn_levels(op: int) -> None:
    assert compare(op, DRAWN_LEVELS, 61, 96).max() == 0


@pytest.mark.parametrize("op", range(15), ids=OPS)
def test_operation_equals_timm_at_whole_levels(op: int) -> None:
    difference = compare(op, tuple(range(11)), 47, 53)
    if OPS[op] in SLIDES:  # at round shifts a value can be a whole number, which the last bit then truncates either way
        assert difference.max() <= 1
        assert difference.mean() < 1e-3
    else:
        assert difference.max() == 0


@pytest.mark.parametrize("degrees", [27.3, -13.1, 0.0, 30.0])
def test_device_warp_equals_pillows_rotation(degrees: float) -> None:
    source = images(45, 64)
    matrix = np.array([warps.rotation(degrees, 64, 45)] * 5)
    rotated = [Image.fromarray(i).rotate(degrees, Image.Resampling.BICUBIC, fillcolor=(124, 116, 104)) for i in source]
    assert np.array_equal(warps.warp(torch.from_numpy(source), matrix).numpy(), np.stack(rotated))


@pytest.mark.parametrize("darkest", [0, 7, 200])
def test_auto_contrast_stretches_every_range_as_pillow(darkest: int) -> None:
    op = OPS.index("auto_contrast")
    for brightest in range(darkest, 256):
        ramp = np.linspace(darkest, brightest, 3 * 90).round().astype(np.uint8).reshape(9, 10, 3)
        ours = FUNCTIONS[op](torch.from_numpy(ramp)[None], np.ones(1), np.ones(1))[0].numpy()
        assert np.array_equal(ours, timm_oracle.operate(ramp, op, 1.0, 1.0)), brightest


def test_two_operations_apply_in_order_and_only_where_drawn() -> None:
    source = images(32, 32)
    op_B2 = np.array([[5, 3], [3, 5], [-1, 1], [1, -1], [-1, -1]], np.int8)
    level_B2, sign_B2 = np.full((5, 2), 9.2), np.array([[1.0, -1.0]] * 5)
    ours = torch.from_numpy(source.copy())
    rand_augment(ours, op_B2, level_B2, sign_B2)
    for image, result, ops in zip(source, ours.numpy(), op_B2, strict=True):
        for op, level, sign in zip(ops, level_B2[0], sign_B2[0], strict=True):
            image = timm_oracle.operate(image, op, level, sign) if op >= 0 else image
        assert np.array_equal(image, result)


def test_images_larger_than_the_cache_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    source, op_B2 = torch.from_numpy(images(20, 20)), np.array([[11, 8]] * 5, np.int8)
    whole, parts = source.clone(), source.clone()
    rand_augment(whole, op_B2, np.full((5, 2), 9.2), np.ones((5, 2)))
    monkeypatch.setattr(randaugment, "CACHED_VALUES", 2 * 20 * 20 * 3)
    rand_augment(parts, op_B2, np.full((5, 2), 9.2), np.ones((5, 2)))
    assert torch.equal(whole, parts)
