"""Student (a distilled Vision Transformer) and frozen teacher (a CNN): networks, checkpoints and saved models.

Imports ``data``, ``kernels`` and ``store``; imported by everything that runs a network.
"""

from fastdeitlt.models.teacher import create_teacher, load_teacher
from fastdeitlt.models.vit import create_student

__all__ = ["create_student", "create_teacher", "load_teacher"]
