"""Teacher and student in one go: `train --with-teacher`, and `demo` on the embedded images."""

import hashlib
import logging
from pathlib import Path

from fastdeitlt import config
from fastdeitlt.config import Config
from fastdeitlt.teachers.train import train_teacher
from fastdeitlt.train import train

log = logging.getLogger("fastdeitlt")


def train_both(cfg: Config, teacher_cfg: Config, resume: str = "auto") -> Path:
    """Train the teacher on the student's data, then the student. A teacher trained before is used again.

    Args:
        cfg: the student's run.
        teacher_cfg: the teacher's recipe; its data, seed, device and runs_dir are the student's.
        resume: of the student; see ``train``. The teacher's is always auto.

    Returns:
        The student's run folder.

    Raises:
        UserError: see ``train`` and ``train_teacher``.
    """
    shared = {name: value for name, value in config.flatten(cfg).items() if name.startswith("data.")}
    shared |= {"train.seed": cfg.train.seed, "train.device": cfg.train.device, "runs_dir": cfg.runs_dir}
    flat = config.flatten(teacher_cfg) | shared
    # the folder carries a hash of all that shapes the teacher, so that equal settings find it again and others do not
    named = "".join(
        f"{name}={flat[name]!r}\n" for name in sorted(flat) if name not in ("name", "runs_dir", "data.root")
    )
    flat["name"] = f"{teacher_cfg.name}-{hashlib.sha256(named.encode()).hexdigest()[:8]}"
    teacher = train_teacher(config.build(flat))
    log.info("teacher: %s", teacher)
    return train(config.build(config.flatten(cfg) | {"teacher.path": str(teacher)}), resume)


def demo(seed: int = 0, runs_dir: str = "runs") -> Path:
    """Train the quick-start teacher (a small CNN with SAM) and student (DeiT-LT) on the embedded Fashion-MNIST-LT.

    Args:
        seed: of both trainings; each seed has its own run folders.
        runs_dir: folder that holds them.

    Returns:
        The student's run folder, with report.html.
    """
    common = [f"runs_dir={runs_dir}", f"train.seed={seed}"]
    student = config.load("quickstart", [*common, f"name=demo-{seed}"])
    return train_both(student, config.load("teacher/quickstart", common))
