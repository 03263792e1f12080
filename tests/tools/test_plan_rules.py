"""The rules of `plan`, without a clock: valid recipes that fit the hours, agree, and grow with time."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastdeitlt import config
from fastdeitlt.data.sampler import plan_of
from fastdeitlt.data.sets.opening import hold_out
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.data.teacher_plan import teacher_plan_of
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.models.vit import SIZES
from fastdeitlt.tools import plan_rules
from fastdeitlt.tools.plan_facts import Facts, Rates, Rung
from fastdeitlt.tools.plan_rules import candidate, choose, default_hours, holdout_shares

CPU_RATE, GPU_RATE = 400.0, 60_000.0
"""Images a second of the cheapest student: two cores, and more than any GPU."""


def facts_of(counts, short_side=200, num_val=100, gpu=False, **changes):
    facts = Facts(
        dataset="folder", root="/photos", lists={}, counts=counts, num_val=num_val, holdouts={}, mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25), short_side=short_side, gray=0.0, gpu=gpu,
    )  # fmt: skip
    return dataclasses.replace(facts, **changes)


def rates_of(facts, fastest):
    """Rates that fall with the cost of a rung's patches and blocks; teachers are as fast as students."""
    costs = [(r.img_size / r.patch) ** 2 * r.depth * SIZES[r.width][0] ** 2 for r in facts.rungs]
    rates = {rung: fastest * costs[0] / cost for rung, cost in zip(facts.rungs, costs, strict=True)}
    return Rates(rates, {rung: 1.5 * rate for rung, rate in rates.items()}, 30.0)


COUNTS = st.one_of(
    st.lists(st.integers(1, 1000), min_size=2, max_size=60),
    st.builds(lambda k, n: [max(1, n // (1 + i)) for i in range(k)], st.integers(2, 8000), st.integers(1, 3000)),
)
FACTS = st.builds(
    facts_of, COUNTS, short_side=st.integers(1, 4000), num_val=st.integers(0, 20_000), gpu=st.booleans(),
    gray=st.floats(0, 1), mean=st.tuples(*[st.floats(0, 1)] * 3), std=st.tuples(*[st.floats(0.001, 0.5)] * 3),
)  # fmt: skip


@given(FACTS, st.floats(0.02, 200), st.sampled_from([50.0, CPU_RATE, 4000.0, GPU_RATE]))
def test_recipes_are_valid_fit_the_hours_and_agree(facts, hours, fastest):
    rates = rates_of(facts, fastest)
    try:
        choice = choose(facts, rates, hours, "mine")
    except UserError as error:
        least = float(str(error).partition("at least ")[2].partition(" ")[0])
        assert least > hours
        choice = choose(facts, rates, 1.02 * least + 0.01, "mine")  # what the message offers works
        hours = 1.02 * least + 0.01
    student, teacher = choice.configs
    assert sum(choice.seconds.values()) <= hours * 3600
    assert teacher.is_teachers and not student.is_teachers
    assert (student.name, teacher.name) == ("mine", "mine-teacher")
    for name, value in config.flatten(student).items():
        if name.startswith(("data.", "augment.mean", "augment.std", "augment.flip_prob", "evaluate.crop_pct")):
            assert value == config.flatten(teacher)[name], name
    t = teacher.teacher_training
    assert (student.teacher.arch, student.teacher.img_size) == (t.arch, t.img_size)
    assert student.student.name.endswith(f"_{t.img_size}")
    # what the trainings check before their first step
    n = facts.num_images
    assert student.train.virtual_ranks, "the number of GPUs must not change the recipe"
    assert (student.train.accumulate if facts.gpu else student.train.virtual_ranks) == 1
    plan = plan_of(student, n)
    teacher_plan = teacher_plan_of(teacher, n)
    # the times are those of the epochs that will be trained
    chosen, passes = choice.rung, 2 if t.sam == "sam" else 1
    evaluations = math.ceil(student.train.epochs / student.evaluate.every)
    seconds = (student.train.epochs * plan.images_per_epoch + evaluations * facts.num_val) / rates.student[chosen]
    evaluations = math.ceil(t.epochs / teacher.evaluate.every)
    trained = sum(len(sample_B) for sample_B, _ in teacher_plan.batches(0)) * t.epochs * passes
    assert seconds <= choice.seconds["student"] * 1.0001
    assert (trained + evaluations * facts.num_val) / rates.teacher[chosen] <= choice.seconds["teacher"] * 1.0001


@given(FACTS, st.floats(0.05, 50), st.floats(1.01, 20), st.sampled_from([CPU_RATE, GPU_RATE]))
def test_more_hours_never_give_less(facts, hours, factor, fastest):
    rates = rates_of(facts, fastest)
    try:
        short = choose(facts, rates, hours, "a")
    except UserError:
        return
    long = choose(facts, rates, hours * factor, "a")
    order = facts.rungs
    assert order.index(long.rung) >= order.index(short.rung)
    short_teacher, long_teacher = short.configs[1].teacher_training, long.configs[1].teacher_training
    if long.rung == short.rung:
        assert long.images_seen >= short.images_seen
        short_passes, long_passes = (t.epochs * (2 if t.sam == "sam" else 1) for t in (short_teacher, long_teacher))
        assert long_passes >= short_passes - 1
        strength = [c.student["augment.crop_scale"][0][0] for c in (short, long)]
        assert strength[1] <= strength[0]
        assert long.student["mixup.prob"][0] >= short.student["mixup.prob"][0]


@given(FACTS, st.floats(0.05, 50), st.floats(1.01, 20))
def test_a_faster_machine_never_gives_less(facts, hours, factor):
    try:
        slow = choose(facts, rates_of(facts, CPU_RATE), hours, "a")
    except UserError:
        return
    fast = choose(facts, rates_of(facts, CPU_RATE * factor), hours, "a")
    assert facts.rungs.index(fast.rung) >= facts.rungs.index(slow.rung)


@given(FACTS, st.integers(2, 512))
@example(facts_of([20_000] * 3), 512)
@example(facts_of([20_000] * 3, gpu=True), 512)
@example(facts_of([5_000] * 3, short_side=4000, gpu=True), 64)
def test_candidates_fit_the_sample_that_they_are_measured_on(facts, sample):
    sample = min(sample, facts.num_images)
    for rung in facts.rungs:
        student, teacher = candidate(facts, rung, sample)
        assert plan_of(student, sample).micro_steps and teacher_plan_of(teacher, sample).steps


@given(st.lists(st.integers(1, 6), min_size=2, max_size=40), st.booleans())
def test_held_out_images_are_of_most_classes(counts, has_val):
    images = LongTailSet([""] * sum(counts), np.repeat(np.arange(len(counts)), counts), counts)
    shares = holdout_shares(counts, has_val, has_test=False)
    covered = dict(zip(("train", "val", "test"), hold_out(images, **shares), strict=True))
    assert all(covered.pop("train").counts)
    for split in shares:  # classes of three images have one for each split
        assert np.count_nonzero(covered[split].counts) >= 2 / 3 * sum(count >= 3 for count in counts)


LONG_TAIL = [200, 118, 69, 41, 24, 14, 8, 5]


def test_minutes_on_two_cores_give_a_small_student_and_mild_augmentation():
    facts = facts_of(LONG_TAIL)
    choice = choose(facts, rates_of(facts, CPU_RATE), 0.15, "photos")
    student, teacher = choice.configs
    assert student.student.name.startswith("deit_tiny") and student.student.depth == 3
    assert student.augment.rand_ops == 0 and student.mixup.prob == 0 and student.augment.repeats == 1
    assert student.loss.drw_epoch == student.train.epochs // 2
    decay, why = choice.student["optim.ema_decay"]
    assert why.startswith(f"averages about {1 / (1 - decay):,.0f} of ")
    assert teacher.teacher_training.sam == "none" and not student.train.compile
    assert any("may be better than the student" in remark for remark in choice.remarks)


def test_days_on_a_gpu_give_the_papers_student_and_augmentation():
    facts = facts_of([max(5, 1280 - i) for i in range(1000)], gpu=True)
    choice = choose(facts, rates_of(facts, 40 * GPU_RATE), 100, "large")
    student, teacher = choice.configs
    assert student.student.name == "deit_base_distilled_patch16_224" and teacher.teacher_training.arch == "resnet50"
    assert (student.augment.repeats, student.mixup.prob, student.augment.crop_scale[0]) == (3, 1.0, 0.08)
    assert (student.train.batch_size, student.train.virtual_ranks, student.train.accumulate) == (128, 8, 1)
    assert teacher.teacher_training.sam == "sam" and student.train.compile


def test_small_images_are_enlarged_no_further_than_32_pixels_and_the_reason_says_so():
    facts = facts_of(LONG_TAIL, short_side=8)
    choice = choose(facts, rates_of(facts, GPU_RATE), 10, "digits")
    assert choice.rung.img_size == 32
    assert "the images are enlarged (median short side 8 px)" in choice.student["student.name"][1]
    assert all(r.img_size <= 1.5 * 100 for r in facts_of(LONG_TAIL, short_side=100).rungs)


def test_larger_images_never_get_a_smaller_student():
    ladders = {side: facts_of(LONG_TAIL, short_side=side).rungs for side in range(1, 400)}
    assert {(rungs[-1].width, rungs[-1].depth) for rungs in ladders.values()} == {("base", 12)}
    sides = [rungs[-1].img_size for rungs in ladders.values()]
    assert sides == sorted(sides) and sorted(set(sides)) == [32, 64, 128, 160, 224]
    for side in (42, 43, 86, 107, 150):
        facts = facts_of([500] * 200, short_side=side, gpu=True)
        rates = rates_of(facts, GPU_RATE)
        assert list(rates.student.values()) == sorted(rates.student.values(), reverse=True)
        assert choose(facts, rates, 1000, "a").rung == facts.rungs[-1]
        for rung in facts.rungs:
            image_BCHW = torch.zeros(1, 3, rung.img_size, rung.img_size)
            for network in (create_student(rung.student, 5, depth=1), create_teacher(rung.teacher, 5)):
                network.eval()(image_BCHW)


def test_equal_classes_are_not_reweighted_and_gray_images_not_mirrored():
    facts = facts_of([50, 60, 55], gray=1.0)
    student, teacher = choose(facts, rates_of(facts, CPU_RATE), 0.2, "a").configs
    assert student.loss.drw_epoch == teacher.teacher_training.drw_epoch == -1
    assert student.augment.flip_prob == teacher.augment.flip_prob == 0.0


def test_given_weights_keep_their_architecture():
    given_weights = Rung(224, 16, "small", 12, "", 0)
    facts = facts_of(LONG_TAIL, init="/weights.safetensors", architecture=given_weights)
    assert {(r.patch, r.width, r.depth) for r in facts.rungs} == {(16, "small", 12)}
    assert [r.img_size for r in facts.rungs] == [64, 128, 224]
    choice = choose(facts, rates_of(facts, 100.0), 0.3, "a")
    student, teacher = choice.configs
    assert (student.student.init, student.student.depth) == ("/weights.safetensors", 12)
    assert choice.rung.width == "small" and teacher.teacher_training.arch == choice.rung.teacher
    fresh = choose(dataclasses.replace(facts, init=""), rates_of(facts, 100.0), 0.3, "a")
    assert choice.student["optim.lr"][0] < fresh.student["optim.lr"][0]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([200, 5], {"val": 0.1, "test": 0.2}),
        ([4, 4], {"val": 0.2, "test": 0.2}),
        ([5] + [4] * 39, {"val": 0.2, "test": 0.2}),
        ([5] + [4] * 2999, {"val": 0.2, "test": 0.2}),
        ([500, 4, 4, 4, 4], {"val": 0.2, "test": 0.2}),
        ([5, 5, 4], {"val": 0.1, "test": 0.2}),
        ([200] * 7 + [2] * 3, {"val": 0.1, "test": 0.2}),
        ([200, 5, 1, 1, 1, 0], {"val": 0.1, "test": 0.2}),
        ([3] + [2] * 39, {"val": 0.3, "test": 0.2}),
        ([2, 2], {"val": 0.3}),
        ([1, 1], {}),
    ],
)
def test_shares_set_aside_leave_each_class_an_image(counts, expected):
    assert holdout_shares(counts, has_val=False, has_test=False) == expected
    assert holdout_shares(counts, has_val=True, has_test=True) == {}
    assert "val" not in holdout_shares(counts, has_val=True, has_test=False)


def test_hours_without_hours_grow_with_the_set():
    assert default_hours(100) == default_hours(500) == plan_rules.LEAST_HOURS
    assert 0.9 < default_hours(10_000) < 1.5
    assert default_hours(10**7) == plan_rules.MOST_HOURS
