"""Pixel statistics: the mean and deviation that a recipe needs, of the images that can be read."""

import numpy as np
import pytest
from PIL import Image

from fastdeitlt.config import DataConfig, build
from fastdeitlt.data.check.doctor import stats
from fastdeitlt.data.check.pixel_stats import BATCH, SIDE, pixel_stats
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError


def save_set(folder, images, labels=None):
    """Write images (uint8 arrays) as PNG files; the set."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [f"{number:03d}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(folder / path)
    labels_N = np.asarray(labels if labels is not None else np.arange(len(images)) % 2)
    return LongTailSet(paths, labels_N, np.bincount(labels_N).tolist(), str(folder))


def noise(number, side=SIDE, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (number, side, side, 3), dtype=np.uint8))


def test_mean_and_deviation_are_those_of_all_pixels_over_several_batches(tmp_path):
    scale = np.array([0.5, 1.0, 0.25])
    images = [(image * scale).astype(np.uint8) for image in noise(BATCH + 7)]
    found = pixel_stats(save_set(tmp_path, images), DataConfig())
    values = np.stack(images).reshape(-1, 3) / 255
    assert found.mean == pytest.approx(values.mean(0), abs=1e-4)
    assert found.std == pytest.approx(values.std(0), abs=1e-4)
    assert (found.short_side, found.gray, found.num_images) == (SIDE, 0.0, BATCH + 7)


def test_gray_images_sides_and_unreadable_files_are_counted(tmp_path):
    gray = [np.repeat(image[..., :1], 3, -1) for image in noise(3, side=20)]
    images = save_set(tmp_path, [*gray, *noise(1, side=90)], labels=[0, 1, 1, 1])
    assert (pixel_stats(images, DataConfig()).gray, pixel_stats(images, DataConfig()).short_side) == (0.75, 20)
    (tmp_path / "000.png").write_text("no image")  # the only one of its class
    found = pixel_stats(images, DataConfig())
    assert (found.num_images, found.num_unreadable) == (3, 1)
    assert found.gray == pytest.approx(2 / 3)
    for path in images.paths:
        (tmp_path / path).write_text("no image")
    with pytest.raises(UserError):
        pixel_stats(images, DataConfig())


def test_a_large_set_is_sampled_evenly_and_one_colour_has_a_deviation_to_divide_by(tmp_path):
    plain = [np.full((9, 9, 3), value, np.uint8) for value in (0, 51, 102, 153, 204)]
    found = pixel_stats(save_set(tmp_path, plain), DataConfig(), most=3)  # the first, the middle one, the last
    assert found.mean == pytest.approx([0.4] * 3, abs=1e-4)
    assert pixel_stats(save_set(tmp_path / "one", plain[:1]), DataConfig()).std == (0.001,) * 3


def test_sets_that_come_decoded_are_measured_too():
    pixels = np.stack(noise(4, side=32))
    images = LongTailSet(["a"] * 4, np.array([0, 0, 1, 1]), [2, 2], images_NHWC=pixels)
    found = pixel_stats(images, DataConfig())
    assert found.mean == pytest.approx((pixels / 255).mean((0, 1, 2)), abs=1e-4)
    assert found.short_side == 32


def test_data_stats_shows_mean_and_deviation_as_a_recipe_has_them(tmp_path, capsys):
    for label, name in enumerate(("cat", "dog")):
        for split in ("train", "val", "test"):
            save_set(tmp_path / split / name, noise(2, seed=label))
    cfg = build({"data.dataset": "folder", "data.root": str(tmp_path), "train.batch_size": 2, "augment.repeats": 1})
    report = stats(cfg)
    report.print()
    shown = capsys.readouterr().out
    assert report.pixels and str(list(report.pixels.mean)) in shown and str(list(report.pixels.std)) in shown
    assert report.to_dict()["pixels"]["num_images"] == 4
