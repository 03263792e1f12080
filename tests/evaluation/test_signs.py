"""The three signs of failure: seen where they are, silent where they are not, in words that name the figures."""

import numpy as np
import pytest
import torch

from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.evaluation.metrics import score
from fastdeitlt.evaluation.signs import NUM_TAIL_IMAGES, Reading, check, tail_images

COUNTS = [500, 400, 300, 80, 70, 60, 50, 9, 8, 7]  # official split: 3 head, 4 mid, 3 tail
DRW = 10


def reading(epoch, head=90, cls_tail=30, dist_tail=60, avg_tail=50, seen=80, num_images=1000):
    """A Reading whose heads have these accuracies in % on the head and on the tail."""

    def logits(head_share, tail_share, labels_N):
        place_N = torch.arange(len(labels_N)) // 10 * 1000 // len(labels_N)
        share_N = torch.where(labels_N < 3, head_share, torch.where(labels_N > 6, tail_share, 50))
        return torch.nn.functional.one_hot(torch.where(place_N < share_N, labels_N, (labels_N + 1) % 10), 10).float()

    labels_N = torch.arange(num_images) % 10
    cls_NK, dist_NK = logits(head, cls_tail, labels_N), logits(head, dist_tail, labels_N)
    scores = score(cls_NK, dist_NK, labels_N, COUNTS)
    scores.heads["AVG"] = score(*(logits(head, avg_tail, labels_N),) * 2, labels_N, COUNTS).heads["AVG"]
    tail_N = labels_N[labels_N > 6]
    seen_NK = torch.nn.functional.one_hot(
        torch.where(torch.arange(len(tail_N)) < len(tail_N) * seen / 100, tail_N, 0), 10
    ).float()
    return Reading(epoch, scores, score(seen_NK, seen_NK, tail_N, COUNTS))


def seen(readings, **options):
    return {sign.name: sign.text for sign in check(readings, DRW, **options) if sign.seen}


def test_a_healthy_run_shows_none_and_says_so_with_figures():
    signs = check([reading(9, head=92), reading(10), reading(12, avg_tail=55)], DRW)
    assert [(sign.name, sign.seen) for sign in signs] == [
        ("tail expert", False),
        ("head", False),
        ("overfitting", False),
    ]
    assert signs[0].text == "DIST leads CLS on the tail: 60.0 to 30.0 %"
    assert "90.0 %, best before re-weighting: 92.0 %" in signs[1].text


@pytest.mark.parametrize("dist_tail", [30, 12])
def test_a_dist_head_that_is_no_better_on_the_tail(dist_tail):
    found = seen([reading(9), reading(10, dist_tail=dist_tail)])
    assert list(found) == ["tail expert"] and f"{dist_tail:.1f} to 30.0 %" in found["tail expert"]


def test_two_heads_that_are_right_on_the_whole_tail_are_no_sign():
    assert seen([reading(9), reading(10, cls_tail=100, dist_tail=100, avg_tail=100)]) == {}


def test_a_head_far_below_its_own_best_or_a_given_baseline():
    found = seen([reading(4, head=95), reading(9, head=93), reading(11, head=80)])
    assert list(found) == ["head"] and "lost 15.0 points" in found["head"] and "95.0 %" in found["head"]
    assert seen([reading(9), reading(10, head=85)]) == {}
    found = seen([reading(10, head=60)], baseline_head=71.5)
    assert "evaluate.baseline_head" in found["head"] and "11.5 points" in found["head"]
    assert [sign.name for sign in check([reading(10)], DRW)] == ["tail expert", "overfitting"]  # nothing to compare


def test_tail_classes_learned_by_heart():
    rising = [reading(9, avg_tail=40, seen=60), reading(10, avg_tail=60, seen=80), reading(12, avg_tail=45, seen=97)]
    found = seen(rising)
    assert list(found) == ["overfitting"]
    for figure in ("45.0 %", "97.0 %", "epoch 11: 60.0 and 80.0 %"):
        assert figure in found["overfitting"]
    assert seen(rising[:2]) == {}
    forgotten = [*rising[:2], reading(12, avg_tail=45, seen=70)]  # worse on both: not overfitting
    assert seen(forgotten) == {}


def test_a_fall_within_the_noise_of_few_images_is_no_sign():
    few = [reading(10, avg_tail=60, num_images=100), reading(12, avg_tail=50, seen=97, num_images=100)]
    assert seen(few) == {}


def test_the_tail_images_are_those_of_tail_classes_and_not_too_many():
    labels_N = np.repeat(np.arange(10), [3000] * 10)
    images = LongTailSet([f"{i}.png" for i in range(30_000)], labels_N, [3000] * 10)
    tail = tail_images(images, "fashion_mnist_lt")
    assert len(tail) == NUM_TAIL_IMAGES and set(tail.labels.tolist()) == {7, 8, 9}
    few = images.take(np.arange(0, 30_000, 500))
    assert len(tail_images(few, "fashion_mnist_lt")) == 18
