"""The student (a distilled Vision Transformer) and the teacher (a frozen CNN)."""

from fastdeitlt.models.teacher import create_teacher, load_teacher
from fastdeitlt.models.vit import create_student

__all__ = ["create_student", "create_teacher", "load_teacher"]
