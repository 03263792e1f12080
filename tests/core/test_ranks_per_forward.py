"""Micro-batches of several virtual ranks in one forward pass: the same losses and the same steps."""

import numpy as np
import pytest
import torch

from fastdeitlt import config
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.engine import build_engine
from fastdeitlt.core.joint import JointForward
from fastdeitlt.core.step import TrainStep, join, phase_of
from fastdeitlt.data.sampler import MicroBatch, Plan
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.models.teacher import Teacher

CPU = torch.device("cpu")
CLASSES, SIZE, RANKS, ACCUMULATE = 7, 4, 4, 2


def build(ranks_per_forward: int, world: int = 1, teacher: bool = True, **changes: object):
    settings = {
        "student.name": "deit_tiny_distilled_patch16_32", "student.img_size": 32, "student.depth": 2,
        "student.drop_path": 0.5, "train.precision": "fp32", "train.compile": False, "train.batch_size": SIZE,
        "train.virtual_ranks": RANKS, "train.accumulate": ACCUMULATE, "train.device": "cpu", "optim.eps": 1e-4,
        "train.ranks_per_forward": ranks_per_forward,
    }  # fmt: skip
    cfg = config.build(settings | {name.replace("__", "."): value for name, value in changes.items()})
    torch.manual_seed(0)
    student = create_student(num_classes=CLASSES, **cfg.student.architecture).train()
    network = Teacher(create_teacher("resnet8", CLASSES), CLASSES) if teacher else None
    joint = JointForward(student, network, [9, 8, 7, 6, 5, 4, 3], cfg, CPU)
    engine = build_engine(joint, cfg, Plan(200, SIZE, ACCUMULATE, 1, RANKS, 0, world))
    return cfg, student, TrainStep(engine, None, cfg.train, joint.student)


def batches(mixing: bool = True):
    for index in range(ACCUMULATE):
        for rank in range(RANKS):
            generator = torch.Generator().manual_seed(10 * index + rank)
            labels = torch.randint(CLASSES, (SIZE,), generator=generator)
            images = torch.randn(SIZE, 3, 32, 32, generator=generator)
            mixed = (labels.flip(0), torch.tensor(0.1 + 0.2 * rank)) if mixing else (None, None)
            yield Batch(images, labels, *mixed, MicroBatch(0, index, rank, np.arange(SIZE), np.zeros(SIZE, int)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixing": False},
        {"student__drop_path_law": "count"},
        {"loss__drw_epoch": 0, "loss__reweight_cls": True},
        {"loss__distillation": "soft"},
        {"teacher": False},
        {"train__engine": "deepspeed", "train__zero_stage": 2},
    ],
    ids=lambda changes: " ".join(changes) or "as it is",
)
def test_losses_norm_and_weights_are_those_of_one_rank_at_a_time(changes):
    mixing = changes.pop("mixing", True)
    runs = []
    for ranks in (1, 2, 4):
        cfg, student, step = build(ranks, **changes)
        phase = phase_of(cfg, torch.linspace(0.5, 1.5, CLASSES), 0)
        taken = step(batches(mixing), RANKS * ACCUMULATE, phase, 1e-3)
        runs.append(([torch.stack(losses) for losses in taken.losses], taken.norm, [*student.parameters()]))
    losses, norm, weights = runs[0]
    assert len(losses) == RANKS * ACCUMULATE and len({round(float(loss[0]), 4) for loss in losses}) > 1
    for other_losses, other_norm, other_weights in runs[1:]:
        torch.testing.assert_close(other_losses, losses, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other_norm, norm, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other_weights, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("law", ["bernoulli", "count"])
def test_each_rank_keeps_its_own_drop_path(law):
    _, student, step = build(4, student__drop_path_law=law)
    joined = join([*batches()][:RANKS], student, step.cfg.seed)
    last = joined.drop_paths[-1][0]
    assert (len(last.scale_B11) == RANKS * SIZE and last.scale_B11.min() < last.scale_B11.max()) or law == "count"
    if law == "count":
        assert [int(((last.samples_S // SIZE) == rank).sum()) for rank in range(RANKS)] == [SIZE // 2] * RANKS
    again = join([*batches()][:RANKS], student, step.cfg.seed).drop_paths[-1][0]
    assert torch.equal(last.scale_B11, again.scale_B11)


def test_several_ranks_are_one_graph():
    _, student, step = build(2)
    joint, batch = step.engine.joint, join([*batches()][:2], student, 0)
    compiled = torch.compile(joint, backend="eager", fullgraph=True)
    ones_K = torch.ones(CLASSES)
    inputs = (
        batch.images_BCHW,
        batch.labels_B,
        batch.partner_B,
        batch.lam,
        ones_K,
        None,
        batch.ranks,
        batch.drop_paths,
    )
    for got, expected in zip(compiled(*inputs), joint(*inputs), strict=True):
        assert got.shape == (2,)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("ranks", "changes", "words"),
    [
        (3, {}, "expected a divisor of 4, the virtual ranks of each process"),
        (2, {"loss__normalise": "global"}, "with loss.normalise=global, expected 1"),
        (0, {}, "train.ranks_per_forward: got 0"),
    ],
)
def test_what_cannot_be_joined_is_refused(ranks, changes, words):
    with pytest.raises(UserError, match=words):
        build(ranks, **changes)
