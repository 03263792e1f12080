"""Training of a flat CNN teacher, from data to model folder, one line per stage."""

import logging
from contextlib import ExitStack
from pathlib import Path

import torch

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.core import optim
from fastdeitlt.data.check.scan import check_files
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.data.sets.counts import drw_weights
from fastdeitlt.data.sets.opening import open_training_sets
from fastdeitlt.data.teacher_plan import TeacherPlan, teacher_plan_of
from fastdeitlt.run.folder import Run
from fastdeitlt.run.loop import EpochLoop
from fastdeitlt.run.meter import Loop, Meter
from fastdeitlt.run.preemption import StopRequest
from fastdeitlt.run.selection import Selector
from fastdeitlt.run.state import State
from fastdeitlt.run.teacher_scorer import TeacherScorer
from fastdeitlt.run.watch import memory_hint
from fastdeitlt.teachers.sam import SAM
from fastdeitlt.teachers.schedule import learning_rate, radius
from fastdeitlt.teachers.step import Step, build_objective, build_optimizer
from fastdeitlt.teachers.views import teacher_batches, view_recipes

log = logging.getLogger("fastdeitlt")


def train_teacher(cfg: Config, resume: str = "auto") -> Path:
    """Train a flat CNN teacher, select its best weights and test them.

    Args:
        cfg: the run.
        resume: auto, never, must, or the path of a run folder (see ``Run``).

    Returns:
        The model folder: weights, architecture, normalisation, class counts, accuracy on clean training, validation
        and test images.

    Raises:
        UserError: an invalid configuration, data set or saved state, before the first step.
        NonFiniteError: the loss is NaN or infinite.
        MemoryFullError: out of memory.
    """
    with ExitStack() as stack:
        where, limits = cfg.train.device, (cfg.train.timeout_s, cfg.train.main_timeout_s)
        rank, world = stack.enter_context(distributed.group(where, *limits))
        run = stack.enter_context(Run(for_any_ranks(cfg), resume))
        cfg, t = run.cfg, run.cfg.teacher_training
        stack.enter_context(memory_hint(cfg, run.folder, "teacher_training"))
        best = run.folder / "checkpoints" / "best"
        if run.finished:
            log.info("%s is finished; 'train-teacher --resume never' trains again in a new folder", run.folder)
            return best
        torch.compiler.reset()  # graphs of earlier runs in this process count towards the compiler's limit
        device = distributed.device_of(cfg.train.device)
        sets = open_training_sets(cfg.data)  # data sets
        distributed.on_main(lambda: check_files(sets, cfg.data))
        images = sets.train
        plan = teacher_plan_of(cfg, len(images), rank, world, images.labels)
        if plan.last_batch:
            log.info(plan.last_batch)
        source = open_source(images, cfg.data, device, window=len(view_recipes(cfg)), tell=True)  # read, decode
        torch.manual_seed(cfg.train.seed)
        objective = build_objective(t, images.counts, device)  # network, loss
        optimizer = build_optimizer(objective.network, t)  # SGD, SAM
        take_step = Step(objective, optimizer, cfg, device)
        selector = Selector(cfg, run, sets, TeacherScorer(cfg, sets, source, objective.network, device))
        state = State(run, selector, take_step, plan.steps)
        state.restore()
        stop = stack.enter_context(StopRequest())
        meter = Meter(run, loop_of(cfg, plan), device, state.step)
        loop = EpochLoop(run, state, selector, meter, stop, t.epochs)
        drw_weights_K = drw_weights(images.counts, t.drw_beta).to(device)

        for epoch in loop.epochs():
            rate, rho = learning_rate(epoch, t), radius(epoch, t)
            optim.set_learning_rate(optimizer, rate)
            if isinstance(optimizer, SAM):
                optimizer.set_rho(rho)
            weights_K = drw_weights_K if 0 <= t.drw_epoch <= epoch else torch.ones_like(drw_weights_K)
            batches = teacher_batches(cfg, source, images, plan, epoch, state.begun)  # augment
            for index in range(state.begun, plan.steps):
                with meter.stage("data"):
                    batch = next(batches)
                loss = take_step(batch, weights_K, plan.step_seed(epoch, index))  # forward, backward, step
                state.step += 1
                facts = {"lr": rate, "rho": rho}
                window = world * loss  # scaled so that the mean over ranks is the whole batch's loss
                meter.step([[window]], None, len(batch.labels_B), done=state.step, epoch=epoch, facts=facts)
                loop.end_step()
            batches.close()
            loop.end_epoch()  # checkpoint, evaluate
        loop.finish()
        source.close()
    return best


def for_any_ranks(cfg: Config) -> Config:
    """Clear the number of ranks: a batch spans all of them, so any number can resume."""
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"virtual_ranks": 1})})


def loop_of(cfg: Config, plan: TeacherPlan) -> Loop:
    """Return the meter's description of a teacher's training."""
    t = cfg.teacher_training
    return Loop(
        steps=plan.steps * t.epochs,
        epochs=t.epochs,
        losses={"loss": ""},
        section="teacher_training",
        clip_norm=t.clip_norm,
        log_every=cfg.train.log_every,
        rank=plan.rank,
        world=plan.world,
    )
