"""Learning rate and SAM's radius per epoch of teacher training, counted from 0."""

import math
from collections.abc import Sequence

from fastdeitlt.config import TeacherTrainingConfig
from fastdeitlt.errors import UserError


def learning_rate(epoch: int, cfg: TeacherTrainingConfig) -> float:
    """Return SGD's learning rate: linear warm-up, then steps or a half cosine to 0.

    Source: val-iisc/Saddle-LongTail and PaCo, ``adjust_learning_rate``. (PaCo's CIFAR warm-up lasts one epoch longer,
    at 1.1 times the peak, and its cosine ends one epoch later; neither is copied.)
    """
    if epoch < cfg.warmup_epochs:
        return cfg.lr * (epoch + 1) / cfg.warmup_epochs
    if cfg.schedule == "cosine":
        done = (epoch - cfg.warmup_epochs) / (cfg.epochs - cfg.warmup_epochs)
        return cfg.lr * 0.5 * (1 + math.cos(math.pi * done))
    return cfg.lr * stage(epoch, cfg.lr_steps, 1.0)


def radius(epoch: int, cfg: TeacherTrainingConfig) -> float:
    """Return SAM's rho in an epoch.

    Source: val-iisc/Saddle-LongTail, ``adjust_rho``.
    """
    match cfg.sam_schedule:
        case "constant":
            return cfg.sam_rho
        case "linear":
            return cfg.sam_rho * (epoch + 1) / cfg.epochs
        case "step":
            return stage(epoch, cfg.sam_rho_steps, cfg.sam_rho)


def stage(epoch: int, steps: Sequence[tuple[int, float]], before: float) -> float:
    """Return the latest reached (first epoch, value) pair's value, else ``before``."""
    values = [(first, value) for first, value in steps if first <= epoch]
    return max(values)[1] if values else before


def check_steps(cfg: TeacherTrainingConfig) -> None:
    """Refuse steps of the learning rate or of rho that the training never reaches.

    Raises:
        UserError: the first epoch of a step in use is not before the end.
    """
    for name, steps, used, other in (
        ("lr_steps", cfg.lr_steps, cfg.schedule == "step", "schedule=cosine"),
        ("sam_rho_steps", cfg.sam_rho_steps, cfg.sam_schedule == "step" and cfg.sam != "none", "sam_schedule=constant"),
    ):
        if late := [first for first, _ in steps if used and first >= cfg.epochs]:
            raise UserError(
                f"teacher_training.{name}: got first epoch {late[0]}, expected less than teacher_training.epochs="
                f"{cfg.epochs}. Use earlier steps, or teacher_training.{other}."
            )
