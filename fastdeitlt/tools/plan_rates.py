"""Measurement of training throughput for `plan`, by student and teacher.

B images in a micro-batch, N images that are measured on.
"""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import count

import numpy as np
import torch

from fastdeitlt.config import Config
from fastdeitlt.core.assemble import Data
from fastdeitlt.core.measure.timer import synchronise
from fastdeitlt.data.pixels.cache import DecodedSet, pack
from fastdeitlt.data.pixels.reader import Stream
from fastdeitlt.data.pixels.resident import Resident
from fastdeitlt.data.pixels.source import Source, choose
from fastdeitlt.data.sampler import plan_of
from fastdeitlt.data.sets.types import LongTailSet, Sets
from fastdeitlt.data.teacher_plan import teacher_plan_of
from fastdeitlt.teachers.step import Step, build_objective, build_optimizer
from fastdeitlt.teachers.views import StepBatch, teacher_batches
from fastdeitlt.tools.plan_facts import Facts, Rates, Rung
from fastdeitlt.tools.plan_rules import candidate
from fastdeitlt.tools.setup import Setup, endless, step_of

LEAST_IMAGES, MOST_IMAGES, MOST_BYTES = 64, 512, 1e9
"""Sample of images, evenly spaced in the set, smaller for large images to save memory."""
WARM_UP, LEAST_STEPS, SAMPLE_S = 2, 2, 2.0
"""Warm-up steps, fewest measured steps, and seconds of a measurement."""
LIMIT_S = 45.0
"""Seconds after which no further student is measured."""
START_S = 45.0
"""Seconds for two starts, tests, analysis and report (docs/own_images.md)."""


def measure_rates(images: LongTailSet, facts: Facts, hours: float, device: torch.device) -> Rates:
    """Time steps of each student and teacher, by ascending cost, while hours suffice.

    Args:
        images: the training set.
        facts: facts of the set.
        hours: hours for both trainings.
        device: device of the trainings.

    Raises:
        UserError: an unreadable image, see ``Stream``.
    """
    began = time.monotonic()
    most = max(LEAST_IMAGES, min(MOST_IMAGES, int(MOST_BYTES / (4 * facts.short_side**2))))
    sample_N = np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).astype(np.int64))
    chosen = images.take(sample_N)
    student: dict[Rung, float] = {}
    teacher: dict[Rung, float] = {}
    cfg, _ = candidate(facts, facts.rungs[0], len(chosen))
    with closing(Stream(chosen, cfg.data, device)) as stream:
        source, decode_s = _source(chosen, len(images), cfg, stream, device)
        for rung in facts.rungs:
            # costs rise, so the next one is no faster than the last
            is_late = time.monotonic() - began > LIMIT_S
            if student and (is_late or hours * 3600 * list(student.values())[-1] < rung.needs):
                break
            student_cfg, teacher_cfg = candidate(facts, rung, len(chosen))
            student[rung] = _student_rate(student_cfg, source, chosen, device)
            teacher[rung] = _teacher_rate(teacher_cfg, source, chosen, device)
        if source is not stream:
            source.close()
    return Rates(student, teacher, START_S + decode_s)


def _source(chosen: LongTailSet, total: int, cfg: Config, stream: Stream, device: torch.device) -> tuple[Source, float]:
    """Return the sample's source as in training, and seconds to decode the whole set."""
    if chosen.images_NHWC is not None:
        return Resident(chosen, cfg.data, device, pack(chosen.images_NHWC)), 0.0
    began = time.monotonic()
    decoded = _decode(stream, len(chosen))
    scale = total / len(chosen)
    decode_s = (time.monotonic() - began) * scale
    residency = choose(chosen, cfg.data, device, int(decoded.pixels.numel() * scale))
    if residency == "stream":
        return stream, 0.0
    return Resident(chosen, cfg.data.model_copy(update={"residency": residency}), device, decoded), decode_s


def _decode(stream: Stream, total: int) -> DecodedSet:
    """Decode all images of a stream into memory, for this process alone."""
    images = list(stream.decoded(range(total), 0))
    sizes_N2 = np.array([(0, 0) if image is None else image.shape[:2] for image in images], np.int32)
    pixels = torch.cat([image.reshape(-1) for image in images if image is not None])
    return DecodedSet(pixels, sizes_N2, np.flatnonzero([image is None for image in images]))


def _student_rate(cfg: Config, source: Source, images: LongTailSet, device: torch.device) -> float:
    """Return the images/s of a student's full steps with its teacher."""
    setup = Setup(cfg, device, Data(images.counts, plan_of(cfg, len(images))), Sets(images))
    parts = setup.assemble(source)
    with closing(endless(parts)) as batches:
        return _rate(step_of(parts, batches), setup.images_per_call, device)


def _teacher_rate(cfg: Config, source: Source, images: LongTailSet, device: torch.device) -> float:
    """Return the images/s of a teacher's plain steps."""
    torch.manual_seed(0)
    plan = teacher_plan_of(cfg, len(images))
    objective = build_objective(cfg.teacher_training, images.counts, device)
    step = Step(objective, build_optimizer(objective.network, cfg.teacher_training), cfg, device)
    ones_K = torch.ones(len(images.counts), device=device)

    def stream() -> Generator[StepBatch, None, None]:
        for epoch in count():
            with closing(teacher_batches(cfg, source, images, plan, epoch)) as batches:
                # without smaller last batches, which would count as full ones
                yield from (batch for batch in batches if len(batch.labels_B) >= plan.batch_size)

    with closing(stream()) as batches:
        return _rate(lambda: step(next(batches), ones_K, 0), plan.batch_size, device)


def _rate(step: Callable[[], object], images_a_step: int, device: torch.device) -> float:
    """Return the images/s of a step after a warm-up."""
    for _ in range(WARM_UP):
        step()
    synchronise(device)
    began, steps = time.perf_counter(), 0
    while steps < LEAST_STEPS or time.perf_counter() - began < SAMPLE_S:
        step()
        steps += 1
        if steps % LEAST_STEPS == 0:
            synchronise(device)
    synchronise(device)
    return steps * images_a_step / (time.perf_counter() - began)
