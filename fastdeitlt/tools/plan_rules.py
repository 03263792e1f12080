"""Rules of `plan`: from facts, measured rates and hours to two recipes.

N training images, K classes.
"""

import math
from collections.abc import Sequence

from fastdeitlt.config import Config
from fastdeitlt.errors import UserError, counted
from fastdeitlt.tools.plan_facts import Choice, Facts, Rates, Rung, Schedule, build_settings
from fastdeitlt.tools.plan_recipes import FEW_CHANGES, PAPER_CHANGES, recipes

USABLE = 0.85
"""Share of the hours to plan for; the rest is a margin for other load."""
TEACHER_SHARE = 0.4
"""Share of the training time for the teacher."""
MOST_EPOCHS, MOST_TEACHER_EPOCHS = 1400, 400
"""The longest published schedule (ImageNet-LT); twice the recipes' teachers."""
MOST_EVALUATIONS = 19
"""Most evaluations of any number of epochs, see ``_every``."""
LEAST_HOURS, MOST_HOURS = 0.14, 12.0
MOST_CLASSES = 2 / 3
"""Share of the classes to hold images out of, among those for which a larger share would suffice."""


def default_hours(num_images: int) -> float:
    """Return hours by size: 8 minutes for 500 images, about 1 hour for 10,000, <= 12."""
    return min(max(LEAST_HOURS * (num_images / 500) ** 0.7, LEAST_HOURS), MOST_HOURS)


def holdout_shares(counts: Sequence[int], has_val: bool, has_test: bool) -> dict[str, float]:
    """Return split -> share of each class to hold out: val 0.1, test 0.2.

    Larger shares if these leave over a third of the classes without an image; none if no class has enough images.

    Args:
        counts: training images of each class [K] before the hold-out.
    """
    shares: dict[str, float] = {}
    totals = [count for count in counts if count]
    left = totals
    for split, there, usual in (("val", has_val, 0.1), ("test", has_test, 0.2)):
        if there:
            continue
        # rounded as in hold_out; train keeps an image
        held = {
            share: [min(int(total * share + 0.5), rest - 1) for total, rest in zip(totals, left, strict=True)]
            for share in (usual, 0.2, 0.3)
        }
        covered = {share: sum(number > 0 for number in numbers) for share, numbers in held.items()}
        if most := max(covered.values()):
            shares[split] = next(share for share, number in covered.items() if number >= MOST_CLASSES * most)
            left = [rest - number for rest, number in zip(left, held[shares[split]], strict=True)]
    return shares


def choose(facts: Facts, rates: Rates, hours: float, name: str) -> Choice:
    """Choose both recipes so that training takes at most ``hours`` at these rates.

    The student is the most expensive candidate that sees as many images as it needs.

    Raises:
        UserError: too few hours for two epochs of both; the message has the least hours.
    """
    budget = USABLE * hours * 3600 - rates.start_s
    chosen = None
    for rung in facts.rungs:
        if rung not in rates.student:
            break
        schedule = _schedule(facts, rates, rung, budget)
        if schedule is not None and (chosen is None or schedule.images_seen >= rung.needs):
            chosen = schedule
        if schedule is None or schedule.images_seen < rung.needs:
            break
    if chosen is None:
        rung = facts.rungs[0]
        epoch = facts.num_images + facts.num_val
        cost_s = 2 * epoch / rates.student[rung] / (1 - TEACHER_SHARE) + 2 * epoch / rates.teacher[rung] / TEACHER_SHARE
        least = (cost_s + rates.start_s) / USABLE / 3600
        raise UserError(
            f"--hours: got {hours:g}, expected at least {math.ceil(least * 100) / 100:g} for two epochs of "
            f"{counted(facts.num_images, 'image')} with teacher and student on this machine."
        )
    return recipes(facts, chosen, hours, name)


def candidate(facts: Facts, rung: Rung, sample: int) -> tuple[Config, Config]:
    """Return a candidate's recipes for measurement: mild, uncompiled, no SAM.

    Args:
        sample: images to measure on, at least 2; an optimizer step of either has at most as many.
    """
    batch, number = _batch(facts, rung)
    batch = min(batch, sample // 2 * 2)
    number = min(number, sample // batch)
    schedule = Schedule(rung, 10, 10, False, FEW_CHANGES, 1, batch, number, 1, 1, {"teacher": 0.0, "student": 0.0})
    measured = {"train.compile": (False, ""), "train.measure_kernels": (False, "")}
    choice = recipes(facts, schedule, 1.0, "plan")
    student = {name: value for name, value in choice.student.items() if name != "student.init"}
    teacher_batch = min(choice.teacher["teacher_training.batch_size"][0], sample)
    teacher = choice.teacher | {"teacher_training.batch_size": (teacher_batch, "")}
    return build_settings(student | measured), build_settings(teacher | measured)


def _schedule(facts: Facts, rates: Rates, rung: Rung, budget_s: float) -> Schedule | None:
    """Return a candidate's schedule within a budget; None for under two epochs."""
    n = facts.num_images
    batch, number = _batch(facts, rung)
    student_rate, teacher_rate = rates.student[rung], rates.teacher[rung]
    # an evaluation is forward passes of weights and EMA, cheaper than a training step per image
    eval_s, teacher_eval_s = facts.num_val / student_rate, facts.num_val / teacher_rate
    evaluations_s = MOST_EVALUATIONS * teacher_eval_s
    most_s = MOST_TEACHER_EPOCHS * 2 * n / teacher_rate + evaluations_s
    reserved_s = min(TEACHER_SHARE * budget_s, most_s)
    # SAM's second pass pays if time allows more plain epochs than a teacher needs
    sam = (reserved_s - evaluations_s) * teacher_rate / n >= MOST_TEACHER_EPOCHS
    passes = 2 if sam else 1
    teacher_epochs = min(_fitting(reserved_s, passes * n / teacher_rate, teacher_eval_s), MOST_TEACHER_EPOCHS)
    teacher_every = _every(teacher_epochs)
    if teacher_epochs < 2:
        return None
    teacher_s = teacher_epochs * passes * n / teacher_rate + -(-teacher_epochs // teacher_every) * teacher_eval_s
    epochs = min(_fitting(budget_s - reserved_s, n / student_rate, eval_s), MOST_EPOCHS)
    if epochs < 2:
        return None
    every = _every(epochs)
    repeats = 3 if epochs * n >= PAPER_CHANGES and n >= 10_000 else 1
    seconds = {
        "teacher": teacher_s,
        "student": epochs * n / student_rate + -(-epochs // every) * eval_s,
        "start, decoding, report": rates.start_s,
    }
    seen = epochs * n
    return Schedule(rung, epochs, teacher_epochs, sam, seen, repeats, batch, number, every, teacher_every, seconds)


def _every(epochs: int) -> int:
    """Return the epochs between evaluations, for about ten in all."""
    return max(1, epochs // 10)


def _fitting(seconds: float, epoch_s: float, eval_s: float) -> int:
    """Return the epochs that fit in ``seconds`` with evaluations (monotone)."""
    one_each = min(int(seconds / (epoch_s + eval_s)), MOST_EVALUATIONS)
    return max(int((seconds - MOST_EVALUATIONS * eval_s) / epoch_s), one_each, 0)


def _batch(facts: Facts, rung: Rung) -> tuple[int, int]:
    """Return images per micro-batch (even) and micro-batches per optimizer step."""
    n = facts.num_images
    effective = 32 if n < 4_000 else 64 if n < 10_000 else 256 if n < 50_000 else 1024
    micro = min(effective, (256 if rung.width == "tiny" else 128) if facts.gpu else 32, max(n // 2 * 2, 2))
    return micro, max(effective // micro, 1) if n >= effective else 1
