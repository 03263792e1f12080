"""Which image when: the reference's order, and the same steps on any number of ranks."""

import golden
import numpy as np
import pytest

from fastdeitlt.data.sampler import Plan, RepeatedAugmentationSampler
from fastdeitlt.errors import UserError


@pytest.mark.parametrize(
    "case", golden.load("repeated_augmentation"), ids=lambda c: f"n{c['n']}-world{c['replicas']}-rank{c['rank']}"
)
def test_order_is_the_references(case):
    sampler = RepeatedAugmentationSampler(case["n"], case["replicas"], case["rank"])
    sampler.set_epoch(case["epoch"])
    order = list(sampler)
    assert len(order) == len(sampler) == case["length"]
    assert order[:24] == case["head"]
    assert sum((i + 1) * index for i, index in enumerate(order)) % 1_000_000_007 == case["checksum"]


def test_state_continues_with_the_next_index():
    whole = list(RepeatedAugmentationSampler(1000, 2, 1, seed_epoch=5))
    sampler = RepeatedAugmentationSampler(1000, 2, 1, seed_epoch=5)
    running = iter(sampler)
    first = [next(running) for _ in range(100)]
    again = RepeatedAugmentationSampler(1000, 2, 1)
    again.load_state_dict(sampler.state_dict())
    assert first + list(again) == whole
    with pytest.raises(UserError, match="n=1000, world_size=2, expected n=999"):
        RepeatedAugmentationSampler(999, 2, 1).load_state_dict(sampler.state_dict())


def test_copies_of_an_image_are_numbered_apart():
    sampler = RepeatedAugmentationSampler(512, 1, 0, repeats=3)
    sample_n, copy_n = sampler.order()
    assert len({*zip(sample_n.tolist(), copy_n.tolist(), strict=True)}) == len(sample_n)
    assert set(copy_n.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("n", [1, 5, 255, 256, 257])
def test_tiny_sets_still_give_images(n):
    assert len(list(RepeatedAugmentationSampler(n, 1, 0))) == (n // 256 * 256 or n)


@pytest.mark.parametrize(
    ("n", "batch_size", "ranks", "images"),
    [(511, 32, 1, 480), (511, 16, 4, 448), (244, 32, 1, 224), (2478, 32, 1, 2464), (2478, 1, 4, 2476)],
)
def test_without_repeated_augmentation_an_epoch_is_rounded_only_to_batches(n, batch_size, ranks, images):
    plan = Plan(n, batch_size, 2, 1, ranks)
    assert n - batch_size * ranks < images <= n
    assert plan.images_per_epoch == plan.distinct_images == images
    steps = list(plan.steps(1))
    assert len(steps) == plan.optimizer_steps
    seen = [index for step in steps for micro in step.micro_batches for index in micro.sample_B.tolist()]
    assert len(seen) == len(set(seen)) == images
    assert steps[-1].clock == 1 + (plan.micro_steps - 1) / plan.micro_steps
    left_out = set(range(n)) - set(seen)
    later = {i for step in plan.steps(2) for micro in step.micro_batches for i in micro.sample_B.tolist()}
    assert len(left_out & later) > len(left_out) / 2  # another epoch leaves out others


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (Plan(511, 32, 1, 1, 1), "480 of 511 images per epoch"),
        (
            Plan(12406, 128, 4, 3, 2),
            "4,096 of 12,406 images per epoch, 12,288 with copies (augment.repeats=3)",
        ),
        (
            Plan(486, 32, 1, 3, 1),
            "86 of 486 images per epoch, 256 with copies (augment.repeats=3); the others are in later epochs. "
            "For more per epoch, use augment.repeats=1",
        ),
        (
            Plan(244, 128, 1, 1, 1),
            "128 of 244 images per epoch; the others are in later epochs. For more per epoch, use a "
            "train.batch_size below 128",
        ),
    ],
)
def test_an_epoch_is_described_with_its_distinct_images(plan, text):
    assert plan.describe_epoch() == text
    assert plan.is_partial == ("For more" in text)
    seen = {i for step in plan.steps(0) for micro in step.micro_batches for i in micro.sample_B.tolist()}
    assert len(seen) == plan.distinct_images


@pytest.mark.parametrize("arguments", [(0, 1, 0), (5, 6, 0), (5, 2, 2), (5, 2, -1), (5, 0, 0), (5, 1, 0, 0)])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(UserError, match="sampler: got n="):
        RepeatedAugmentationSampler(*arguments)


def test_published_recipes_have_the_published_number_of_steps():
    assert Plan(12406, 128, 4, 3, 2).optimizer_steps * 1200 == 14_400  # CIFAR-10 rho 100
    assert Plan(13996, 128, 4, 3, 2).optimizer_steps * 1200 == 16_800  # CIFAR-10 rho 50
    assert Plan(115846, 128, 4, 3, 4).optimizer_steps * 1400 == 79_800  # ImageNet-LT
    assert Plan(437513, 128, 4, 3, 4).optimizer_steps * 1000 == 214_000  # iNaturalist 2018


def _batches(plan, epoch):
    return [
        {(m.index, m.virtual_rank): (m.sample_B.tolist(), m.copy_B.tolist()) for m in step.micro_batches}
        for step in plan.steps(epoch)
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_fewer_ranks_form_the_batches_of_more(world):
    alone = _batches(Plan(2000, 16, 2, 3, 4), epoch=3)
    shared = [_batches(Plan(2000, 16, 2, 3, 4, rank, world), epoch=3) for rank in range(world)]
    assert alone == [{k: v for part in step for k, v in part.items()} for step in zip(*shared, strict=True)]


def test_learning_rate_clock_is_the_references():
    clocks = [step.clock for step in Plan(256 * 4, 64, 4, 1, 1).steps(2)]
    assert clocks == [2, 2 + 4 / 16, 2 + 8 / 16, 2 + 15 / 16]
    assert [len(s.micro_batches) for s in Plan(256, 32, 3, 1, 1).steps(0)] == [3, 3, 2]


def test_starting_inside_an_epoch_gives_its_remaining_steps():
    plan = Plan(1024, 32, 2, 3, 2)
    rest = list(plan.steps(1, start=5))
    for got, expected in zip(rest, list(plan.steps(1))[5:], strict=True):
        assert got.clock == expected.clock
        assert all(
            np.array_equal(a.sample_B, b.sample_B)
            for a, b in zip(got.micro_batches, expected.micro_batches, strict=True)
        )


def test_impossible_plans_are_refused():
    with pytest.raises(UserError, match="expected a multiple of 3"):
        Plan(1000, 8, 1, 3, 4, 0, 3)
    with pytest.raises(UserError, match=r"train\.batch_size: got 300, expected at most 256.*Use a smaller batch$"):
        Plan(256, 300, 1, 3, 1)
    with pytest.raises(UserError, match=r"train\.virtual_ranks: got 4, expected at most 3, the images of the set"):
        Plan(3, 1, 1, 1, 4)
    with pytest.raises(UserError, match=r"train\.accumulate: got 4, expected at most 3, the micro-batches per epoch"):
        Plan(100, 32, 4, 1, 1)
    assert Plan(100, 32, 3, 1, 1).optimizer_steps == 1
