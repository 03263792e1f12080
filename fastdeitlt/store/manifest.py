"""The schema of manifest.json in a model folder."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastdeitlt.config import Config

Positive = Annotated[float, Field(gt=0)]
Head = Annotated[str, Field(pattern="^(AVG|CLS|DIST)$")]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class File(_Facts):
    """Manifest entry of one file."""

    sha256: str


class ModelInfo(_Facts):
    """Architecture: ``name`` for a student, ``arch`` for a teacher; 0 = not stated."""

    name: str = ""
    arch: str = ""
    num_classes: int = Field(0, ge=0, le=10**6)
    img_size: int = Field(0, ge=0, le=10**4)
    depth: int = Field(0, ge=0, le=1000)


class Preprocess(_Facts):
    """Preprocessing of the model's input images."""

    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]
    img_size: int = Field(0, ge=0, le=10**4)
    crop_pct: float = Field(1.0, gt=0, le=1)
    exif: Literal["ignore", "apply"] = "ignore"
    """Handling of the EXIF orientation: ``data.exif`` of the run. A TIFF's own tag is always applied."""

    @property
    def resize(self) -> int:
        """Pixels of the shorter side before the centre crop.

        Source: timm's ``transforms_imagenet_eval``.
        """
        return math.floor(self.img_size / self.crop_pct)


def preprocess_of(cfg: Config, img_size: int) -> Preprocess:
    """Return the preprocessing of a run's evaluation images; ``img_size`` in pixels."""
    return Preprocess(
        mean=cfg.augment.mean,
        std=cfg.augment.std,
        img_size=img_size,
        crop_pct=cfg.evaluate.crop_pct,
        exif=cfg.data.exif,
    )


class Calibration(_Facts):
    """Softmax temperatures fitted on validation images (posthoc.py)."""

    temperatures: dict[Head, Positive]
    num_fitted: int = Field(ge=1)
    """Number of validation images."""


class Best(_Facts):
    """Checkpoint step, epoch and state dict of a run's best weights."""

    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    weights: Literal["model", "ema"]


class Manifest(_Facts):
    """The manifest: types and ranges are checked, further entries are allowed."""

    format: Literal["fastdeitlt"]
    files: dict[str, File]
    kind: Literal["student", "teacher"] = "student"
    model: ModelInfo = ModelInfo()
    step: int = Field(0, ge=0)
    """Checkpoints: completed optimizer steps."""
    epoch: int = Field(0, ge=0)
    """Checkpoints: completed epochs, including the evaluation and milestone due at their end."""
    best: Best | None = None
    """Checkpoints: the best weights so far."""
    class_map: list[int] | None = None
    """The model's class of each data-set label; None = identical."""
    class_names: list[str] | None = None
    class_counts: list[int] | None = None
    dataset: str | None = None
    """Display name of the data set (``DataConfig.title``)."""
    data_sha256: str | None = None
    """Fingerprint of the training images."""
    preprocess: Preprocess | None = None
    recipe: dict[str, Any] | None = None
    """Teachers: the ``teacher_training`` settings."""
    accuracy: dict[str, float] | None = None
    """Teachers: accuracy over images in %, by set."""
    balanced_accuracy: dict[str, float] | None = None
    """Teachers: mean class accuracy in %, by set."""
    calibration: Calibration | None = None
    """None: not calibrated; probabilities are the softmax of the raw logits."""
