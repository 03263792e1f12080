"""The spine: one DeiT-LT student from data to report, one line a stage, in the order an image meets them."""

# B images in a micro-batch, K classes

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.core.batches import train_batches
from fastdeitlt.core.engine import Engine, build_engine
from fastdeitlt.core.joint import JointForward
from fastdeitlt.core.measure.auto import measure_kernels
from fastdeitlt.core.optim import Ema, learning_rate
from fastdeitlt.data.check.scan import check_files
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.data.sampler import MicroBatch, Plan
from fastdeitlt.data.sets.counts import drw_weights
from fastdeitlt.data.sets.opening import open_training_sets
from fastdeitlt.models import create_student
from fastdeitlt.reporting import analysis, report
from fastdeitlt.run.folder import Run
from fastdeitlt.run.meter import Meter
from fastdeitlt.run.preemption import StopRequest
from fastdeitlt.run.selection import Selector
from fastdeitlt.run.state import State
from fastdeitlt.run.student_scorer import StudentScorer
from fastdeitlt.run.watch import memory_hint
from fastdeitlt.teachers.check import check_decisions
from fastdeitlt.teachers.opening import settle_order, teacher_of

log = logging.getLogger("fastdeitlt")


def train(cfg: Config, resume: str = "auto") -> Path:
    """Train one student, choose its weights, test them once, write the report.

    Args:
        cfg: the run.
        resume: auto, never, must, or the path of a run folder (see ``Run``).

    Returns:
        The run folder.

    Raises:
        UserError: anything wrong with configuration, data, teacher or saved state, before the first step; later a
            loss that is not finite, memory that is full, a rank that is lost, a signal (the subclasses, errors.py).
    """
    with ExitStack() as stack:
        rank, world = stack.enter_context(distributed.group(cfg.train.device, cfg.train.timeout_s))
        run = stack.enter_context(Run(cfg, resume))
        stack.enter_context(memory_hint(run.cfg, run.folder))
        cfg, ranks = run.cfg, run.cfg.train.virtual_ranks
        if run.finished:
            log.info("%s is finished; '--resume never' trains again in a new folder", run.folder)
            report_once(run)
            return run.folder
        torch.compiler.reset()  # graphs of earlier runs in this process count against the compiler's limit
        device = distributed.device_of(cfg.train.device)
        sets = open_training_sets(cfg.data)  # 1 which images
        distributed.on_main(lambda: check_files(sets, cfg.data))
        images, num_classes = sets.train, sets.train.num_classes
        plan = Plan(len(images), cfg.train.batch_size, cfg.train.accumulate, cfg.augment.repeats, ranks, rank, world)
        log.log(logging.WARNING if plan.is_partial else logging.INFO, "%s", plan.describe_epoch())
        share = plan.virtual_ranks // world
        source = open_source(images, cfg.data, device, share, tell=True)  # 2 read, decode
        torch.manual_seed(cfg.train.seed)
        student = create_student(num_classes=num_classes, **cfg.student.model_dump()).to(device)  # 4 student
        size = student.img_size
        teacher = teacher_of(cfg, images, size, device)  # 5 teacher
        if teacher:
            settle_order(teacher, images, source, cfg, size, run.folder)
        measure_kernels(cfg, student, teacher, num_classes, device)
        run.note_environment()
        joint = JointForward(student, teacher, images.counts, cfg, device)  # 6 joint loss
        engine = build_engine(joint, cfg, plan)  # 7 backward, step
        ema = Ema(student, cfg.optim.ema_decay, engine.optimizer) if cfg.optim.ema_decay else None
        selector = Selector(cfg, run, sets, StudentScorer(cfg, sets, student, teacher, ema, device))
        state = State(run, selector, Student(engine, ema), plan.optimizer_steps)
        state.restore()
        if teacher and cfg.teacher.check and state.step == 0:
            distributed.on_main(lambda: check_decisions(teacher, images, source, cfg, size))
        stop = stack.enter_context(StopRequest())
        meter = Meter(cfg, run, plan, student, teacher, device, state.step)
        drw_weights_K = drw_weights(images.counts, cfg.loss.drw_beta).to(device)
        every_steps, every_epochs = cfg.train.save_every_steps, cfg.train.save_every_epochs

        for epoch in range(state.epoch, cfg.train.epochs):
            reweight = 0 <= cfg.loss.drw_epoch <= epoch
            mixing = cfg.mixup.on and not (reweight and cfg.mixup.off_in_drw)
            dist_weights_K = drw_weights_K if reweight else torch.ones_like(drw_weights_K)
            cls_weights_K = drw_weights_K if reweight and cfg.loss.reweight_cls else None
            steps = list(plan.steps(epoch, state.begun))
            micro_batches = chain.from_iterable(step.micro_batches for step in steps)
            batches = train_batches(micro_batches, source, images, cfg, mixing=mixing, size=size)  # 3 augment, mix
            for step in steps:
                for micro_batch in step.micro_batches:
                    batch = meter.wait(batches)
                    seed_drop_path(cfg.train.seed, micro_batch)
                    losses = engine.forward(batch, dist_weights_K, cls_weights_K)
                    engine.backward(losses.loss)
                    meter.add(losses, micro_batch)
                rate = learning_rate(step.clock, cfg, ranks)
                norm = engine.step(rate)
                if ema:
                    ema.update()
                state.step += 1
                meter.step(state.step, epoch, rate, norm)
                if every_steps and state.step % every_steps == 0:
                    state.save(meter)
                if number := stop.agreed():
                    state.save(meter, wait=True)
                    raise run.stopped(number, state.step)
            batches.close()
            last, before_drw = epoch + 1 == cfg.train.epochs, epoch + 1 == cfg.loss.drw_epoch
            evaluates = last or (epoch + 1) % cfg.evaluate.every == 0
            with meter.paused():
                if evaluates:
                    selector.evaluate(state.step, epoch, last)  # 9 evaluate
                state.epoch += 1
                if evaluates or before_drw or (every_epochs and (epoch + 1) % every_epochs == 0):
                    state.save(meter, wait=last, milestone="before-drw" if before_drw else "")  # 8 checkpoint
            if number := stop.agreed(at_once=True):
                state.save(meter, wait=True)
                raise run.stopped(number, state.step)
        stop.close()  # nothing is left to save
        source.close()
        selector.finish(state.step, epoch=cfg.train.epochs - 1)
        report_once(run)  # 10 report
    return run.folder


def report_once(run: Run) -> None:
    """Look into a tested run and write its report, unless there is one. Rank 0; the others do not wait."""
    if run.is_main and not (run.folder / "report.html").exists():
        analysis.look_into(run.folder, run.cfg.evaluate.analyze_images)
        log.info("report: %s", report.write_report(run.folder))


@dataclass(frozen=True)
class Student:
    """What is trained, as a checkpoint has it."""

    engine: Engine
    ema: Ema | None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """State dicts by name."""
        parts = {"model": self.engine.weights(), "optimizer": self.engine.optimizer_tensors()}
        return parts | ({"ema": self.ema.state} if self.ema else {})

    def load(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Put them back."""
        self.engine.load(read("model"), read("optimizer"))
        if self.ema:
            self.ema.load(read("ema"))


def seed_drop_path(seed: int, micro_batch: MicroBatch) -> None:
    """Seed drop path from the micro-batch's place alone, so that no generator state is saved or shared by ranks."""
    key = (seed, micro_batch.epoch, micro_batch.index, micro_batch.virtual_rank)
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
