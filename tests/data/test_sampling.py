"""How often an epoch shows each class: the laws of each sampler, and that draws depend on nothing but their key."""

import numpy as np
import pytest

from fastdeitlt import config
from fastdeitlt.data.sampler import Plan, plan_of
from fastdeitlt.data.sampling import Sampling
from fastdeitlt.data.teacher_plan import teacher_plan_of

COUNTS = [400, 160, 64, 25, 0, 10, 4]
EPOCHS = 10
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
N = len(LABELS)
KINDS = ["class_balanced", "sqrt", "progressive"]


def of_kind(kind, seed=0):
    return Sampling(kind, LABELS, EPOCHS, seed)


def shares_of(kind, epoch):
    """Kang et al. 2020, by hand."""
    counts = np.array(COUNTS, float)
    alike = np.where(counts > 0, 1 / 6, 0)
    match kind:
        case "class_balanced":
            return alike
        case "sqrt":
            return counts**0.5 / sum(n**0.5 for n in COUNTS)
        case "progressive":
            return counts / N * (1 - epoch / EPOCHS) + alike * epoch / EPOCHS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epoch", [0, 3, 9])
def test_a_class_is_shown_its_share_rounded_up_or_down_and_its_images_equally_often(kind, epoch):
    sample_N, before_N = of_kind(kind).draw(epoch)
    assert len(sample_N) == len(before_N) == N
    shown_K = np.bincount(LABELS[sample_N], minlength=len(COUNTS))
    assert (np.abs(shown_K - N * shares_of(kind, epoch)) < 1).all()
    for label, images in enumerate(COUNTS):
        times = np.bincount(sample_N, minlength=N)[label == LABELS]
        assert len(times) == images and (images == 0 or times.max() - times.min() <= 1)
    places = set(zip(sample_N.tolist(), before_N.tolist(), strict=True))
    assert len(places) == N and all(before == 0 or (sample, before - 1) in places for sample, before in places)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_without_bias_and_the_order_is_mixed(kind):
    shown_EK = np.array([np.bincount(LABELS[of_kind(kind, s).draw(4)[0]], minlength=7) for s in range(300)])
    assert np.abs(shown_EK.mean(0) - N * shares_of(kind, 4)).max() < 0.15  # of one draw, 0.5 at most
    label_N = LABELS[of_kind(kind).draw(4)[0]]
    halves = [np.bincount(half, minlength=7) for half in np.array_split(label_N, 2)]
    assert np.abs(halves[0] - halves[1]).max() < 6 * np.sqrt(N)


def test_every_image_of_a_class_has_the_same_chance():
    head = np.flatnonzero(LABELS == 0)
    times = sum(np.bincount(of_kind("class_balanced").draw(epoch)[0], minlength=N) for epoch in range(200))
    mean = 200 * N / 6 / 400
    assert np.abs(times[head] - mean).max() < 6 * np.sqrt(mean)


def cfg_with(kind, **more):
    return config.build({"data.sampling": kind, "train.epochs": EPOCHS, "train.batch_size": 8, "train.seed": 5} | more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeats", [1, 3])
def test_ranks_and_resumes_see_the_same_and_no_view_comes_twice(kind, repeats):
    cfg = cfg_with(kind, **{"augment.repeats": repeats, "train.virtual_ranks": 4})
    alone = plan_of(cfg, N, labels_N=LABELS)
    whole = [micro for step in alone.steps(3) for micro in step.micro_batches]
    ranks = [plan_of(cfg, N, rank, 2, labels_N=LABELS) for rank in range(2)]
    shared = [micro for plan in ranks for step in plan.steps(3) for micro in step.micro_batches]

    def by_place(micro):
        return micro.index, micro.virtual_rank

    for one, other in zip(sorted(whole, key=by_place), sorted(shared, key=by_place), strict=True):
        assert (one.sample_B == other.sample_B).all() and (one.copy_B == other.copy_B).all()
    resumed = [micro for step in alone.steps(3, start=2) for micro in step.micro_batches]
    assert all((a.sample_B == b.sample_B).all() for a, b in zip(whole[-len(resumed) :], resumed, strict=True))
    views = [v for m in whole for v in zip(m.sample_B.tolist(), m.copy_B.tolist(), strict=True)]
    assert len(set(views)) == len(views)
    assert {copy for _, copy in views} > set(range(repeats))


def test_instance_is_the_order_of_before():
    cfg = cfg_with("instance", **{"augment.repeats": 1})
    plan = plan_of(cfg, N, labels_N=LABELS)
    assert plan == Plan(N, 8, 1, 1, 1) and plan.sampling is None
    batches = next(teacher_plan_of(cfg, N, labels_N=LABELS).batches(0))
    assert not batches[1].any() and len(set(batches[0].tolist())) == len(batches[0])


def test_a_teacher_draws_by_its_own_epochs():
    cfg = cfg_with("progressive", **{"teacher_training.epochs": 20, "teacher_training.batch_size": 32})
    plan = teacher_plan_of(cfg, N, labels_N=LABELS)
    first, last = (np.concatenate([batch for batch, _ in plan.batches(epoch)]) for epoch in (0, 19))
    assert np.bincount(LABELS[first])[0] > 380 and np.bincount(LABELS[last])[0] < 150
    again = list(plan.batches(19, start=3))
    assert all((a[1] == b[1]).all() for a, b in zip(list(plan.batches(19))[3:], again, strict=True))
