"""The teacher's views: drawn by key alone, and coloured as torchvision colours."""

import itertools

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as torchvision

from fastdeitlt import config
from fastdeitlt.config import AugmentConfig
from fastdeitlt.data.augment import colour
from fastdeitlt.data.augment.colour import CIFAR10_POLICY, View
from fastdeitlt.data.augment.randaugment import OPS
from fastdeitlt.data.teacher_plan import TeacherPlan
from fastdeitlt.teachers.views import view_recipes

CROP = AugmentConfig(recipe="crop_jitter", crop_scale=(0.2, 1.0))
SIMCLR = View(CROP, jitter_prob=0.8, hue=0.1, gray_prob=0.2, blur_prob=0.5)
POLICY = View(AugmentConfig(recipe="autoaugment_cutout"), policy=True, cutout=0.5)
STILL = AugmentConfig(recipe="none")


def draws_of(sample_B: np.ndarray, view: View, size: int = 16) -> colour.ViewDraws:
    return colour.draw(sample_B, np.zeros_like(sample_B), seed=3, epoch=2, view=view, size=size)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_part_has_one_image_and_an_epoch_has_every_image(world: int, accumulate: int) -> None:
    least = 2 * world * accumulate
    for n, batch_size in itertools.product(range(least, 60), range(least, 20)):
        plans = [TeacherPlan(n, batch_size, 0, False, rank, world, accumulate) for rank in range(world)]
        batches = [batch for batch, _ in plans[0].batches(0)]
        assert len(batches) == plans[0].steps >= 1
        assert sorted(np.concatenate(batches).tolist()) == list(range(n))
        assert all(len(part) >= 2 for batch in batches for plan in plans for part in plan.parts(batch))
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert len(batches[-1]) < batch_size + max(least, batch_size / 8)
        assert bool(plans[0].last_batch) == (len(batches[-1]) > batch_size)


@pytest.mark.parametrize("n", [256 + 9, 256 + 31, 256 + 32, 100])
def test_an_epoch_has_as_many_steps_on_any_number_of_ranks(n: int) -> None:
    steps = {TeacherPlan(n, 256, 0, False, 0, world, 16 // world).steps for world in (1, 2, 4, 8, 16)}
    steps |= {TeacherPlan(n, 256, 0, False, 0, world).steps for world in range(1, 17)}
    assert steps == {1 if n < 256 + 32 else 2}


def test_the_last_image_joins_the_batch_before_and_paco_leaves_it_out() -> None:
    plan = TeacherPlan(121, 24, 0, drop_last=False)
    assert [len(batch) for batch, _ in plan.batches(0)] == [24, 24, 24, 24, 25]
    whole, ((last, _),) = list(plan.batches(0)), plan.batches(0, start=4)
    assert len(last) == 25 and last.tolist() == whole[-1][0].tolist()
    assert plan.last_batch == "the last batch of an epoch has 25 images: 1 alone would be too few for a step"
    paco = TeacherPlan(121, 24, 0, drop_last=True)
    assert [len(batch) for batch, _ in paco.batches(0)] == [24] * 5
    assert paco.last_batch == "PaCo uses full batches: each epoch skips 1 of 121 images, others in each"


def test_hue_is_torchvisions() -> None:
    images, turns = torch.rand(4, 3, 9, 7), torch.tensor([0.07, -0.1, 0.5, 0.0]).view(-1, 1, 1, 1)
    images[0, :, 0, 0] = 0.5  # gray has no hue
    expected = torch.stack([torchvision.adjust_hue(x, t.item()) for x, t in zip(images, turns, strict=True)])
    torch.testing.assert_close(colour.shift_hue(images, turns), expected, atol=2e-6, rtol=0)


def test_blur_is_torchvisions() -> None:
    images, sigma = torch.rand(2, 3, 20, 14), torch.tensor([0.4, 1.9]).view(-1, 1, 1, 1)
    expected = torch.stack([torchvision.gaussian_blur(x, 13, s.item()) for x, s in zip(images, sigma, strict=True)])
    torch.testing.assert_close(colour.blur(images, sigma), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("view", [SIMCLR, POLICY, View(CROP, jitter_prob=1.0)], ids=["simclr", "policy", "jitter"])
def test_an_image_is_the_same_in_any_batch(view: View) -> None:
    crops = torch.randint(0, 256, (12, 16, 16, 3), dtype=torch.uint8)
    whole = colour.apply(crops, draws_of(np.arange(12), view), view)
    part = colour.apply(crops[5:8], draws_of(np.arange(5, 8), view), view)
    torch.testing.assert_close(whole[5:8], part)
    assert whole.isfinite().all()
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_jitter_has_torchvisions_range_and_every_order() -> None:
    drawn = draws_of(np.arange(4000), View(CROP, jitter_prob=0.8)).draws
    jittered = drawn.op_B2[:, 0] >= 0
    assert jittered.mean() == pytest.approx(0.8, abs=0.03)
    assert all(sorted(op) == sorted(colour.JITTERS.tolist()) for op in drawn.op_B2[jittered].tolist())
    assert len({tuple(op) for op in drawn.op_B2[jittered].tolist()}) == 6
    factor = 1 + 0.09 * drawn.sign_B2 * drawn.level_B2
    assert factor.min() == pytest.approx(0.6, abs=0.01)
    assert factor.max() == pytest.approx(1.4, abs=0.01)


def test_gray_images_are_gray_and_as_many_as_asked() -> None:
    view = View(STILL, gray_prob=0.3)
    crops = torch.randint(0, 256, (400, 8, 8, 3), dtype=torch.uint8)
    draws = draws_of(np.arange(400), view, 8)
    images = colour.apply(crops, draws, view)
    rgb = images * torch.tensor(STILL.std).view(3, 1, 1) + torch.tensor(STILL.mean).view(3, 1, 1)
    is_gray = (rgb[:, 0] - rgb[:, 1]).abs().amax((1, 2)) < 1e-5
    assert is_gray.numpy().tolist() == draws.gray_B.tolist()
    assert draws.gray_B.mean() == pytest.approx(0.3, abs=0.07)


def test_cutout_blackens_one_square_of_half_the_side() -> None:
    view = View(STILL, cutout=0.5)
    crops = torch.full((300, 16, 16, 3), 255, dtype=torch.uint8)
    images = colour.apply(crops, draws_of(np.arange(300), view), view)
    black = images[:, 0] < 0
    area = black.sum((1, 2))
    assert area.max() == 64
    assert area.min() >= 16
    assert torch.equal(black.any(2).sum(1) * black.any(1).sum(1), area)


def test_the_policy_is_autoaugments() -> None:
    assert len(CIFAR10_POLICY) == 25
    assert {op for p in CIFAR10_POLICY for op in (p[1], p[4])} <= set(OPS)
    drawn = draws_of(np.arange(20000), POLICY)
    names = np.array([*OPS, "none"])[drawn.draws.op_B2]
    # translate_y at magnitude 9 is 150/331 of the height, in sub-policies 4, 22 (twice) and 25
    far = names == "translate_y"
    assert (drawn.draws.level_B2[far] * 0.045).max() == pytest.approx(150 / 331)
    assert far.mean() == pytest.approx((0.4 + 0.7 + 0.9 + 0.7 + 0.7) / 50, abs=0.01)
    assert (drawn.draws.sign_B2[names == "rotate"] == 1).all()
    assert drawn.posterize_B.mean() == pytest.approx(0.3 / 25, abs=0.004)


def test_recipes_give_their_views() -> None:
    paco = view_recipes(config.load("teacher/cifar100_lt_r100_paco"))
    assert paco[0].policy
    assert paco[0].cutout == 0.5
    assert paco[1].hue == 0.1
    assert paco[1].augment.crop_scale == (0.2, 1.0)
    large = view_recipes(config.load("teacher/imagenet_lt_paco"))
    assert large[1].jitter_prob == 1.0
    assert large[1].hue == 0.0
    assert len(view_recipes(config.load("teacher/cifar10_lt_r100"))) == 1
    assert view_recipes(config.load("teacher/imagenet_lt"))[0].jitter_prob == 1.0
