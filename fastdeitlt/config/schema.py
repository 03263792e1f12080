"""The configuration schema: all sections and the dotted names of their fields."""

import difflib
from typing import Any

from pydantic import BaseModel, Field, PrivateAttr, model_validator
from pydantic.fields import FieldInfo

from fastdeitlt.config.section import Place, Section, TrackerNames
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


class Config(Section):
    """Configuration of a run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run's folder under runs_dir: letters, digits, dot, dash, underscore."""
    runs_dir: Place = "runs"
    """Folder of the run folders."""
    track: TrackerNames = ("tensorboard",)
    """Trackers for the numbers of metrics.jsonl: tensorboard, wandb, mlflow, one or several. [] = none. A failing
    tracker is dropped with a warning."""
    published: dict[str, float] = Field(default_factory=dict)
    """Published accuracies in % for comparison in the report (all, head, mid, tail)."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    mixup: MixupConfig = MixupConfig()
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    teacher_training: TeacherTrainingConfig = TeacherTrainingConfig()
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def origins(self) -> dict[str, str]:
        """Source of each value by dotted name (`default`, the file's name, `override`)."""
        return self._origins

    @property
    def is_teachers(self) -> bool:
        """Whether the recipe is for `train-teacher` and changes nothing of the student."""
        kept = (self.student, self.teacher, self.loss) == (StudentConfig(), TeacherConfig(), LossConfig())
        return kept and self.teacher_training != TeacherTrainingConfig()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.mixup.on and self.train.batch_size % 2:
            raise ValueError(
                f"train.batch_size: got {self.train.batch_size}, expected an even number because mixing pairs images. "
                f"Use {self.train.batch_size - 1 or 2} or {self.train.batch_size + 1}, or mixup.prob=0."
            )
        if self.train.autotune and not self.train.compile:
            raise ValueError("train.autotune: got true with train.compile=false, expected false or train.compile=true")
        if self.train.ranks_per_forward > 1 and self.loss.normalise == "global":
            raise ValueError(
                f"train.ranks_per_forward: got {self.train.ranks_per_forward} with loss.normalise=global, expected 1 "
                "because the global mean is taken over real ranks"
            )
        if self.train.cuda_graphs and not self.train.compile:
            raise ValueError(
                "train.cuda_graphs: got true with train.compile=false, expected train.compile=true because the "
                "compiler records the graphs"
            )
        if self.loss.tau != 1 and self.loss.distillation == "hard":
            raise ValueError(
                f"loss.tau: got {self.loss.tau} with loss.distillation=hard, which has no temperature, expected 1 or "
                "loss.distillation=soft"
            )
        if self.loss.drw_epoch >= self.train.epochs:
            raise ValueError(
                f"loss.drw_epoch: got {self.loss.drw_epoch}, expected less than train.epochs={self.train.epochs}, or "
                "-1 for no re-weighting"
            )
        if self.evaluate.weights == "ema" and not self.optim.ema_decay:
            raise ValueError(
                "evaluate.weights: got ema with optim.ema_decay=0, which keeps no average, expected model or both. Set "
                "evaluate.weights=model, or optim.ema_decay."
            )
        return self


def _field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            names += _field_names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def field_info(name: str) -> FieldInfo:
    """Return the schema of a dotted field name."""
    section, _, field = name.rpartition(".")
    model: Any = Config.model_fields[section].annotation if section else Config
    return model.model_fields[field]


FIELDS = tuple(_field_names(Config))
SECTIONS = tuple(dict.fromkeys(name.partition(".")[0] for name in FIELDS if "." in name))
TEXTS = frozenset(name for name in FIELDS if field_info(name).annotation is str)
STUDENT_ONLY = (
    "augment.impl", "augment.repeats", "evaluate.analyze_images", "evaluate.baseline_head", "evaluate.weights", "loss.",
    "mixup.", "optim.", "student.", "teacher.", "train.accumulate", "train.batch_size", "train.cuda_graphs",
    "train.epochs", "train.measure_kernels", "train.nonfinite_skips", "train.offload", "train.ranks_per_forward",
    "train.zero_stage",
)  # fmt: skip
"""Beginnings of the settings that a teacher's training does not read."""
EVALUATION = (
    "data.", "evaluate.batch_size", "train.device", "train.main_timeout_s", "train.precision", "train.timeout_s",
)  # fmt: skip
"""Beginnings of the settings that the evaluation of a finished model reads."""


def near(name: str, names: list[str] | tuple[str, ...]) -> str:
    """Return the "did you mean" part of an error message, or ""."""
    leaf = {k.rsplit(".", 1)[-1]: k for k in names}
    matches = difflib.get_close_matches(name, names, 2, 0.6)
    matches = matches or [leaf[n] for n in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaf), 2, 0.6)]
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def describe(name: str) -> str:
    """Return the documentation of a dotted field name on one line."""
    return " ".join((field_info(name).description or "").split())
