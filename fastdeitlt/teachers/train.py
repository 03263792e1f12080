"""The teacher's spine: one flat CNN from data to model folder, one line a stage."""

import logging
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from fastdeitlt import checkpoint, distributed, optim
from fastdeitlt.config import Config
from fastdeitlt.data.longtail import drw_weights, open_training_sets
from fastdeitlt.data.resident import open_source
from fastdeitlt.data.scan import check_files
from fastdeitlt.errors import UserError
from fastdeitlt.running.preemption import StopRequest
from fastdeitlt.running.run import Run
from fastdeitlt.teachers.meter import Meter
from fastdeitlt.teachers.sam import SAM
from fastdeitlt.teachers.schedule import learning_rate, radius
from fastdeitlt.teachers.selection import TeacherSelector
from fastdeitlt.teachers.step import Step, build_objective, build_optimizer
from fastdeitlt.teachers.views import plan_of, teacher_batches, view_recipes

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
    with ExitStack() as stack:
        rank, world = stack.enter_context(distributed.group(cfg.train.device, cfg.train.timeout_s))
        run = stack.enter_context(Run(_for_any_ranks(cfg), resume))
        cfg, t = run.cfg, run.cfg.teacher_training
        best = run.folder / "checkpoints" / "best"
        if run.finished:
            log.info("%s is finished; '--resume never' trains again in a new folder", run.folder)
            return best
        torch.compiler.reset()  # graphs of earlier runs in this process count against the compiler's limit
        device = distributed.device_of(cfg.train.device)
        sets = open_training_sets(cfg.data)  # which images
        distributed.on_main(lambda: check_files(sets, cfg.data))
        images = sets.train
        plan = plan_of(cfg, len(images), rank, world)
        if plan.last_batch:
            log.info(plan.last_batch)
        source = open_source(images, cfg.data, device, share=len(view_recipes(cfg)), tell=True)  # read, decode
        torch.manual_seed(cfg.train.seed)
        objective = build_objective(t, images.counts, device)  # network, loss
        optimizer = build_optimizer(objective.network, t)  # SGD, SAM
        take_step = Step(objective, optimizer, cfg, device)
        selector = TeacherSelector(cfg, run, sets, source, objective.network, device)
        done = restore(run, objective.network, optimizer, selector)
        stop = stack.enter_context(StopRequest())
        meter = Meter(cfg, run, plan, device, done)
        drw_weights_K = drw_weights(images.counts, t.drw_beta).to(device)

        for epoch in range(done // plan.steps, t.epochs):
            rate, rho = learning_rate(epoch, t), radius(epoch, t)
            optim.set_learning_rate(optimizer, rate)
            if isinstance(optimizer, SAM):
                optimizer.set_rho(rho)
            weights_K = drw_weights_K if 0 <= t.drw_epoch <= epoch else torch.ones_like(drw_weights_K)
            batches = teacher_batches(cfg, source, images, plan, epoch, done % plan.steps)  # augment
            for index, batch in enumerate(meter.timed(batches), done % plan.steps):
                loss = take_step(batch, weights_K, plan.step_seed(epoch, index))  # forward, backward, step
                done += 1
                meter.step(loss, len(batch.labels_B), done, epoch, rate, rho)
                if cfg.train.save_every_steps and done % cfg.train.save_every_steps == 0:
                    save(run, objective.network, optimizer, selector, meter, done)
                if number := stop.agreed():
                    save(run, objective.network, optimizer, selector, meter, done, wait=True)
                    raise run.stopped(number, done)
            last = epoch + 1 == t.epochs
            with meter.paused():
                if last or (epoch + 1) % cfg.evaluate.every == 0:
                    selector.evaluate(done, epoch, last)  # evaluate
                if last or (cfg.train.save_every_epochs and (epoch + 1) % cfg.train.save_every_epochs == 0):
                    save(run, objective.network, optimizer, selector, meter, done)  # checkpoint
            if number := stop.agreed(at_once=True):
                save(run, objective.network, optimizer, selector, meter, done, wait=True)
                raise run.stopped(number, done)
        stop.close()  # nothing is left to save
        selector.finish(done, epoch=t.epochs - 1)
        source.close()
    return best


def _for_any_ranks(cfg: Config) -> Config:
    """The run without its number of ranks: a batch is that of all of them, so any number may continue it."""
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"virtual_ranks": 1})})


def save(
    run: Run,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    selector: TeacherSelector,
    meter: Meter,
    done: int,
    wait: bool = False,
) -> None:
    """Checkpoint after ``done`` steps: weights (PaCo's key encoder and queue with them), momentum, the best so far.

    The meter reports first, which refuses weights that came from a loss that is not finite.
    """
    meter.report()
    parts = {"model": network.state_dict(), "optimizer": optim.optimizer_tensors(network, optimizer)}
    manifest = selector.manifest() | {"best": selector.best}
    distributed.on_main(lambda: run.checkpoints.save(done, parts, manifest, wait=wait))


def restore(run: Run, network: nn.Module, optimizer: torch.optim.Optimizer, selector: TeacherSelector) -> int:
    """Continue from the run's newest whole checkpoint, if there is one; the steps already done."""
    folder, manifest = distributed.on_main(lambda: run.checkpoints.newest(run.must)) or (None, {"step": 0})
    done: int = manifest["step"]
    distributed.on_main(lambda: run.count_start(done))
    run.rewind(done)
    if folder is None:
        return 0
    if manifest.get("data_sha256", selector.data_sha256) != selector.data_sha256:
        raise UserError(
            f"run folder {run.folder}: images or labels of the training set changed since the checkpoint; bring back "
            "the old files, or use --resume never for a new folder"
        )
    network.load_state_dict(checkpoint.load_tensors(folder))
    optim.load_optimizer(network, optimizer, checkpoint.load_tensors(folder, "optimizer"))
    selector.best = manifest["best"]
    log.info("resumed %s after step %d", run.folder, done)
    return done
