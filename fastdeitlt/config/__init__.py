"""Configuration: a frozen, documented schema, YAML files and dotted overrides.

Precedence, lowest first: the schema's default, the YAML file, an override ``section.field=value``. ``origins`` records
the source of each value for ``fastdeitlt config show``. Imports only ``errors``.
"""

from fastdeitlt.config.files import (
    Recipe,
    build,
    dump,
    dump_value,
    dump_values,
    find,
    flatten,
    load,
    load_evaluation,
    load_student,
    load_teacher,
    parse_overrides,
    read_yaml,
    recipes,
)
from fastdeitlt.config.schema import FIELDS, SECTIONS, Config, describe, near
from fastdeitlt.config.section import IMAGENET_MEAN, IMAGENET_STD, Section
from fastdeitlt.config.student import (
    AugmentConfig,
    DataConfig,
    EvaluateConfig,
    LossConfig,
    MixupConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from fastdeitlt.config.teacher_training import TeacherTrainingConfig

__all__ = [
    "FIELDS", "IMAGENET_MEAN", "IMAGENET_STD", "SECTIONS", "AugmentConfig", "Config", "DataConfig", "EvaluateConfig",
    "LossConfig", "MixupConfig", "OptimConfig", "Recipe", "Section", "StudentConfig", "TeacherConfig",
    "TeacherTrainingConfig", "TrainConfig", "build", "describe", "dump", "dump_value", "dump_values", "find", "flatten",
    "load", "load_evaluation", "load_student", "load_teacher", "near", "parse_overrides", "read_yaml", "recipes",
]  # fmt: skip
