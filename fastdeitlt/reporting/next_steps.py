"""Last section of the report: suggested commands for a run."""

import json
import shlex

from fastdeitlt.reporting.page import Section, Table
from fastdeitlt.run.run_files import RunFiles
from fastdeitlt.store.files import read_json

Step = tuple[str, str]
"""(reason, commands)."""
LEAST_GAP = 1.0
"""Smallest reported lead of the teacher, in points."""


def place_of(run: RunFiles) -> str:
    """Return the run folder as given to the report, quoted for a shell."""
    return shlex.quote(str(run.folder))


def next_section(run: RunFiles) -> Section:
    """Return the section: steps suggested by the results, then general ones."""
    if run.results:
        steps = [*_suggested(run), *_analyses(run), *_uses(run)]
    else:
        verb = "train-teacher" if run.is_teacher else "train"
        steps = [("Finish the run", f"fastdeitlt {verb} {place_of(run)}/config.yaml --resume {place_of(run)}")]
        steps = steps if run.cfg else []
    table = Table("", ["what", "command"], [list(step) for step in steps], text=True, wide=True, commands=True)
    return Section(
        "Next steps", "Run these commands in the folder that this report was made in.", [table] if steps else []
    )


def _suggested(run: RunFiles) -> list[Step]:
    """Return the steps suggested by the results."""
    if run.cfg is None or (result := run.tested) is None:
        return []
    steps: list[Step] = []
    selected = run.results.get("selected") or {}
    if selected.get("on") in ("test", "last"):
        why = "The weights were selected on the test images, which overestimates their accuracy"
        why = why if selected["on"] == "test" else "The final weights were kept without selection"
        steps.append(
            (
                f"{why}. Select on a tenth of the training images",
                _again(run, "val", "evaluate.select_on=val data.val_holdout=0.1"),
            )
        )
    gap = run.teacher.accuracy() - result.accuracy() if run.teacher else 0.0
    epochs = run.cfg.teacher_training.epochs if run.is_teacher else run.cfg.train.epochs
    rising = selected.get("on") == "val" and selected.get("epoch") == epochs - 1
    if rising or gap >= LEAST_GAP:
        reasons = ["the last epoch was the best"] if rising else []
        reasons += [f"the teacher leads by {gap:.1f} points"] if gap >= LEAST_GAP else []
        why = " and ".join(reasons)
        steps.append((f"{why[:1].upper()}{why[1:]}. Train twice as long", _again(run, "longer", _twice(run))))
    seen = {sign["name"] for sign in run.signs[-1]["signs"] if sign["seen"]} if run.signs else set()
    if "tail expert" in seen and run.cfg.teacher.path:
        steps.append(
            ("DIST does not lead CLS on the tail. Analyze the teacher's decisions", _report_with(run, "teacher"))
        )
    if "overfitting" in seen:
        why = "Accuracy on held-out tail images fell. Stop after three evaluations without improvement"
        steps.append((why, _again(run, "patient", "train.patience=3")))
    return steps


def _twice(run: RunFiles) -> str:
    """Return the settings for twice the epochs, with all milestones doubled."""
    assert run.cfg
    section, recipe = ("teacher_training", run.cfg.teacher_training) if run.is_teacher else ("loss", run.cfg.loss)
    epochs = run.cfg.teacher_training.epochs if run.is_teacher else run.cfg.train.epochs
    settings = f"{'teacher_training' if run.is_teacher else 'train'}.epochs={2 * epochs}"
    settings += f" {section}.drw_epoch={2 * recipe.drw_epoch}" if recipe.drw_epoch >= 0 else ""
    teacher = run.cfg.teacher_training
    for name, schedule in (("lr_steps", teacher.schedule), ("sam_rho_steps", teacher.sam_schedule)):
        if run.is_teacher and schedule == "step":
            pairs = [[2 * epoch, value] for epoch, value in getattr(teacher, name)]
            settings += " " + shlex.quote(f"{section}.{name}={json.dumps(pairs, separators=(',', ':'))}")
    return settings


def _again(run: RunFiles, suffix: str, settings: str) -> str:
    """Return the command for a new run with changed settings."""
    verb = "train-teacher" if run.is_teacher else "train"
    return f"fastdeitlt {verb} {place_of(run)}/config.yaml name={run.name}-{suffix} {settings}"


def _report_with(run: RunFiles, *analyses: str) -> str:
    lines = [f"fastdeitlt analyze {name} {place_of(run)}" for name in analyses]
    return "\n".join([*lines, f"fastdeitlt report {place_of(run)}"])


def _analyses(run: RunFiles) -> list[Step]:
    """Return the steps for analyses missing from the page."""
    names = [] if run.is_teacher else ["student", *(["teacher"] if run.cfg and run.cfg.teacher.path else [])]
    there = {name: read_json(run.folder / "analysis" / f"{name}.json") for name in names}
    absent = [name for name, facts in there.items() if not facts]
    steps = [("Add the missing analyses to this page", _report_with(run, *absent))] if absent else []
    if there.get("teacher") and "sharpness" not in there["teacher"]:
        steps.append(("Add the teacher's sharpness to this page", _report_with(run, "teacher")))
    return steps


def _uses(run: RunFiles) -> list[Step]:
    """Return the steps for any finished run."""
    place, seed = place_of(run), run.cfg.train.seed + 1 if run.cfg else 1
    steps: list[Step] = [
        (
            "List the prediction and probability of every image",
            f"fastdeitlt eval {place} --predictions predictions.csv",
        ),
        ("Score other images", f"fastdeitlt eval {place} data.dataset=folder data.root=/images"),
        ("Classify your own images", f"fastdeitlt predict {place} IMAGES --out answers.csv"),
        ("Use the model in another program", f"fastdeitlt export {place} model.onnx --format onnx"),
    ]
    if run.is_teacher:
        steps.append(("Train a student with this teacher", f"fastdeitlt train RECIPE teacher.path={place}"))
    if run.cfg:
        steps.append(("Measure the variance over seeds", _again(run, f"seed{seed}", f"train.seed={seed}")))
    return steps
