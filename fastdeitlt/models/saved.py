"""Saved models for inference: network in eval mode, class names and preprocessing."""

# B batch, H height, W width, C channels, K classes

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdeitlt.config import IMAGENET_MEAN, IMAGENET_STD
from fastdeitlt.data.augment.transform import normalise
from fastdeitlt.data.sets.folders import is_image
from fastdeitlt.data.sets.splits import Classes
from fastdeitlt.errors import UserError, counted
from fastdeitlt.models import load_teacher
from fastdeitlt.models.convert import load_student_checkpoint
from fastdeitlt.models.teacher import check_class_map
from fastdeitlt.store.checkpoint import find_model_folder, read_manifest
from fastdeitlt.store.files import read_json
from fastdeitlt.store.manifest import Calibration, Preprocess

EXPORTED = (".onnx", ".pt2")
"""Suffixes of exported files; exported timm folders have a config.json."""


@dataclass(frozen=True)
class Saved:
    """Model from a model folder, a run folder or a released checkpoint; classes are in the model's order."""

    model: nn.Module
    kind: str
    """"student" or "teacher"."""
    class_names: list[str]
    """Name of each class of the model [K], "class <label>" if its file has none."""
    classes: Classes
    """Labels that a data set must have: names by label, if the model's file has them."""
    class_map: Tensor
    """The model's class of each label of the data set, int64 [K]."""
    preprocess: Preprocess
    """Preprocessing of its images."""
    calibration: Calibration | None = None
    """Temperatures fitted on validation images, if the model's run had some."""
    info: dict[str, Any] = field(default_factory=dict)
    """All metadata of the file, e.g. ``model``, ``dataset``, ``recipe``."""
    results: dict[str, Any] = field(default_factory=dict)
    """results.json of the model's run, if the model has the run's best weights and is in its folder."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def label_names(self) -> list[str]:
        """Name of each label of the data set [K]."""
        return [self.class_names[k] for k in self.class_map.tolist()]

    @property
    def class_counts(self) -> list[int] | None:
        """Training images of each label [K], if the model's file has them."""
        return self.info.get("class_counts")

    def normalise(self, crops_BHWC: Tensor) -> Tensor:
        """Normalise uint8 crops to the model's input images_BCHW, float32."""
        return normalise(crops_BHWC, self.preprocess.mean, self.preprocess.std)

    def by_label(self, logits_BK: Tensor) -> Tensor:
        """Reorder logits from the model's classes to the data set's labels."""
        return logits_BK[:, self.class_map.to(logits_BK.device)]


def released_preprocess(img_size: int) -> Preprocess:
    """Return the preprocessing of a released checkpoint, which states none.

    ImageNet's mean and std; above 32 pixels the central 7/8 of the shorter side, else all of it. Source: DeiT-LT
    datasets.py, ``build_transform_deit``; the crops are those of val-iisc/Saddle-LongTail and PaCo too.

    Raises:
        UserError: no pixel.
    """
    if img_size < 1:
        raise UserError(f"img_size: got {img_size}, expected at least 1 pixel")
    crop_pct = 0.875 if img_size > 32 else 1.0
    return Preprocess(mean=IMAGENET_MEAN, std=IMAGENET_STD, img_size=img_size, crop_pct=crop_pct)


def open_saved(path: str | Path) -> Saved:
    """Open a saved student, or the folder of a teacher.

    Args:
        path: a model folder, a run folder (its best checkpoint), a released student checkpoint (.pth, .safetensors).

    Raises:
        UserError: no such file or folder, damaged, or not a model.
    """
    path = Path(path)
    if (path.suffix in EXPORTED and path.is_file()) or (path / "config.json").is_file():
        raise UserError(
            f"model {path}: exported for other programs, expected a run or model folder. Use the run it was exported "
            "from."
        )
    if path.is_file() and (path.suffix in (".yaml", ".yml") or is_image(path.name)):
        raise UserError(f"model {path}: got a {path.suffix} file, expected a run folder such as runs/NAME, or a model")
    model: nn.Module
    if path.is_dir() and (info := read_manifest(find_model_folder(path))).get("kind") == "teacher":
        model = load_teacher(path, "", info.get("model", {}).get("num_classes", 0))
    else:
        model, info = load_student_checkpoint(path)
    num_classes, img_size = info["model"]["num_classes"], info["model"]["img_size"]
    stated = info.get("preprocess") or released_preprocess(img_size).model_dump()
    map_K = check_class_map(info.get("class_map") or range(num_classes), num_classes)
    names = info.get("class_names") or [f"class {label}" for label in range(num_classes)]
    if len(names) != num_classes:
        raise UserError(
            f"model {path}: got {counted(len(names), 'class name')}, expected {num_classes}. Repair its manifest."
        )
    if len(info.get("class_counts") or names) != num_classes:
        number = len(info["class_counts"])
        raise UserError(
            f"model {path}: got {counted(number, 'class count')}, expected {num_classes}. Repair its manifest."
        )
    return Saved(
        model=model,
        kind=info.get("kind", "student"),
        classes=Classes(f"model {path}", num_classes, info.get("class_names")),
        class_names=[names[label] for label in map_K.argsort().tolist()],
        class_map=map_K,
        preprocess=Preprocess(**stated | {"img_size": stated.get("img_size") or img_size}),
        calibration=Calibration(**info["calibration"]) if info.get("calibration") else None,
        info=info,
        # only the manifest of the best weights, which were tested, has "selected"
        results=read_json(run / "results.json") if "selected" in info and (run := run_of(path)) else {},
    )


def open_released_teacher(path: Path, arch: str, num_classes: int, img_size: int) -> Saved:
    """Open a teacher's released checkpoint, which states no architecture or input.

    Args:
        arch: see ``load_teacher``.
        img_size: side of its input in pixels; see ``released_preprocess``.

    Raises:
        UserError: no class; see ``load_teacher``.
    """
    if num_classes < 1:
        raise UserError(f"num_classes: got {num_classes}, expected the number of classes of {path}")
    return Saved(
        model=load_teacher(path, arch, num_classes),
        kind="teacher",
        class_names=[f"class {label}" for label in range(num_classes)],
        classes=Classes(f"model {path}", num_classes, None),
        class_map=torch.arange(num_classes),
        preprocess=released_preprocess(img_size),
        info={"model": {"arch": arch, "num_classes": num_classes, "img_size": img_size}},
    )


def run_of(path: Path) -> Path | None:
    """Return the run folder that contains a model folder checkpoints/<name>, if any."""
    if not path.is_dir():
        return None
    folder = find_model_folder(path)
    return next((place for place in (folder, folder.parent.parent) if (place / "config.yaml").is_file()), None)
