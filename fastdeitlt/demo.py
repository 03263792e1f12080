"""`fastdeitlt demo`: the whole method on real images in minutes, on any machine."""

from pathlib import Path

from fastdeitlt import config
from fastdeitlt.teachers.train import train_teacher
from fastdeitlt.train import train


def demo(seed: int = 0, runs_dir: str = "runs") -> Path:
    """Train the quick-start teacher (a small CNN with SAM) and student (DeiT-LT) on the embedded Fashion-MNIST-LT.

    Args:
        seed: of both trainings; each seed has its own run folders.
        runs_dir: folder that holds them.

    Returns:
        The student's run folder, with report.html.
    """
    common = [f"runs_dir={runs_dir}", f"train.seed={seed}"]
    teacher = train_teacher(config.load("teacher/quickstart", [*common, f"name=demo-teacher-{seed}"]))
    return train(config.load("quickstart", [*common, f"name=demo-{seed}", f"teacher.path={teacher}"]))
