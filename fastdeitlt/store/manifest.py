"""What manifest.json of a model folder says: the one schema, for whoever writes, checks or reads such a folder."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastdeitlt.config import Config

Positive = Annotated[float, Field(gt=0)]
Head = Annotated[str, Field(pattern="^(AVG|CLS|DIST)$")]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class File(_Facts):
    """A file of the folder."""

    sha256: str


class ModelInfo(_Facts):
    """What to build. A student has a ``name``, a teacher an ``arch``; 0 = not said."""

    name: str = ""
    arch: str = ""
    num_classes: int = Field(0, ge=0, le=10**6)
    img_size: int = Field(0, ge=0, le=10**4)
    depth: int = Field(0, ge=0, le=1000)


class Preprocess(_Facts):
    """What the model expects of its images."""

    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]
    img_size: int = Field(0, ge=0, le=10**4)
    crop_pct: float = Field(1.0, gt=0, le=1)
    exif: Literal["ignore", "apply"] = "ignore"
    """What is done with the orientation that EXIF or TIFF states: ``data.exif`` of the run."""

    @property
    def resize(self) -> int:
        """Pixels of the shorter side before the centre crop. Source: timm's ``transforms_imagenet_eval``."""
        return math.floor(self.img_size / self.crop_pct)


def preprocess_of(cfg: Config, img_size: int) -> Preprocess:
    """Return how a run prepares the images that it evaluates on, ``img_size`` in pixels."""
    return Preprocess(
        mean=cfg.augment.mean,
        std=cfg.augment.std,
        img_size=img_size,
        crop_pct=cfg.evaluate.crop_pct,
        exif=cfg.data.exif,
    )


class Calibration(_Facts):
    """Temperatures by which logits are divided before the softmax, fitted on validation images (posthoc.py)."""

    temperatures: dict[Head, Positive]
    num_fitted: int = Field(ge=1)
    """Validation images."""


class Best(_Facts):
    """The best weights of a run."""

    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    weights: Literal["model", "ema"]
    """The part of that step's checkpoint."""


class Manifest(_Facts):
    """The facts that readers rely on; a folder may have more. One of the wrong type or range is refused."""

    format: Literal["fastdeitlt"]
    files: dict[str, File]
    kind: Literal["student", "teacher"] = "student"
    model: ModelInfo = ModelInfo()
    step: int = Field(0, ge=0)
    """Of a checkpoint: optimizer steps done."""
    epoch: int = Field(0, ge=0)
    """Of a checkpoint: epochs that have ended, with the evaluation and the milestone that were due."""
    best: Best | None = None
    """Of a checkpoint: the best weights so far."""
    class_map: list[int] | None = None
    """The model's class of each label of the data set; None = the same."""
    class_names: list[str] | None = None
    class_counts: list[int] | None = None
    preprocess: Preprocess | None = None
    recipe: dict[str, Any] | None = None
    """Of a teacher: its ``teacher_training`` settings."""
    accuracy: dict[str, float] | None = None
    """Of a teacher: accuracy in % over the images of a set, by set."""
    balanced_accuracy: dict[str, float] | None = None
    """Of a teacher: mean accuracy of the classes in %, by set."""
    calibration: Calibration | None = None
    """None: nothing was fitted; probabilities are the softmax of the logits as they are."""
