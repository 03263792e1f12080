"""Training of teacher and student in sequence: `train --with-teacher`, and `demo`."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from fastdeitlt import config
from fastdeitlt.config import Config
from fastdeitlt.data.sets.fingerprint import fingerprint
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.run.choice import MAY_CHANGE, begun, choose_folder, refuse_changes
from fastdeitlt.run.progress import heading
from fastdeitlt.train import train
from fastdeitlt.train_teacher import train_teacher

log = logging.getLogger("fastdeitlt")
SHARED = (
    "data.", "runs_dir", "track", "train.device", "train.main_timeout_s", "train.precision", "train.seed",
    "train.timeout_s",
)  # fmt: skip
"""Beginnings of the student's settings that its teacher's run has too. The process group has one pair of timeouts."""


def train_both(cfg: Config, teacher_cfg: Config, resume: str = "auto") -> Path:
    """Train or reuse a teacher on the student's data, then train the student.

    Args:
        cfg: the student's run.
        teacher_cfg: the teacher's recipe; its data, seed, device, precision, timeouts, runs_dir and trackers are
            the student's.
        resume: resume mode of the student, see ``train``; the teacher's is auto.

    Returns:
        The student's run folder.

    Raises:
        UserError: see ``train`` and ``train_teacher``.
    """
    flat = config.flatten(with_shared(teacher_cfg, cfg))
    flat["name"] = f"{teacher_cfg.name}-{_teacher_key(flat, cfg)}"
    if resume != "never":
        _refuse_another_teacher(cfg, Path(cfg.runs_dir) / flat["name"] / "checkpoints" / "best", resume)
    heading(f"part 1 of 2: teacher {flat['name']}")
    teacher = train_teacher(config.build(flat))
    log.info("teacher: %s", teacher)
    heading(f"part 2 of 2: student {cfg.name}")
    return train(config.build(config.flatten(cfg) | {"teacher.path": str(teacher)}), resume)


def with_shared(teacher_cfg: Config, cfg: Config) -> Config:
    """Return a teacher's recipe with the settings that it takes from its student."""
    shared = {name: value for name, value in config.flatten(cfg).items() if name.startswith(SHARED)}
    return config.build(config.flatten(teacher_cfg) | shared)


def _refuse_another_teacher(cfg: Config, teacher: Path, resume: str) -> None:
    """Raise UserError if the student's run began with another teacher or settings."""
    folder = choose_folder(cfg, resume)
    if before := begun(folder):
        remedy = (
            "Use --resume never for a new folder, or the saved settings; a teacher's folder is named by its settings "
            "and images."
        )
        now = config.build(config.flatten(cfg) | {"teacher.path": str(teacher)})
        refuse_changes(before, now, folder, ["train.virtual_ranks"], remedy)


def _teacher_key(flat: dict[str, Any], cfg: Config) -> str:
    """Return a hash of the teacher's settings and images, without ``MAY_CHANGE``."""
    settings = {name: value for name, value in flat.items() if name not in (*MAY_CHANGE, "name")}
    sets = open_sets(cfg.data)
    content = [fingerprint(images) for images in (sets.train, sets.val) if images is not None]
    return hashlib.sha256(json.dumps([settings, content], sort_keys=True).encode()).hexdigest()[:8]


def demo(seed: int = 0, runs_dir: str = "runs") -> Path:
    """Train the quick-start teacher and DeiT-LT student on Fashion-MNIST-LT.

    Args:
        seed: seed of both trainings; each seed has its own run folders.
        runs_dir: folder of the run folders.

    Returns:
        The student's run folder, with report.html.
    """
    common = [f"runs_dir={runs_dir}", f"train.seed={seed}"]
    student = config.load("quickstart", [*common, f"name=demo-{seed}"])
    return train_both(student, config.load("teacher/quickstart", common))
