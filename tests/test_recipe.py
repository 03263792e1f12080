"""The recipe's switches, end to end: what reaches the loss and the optimizer, step by step, in a real small training.

Expected values are worked out from the recipe here, not by the code that trains.
"""

import logging
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import tiny_run

from fastdeitlt import config
from fastdeitlt.core import joint
from fastdeitlt.core.engine.plain import PlainEngine
from fastdeitlt.core.optim import learning_rate
from fastdeitlt.data.sampler import RepeatedAugmentationSampler
from fastdeitlt.data.sets.counts import drw_weights
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.evaluation.evaluate import OneHead
from fastdeitlt.evaluation.metrics import Result
from fastdeitlt.models import load_teacher
from fastdeitlt.models.vit import DistilledViT
from fastdeitlt.reporting import report
from fastdeitlt.run.selection import Selector
from fastdeitlt.run.student_scorer import StudentScorer
from fastdeitlt.run.teacher_scorer import TeacherScorer
from fastdeitlt.store.checkpoint import load_tensors, read_manifest, save_model_folder
from fastdeitlt.teachers.step import Step
from fastdeitlt.train import train
from fastdeitlt.train_teacher import train_teacher

EPOCHS, DRW_EPOCH, BATCH, ACCUMULATE, RANKS = 5, 2, 4, 3, 2
OUTPUT_OF_CLASS = [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
CLASS_OF_OUTPUT = [7, 8, 9, 0, 1, 2, 3, 4, 5, 6]
"""The teacher's order of classes."""
SCORES = [50.0, 60.0, 60.0, 60.0, 55.0, 40.0]
"""What selection is told of the model's weights and their average, in turn; the first 60 is the best."""
RECIPES = {
    "cifar": {"mixup.off_in_drw": True, "loss.reweight_cls": False},
    "imagenet": {"mixup.off_in_drw": False, "loss.reweight_cls": True, "augment.repeats": 3},
    "plain": {"mixup.prob": 0.0, "loss.drw_epoch": -1},
}


@dataclass
class Recording:
    """What a run did, in order."""

    cfg: config.Config
    losses: list[SimpleNamespace] = field(default_factory=list)
    """Arguments of each call of the joint loss, and the state of the student then."""
    backward: int = 0
    steps: list[SimpleNamespace] = field(default_factory=list)
    """Learning rate, number of backward passes since the step before, and the weights after it."""
    evaluations: list[tuple[int, int, bool]] = field(default_factory=list)
    scored: list[SimpleNamespace] = field(default_factory=list)
    """Set, mode and weights of each pass over images that are scored."""
    log: list[str] = field(default_factory=list)
    folder: object = None


@pytest.fixture(scope="module", params=RECIPES)
def recorded(request, tmp_path_factory):
    """A whole run of one recipe."""
    folder = tmp_path_factory.mktemp(request.param)
    flat = config.flatten(tiny_run(folder))
    lines = (folder / "train.txt").read_text().splitlines()
    (folder / "train.txt").write_text("\n".join(lines[::2]))
    recipe = {
        "name": "recorded", "train.epochs": EPOCHS, "loss.drw_epoch": DRW_EPOCH, "train.batch_size": BATCH,
        "train.accumulate": ACCUMULATE, "train.virtual_ranks": RANKS, "train.save_every_steps": 0,
        "augment.recipe": "none", "augment.repeats": 1, "mixup.prob": 1.0, "mixup.cutmix_alpha": 0.0,
        "mixup.smoothing": 0.2, "loss.alpha": 0.3, "optim.warmup_epochs": 1,
        "teacher.path": str(_in_another_order(folder)),
    }  # fmt: skip
    run = Recording(config.build(flat | recipe | RECIPES[request.param]))
    log, handler = logging.getLogger("fastdeitlt"), logging.Handler()
    level = log.level
    log.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        _record(run, patch)
        patch.setattr(handler, "emit", lambda record: run.log.append(record.getMessage()))
        patch.setattr(log, "handlers", [handler])
        run.folder = train(run.cfg)
    log.setLevel(level)
    return run


def _in_another_order(folder):
    """The small run's teacher, with the order of its classes."""
    facts = {name: value for name, value in read_manifest(folder / "teacher").items() if name != "files"}
    facts["class_map"] = OUTPUT_OF_CLASS
    return save_model_folder(folder / "other-order", load_tensors(folder / "teacher"), facts)


def _record(run, patch):
    loss, forward, backward = joint.joint_loss, PlainEngine.forward, PlainEngine.backward
    step, evaluate = PlainEngine.step, Selector.evaluate
    logits, prefix = StudentScorer._logits, DistilledViT.forward_prefix
    now = SimpleNamespace(scored=None)

    def spied_forward(self, batch, *weights):
        now.batch, now.student, now.seed = batch, self.joint.student, torch.initial_seed()
        return forward(self, batch, *weights)

    def spied_loss(cls_logits, dist_logits, labels, teacher_logits, **options):
        weights = {name: value.clone() for name, value in now.student.state_dict().items()}
        run.losses.append(
            SimpleNamespace(
                **options, labels=labels, teacher_logits=teacher_logits, images=now.batch.images_BCHW, seed=now.seed,
                training=now.student.training, student=weights,
            )
        )  # fmt: skip
        found = loss(cls_logits, dist_logits, labels, teacher_logits, **options)
        run.losses[-1].cls_loss, run.losses[-1].dist_loss = found.cls_loss.item(), found.dist_loss.item()
        return found

    def spied_backward(self, value):
        run.backward += 1
        run.losses[-1].minimised = value.item()
        return backward(self, value)

    def spied_step(self, rate):
        norm = step(self, rate)
        weights = {name: value.clone() for name, value in self.weights().items()}
        run.steps.append(SimpleNamespace(rate=rate, backward=run.backward, weights=weights))
        run.backward = 0
        return norm

    def spied_evaluate(self, *place):
        run.evaluations.append(place)
        return evaluate(self, *place)

    def spied_logits(self, images, model, *preprocess):
        split = {id(self.sets.val): "val", id(self.sets.test): "test"}.get(id(images), "tail")
        weights = {name: value.clone() for name, value in self.student.state_dict().items()}
        split = "teacher" if isinstance(model, OneHead) else split
        run.scored.append(SimpleNamespace(split=split, weights=weights, modes=set()))
        now.scored = run.scored[-1]
        found = logits(self, images, model, *preprocess)
        now.scored = None
        return found

    def spied_prefix(self, images_BCHW, *rest):
        if now.scored:
            now.scored.modes.add(self.training)
        return prefix(self, images_BCHW, *rest)

    def scripted(self, by):
        number = sum(seen.split == "val" for seen in run.scored)
        return SCORES[min(number, len(SCORES)) - 1]

    patch.setattr(StudentScorer, "_logits", spied_logits)
    patch.setattr(DistilledViT, "forward_prefix", spied_prefix)
    patch.setattr(Result, "selection_accuracy", scripted)
    patch.setattr(joint, "joint_loss", spied_loss)
    patch.setattr(PlainEngine, "forward", spied_forward)
    patch.setattr(PlainEngine, "backward", spied_backward)
    patch.setattr(PlainEngine, "step", spied_step)
    patch.setattr(Selector, "evaluate", spied_evaluate)
    patch.setattr(report, "write_report", lambda folder: folder)  # half of so small a run's time


@pytest.fixture
def plan(recorded):
    """What the recipe's epochs consist of: (epoch, images) of each micro-batch, micro-steps of each step."""
    images = open_sets(recorded.cfg.data).train
    repeats, n = recorded.cfg.augment.repeats, len(images)
    micro_steps = n // RANKS // BATCH
    sizes = [len(part) for part in np.array_split(np.arange(micro_steps), range(ACCUMULATE, micro_steps, ACCUMULATE))]
    assert len(sizes) > 2 and sizes[-1] < ACCUMULATE, "the last step of an epoch is to be a shorter one"
    micro_batches = []
    for epoch in range(EPOCHS):
        orders = [list(RepeatedAugmentationSampler(n, RANKS, rank, repeats, seed_epoch=epoch)) for rank in range(RANKS)]
        for index in range(micro_steps):
            part = slice(index * BATCH, (index + 1) * BATCH)
            micro_batches += [(epoch, order[part]) for order in orders]
    return SimpleNamespace(images=images, micro_steps=micro_steps, sizes=sizes, micro_batches=micro_batches)


def _mixes(cfg, epoch):
    reweighted = 0 <= cfg.loss.drw_epoch <= epoch
    return cfg.mixup.prob > 0 and not (cfg.mixup.off_in_drw and reweighted)


def test_every_micro_batch_has_the_images_of_its_epoch(recorded, plan):
    assert len(recorded.losses) == len(plan.micro_batches) == EPOCHS * plan.micro_steps * RANKS
    for seen, (_, sample) in zip(recorded.losses, plan.micro_batches, strict=True):
        assert seen.labels.tolist() == plan.images.labels[sample].tolist()
    orders = {tuple(sample) for _, sample in plan.micro_batches}
    assert len(orders) == len(plan.micro_batches), "epochs and ranks differ"
    n, seen = len(plan.images), {index for epoch, sample in plan.micro_batches if epoch == 0 for index in sample}
    assert any(line.startswith(f"{len(seen)} of {n} images per epoch") for line in recorded.log)
    assert recorded.cfg.augment.repeats > 1 or n - len(seen) < BATCH * RANKS


def test_images_and_labels_are_mixed_and_smoothed_in_the_phase_for_it(recorded, plan):
    cfg, clean, shares = recorded.cfg, {}, []
    for seen, (epoch, sample) in zip(recorded.losses, plan.micro_batches, strict=True):
        if _mixes(cfg, epoch):
            assert torch.equal(seen.partner, seen.labels.flip(0))
            assert seen.smoothing == 0.2
            shares.append(float(seen.lam))
        else:
            assert seen.partner is None and seen.lam is None and seen.smoothing == 0.0
            clean |= dict(zip(sample, seen.images, strict=True))
    assert len(set(shares)) == len(shares) and all(0 < lam < 1 for lam in shares)
    assert bool(shares) == (cfg.mixup.prob > 0) and bool(clean) == (cfg.mixup.off_in_drw or not shares)
    checked = 0
    for seen, (epoch, sample) in zip(recorded.losses, plan.micro_batches, strict=True):
        if _mixes(cfg, epoch) and set(sample) <= clean.keys():
            alone = torch.stack([clean[index] for index in sample])
            torch.testing.assert_close(seen.images, seen.lam * alone + (1 - seen.lam) * alone.flip(0))
            checked += 1
    assert (checked > 0) == (bool(clean) and bool(shares))


def test_re_weighting_begins_with_its_epoch_in_the_losses_it_is_for(recorded, plan):
    cfg = recorded.cfg
    drw_weights_K = drw_weights(plan.images.counts, cfg.loss.drw_beta)
    assert not torch.allclose(drw_weights_K, torch.ones(10))
    for seen, (epoch, _) in zip(recorded.losses, plan.micro_batches, strict=True):
        reweighted = 0 <= cfg.loss.drw_epoch <= epoch
        assert torch.equal(seen.weights, drw_weights_K if reweighted else torch.ones(10))
        if reweighted and cfg.loss.reweight_cls:
            assert torch.equal(seen.cls_weights, drw_weights_K)
        else:
            assert seen.cls_weights is None
        assert (seen.distillation, seen.base) == ("hard", "ce")
        assert seen.minimised == pytest.approx(0.7 * seen.cls_loss + 0.3 * seen.dist_loss)
        assert abs(seen.cls_loss - seen.dist_loss) > 1e-4


def test_the_teacher_decides_on_the_students_images_in_its_own_class_order(recorded):
    teacher = load_teacher(recorded.cfg.teacher.path, "", 10)
    teacher.img_size = 28
    decided, own = set(), read_manifest(recorded.cfg.teacher.path)["preprocess"]
    mean, std, own_mean, own_std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (recorded.cfg.augment.mean, recorded.cfg.augment.std, own["mean"], own["std"])
    )
    for seen in recorded.losses:
        torch.testing.assert_close(
            seen.teacher_logits, teacher((seen.images * std + mean - own_mean) / own_std), atol=1e-4, rtol=1e-4
        )
        assert seen.class_map.tolist() == CLASS_OF_OUTPUT
        decided |= {*seen.teacher_logits.argmax(1).tolist()}
    assert len(decided) > 1


def test_an_optimizer_step_has_all_its_micro_batches_and_its_learning_rate(recorded, plan):
    firsts = np.cumsum([0, *plan.sizes[:-1]])
    clocks = [*firsts[:-1], plan.micro_steps - 1]  # the reference reads the clock of an epoch's last micro-step
    expected = [
        (size * RANKS, epoch + clock / plan.micro_steps)
        for epoch in range(EPOCHS)
        for size, clock in zip(plan.sizes, clocks, strict=True)
    ]
    assert [step.backward for step in recorded.steps] == [passes for passes, _ in expected]
    rates = [learning_rate(clock, recorded.cfg, RANKS) for _, clock in expected]
    assert [step.rate for step in recorded.steps] == pytest.approx(rates, rel=1e-12)
    assert len(set(rates)) == len(rates)


def test_the_student_that_trains_is_the_one_that_the_last_step_left(recorded, plan):
    """Evaluation puts the average in its place, and switches to evaluation mode, for its own time only."""
    assert all(seen.training for seen in recorded.losses)
    before = recorded.losses[0].student
    number = 0
    for step in recorded.steps:
        for seen in recorded.losses[number : number + step.backward]:
            assert all(torch.equal(value, before[name]) for name, value in seen.student.items())
        assert not torch.equal(step.weights["head.weight"], before["head.weight"])
        number, before = number + step.backward, step.weights
    last = load_tensors(recorded.folder / "checkpoints" / "last")
    assert all(torch.equal(value, before[name]) for name, value in last.items())


def _averages(recorded):
    """The moving average after each step."""
    average = {name: value.double() for name, value in recorded.losses[0].student.items()}
    for step in recorded.steps:
        average = {name: 0.9 * value + 0.1 * step.weights[name].double() for name, value in average.items()}
        yield average


def _assert_close(got, expected):
    for name, value in got.items():
        torch.testing.assert_close(value.double(), expected[name].double(), atol=1e-5, rtol=1e-4)


def test_the_average_follows_every_step(recorded):
    *_, average = _averages(recorded)
    _assert_close(load_tensors(recorded.folder / "checkpoints" / "last", "ema"), average)


def test_weights_and_average_are_scored_and_the_first_best_are_kept_and_tested(recorded):
    """In evaluation mode; equal scores later change nothing."""
    averages = list(_averages(recorded))
    candidates = [
        weights
        for step, *_ in recorded.evaluations
        for weights in (recorded.steps[step - 1].weights, averages[step - 1])
    ]
    during, after = recorded.scored[: 2 * len(candidates)], recorded.scored[2 * len(candidates) :]
    assert [seen.split for seen in during] == ["val", "tail"] * len(candidates)
    for seen, weights in zip(during, [weights for weights in candidates for _ in range(2)], strict=True):
        _assert_close(seen.weights, weights)
    chosen = SCORES.index(max(SCORES))
    kept = read_manifest(recorded.folder / "checkpoints" / "best")["selected"]
    assert (kept["step"], kept["weights"]) == (recorded.evaluations[chosen // 2][0], ("model", "ema")[chosen % 2])
    _assert_close(load_tensors(recorded.folder / "checkpoints" / "best"), candidates[chosen])
    expected = ["teacher", "teacher", "test", "val"]  # the teacher on test images, and on validation images
    assert sorted(seen.split for seen in after) == expected, "the test set is scored once"
    for seen in after:
        _assert_close(seen.weights, candidates[chosen])
    assert all(seen.modes <= {False} for seen in recorded.scored)
    assert any(seen.modes for seen in recorded.scored)


def test_drop_path_is_seeded_apart_for_every_micro_batch(recorded):
    assert recorded.cfg.student.drop_path > 0
    assert len({seen.seed for seen in recorded.losses}) == len(recorded.losses)


def test_evaluations_and_the_state_before_re_weighting_come_when_they_are_due(recorded, plan):
    steps = len(plan.sizes)
    assert recorded.cfg.evaluate.every == 2
    assert recorded.evaluations == [(steps * (epoch + 1), epoch, epoch == EPOCHS - 1) for epoch in (1, 3, 4)]
    before = recorded.folder / "checkpoints" / "before-drw"
    assert before.exists() == (recorded.cfg.loss.drw_epoch >= 0)
    if before.exists():
        assert read_manifest(before)["step"] == steps * DRW_EPOCH


TEACHER_BATCH = 16
TEACHER_SCORES = [60.0, 60.0, 40.0]
"""What selection is told at the three evaluations; of equal ones a teacher keeps the later."""


@pytest.fixture(scope="module", params=["sam", "none"])
def recorded_teacher(request, tmp_path_factory):
    """A whole run of a teacher: (cfg, what each optimizer step was given, evaluations, folder)."""
    folder = tmp_path_factory.mktemp("teacher")
    flat = {name: value for name, value in config.flatten(tiny_run(folder)).items() if name.startswith("data.")}
    lines = (folder / "train.txt").read_text().splitlines()
    (folder / "train.txt").write_text("\n".join(lines[::2]))
    recipe = {
        "name": "recorded", "runs_dir": str(folder), "train.precision": "fp32", "train.compile": False,
        "train.device": "cpu", "augment.recipe": "none", "evaluate.every": 2, "evaluate.crop_pct": 1.0,
    }  # fmt: skip
    training = {
        "arch": "resnet8", "img_size": 28, "loss": "ldam", "epochs": EPOCHS, "drw_epoch": DRW_EPOCH, "lr": 0.05,
        "warmup_epochs": 2, "lr_steps": [(3, 0.1), (4, 0.01)], "schedule": "step", "batch_size": TEACHER_BATCH,
        "accumulate": 2, "sam": request.param, "sam_rho": 0.2, "sam_schedule": "linear",
    }  # fmt: skip
    cfg = config.build(flat | recipe | {f"teacher_training.{name}": value for name, value in training.items()})
    run = SimpleNamespace(cfg=cfg, steps=[], evaluations=[], scored=[])
    take_step, evaluate, logits = Step.__call__, Selector.evaluate, TeacherScorer._logits

    def spied_step(self, batch, weights_K, seed):
        group, network = self.optimizer.param_groups[0], self.objective.network
        seen = SimpleNamespace(labels=batch.labels_B, weights=weights_K, seed=seed, rate=group["lr"])
        seen.rho, seen.training = group.get("rho"), network.training
        seen.parts = [part.labels_B for part in batch.parts]
        seen.images = [part.views[0] for part in batch.parts]
        seen.before = {name: value.clone() for name, value in network.state_dict().items()}
        loss = take_step(self, batch, weights_K, seed)
        seen.after = {name: value.clone() for name, value in network.state_dict().items()}
        run.steps.append(seen)
        return loss

    def spied_evaluate(self, *place):
        run.evaluations.append(place)
        return evaluate(self, *place)

    def spied_logits(self, split):
        weights = {key: value.clone() for key, value in self.network.state_dict().items()}
        run.scored.append((split, weights))
        return logits(self, split)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherScorer, "_logits", spied_logits)
        patch.setattr(Result, "selection_accuracy", lambda self, by: TEACHER_SCORES[min(len(run.scored), 3) - 1])
        patch.setattr(Step, "__call__", spied_step)
        patch.setattr(Selector, "evaluate", spied_evaluate)
        run.folder = train_teacher(cfg).parent
    run.images = open_sets(cfg.data).train
    run.per_epoch = -(-len(run.images) // TEACHER_BATCH)
    assert len(run.images) % TEACHER_BATCH > 2, "an epoch is to end with a smaller batch"
    return run


def _epochs(run):
    return [run.steps[epoch * run.per_epoch : (epoch + 1) * run.per_epoch] for epoch in range(EPOCHS)]


def test_a_teachers_epoch_has_every_image_once_in_an_order_of_its_own(recorded_teacher):
    run, orders = recorded_teacher, []
    assert len(run.steps) == EPOCHS * run.per_epoch
    for steps in _epochs(run):
        labels = torch.cat([step.labels for step in steps])
        assert labels.bincount(minlength=10).tolist() == run.images.counts
        assert all(torch.equal(torch.cat(step.parts), step.labels) and len(step.parts) == 2 for step in steps)
        orders.append(labels.tolist())
        images = torch.cat([image for step in steps for image in step.images])
        assert len({image.numpy().tobytes() for image in images}) == len(run.images)
    assert len({tuple(order) for order in orders}) == EPOCHS
    assert len({step.seed for step in run.steps}) == len(run.steps)


def test_a_teachers_weights_rate_and_radius_are_those_of_the_epoch(recorded_teacher):
    run, t = recorded_teacher, recorded_teacher.cfg.teacher_training
    drw_weights_K = drw_weights(run.images.counts, t.drw_beta)
    rates = [0.05 * factor for factor in (0.5, 1.0, 1.0, 0.1, 0.01)]
    for epoch, steps in enumerate(_epochs(run)):
        for step in steps:
            assert torch.equal(step.weights, drw_weights_K if epoch >= DRW_EPOCH else torch.ones(10))
            assert step.rate == pytest.approx(rates[epoch])
            assert step.rho == (pytest.approx(0.2 * (epoch + 1) / EPOCHS) if t.sam == "sam" else None)


def test_the_teacher_that_trains_is_the_one_that_the_last_step_left(recorded_teacher):
    run = recorded_teacher
    assert all(step.training for step in run.steps)
    for step, following in zip(run.steps, run.steps[1:], strict=False):
        assert all(torch.equal(value, following.before[name]) for name, value in step.after.items())
        assert any(not torch.equal(value, step.before[name]) for name, value in step.after.items())
    last = load_tensors(run.folder / "last")
    assert all(torch.equal(value, run.steps[-1].after[name]) for name, value in last.items())
    ends = [(run.per_epoch * (epoch + 1), epoch, epoch == EPOCHS - 1) for epoch in (1, 3, 4)]
    assert run.evaluations == ends


def test_a_teachers_latest_best_weights_are_kept_and_tested(recorded_teacher):
    run = recorded_teacher
    at = [run.steps[step - 1].after for step, *_ in run.evaluations]
    assert [name for name, _ in run.scored] == ["val", "val", "val", "train", "val", "test"]
    for (_, weights), expected in zip(run.scored, [*at, at[1], at[1], at[1]], strict=True):
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert read_manifest(run.folder / "best")["selected"]["step"] == run.evaluations[1][0]
    kept = load_tensors(run.folder / "best")
    assert all(torch.equal(value, at[1][name]) for name, value in kept.items())
