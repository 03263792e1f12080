"""The spine: one DeiT-LT student from data to report, one line a stage, in the order an image meets them."""

# B images in a micro-batch, K classes

import logging
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from fastdeitlt import analysis, checkpoint, distributed
from fastdeitlt.config import Config
from fastdeitlt.data.batches import train_batches
from fastdeitlt.data.longtail import drw_weights, open_training_sets
from fastdeitlt.data.resident import open_source
from fastdeitlt.data.sampler import MicroBatch, Plan
from fastdeitlt.data.scan import check_files
from fastdeitlt.engine import Engine, build_engine
from fastdeitlt.evaluation.selection import Selector
from fastdeitlt.joint import JointForward
from fastdeitlt.models import create_student
from fastdeitlt.optim import Ema, learning_rate
from fastdeitlt.reporting import report
from fastdeitlt.running.meter import Meter
from fastdeitlt.running.preemption import StopRequest
from fastdeitlt.running.run import Run
from fastdeitlt.running.watch import memory_hint
from fastdeitlt.speed.auto import measure_kernels
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
        selector = Selector(cfg, run, sets, student, teacher, ema, device)
        done = restore(run, engine, ema, selector)
        if teacher and cfg.teacher.check and done == 0:
            distributed.on_main(lambda: check_decisions(teacher, images, source, cfg, size))
        stop = stack.enter_context(StopRequest())
        meter = Meter(cfg, run, plan, student, teacher, device, done)
        drw_weights_K = drw_weights(images.counts, cfg.loss.drw_beta).to(device)
        every_epochs = cfg.train.save_every_epochs

        for epoch in range(done // plan.optimizer_steps, cfg.train.epochs):
            reweight = 0 <= cfg.loss.drw_epoch <= epoch
            mixing = cfg.mixup.on and not (reweight and cfg.mixup.off_in_drw)
            dist_weights_K = drw_weights_K if reweight else torch.ones_like(drw_weights_K)
            cls_weights_K = drw_weights_K if reweight and cfg.loss.reweight_cls else None
            steps = list(plan.steps(epoch, done % plan.optimizer_steps))
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
                done += 1
                meter.step(done, epoch, rate, norm)
                if cfg.train.save_every_steps and done % cfg.train.save_every_steps == 0:
                    save(run, engine, ema, selector, meter, done)
                if number := stop.agreed():
                    save(run, engine, ema, selector, meter, done, wait=True)
                    raise run.stopped(number, done)
            batches.close()
            last, before_drw = epoch + 1 == cfg.train.epochs, epoch + 1 == cfg.loss.drw_epoch
            with meter.paused():
                if last or (epoch + 1) % cfg.evaluate.every == 0:
                    selector.evaluate(done, epoch, last)  # 9 evaluate
                if last or before_drw or (every_epochs and (epoch + 1) % every_epochs == 0):
                    milestone = "before-drw" if before_drw else ""
                    save(run, engine, ema, selector, meter, done, wait=last, milestone=milestone)  # 8 checkpoint
            if number := stop.agreed(at_once=True):
                save(run, engine, ema, selector, meter, done, wait=True)
                raise run.stopped(number, done)
        stop.close()  # nothing is left to save
        source.close()
        selector.finish(done, epoch=cfg.train.epochs - 1)
        if run.is_main:  # the others do not wait
            analysis.look_into(run.folder, cfg.evaluate.analyze_images)
            log.info("report: %s", report.write_report(run.folder))  # 10 report
    return run.folder


def seed_drop_path(seed: int, micro_batch: MicroBatch) -> None:
    """Seed drop path from the micro-batch's place alone, so that no generator state is saved or shared by ranks."""
    key = (seed, micro_batch.epoch, micro_batch.index, micro_batch.virtual_rank)
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def save(
    run: Run,
    engine: Engine,
    ema: Ema | None,
    selector: Selector,
    meter: Meter,
    done: int,
    wait: bool = False,
    milestone: str = "",
) -> None:
    """Checkpoint after ``done`` optimizer steps: weights, optimizer, average, and the best result so far.

    The meter reports first: it refuses weights that came from a loss that is not finite, and a resumed run then logs
    the same intervals as one that never stopped.
    """
    meter.report()
    parts = {"model": engine.weights(), "optimizer": engine.optimizer_tensors()}
    if ema:
        parts["ema"] = ema.state
    manifest = selector.manifest() | {"best": selector.best, "fingerprint": selector.fingerprint}
    distributed.on_main(lambda: run.checkpoints.save(done, parts, manifest, wait=wait, milestone=milestone))


def restore(run: Run, engine: Engine, ema: Ema | None, selector: Selector) -> int:
    """Continue from the run's newest whole checkpoint, if there is one; the optimizer steps already done."""
    folder, manifest = distributed.on_main(lambda: run.checkpoints.newest(run.must)) or (None, {"step": 0})
    done: int = manifest["step"]
    distributed.on_main(lambda: run.count_start(done))
    run.rewind(done)
    if folder is None:
        return 0
    selector.check_fingerprint(manifest, run.folder)
    engine.load(checkpoint.load_tensors(folder), checkpoint.load_tensors(folder, "optimizer"))
    if ema:
        ema.load(checkpoint.load_tensors(folder, "ema"))
    selector.best = manifest["best"]
    log.info("resumed %s after step %d", run.folder, done)
    return done
