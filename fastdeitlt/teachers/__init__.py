"""Teachers: losses, SAM, training views, and the check before student training.

Imports ``core``, ``models`` and ``data``.
"""

from fastdeitlt.teachers.losses import (
    balanced_softmax_loss,
    cb_focal_loss,
    ldam_loss,
    logit_adjustment_loss,
    paco_loss,
    vs_loss,
)
from fastdeitlt.teachers.sam import SAM

__all__ = [
    "SAM",
    "balanced_softmax_loss",
    "cb_focal_loss",
    "ldam_loss",
    "logit_adjustment_loss",
    "paco_loss",
    "vs_loss",
]
