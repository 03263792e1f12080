"""The teacher's spine: one flat CNN from data to model folder, one line a stage."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.core import optim
from fastdeitlt.data.check.scan import check_files
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.data.sets.counts import drw_weights
from fastdeitlt.data.sets.opening import open_training_sets
from fastdeitlt.data.teacher_plan import plan_of
from fastdeitlt.run.folder import Run
from fastdeitlt.run.preemption import StopRequest
from fastdeitlt.run.selection import Selector
from fastdeitlt.run.state import State
from fastdeitlt.run.teacher_meter import Meter
from fastdeitlt.run.teacher_scorer import TeacherScorer
from fastdeitlt.teachers.sam import SAM
from fastdeitlt.teachers.schedule import learning_rate, radius
from fastdeitlt.teachers.step import Step, build_objective, build_optimizer
from fastdeitlt.teachers.views import teacher_batches, view_recipes

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
        selector = Selector(cfg, run, sets, TeacherScorer(cfg, sets, source, objective.network, device))
        state = State(run, selector, Trained(objective.network, optimizer), plan.steps)
        state.restore()
        stop = stack.enter_context(StopRequest())
        meter = Meter(cfg, run, plan, device, state.step)
        drw_weights_K = drw_weights(images.counts, t.drw_beta).to(device)
        every_steps, every_epochs = cfg.train.save_every_steps, cfg.train.save_every_epochs

        for epoch in range(state.epoch, t.epochs):
            rate, rho = learning_rate(epoch, t), radius(epoch, t)
            optim.set_learning_rate(optimizer, rate)
            if isinstance(optimizer, SAM):
                optimizer.set_rho(rho)
            weights_K = drw_weights_K if 0 <= t.drw_epoch <= epoch else torch.ones_like(drw_weights_K)
            batches = teacher_batches(cfg, source, images, plan, epoch, state.begun)  # augment
            for index, batch in enumerate(meter.timed(batches), state.begun):
                loss = take_step(batch, weights_K, plan.step_seed(epoch, index))  # forward, backward, step
                state.step += 1
                meter.step(loss, len(batch.labels_B), state.step, epoch, rate, rho)
                if every_steps and state.step % every_steps == 0:
                    state.save(meter)
                if number := stop.agreed():
                    state.save(meter, wait=True)
                    raise run.stopped(number, state.step)
            last = epoch + 1 == t.epochs
            evaluates = last or (epoch + 1) % cfg.evaluate.every == 0
            with meter.paused():
                if evaluates:
                    selector.evaluate(state.step, epoch, last)  # evaluate
                state.epoch += 1
                if evaluates or (every_epochs and (epoch + 1) % every_epochs == 0):
                    state.save(meter, wait=last)  # checkpoint
            if number := stop.agreed(at_once=True):
                state.save(meter, wait=True)
                raise run.stopped(number, state.step)
        stop.close()  # nothing is left to save
        selector.finish(state.step, epoch=t.epochs - 1)
        source.close()
    return best


def _for_any_ranks(cfg: Config) -> Config:
    """The run without its number of ranks: a batch is that of all of them, so any number may continue it."""
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"virtual_ranks": 1})})


@dataclass(frozen=True)
class Trained:
    """What is trained, as a checkpoint has it: weights (PaCo's key encoder and queue with them) and momentum."""

    network: nn.Module
    optimizer: torch.optim.Optimizer

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """State dicts by name."""
        return {"model": self.network.state_dict(), "optimizer": optim.optimizer_tensors(self.network, self.optimizer)}

    def load(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Put them back."""
        self.network.load_state_dict(read("model"))
        optim.load_optimizer(self.network, self.optimizer, read("optimizer"))
