"""Training of a DeiT-LT student, from data to report, one line per stage."""

import logging
from contextlib import ExitStack
from pathlib import Path

import torch

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.core.assemble import Parts, assemble, open_data
from fastdeitlt.core.optim import learning_rate
from fastdeitlt.reporting import analysis, report
from fastdeitlt.reporting.recommended import recommended_lines
from fastdeitlt.run.folder import Run
from fastdeitlt.run.loop import EpochLoop
from fastdeitlt.run.meter import Loop, Meter
from fastdeitlt.run.preemption import StopRequest
from fastdeitlt.run.run_files import read_run
from fastdeitlt.run.selection import Selector
from fastdeitlt.run.state import State
from fastdeitlt.run.student_scorer import StudentScorer
from fastdeitlt.run.watch import memory_hint
from fastdeitlt.store.checkpoint import step_folders
from fastdeitlt.teachers.check import check_decisions
from fastdeitlt.teachers.opening import settled_teacher

log = logging.getLogger("fastdeitlt")


def train(cfg: Config, resume: str = "auto") -> Path:
    """Train a student, select its best weights, test them once, and write the report.

    Args:
        cfg: the run.
        resume: auto, never, must, or the path of a run folder (see ``Run``).

    Returns:
        The run folder.

    Raises:
        UserError: an invalid configuration, data set, teacher or saved state, before the first step; later its
            subclasses in errors.py: non-finite loss, out of memory, lost rank, signal.
    """
    with ExitStack() as stack:
        where, limits = cfg.train.device, (cfg.train.timeout_s, cfg.train.main_timeout_s)
        rank, world = stack.enter_context(distributed.group(where, *limits))
        run = stack.enter_context(Run(cfg, resume))
        cfg = run.cfg
        stack.enter_context(memory_hint(cfg, run.folder))
        if run.finished:
            log.info("%s is finished; use '--resume never' to train again in a new folder", run.folder)
            report_once(run)
            return run.folder
        torch.compiler.reset()  # graphs of earlier runs in this process count towards the compiler's limit
        device = distributed.device_of(cfg.train.device)
        data = open_data(cfg, device, rank, world)  # data sets, pixel source
        parts = assemble(  # student, teacher, joint loss, optimizer
            cfg,
            data,
            device,
            lambda size: settled_teacher(cfg, data.images, data.source, size, device, run.folder),
            init="" if step_folders(run.checkpoints.folder) else cfg.student.init,
        )
        run.note_environment()
        selector = Selector(
            cfg, run, data.sets, StudentScorer(cfg, data.sets, parts.student, parts.teacher, parts.ema, device)
        )
        state = State(run, selector, parts, data.plan.optimizer_steps)
        state.restore()
        teacher, source = parts.teacher, data.source
        if teacher and cfg.teacher.check and state.step == 0:
            distributed.on_main(lambda: check_decisions(teacher, data.images, source, cfg, parts.size))
        stop = stack.enter_context(StopRequest())
        meter = Meter(run, loop_of(parts), device, state.step)
        loop = EpochLoop(run, state, selector, meter, stop, cfg.train.epochs)
        take_step = parts.step(meter.stage)

        for epoch in loop.epochs():
            phase = parts.phase(epoch)
            steps = list(data.plan.steps(epoch, state.begun))
            batches = parts.batches(steps, phase)  # augment, mix
            for step in steps:
                rate = learning_rate(step.clock, cfg, data.plan.virtual_ranks)
                result = take_step(batches, len(step.micro_batches), phase, rate)
                state.step += 1
                meter.step(
                    result.losses,
                    result.norm,
                    data.plan.batch_size * len(step.micro_batches) * world,
                    done=state.step,
                    epoch=epoch,
                    facts={"lr": rate},
                    micro_batches=step.micro_batches,
                )
                loop.end_step()
            batches.close()
            loop.end_epoch("before-drw" if epoch + 1 == cfg.loss.drw_epoch else "")  # checkpoint, evaluate
        source.close()
        loop.finish()
        report_once(run)
    return run.folder


def loop_of(parts: Parts) -> Loop:
    """Return the meter's description of a student's training."""
    cfg, plan = parts.cfg, parts.data.plan
    return Loop(
        steps=plan.optimizer_steps * cfg.train.epochs,
        epochs=cfg.train.epochs,
        losses={"loss": "", "cls_loss": "CLS", "dist_loss": "DIST"},
        section="optim",
        clip_norm=cfg.optim.clip_norm,
        log_every=cfg.train.log_every,
        skips=cfg.train.nonfinite_skips,
        flops=parts.flops,
        rank=plan.rank,
        world=plan.world,
    )


def report_once(run: Run) -> None:
    """Report a tested run, unless its report is done; log its recommendation."""
    if not run.is_main:
        return
    page, results = run.folder / "report.html", run.folder / "results.json"
    if not (page.exists() and page.stat().st_mtime >= results.stat().st_mtime):
        analysis.look_into(run.folder, run.cfg.evaluate.analyze_images)
        log.info("report: %s", report.write_report(run.folder))
    for line in recommended_lines(read_run(run.folder)):
        log.info("%s", line)
