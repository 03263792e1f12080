"""The student (a distilled Vision Transformer), the frozen teacher (a CNN), and how both are loaded and saved.

Imports ``data``, ``kernels`` and ``store``; everything that runs a network imports it.
"""

from fastdeitlt.models.teacher import create_teacher, load_teacher
from fastdeitlt.models.vit import create_student

__all__ = ["create_student", "create_teacher", "load_teacher"]
