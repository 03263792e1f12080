"""Model folders as models read them: the manifest's facts, checked, and the tensors."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastdeitlt.checkpoint import find_model_folder, load_tensors, read_manifest
from fastdeitlt.errors import UserError
from fastdeitlt.models.state import State

Positive = Annotated[float, Field(gt=0)]
Head = Annotated[str, Field(pattern="^(AVG|CLS|DIST)$")]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class ModelInfo(_Facts):
    """What to build. A student has a ``name``, a teacher an ``arch``."""

    name: str = ""
    arch: str = ""
    num_classes: int = Field(ge=1)
    img_size: int = Field(0, ge=0)


class Preprocess(_Facts):
    """What the model expects of its images."""

    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]
    img_size: int = Field(0, ge=0)
    crop_pct: float = Field(1.0, gt=0, le=1)


class Calibration(_Facts):
    """Temperatures by which logits are divided before the softmax, fitted on validation images (posthoc.py)."""

    temperatures: dict[Head, Positive]
    num_fitted: int = Field(ge=1)
    """Validation images."""


class Manifest(_Facts):
    """manifest.json. ``class_map`` holds the model's class of each label of the data set; None = the same."""

    kind: str
    model: ModelInfo
    class_map: list[int] | None = None
    class_names: list[str] | None = None
    preprocess: Preprocess | None = None
    calibration: Calibration | None = None
    """None: nothing was fitted; probabilities are the softmax of the logits as they are."""


def read_folder(path: Path, kind: str, weights: str = "model") -> tuple[State, Manifest]:
    """The tensors and the manifest of a model folder, or of the best checkpoint in a run folder.

    Args:
        kind: "student" or "teacher"; the manifest must say the same.
        weights: "model" or "ema".

    Raises:
        UserError: no or a malformed manifest, the other kind, a file that is missing, truncated or changed.
    """
    folder = find_model_folder(path)
    try:
        manifest = Manifest.model_validate(read_manifest(folder))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"model folder {folder}: manifest.json, {where}: {first['msg']}") from None
    if manifest.kind != kind:
        raise UserError(f"model folder {folder}: got a {manifest.kind}, expected a {kind}")
    return load_tensors(folder, weights), manifest
