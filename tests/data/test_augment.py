"""Draws have timm's laws and depend on nothing but their key; apply is timm's chain."""

from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import timm_oracle
import torch
from laws import REJECT, counts_p, ks_p
from PIL import Image
from torchvision.transforms import functional

from fastdeitlt.config import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from fastdeitlt.data.augment import counter
from fastdeitlt.data.augment import transform as augment
from fastdeitlt.data.augment.transform import Draws
from fastdeitlt.data.pixels.resize import crop_resize

NUM = 50_000
SIZE = 224
DEIT = AugmentConfig()
PHOTOS = Path(__file__).parents[1] / "data" / "photos"


def drawn(cfg: AugmentConfig = DEIT, num: int = NUM, size: int = SIZE, **key: int) -> Draws:
    key = {"seed": 3, "epoch": 5} | key
    return augment.draw(np.arange(num) // 3, np.arange(num) % 3, **key, cfg=cfg, size=size)


def photos() -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in sorted(PHOTOS.glob("*.jpg"))]


def op_p(draws: Draws, timm: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, float]:
    """p-values that our operations, levels and directions follow timm's."""
    op, level, sign = timm
    pairs = [np.bincount(((o + 1) @ [16, 1]).astype(int), minlength=256) for o in (draws.op_B2, op)]
    ours, theirs = draws.op_B2 >= 0, op >= 0
    return {
        "pairs of operations": counts_p(*pairs),
        "applied": counts_p(*(np.bincount(x.ravel(), minlength=2) for x in (ours, theirs))),
        "levels": ks_p(draws.level_B2[ours], level[theirs]),
        "level 10": counts_p(*(np.bincount(x == 10.0, minlength=2) for x in (draws.level_B2[ours], level[theirs]))),
        "directions": counts_p(*(np.bincount(x > 0, minlength=2) for x in (draws.sign_B2[ours], sign[theirs]))),
    }


def box_p(ours: np.ndarray, theirs: np.ndarray, height: int, width: int) -> dict[str, float]:
    """p-values that boxes [N, 4] of two samples have the same areas, aspects and places."""
    measures = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: np.log(b[:, 2] / b[:, 3]),
        "top": lambda b: b[:, 0] / (height - b[:, 2] + 1),
        "left": lambda b: b[:, 1] / (width - b[:, 3] + 1),
    }
    return {name: ks_p(measure(ours), measure(theirs)) for name, measure in measures.items()}


def erase_p(draws: Draws, timm_B4: np.ndarray, size: int) -> dict[str, float]:
    ours, theirs = (boxes[boxes[:, 2] > 0] for boxes in (draws.erase_B4, timm_B4))
    rates = [np.array([len(boxes), NUM - len(boxes)]) for boxes in (ours, theirs)]
    return {"rate": counts_p(*rates)} | box_p(ours, theirs, size, size)


@pytest.fixture(scope="module")
def timm_ops() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return timm_oracle.draw_ops(NUM)


@pytest.fixture(scope="module")
def timm_boxes() -> np.ndarray:
    return timm_oracle.draw_boxes(NUM, 375, 500)


@pytest.fixture(scope="module")
def timm_erasures() -> np.ndarray:
    return timm_oracle.draw_erasures(NUM, 48)


def test_operations_levels_and_directions_follow_timms_law(timm_ops: tuple[np.ndarray, ...]) -> None:
    p_values = op_p(drawn(), timm_ops)
    assert min(p_values.values()) > REJECT, p_values


def test_crops_follow_timms_law(timm_boxes: np.ndarray) -> None:
    ours = drawn().boxes(np.array([375, 500]))
    p_values = box_p(ours, timm_boxes, 375, 500)
    assert min(p_values.values()) > REJECT, p_values
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= [375, 500]).all()


@pytest.mark.parametrize(("height", "width"), [(40, 400), (300, 31), (33, 29)])
def test_odd_shapes_fall_back_to_the_central_crop_as_often_as_timms(height: int, width: int) -> None:
    ours, theirs = drawn(num=20_000).boxes(np.array([height, width])), timm_oracle.draw_boxes(20_000, height, width)
    boxes = [np.unique(b, axis=0, return_counts=True) for b in (ours, theirs)]
    common = {tuple(b) for b, n in zip(*boxes[1], strict=True) if n > 2000}
    for box in common:
        counts = [np.array([(b == box).all(1).sum(), (b != box).any(1).sum()]) for b in (ours, theirs)]
        assert counts_p(*counts) > REJECT, box
    assert bool(common) == (max(height, width) > 100)
    assert min(box_p(ours, theirs, height, width).values()) > REJECT


def test_erasures_follow_timms_law(timm_erasures: np.ndarray) -> None:
    p_values = erase_p(drawn(size=48), timm_erasures, 48)
    assert min(p_values.values()) > REJECT, p_values


def test_flips_are_a_fair_coin_and_independent_of_the_rest() -> None:
    draws = drawn()
    assert abs(draws.flip_B.mean() - 0.5) < 4 * 0.5 / NUM**0.5
    assert counts_p(*(np.bincount(draws.op_B2[draws.flip_B == flip, 0] + 1, minlength=16) for flip in (0, 1))) > REJECT


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ({"rand_prob": 0.52}, "applied"),
        ({"rand_std": 0.55}, "levels"),
        ({"rand_magnitude": 9.05}, "levels"),
        ({"crop_scale": (0.1, 1.0)}, "area"),
        ({"crop_ratio": (0.7, 4 / 3)}, "aspect"),
        ({"erase_prob": 0.27}, "rate"),
    ],
)
def test_a_wrong_law_is_noticed(
    wrong: dict, law: str, timm_ops: tuple[np.ndarray, ...], timm_boxes: np.ndarray, timm_erasures: np.ndarray
) -> None:
    draws = drawn(AugmentConfig(**wrong), size=48)
    p_values = op_p(draws, timm_ops) | box_p(draws.boxes(np.array([375, 500])), timm_boxes, 375, 500)
    p_values |= {"rate": erase_p(draws, timm_erasures, 48)["rate"]}
    assert p_values[law] < REJECT


def test_consecutive_seeds_epochs_samples_and_copies_are_independent() -> None:
    uniform = [
        counter.uniform(counter.keys(0, np.arange(NUM)), 0, 2),
        counter.uniform(counter.keys(np.arange(NUM), 0), 0, 2),
        counter.uniform(counter.keys(1, 2, np.arange(NUM) // 3, np.arange(NUM) % 3), 7, 2),
    ]
    reference = np.random.default_rng(0).random(NUM)
    for u_N2 in uniform:
        assert ks_p(u_N2[:, 0], reference) > REJECT
        cells = (u_N2 * 8).astype(int) @ [8, 1]
        assert counts_p(np.bincount(cells, minlength=64), np.full(64, NUM * 100)) > REJECT
        assert abs(np.corrcoef(u_N2[1:, 0], u_N2[:-1, 0])[0, 1]) < 4 / NUM**0.5
    assert (
        ks_p(counter.normal(counter.keys(np.arange(NUM)), 0, 1)[:, 0], np.random.default_rng(1).normal(size=NUM))
        > REJECT
    )


@hypothesis.given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40), st.integers(0, 2**40), st.randoms())
def test_draws_depend_on_the_key_alone(samples: list[int], seed: int, random) -> None:
    sample_B = np.array(samples)
    whole = augment.draw(sample_B, sample_B % 3, seed=seed, epoch=1, cfg=DEIT, size=64)
    order = np.array(random.sample(range(len(samples)), len(samples)))
    shuffled = augment.draw(sample_B[order], sample_B[order] % 3, seed=seed, epoch=1, cfg=DEIT, size=64)
    for name in ("flip_B", "op_B2", "level_B2", "sign_B2", "erase_B4", "noise_B", "area_BA", "place_B2"):
        assert np.array_equal(getattr(whole, name)[order], getattr(shuffled, name)), name
    assert np.array_equal(whole.boxes(np.array([77, 50]))[order], shuffled.boxes(np.array([77, 50])))


def test_draws_change_with_every_part_of_the_key() -> None:
    base = drawn(num=30).area_BA
    assert not np.array_equal(base, drawn(num=30, seed=4).area_BA)
    assert not np.array_equal(base, drawn(num=30, epoch=6).area_BA)
    assert len(np.unique(base[:, 0])) == 30  # copies of a sample differ


def test_images_are_the_same_in_any_batch() -> None:
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (60, 21, 21, 3), dtype=np.uint8))
    whole = augment.apply(crops, drawn(num=60, size=21), DEIT)
    for part in (np.arange(0, 60, 7), np.array([59]), np.arange(30)[::-1].copy()):
        draws = augment.draw(part // 3, part % 3, seed=3, epoch=5, cfg=DEIT, size=21)
        assert torch.equal(whole[part], augment.apply(crops[part], draws, DEIT))


def timm_chain(source: np.ndarray, box: list[int], draws: Draws, b: int, size: int) -> torch.Tensor:
    """What timm's transform makes of an image with the b-th drawn parameters, before erasing."""
    image = functional.resized_crop(Image.fromarray(source), *box, [size, size], functional.InterpolationMode.BICUBIC)
    pixels = np.asarray(functional.hflip(image) if draws.flip_B[b] else image)
    for op, level, sign in zip(draws.op_B2[b], draws.level_B2[b], draws.sign_B2[b], strict=True):
        pixels = timm_oracle.operate(pixels, op, level, sign) if op >= 0 else pixels
    return functional.normalize(functional.to_tensor(Image.fromarray(pixels)), IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(("exact", "worst_psnr", "median_psnr"), [(True, 80, 80), (False, 30, 60)])
def test_whole_chain_is_timms_with_the_same_parameters(exact: bool, worst_psnr: float, median_psnr: float) -> None:
    std, size, psnr = torch.tensor(IMAGENET_STD).view(3, 1, 1), 64, []
    sources = [photos()[i % 2] for i in range(60)]
    draws = drawn(num=60, size=size)
    boxes_B4 = draws.boxes(np.array([image.shape[:2] for image in sources]))
    crops = crop_resize([torch.from_numpy(image) for image in sources], boxes_B4, size, exact=exact)
    for b, image in enumerate(augment.apply(crops, draws, DEIT)):
        expected = timm_chain(sources[b], boxes_B4[b].tolist(), draws, b, size)
        top, left, height, width = draws.erase_B4[b].tolist()
        expected[:, top : top + height, left : left + width] = image[:, top : top + height, left : left + width]
        difference = ((image - expected) * std * 255).abs()
        psnr.append(10 * torch.log10(255**2 / difference.square().mean().clamp_min(1e-9)).item())
        assert not exact or difference.max() < 1.01, (b, draws.op_B2[b])
    assert min(psnr) > worst_psnr
    assert np.median(psnr) > median_psnr
    assert (draws.erase_B4[:, 2] > 0).any()


def test_erased_pixels_are_standard_normal_and_differ_between_images() -> None:
    draws = drawn(num=600, size=64)
    images = augment.apply(torch.full((600, 64, 64, 3), 128, dtype=torch.uint8), draws, AugmentConfig(rand_ops=0))
    boxes = [
        images[b, :, y : y + h, x : x + w]
        for b, (y, x, h, w) in enumerate(draws.erase_B4.tolist())
        if draws.erase_B4[b, 2]
    ]
    pixels = torch.cat([box.flatten() for box in boxes]).numpy()
    assert len(boxes) > 100
    assert ks_p(pixels, np.random.default_rng(0).normal(size=len(pixels))) > REJECT
    for shift in (1, 2, 3):  # rows, columns and channels are uncorrelated
        lagged = np.concatenate([(box.flatten()[shift:] * box.flatten()[:-shift]).numpy() for box in boxes])
        assert abs(lagged.mean()) < 4 / len(lagged) ** 0.5
    assert len({box.flatten()[0].item() for box in boxes}) > 0.98 * len(boxes)


def test_pixels_outside_the_erased_box_stay() -> None:
    crops = torch.randint(0, 256, (50, 33, 33, 3), dtype=torch.uint8)
    cfg = AugmentConfig(rand_ops=0, flip_prob=0, erase_prob=1)
    draws = drawn(cfg, num=50, size=33)
    images, plain = augment.apply(crops, draws, cfg), augment.normalise(crops, cfg.mean, cfg.std)
    for b, (y, x, h, w) in enumerate(draws.erase_B4.tolist()):
        assert (images[b, :, y : y + h, x : x + w] != plain[b, :, y : y + h, x : x + w]).all()
        images[b, :, y : y + h, x : x + w] = plain[b, :, y : y + h, x : x + w]
    assert torch.equal(images, plain)


def test_normalise_equals_torchvision_and_is_channels_last() -> None:
    crops = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)
    images = augment.normalise(crops, IMAGENET_MEAN, IMAGENET_STD)
    expected = functional.normalize(crops.permute(0, 3, 1, 2) / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_pad_crop_pads_with_black_and_takes_every_offset() -> None:
    cfg = AugmentConfig(recipe="pad_crop", pad=2, flip_prob=0, mean=(0, 0, 0), std=(1, 1, 1))
    crops, draws = torch.randint(1, 256, (400, 9, 9, 3), dtype=torch.uint8), drawn(cfg, num=400, size=9)
    images = (augment.apply(crops, draws, cfg) * 255).round().to(torch.uint8)
    offsets = {(y, x): 0 for y in range(5) for x in range(5)}
    for crop, image in zip(crops.permute(0, 3, 1, 2), images, strict=True):
        padded = torch.nn.functional.pad(crop, (2, 2, 2, 2))
        (found,) = [o for o in offsets if torch.equal(padded[:, o[0] : o[0] + 9, o[1] : o[1] + 9], image)]
        offsets[found] += 1
    assert min(offsets.values()) > 0
    assert np.array_equal(draws.boxes(np.array([12, 10])), [[1, 0, 10, 10]] * 400)  # the central square
    assert np.array_equal(draws.boxes(np.array([10, 13])), [[0, 1, 10, 10]] * 400)
    assert (draws.op_B2 == -1).all()
    assert not draws.erase_B4.any()


def test_recipe_none_only_normalises() -> None:
    cfg = AugmentConfig(recipe="none")
    crops = torch.randint(0, 256, (30, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(
        augment.apply(crops, drawn(cfg, num=30, size=8), cfg), augment.normalise(crops, cfg.mean, cfg.std)
    )


def test_apply_leaves_its_input_alone() -> None:
    crops = torch.randint(0, 256, (30, 16, 16, 3), dtype=torch.uint8)
    before = crops.clone()
    augment.apply(crops, drawn(num=30, size=16), DEIT)
    assert torch.equal(crops, before)


def test_boxes_of_tiny_images_have_at_least_a_pixel() -> None:
    for height, width in ((1, 1), (1, 7), (2, 2)):
        boxes = drawn(num=500).boxes(np.array([height, width]))
        assert (boxes[:, 2:] >= 1).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()
