"""The teacher's side: losses, sharpness-aware minimisation, training views, the check before a student's first step.

Imports ``core``, ``models`` and ``data``; the spines, ``reporting``, ``tools`` and the command line import it.
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
