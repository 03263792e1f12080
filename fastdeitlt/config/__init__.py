"""The configuration: one frozen schema, every field documented; YAML files, dotted overrides, near names for typos.

A value comes, in rising order, from the schema's default, from the YAML file, from an override ``section.field=value``.
``origins`` keeps which, so that ``fastdeitlt config show`` can say where each value came from.
Everything may import it; it imports only ``errors``.
"""

from fastdeitlt.config.files import (
    build,
    dump,
    dump_values,
    find,
    flatten,
    load,
    merge,
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
    "LossConfig", "MixupConfig", "OptimConfig", "Section", "StudentConfig", "TeacherConfig", "TeacherTrainingConfig",
    "TrainConfig", "build", "describe", "dump", "dump_values", "find", "flatten", "load", "merge", "near",
    "parse_overrides", "read_yaml", "recipes",
]  # fmt: skip
