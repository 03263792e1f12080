"""The log's figures: speed without evaluation and checkpoints; what a loss that is not finite is answered with."""

from types import SimpleNamespace

import pytest
import torch

from fastdeitlt import config, train, train_teacher
from fastdeitlt.core.loss import JointLoss
from fastdeitlt.data.sampler import MicroBatch, Plan
from fastdeitlt.data.teacher_plan import TeacherPlan
from fastdeitlt.errors import NonFiniteError
from fastdeitlt.run import meter
from fastdeitlt.run.checkpoints import Checkpoints

CPU = torch.device("cpu")
STEPS, EPOCHS, BATCH = 3, 4, 8


class FakeRun:
    """Keeps the records of a run in memory."""

    def __init__(self, folder):
        self.folder, self.records = folder, []
        self.checkpoints = Checkpoints(folder)

    def start_progress(self, total, done):
        pass

    def show(self, step, text, where, facts):
        pass

    def record(self, kind, step, **facts):
        self.records.append(facts | {"step": step})


class Student:
    """Drives the student's meter."""

    def __init__(self, run, **settings):
        flat = {"train.epochs": EPOCHS, "train.batch_size": BATCH, "train.log_every": 2}
        cfg = config.build(flat | {f"optim.{name}": value for name, value in settings.items()})
        parts = SimpleNamespace(cfg=cfg, data=SimpleNamespace(plan=Plan(STEPS * BATCH, BATCH, 1, 1, 1)), flops=1e6)
        self.meter = meter.Meter(run, train.loop_of(parts), CPU, 0)

    def epoch(self, batches, first, loss, work):
        for done in range(first, first + STEPS):
            with self.meter.stage("data"):
                next(batches)
            with self.meter.stage("forward"):
                work()
            losses = JointLoss(*torch.full((3,), loss))
            micro_batch = MicroBatch(0, 0, 0, torch.arange(BATCH).numpy(), torch.zeros(BATCH).numpy())
            place = {"done": done, "epoch": 0, "facts": {"lr": 1e-3}}
            self.meter.step([losses], torch.tensor(loss), BATCH, **place, micro_batches=[micro_batch])


class Teacher:
    """Drives the teacher's meter."""

    def __init__(self, run, **settings):
        flat = {"teacher_training.epochs": EPOCHS, "teacher_training.batch_size": BATCH, "train.log_every": 2}
        plan = TeacherPlan(STEPS * BATCH, BATCH, 0, drop_last=False)
        cfg = config.build(flat | {f"teacher_training.{name}": value for name, value in settings.items()})
        self.meter = meter.Meter(run, train_teacher.loop_of(cfg, plan), CPU, 0)

    def epoch(self, batches, first, loss, work):
        for done in range(first, first + STEPS):
            with self.meter.stage("data"):
                next(batches)
            work()
            facts = {"lr": 1e-3, "rho": 0.05}
            self.meter.step([[torch.tensor(loss)]], None, BATCH, done=done, epoch=0, facts=facts)


BOTH = pytest.mark.parametrize("kind", [Student, Teacher])


@BOTH
def test_evaluation_and_checkpoints_do_not_count_as_time_of_the_loop(kind, tmp_path, monkeypatch):
    now = 1000.0

    def spend(seconds):
        nonlocal now
        now += seconds

    def batches():
        while True:
            spend(0.5)
            yield None

    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: now))
    run = FakeRun(tmp_path)
    driver = kind(run)
    for epoch in range(EPOCHS):
        driver.epoch(batches(), 1 + epoch * STEPS, 1.0, lambda: spend(1.5))
        with driver.meter.paused():
            spend(10)  # evaluation
            driver.meter.report()  # a checkpoint begins with a report
            spend(5)
    assert [record["step"] for record in run.records] == [2, 3, 4, 6, 8, 9, 10, 12]
    for record in run.records:
        assert record["images_per_s"] == pytest.approx(BATCH / 2)
        assert record["data_wait"] == pytest.approx(0.25)
        assert record["eta_s"] == pytest.approx(2.0 * (STEPS * EPOCHS - record["step"]))


@BOTH
@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1.0, 5.0])
def test_a_loss_that_is_not_finite_gets_advice_that_can_be_followed(kind, tmp_path, clip_norm):
    driver = kind(FakeRun(tmp_path), clip_norm=clip_norm)
    with pytest.raises(NonFiniteError) as caught:
        driver.epoch(iter([None] * STEPS), 1, float("nan"), lambda: None)
    text = str(caught.value)
    assert "no checkpoint was saved before" in text and "intact" not in text
    section = "optim" if kind is Student else "teacher_training"
    assert f"Lower {section}.lr" in text and "--resume never" in text
    assert (f"{section}.clip_norm=1" in text) == (clip_norm in (0.0, 5.0))


@BOTH
def test_a_loss_that_is_not_finite_names_the_sound_checkpoint(kind, tmp_path):
    run = FakeRun(tmp_path)
    driver = kind(run)
    run.checkpoints.save(2, {"model": {"w": torch.zeros(1)}}, {"best": None})  # in flight, perhaps
    with pytest.raises(NonFiniteError, match=r"checkpoint \S*step-00000002 is intact"):
        driver.epoch(iter([None] * STEPS), 1, float("nan"), lambda: None)
