"""`analyze teacher`: decisions, sharpness and feature rank of a teacher."""

# K classes

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdeitlt import config
from fastdeitlt.config import Config
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation.metrics import GROUPS, cell
from fastdeitlt.models.saved import run_of
from fastdeitlt.reporting import figures, page
from fastdeitlt.reporting.page import Section
from fastdeitlt.teachers.diagnose import diagnose_teacher

CONDITIONS = {"clean": "clean", "augmented": "augmented", "mixed": "mixed", "mixed_resized": "resized"}
SHOTS = GROUPS[1:]
MAX_CLASS_ROWS = 100


def diagnose(run: str, overrides: Sequence[str], *, recipe: str | None, images: int) -> dict[str, Any]:
    """Diagnose the teacher of a student's run, or with ``recipe`` a teacher.

    Args:
        run: run of a student; with ``recipe`` a teacher (run, model folder, checkpoint).
        overrides: settings over the student's.
        recipe: the student's recipe or configuration; its ``data`` are those of the teacher's run, if there is one.
        images: number of training images.

    Raises:
        UserError: a run without teacher, a teacher without recipe, or an invalid teacher or data set.
    """
    if images < 2:
        raise UserError(f"--images: got {images}, expected at least 2")
    path, cfg = _student_of(run, recipe, overrides)
    return diagnose_teacher(path, cfg, images, run_dir=None if recipe else run_of(Path(run)))


def after_training(run_dir: Path, num_images: int) -> dict[str, Any]:
    """Analyse a student's teacher, if any, after training, without sharpness."""
    cfg = config.load(str(run_dir / "config.yaml"))
    if not cfg.teacher.path:
        return {}
    return diagnose_teacher(cfg.teacher.path, cfg, max(num_images, 2), flatness=False, run_dir=run_dir)


def _student_of(run: str, recipe: str | None, overrides: Sequence[str]) -> tuple[str, Config]:
    """Return (path of the teacher, configuration of the student)."""
    folder = run_of(Path(run))
    own = folder / "config.yaml" if folder else None
    if recipe:
        # the teacher's data are the student's, as in train --with-teacher
        data = config.flatten(config.load(str(own))) if own else {}
        inherited = {name: value for name, value in data.items() if name.startswith("data.")}
        cfg = config.load(recipe)
        return run, config.build(config.flatten(cfg) | inherited | config.parse_overrides(list(overrides)))
    cfg = config.load(str(own), list(overrides)) if own else Config()
    if not cfg.teacher.path:
        raise UserError(
            f"analyze teacher {run}: not a student's run with a teacher; for a teacher's run add the student's recipe, "
            "such as --recipe quickstart"
        )
    return cfg.teacher.path, cfg


def section(facts: dict[str, Any]) -> Section:
    """Return the report section of analysis/teacher.json."""
    conditions = {name: facts[name] for name in CONDITIONS}
    heights = {"all": [f["accuracy"] for f in conditions.values()]}
    heights |= {shot: [f["agreement"][shot] or math.nan for f in conditions.values()] for shot in SHOTS}
    colours = dict(zip(heights, (figures.COLOURS["AVG"], *figures.RUN_COLOURS), strict=False))
    sharpness = "; sharpness: increase of the loss at a distance along its gradient" if facts.get("sharpness") else ""
    return Section(
        "Teacher",
        f"Teacher {_name(facts['path'])} on {facts['images']:,} training images: clean, as in its evaluation; "
        "augmented with the student's recipe; augmented and mixed; and resized from the student's size, as in "
        "distillation. Right: the hard decision is the label of the larger part of the image (groups by the official "
        "split, else thirds by class size); either: the label of one of the two parts. Entropy: of the softmax. "
        f"Feature rank: number of singular values with 99 % of the energy{sharpness}.",
        [
            page.Figure(
                "Accuracy of the teacher's decisions, in %",
                figures.bars(list(CONDITIONS.values()), heights, colours),
            ),
            _condition_table(conditions),
            _target_table(facts),
            _flatness_table(facts),
        ],
    )


def _name(path: str) -> str:
    """Return the name of the teacher's run or file."""
    return next(part for part in reversed(Path(path).parts) if part not in ("checkpoints", "best", "last"))


def _condition_table(conditions: dict[str, Any]) -> page.Table:
    rows = [
        [
            CONDITIONS[name],
            *(cell(value) for value in (f["accuracy"], *(f["agreement"][shot] for shot in SHOTS), f["either"])),
            f"{f['entropy']:.3f}",
        ]
        for name, f in conditions.items()
    ]
    return page.Table("Right and either, in %; entropy, in nats", ["images", *GROUPS, "either", "nats"], rows)


def _target_table(facts: dict[str, Any]) -> page.Table:
    """Return a table of label and hard-target shares, by class or group."""
    counts = facts["hard_targets"]
    totals = {kind: max(sum(counts[kind]), 1) for kind in counts}
    names = facts["class_names"] or [f"class {k}" for k in range(len(counts["labels"]))]
    classes = [(name, [k]) for k, name in enumerate(names)]  # names may be equal
    bins = classes if len(names) <= MAX_CLASS_ROWS else facts["groups"].items()
    rows = []
    for name, ids in bins:
        number = {kind: sum(counts[kind][k] for k in ids) for kind in ("labels", "targets")}
        share = {kind: 100 * number[kind] / totals[kind] for kind in number}
        ratio = f"{share['targets'] / share['labels']:.1f}" if share["labels"] else "-"
        rows.append([name, *(f"{share[kind]:.1f}" for kind in ("labels", "targets")), ratio])
    header = ["", "label, %", "target, %", "ratio"]
    return page.Table("Frequency of each class as label and as the teacher's target", header, rows)


def _flatness_table(facts: dict[str, Any]) -> page.Table:
    """Return a table of sharpness, if measured, and feature rank."""
    rank, rows = facts["feature_rank"], []
    if sharp := facts.get("sharpness"):
        rows = [["loss, clean images", f"{sharp['loss']:.4f}"]]
        rows += [[f"increase at radius {radius}", f"{gap:.4f}"] for radius, gap in sharp["gap"].items()]
        rows += [["largest Hessian eigenvalue", f"{sharp['top_eigenvalue']:.1f}"]]
    rows += [
        ["feature rank, by sample", f"{rank['sample']} of {rank['width']}"],
        ["feature rank, by feature", f"{rank['feature']} of {rank['width']}"],
    ]
    return page.Table("Sharpness and feature rank" if sharp else "Feature rank", ["", "value"], rows)
