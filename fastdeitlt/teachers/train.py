"""The teacher's spine: one flat CNN from data to model folder, one line a stage."""

import logging
from pathlib import Path

import torch
from torch import nn

from fastdeitlt import checkpoint, distributed
from fastdeitlt.config import Config
from fastdeitlt.data.longtail import drw_weights, open_sets
from fastdeitlt.data.resident import open_source
from fastdeitlt.errors import UserError
from fastdeitlt.optim import set_learning_rate
from fastdeitlt.run import Run
from fastdeitlt.teachers.meter import Meter
from fastdeitlt.teachers.sam import SAM
from fastdeitlt.teachers.schedule import learning_rate, radius
from fastdeitlt.teachers.selection import TeacherSelector
from fastdeitlt.teachers.step import Step, build_objective, build_optimizer
from fastdeitlt.teachers.views import Plan, teacher_batches, view_recipes

log = logging.getLogger("fastdeitlt")


def train_teacher(cfg: Config, resume: str = "auto") -> Path:
    """Train one flat CNN by ``cfg.teacher_training`` on ``cfg.data`` with ``cfg.augment``, choose and test its weights.

    Args:
        cfg: the run.
        resume: auto, never, must, or the path of a run folder (see ``Run``).

    Returns:
        The model folder: weights, architecture, normalisation, class counts, accuracy on clean training, validation
        and test images.

    Raises:
        UserError: anything wrong with configuration, data or saved state; before the first step.
        NonFiniteError: the loss is NaN or infinite.
    """
    t = cfg.teacher_training
    if distributed.start(cfg.train.device)[1] > 1:
        raise UserError("train-teacher: got several ranks, expected one; start it without torchrun")
    device = distributed.device_of(cfg.train.device)
    with Run(cfg, resume) as run:
        best = run.folder / "checkpoints" / "best"
        if run.finished:
            log.info("%s is finished; '--resume never' trains again in a new folder", run.folder)
            return best
        sets = open_sets(cfg.data)  # which images
        images = sets.train
        plan = Plan(len(images), t.batch_size, cfg.train.seed, drop_last=t.loss == "paco")
        if plan.steps == 0:
            raise UserError(
                f"teacher_training.batch_size: got {t.batch_size}, the set has {len(images)} images; lower it"
            )
        source = open_source(images, cfg.data, device, share=len(view_recipes(cfg)))  # read, decode
        torch.manual_seed(cfg.train.seed)
        objective = build_objective(t, images.counts, device)  # network, loss
        optimizer = build_optimizer(objective.network, t)  # SGD, SAM
        take_step = Step(objective, optimizer, cfg, device)
        selector = TeacherSelector(cfg, run, sets, source, objective.network, device)
        done = restore(run, objective.network, optimizer, selector)
        meter = Meter(cfg, run, plan, device, done)
        drw_weights_K = drw_weights(images.counts, t.drw_beta).to(device)

        for epoch in range(done // plan.steps, t.epochs):
            rate, rho = learning_rate(epoch, t), radius(epoch, t)
            set_learning_rate(optimizer, rate)
            if isinstance(optimizer, SAM):
                optimizer.set_rho(rho)
            weights_K = drw_weights_K if 0 <= t.drw_epoch <= epoch else torch.ones_like(drw_weights_K)
            batches = teacher_batches(cfg, source, images, plan, epoch, done % plan.steps)  # augment
            for index, (views, labels_B) in enumerate(meter.timed(batches), done % plan.steps):
                loss = take_step(views, labels_B, weights_K, plan.step_seed(epoch, index))  # forward, backward, step
                done += 1
                meter.step(loss, len(labels_B), done, epoch, rate, rho)
                if cfg.train.save_every_steps and done % cfg.train.save_every_steps == 0:
                    save(run, objective.network, optimizer, selector, meter, done)
            last = epoch + 1 == t.epochs
            with meter.paused():
                if last or (epoch + 1) % cfg.evaluate.every == 0:
                    selector.evaluate(done, epoch, last)  # evaluate
                if last or (cfg.train.save_every_epochs and (epoch + 1) % cfg.train.save_every_epochs == 0):
                    save(run, objective.network, optimizer, selector, meter, done)  # checkpoint
        selector.finish(done, epoch=t.epochs - 1)
        source.close()
    return best


def save(
    run: Run, network: nn.Module, optimizer: torch.optim.Optimizer, selector: TeacherSelector, meter: Meter, done: int
) -> None:
    """Checkpoint after ``done`` steps: weights (PaCo's key encoder and queue with them), momentum, the best so far.

    The meter reports first, which refuses weights that came from a loss that is not finite.
    """
    meter.report()
    parts = {"model": network.state_dict(), "optimizer": checkpoint.optimizer_tensors(network, optimizer)}
    run.checkpoints.save(done, parts, selector.manifest() | {"best": selector.best})


def restore(run: Run, network: nn.Module, optimizer: torch.optim.Optimizer, selector: TeacherSelector) -> int:
    """Continue from the run's newest whole checkpoint, if there is one; the steps already done."""
    found = run.checkpoints.newest()
    if found is None:
        run.rewind(0)
        return 0
    folder, manifest = found
    network.load_state_dict(checkpoint.load_tensors(folder))
    checkpoint.load_optimizer(network, optimizer, checkpoint.load_tensors(folder, "optimizer"))
    selector.best = manifest["best"]
    run.rewind(manifest["step"])
    log.info("resumed %s after step %d", run.folder, manifest["step"])
    return int(manifest["step"])
