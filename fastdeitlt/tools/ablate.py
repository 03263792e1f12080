"""`ablate`: a resumable grid of arms x seeds over one recipe."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from rich.table import Table

from fastdeitlt import config
from fastdeitlt.config import Config, Section
from fastdeitlt.data.sampler import plan_of
from fastdeitlt.data.sets.fingerprint import fingerprint
from fastdeitlt.data.sets.opening import open_sets, open_training_sets
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.data.teacher_plan import teacher_plan_of
from fastdeitlt.errors import NonFiniteError, UserError, counted
from fastdeitlt.models import create_student
from fastdeitlt.reporting import analysis, report
from fastdeitlt.run.choice import refuse_changes
from fastdeitlt.run.progress import console
from fastdeitlt.store.checkpoint import step_folders
from fastdeitlt.store.files import read_json
from fastdeitlt.teachers.opening import teacher_of
from fastdeitlt.teachers.step import build_objective, build_optimizer
from fastdeitlt.tools import ablation_table as table
from fastdeitlt.tools.demo import SHARED, train_both, with_shared
from fastdeitlt.train import train

log = logging.getLogger("fastdeitlt")
OOD_IMAGES = 1024
OWN_SETTINGS = ("name", "runs_dir", "train.seed", "teacher.path")
"""Settings reserved for the grid."""
PLACES = ("data.root", "data.train_list", "data.val_list", "data.test_list")
"""Settings that may change when a run resumes, but are compared for the table."""


class Arm(Section):
    """Settings by dotted name, over those of the grid."""

    student: dict[str, Any] = Field(default_factory=dict)
    """Settings of the student's run."""
    teacher: dict[str, Any] | Literal["none"] = Field(default_factory=dict)
    """Settings of the teacher's run; none: no teacher, both heads learn the labels."""


class Grid(Section):
    """A grid file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder under runs_dir for the runs and the table."""
    student: str
    """Recipe of the students: YAML file or shipped name."""
    teacher: str = ""
    """Recipe of the teachers. Empty: no teacher is trained; settings may have `teacher.path`."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Seeds; each arm is trained once with each."""
    settings: Arm = Arm()
    """Settings of all arms."""
    arms: dict[str, Arm] = Field(min_length=1)
    """Name -> differences. The first arm is the baseline of the comparisons."""


@dataclass(frozen=True)
class ArmRun:
    """One cell of the grid: the student's and teacher's runs."""

    arm: str
    seed: int
    student: Config
    teacher: Config | None

    @property
    def folder(self) -> Path:
        """The student's run folder."""
        return Path(self.student.runs_dir) / self.student.name


@dataclass(frozen=True)
class Work:
    """Progress of a run folder in optimizer steps."""

    name: str
    steps: int
    done: int
    finished: bool

    @property
    def state(self) -> str:
        """The state as text."""
        return "finished" if self.finished else f"interrupted at step {self.done:,}" if self.done else "new"


def ablate(
    path: str,
    overrides: Sequence[str] = (),
    *,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    dry_run: bool = False,
    table_only: bool = False,
) -> Path | None:
    """Train a grid's unfinished runs; write table and reports of the finished ones.

    Args:
        path: grid file, or a shipped one such as ``ablation/embedded``.
        overrides: ``section.field=value`` over the grid's settings, with lower precedence than an arm's own. Names of
            ``teacher_training`` apply to the teacher, all others to the student, whose data, seed, device and
            precision the teacher inherits.
        arms, seeds: train these only. The table has all finished runs.
        dry_run: check everything, list the runs with their steps, and stop.
        table_only: train nothing.

    Returns:
        The folder with results.csv, results.md and results.svg; None after a dry run.

    Raises:
        UserError: an invalid grid, arm, data set, teacher or saved run, or a finished run with other settings; before
            the first step.
        NonFiniteError: a run diverged; raised after the other runs.
    """
    grid = read_grid(path)
    runs = arm_runs(grid, overrides)
    if unknown := [arm for arm in arms if arm not in grid.arms]:
        raise UserError(f"--arms: no arm {unknown[0]!r} in {path}{config.near(unknown[0], list(grid.arms))}")
    if unknown_seeds := [seed for seed in seeds if seed not in grid.seeds]:
        raise UserError(f"--seeds: got {unknown_seeds[0]}, expected some of {grid.seeds}. Add it to `seeds` in {path}.")
    selected = [run for run in runs if (not arms or run.arm in arms) and (not seeds or run.seed in seeds)]
    folder = runs[0].folder.parent
    for run in runs:
        if is_finished(run.folder):  # a row of the table
            _refuse_other_settings(run)
    if not table_only:
        works = check(selected)
        if dry_run:
            console.print(_listing(grid.name, works))
            return None
        diverged = [run.folder for run in selected if not _finish(run)]
    finished = [(run.arm, run.seed, run.folder) for run in runs if is_finished(run.folder)]
    table.write(folder, list(grid.arms), finished)
    if not table_only:
        for _, _, student in finished:
            report.write_report(student)  # each with the other arms
    if not table_only and diverged:
        raise NonFiniteError(f"ablate: {counted(len(diverged), 'run')} diverged: {', '.join(map(str, diverged))}")
    return folder


def read_grid(path: str) -> Grid:
    """Read a grid from a YAML file or a shipped name.

    Raises:
        UserError: no such file, or not a grid; the message has the nearest name.
    """
    file = config.find(path)
    tree = config.read_yaml(file)
    try:
        return Grid.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        hint = config.near(name, list(Grid.model_fields)) if first["type"] == "extra_forbidden" else ""
        raise UserError(f"grid {file}: {name}: {first['msg']}{hint}") from None


def arm_runs(grid: Grid, overrides: Sequence[str] = ()) -> list[ArmRun]:
    """Return the grid's runs by seed, so that a partial grid has complete seeds.

    Raises:
        UserError: invalid settings, settings reserved for the grid, or two equal arms.
    """
    settings = config.parse_overrides(tuple(overrides))
    of_teacher = {name: value for name, value in settings.items() if name.startswith("teacher_training.")}
    of_student = {name: value for name, value in settings.items() if name not in of_teacher}
    recipe, _ = config.load_student(grid.student)
    teacher_recipe = config.load_teacher(grid.teacher) if grid.teacher else None
    runs_dir = Path(str(of_student.get("runs_dir", recipe.runs_dir))) / grid.name
    common_teacher = grid.settings.teacher
    if isinstance(common_teacher, str):
        raise UserError("grid settings.teacher: got none, expected settings. Remove the grid's teacher recipe.")
    of_arms = [arm.teacher for arm in grid.arms.values() if arm.teacher != "none"]
    if not grid.teacher and (
        unused := next((name for part in (of_teacher, common_teacher, *of_arms) for name in part), "")
    ):
        raise UserError(f"{unused}: no effect, because grid {grid.name} has no teacher recipe. Remove it, or add one.")

    def built(what: str, load: Callable[..., Config], base: Config, values: dict[str, Any]) -> Config:
        try:
            return load(base, values)
        except UserError as error:
            raise UserError(f"grid {grid.name}, {what}: {error}") from None

    runs = []
    for seed in grid.seeds:
        for name, arm in grid.arms.items():
            own = {"runs_dir": str(runs_dir), "train.seed": seed}
            values = {**grid.settings.student, **of_student, **arm.student, **own, "name": f"{name}-seed{seed}"}
            teacher_cfg = None
            if arm.teacher == "none":
                values["teacher.path"] = ""
            _check_own(grid, name, arm, of_student)
            if teacher_recipe and isinstance(arm.teacher, dict):
                taught = {**common_teacher, **of_teacher, **arm.teacher, **own}
                teacher_cfg = built(f"arm {name}, teacher", config.load_teacher, teacher_recipe, taught)
            runs.append(ArmRun(name, seed, built(f"arm {name}", config.load, recipe, values), teacher_cfg))
    _refuse_equal_arms(runs[: len(grid.arms)])
    return runs


def _check_own(grid: Grid, name: str, arm: Arm, of_student: dict[str, Any]) -> None:
    """Raise UserError for settings that the grid sets, or of the other model."""
    where = f"grid {grid.name}, arm {name}"
    parts = [part for part in (grid.settings.teacher, arm.teacher) if part != "none"]
    of_teacher = [key for part in parts for key in part]
    taught = bool(grid.teacher) and arm.teacher != "none"
    own = {**grid.settings.student, **arm.student}
    wrong = [key for key in OWN_SETTINGS if key in own and (key != "teacher.path" or taught)]
    wrong += [key for key in ("name", "train.seed") if key in of_student]
    wrong += [key for key in OWN_SETTINGS if key in of_teacher]
    if wrong:
        raise UserError(f"{where}: {wrong[0]} is set by the grid. Remove it.")
    if wrong := [key for key in (*own, *of_teacher) if key in config.SECTIONS]:
        raise UserError(f"{where}: {wrong[0]}: got a section, expected a dotted name such as train.epochs.")
    if wrong := [key for key in own if key.startswith("teacher_training.")]:
        raise UserError(f"{where}: {wrong[0]}: no effect on a student. Move it to `teacher`.")
    if wrong := [key for key in of_teacher if key.startswith(SHARED)]:
        raise UserError(f"{where}, teacher: {wrong[0]}: a teacher has the student's. Move it to `student`.")


def _refuse_equal_arms(runs: list[ArmRun]) -> None:
    """Raise UserError if two arms have equal settings."""
    arms: dict[str, str] = {}
    for run in runs:
        parts = [config.flatten(cfg) | {"name": ""} if cfg else {} for cfg in (run.student, run.teacher)]
        other = arms.setdefault(json.dumps(parts), run.arm)
        if other != run.arm:
            raise UserError(
                f"arm {run.arm}: got the settings of arm {other}, expected different ones. Change or remove one."
            )


def is_finished(folder: Path) -> bool:
    """Return whether a run has its results."""
    return (folder / "results.json").is_file()


def check(runs: Sequence[ArmRun]) -> list[Work]:
    """Check every run and return its progress; each teacher is listed once.

    A finished run needs its images no more.

    Raises:
        UserError: an invalid data set, model or teacher, or a folder with another run.
    """
    train_sets: dict[str, LongTailSet] = {}
    works: dict[str, Work] = {}
    for run in runs:
        if is_finished(run.folder):
            works[str(run.folder)] = _work(run.folder)
            continue
        cfg, data = run.student, run.student.data.model_dump_json()
        if data not in train_sets:
            train_sets[data] = open_training_sets(cfg.data).train
        images = train_sets[data]
        try:
            with torch.device("meta"):
                student = create_student(num_classes=images.num_classes, **cfg.student.architecture)
            if cfg.teacher.path:
                teacher_of(cfg, images, student.img_size, torch.device("cpu"))
            if run.teacher:
                key = run.teacher.model_dump_json() + data
                works[key] = works.get(key) or _teacher_work(run, images)
            works[str(run.folder)] = _student_work(run, images)
        except UserError as error:
            raise UserError(f"arm {run.arm}: {error}") from None
    return list(works.values())


def _student_work(run: ArmRun, images: LongTailSet) -> Work:
    _refuse_other_settings(run)
    return _work(run.folder, plan_of(run.student, len(images)).optimizer_steps * run.student.train.epochs)


def _refuse_other_settings(run: ArmRun) -> None:
    """Raise UserError if the folder has a run with other settings.

    Those of a finished run include its teacher, and the place of its data and its lists unless they were moved.
    """
    cfg, saved = run.student, run.folder / "config.yaml"
    if not saved.is_file():
        return
    before = config.load(str(saved))
    free = {"teacher.path": run.teacher is not None, "train.virtual_ranks": not cfg.train.virtual_ranks}
    free_names = [name for name, is_found in free.items() if is_found]  # resolved only in training
    remedy = f"Use the saved settings, remove {run.folder}, or rename the grid."
    finished = is_finished(run.folder)
    fixed = PLACES if finished and not _were_moved(before, run) else ()
    refuse_changes(before, cfg, run.folder, free_names, remedy, fixed)
    teacher = Path(before.teacher.path).parent.parent  # of checkpoints/best
    if finished and run.teacher and (teacher / "config.yaml").is_file():
        now, trained = with_shared(run.teacher, cfg), config.load(str(teacher / "config.yaml"))
        refuse_changes(trained, now, teacher, ["train.virtual_ranks"], remedy)


def _were_moved(before: Config, run: ArmRun) -> bool:
    """Return whether the training images and list names are a finished run's."""
    data = run.student.data
    names = [[Path(x.val_list).name, Path(x.test_list).name] for x in (before.data, data)]
    trained_on = read_json(run.folder / "checkpoints" / "best" / "manifest.json").get("data_sha256")
    if before.data == data or names[0] != names[1] or not trained_on:
        return False
    return fingerprint(open_sets(data).train) == trained_on


def _teacher_work(run: ArmRun, images: LongTailSet) -> Work:
    """Return a teacher's progress; its run is found by settings, not by hashed name."""
    assert run.teacher
    t = run.teacher.teacher_training
    with torch.device("meta"):
        build_optimizer(build_objective(t, images.counts, torch.device("meta")).network, t)
    steps = t.epochs * teacher_plan_of(run.teacher, len(images)).steps
    for saved in run.folder.parent.glob(f"{run.teacher.name}-*/config.yaml"):
        cfg = config.load(str(saved))
        own = (cfg.teacher_training, cfg.augment, cfg.data, cfg.train.seed)
        if own == (t, run.teacher.augment, run.student.data, run.seed):
            return _work(saved.parent, steps)
    return Work(f"{run.teacher.name} of {run.folder.name}", steps, 0, False)


def _work(folder: Path, steps: int = 0) -> Work:
    """Return a run's progress; 0 ``steps``: as many as it made."""
    newest = next(iter(step_folders(folder / "checkpoints")), folder)
    done = read_json(newest / "manifest.json").get("step", 0)
    total = steps or done
    return Work(folder.name, total, total if is_finished(folder) else done, is_finished(folder))


def _listing(name: str, works: Sequence[Work]) -> Table:
    left = sum(work.steps - work.done for work in works)
    listing = Table(
        "run", "optimizer steps", "state", title=f"grid {name}: {counted(left, 'step')} left", title_justify="left"
    )
    for work in works:
        listing.add_row(work.name, f"{work.steps:,}", work.state)
    return listing


def _finish(run: ArmRun) -> bool:
    """Train a run if unfinished; return whether it has results."""
    if is_finished(run.folder):
        log.info("%s is finished", run.folder)
    else:
        try:
            train_both(run.student, run.teacher) if run.teacher else train(run.student)
        except NonFiniteError as error:
            log.error("%s: %s; continuing with the next run", run.folder, error)
            return False
    if not (run.folder / table.TEACHER_FILE).is_file():  # trained with evaluate.analyze_images=0
        analysis.look_into(run.folder, OOD_IMAGES, ["teacher"])
    return True
