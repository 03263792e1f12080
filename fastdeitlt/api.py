"""The Python API: load, predict, evaluate, fit and plan. `import fastdeitlt` offers all of it."""

# B images, K classes, C H W channels, height and width

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastdeitlt import config, distributed
from fastdeitlt.config import Config, Recipe
from fastdeitlt.data.pixels.resize import centre_crop
from fastdeitlt.data.sets.fingerprint import fingerprint
from fastdeitlt.data.sets.folders import split_folders
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.errors import UserError, counted
from fastdeitlt.evaluation.evaluate import OneHead, evaluate_saved
from fastdeitlt.evaluation.metrics import Result
from fastdeitlt.models.saved import Saved, open_released_teacher, open_saved, run_of
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.run.folder import set_up_logging
from fastdeitlt.run.run_files import RunFiles, read_run
from fastdeitlt.tools.pictures import Picture, PictureReader

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, eq=False)
class Answer:
    """Prediction for one image. Classes are the labels of the data set."""

    label: int
    name: str
    probability: float
    """Probability of ``label``, by the mean of both heads' logits and the temperature fitted on validation images."""
    probabilities_K: Tensor
    logits_K: Tensor
    """Mean of the logits of both heads; for a teacher, its logits."""
    cls_logits_K: Tensor | None
    """None for a teacher, as ``dist_logits_K``."""
    dist_logits_K: Tensor | None


class Model:
    """A student or teacher for inference; ``load`` opens one.

    Images are read, rotated by EXIF, cropped and normalised as in evaluation, on the CPU.

    Attributes:
        kind: "student" or "teacher".
        classes: name of each label [K].
        img_size: height and width in pixels of the input of ``module``.
        module: the network in eval mode: images_BCHW to logits_BK of *its* classes (``class_map``), for a student the
            mean of both heads; ``forward_heads`` returns both.
        class_map: the network's class of each label, int64 [K].
    """

    def __init__(self, saved: Saved, path: Path, device: torch.device) -> None:
        self._saved, self.path, self.device = saved, path, device
        self.kind, self.img_size = saved.kind, saved.preprocess.img_size
        self.class_map = saved.class_map
        self.classes = saved.label_names
        self.module: nn.Module = saved.model.to(device)
        network = OneHead(saved.model, saved.model.logit_scale) if isinstance(saved.model, Teacher) else saved.model
        self._heads = network.eval()
        self._opened: PictureReader | None = None

    def __repr__(self) -> str:
        classes = counted(len(self.classes), "class")
        return f"Model({self.kind} {self.path}, {classes}, {self.img_size} pixels, {self.device})"

    def predict(
        self, images: Picture | Tensor | Sequence[Picture | Tensor], batch_size: int = 64, raw: bool = False
    ) -> Any:
        """Classify images.

        Args:
            images: one image or a list: path, Pillow image, or uint8 array [H, W] or [H, W, C]; or an array
                [B, H, W, C].
            batch_size: images per forward pass.
            raw: return uncalibrated probabilities, without the temperature fitted on validation images.

        Returns:
            An ``Answer`` for one image, a list of answers for several.

        Raises:
            UserError: an unreadable image; the message has up to three names.
        """
        pictures, is_one = _as_pictures(images)
        if batch_size < 1:
            raise UserError(f"batch_size: got {batch_size}, expected at least 1")
        answers: list[Answer] = []
        for start in range(0, len(pictures), batch_size):
            answers += self._answers(self._crops(pictures[start : start + batch_size], start), raw)
        return answers[0] if is_one else answers

    def transform(self, image: Picture | Tensor) -> Tensor:
        """Return an image as input of ``module``, normalised, on the CPU.

        Shape: float32 [3, img_size, img_size].
        """
        pictures, is_one = _as_pictures(image)
        if not is_one:
            raise UserError(f"transform: got {counted(len(pictures), 'image')}, expected one")
        return self._saved.normalise(self._crops(pictures))[0]

    def close(self) -> None:
        """Stop the threads that read images; the next call starts them again."""
        if self._opened:
            self._opened.close()
        self._opened = None

    def _crops(self, pictures: list[Picture], first: int = 0) -> Tensor:
        """Decode and crop pictures; ``first`` is the first one's number in messages."""
        self._opened = self._opened or PictureReader(self._saved.preprocess.exif)
        pixels = self._opened(pictures)
        failed = [
            f"{picture if isinstance(picture, str | Path) else f'image {number}'}: {why}"
            for number, (picture, why) in enumerate(zip(pictures, pixels, strict=True), first)
            if isinstance(why, str)
        ]
        if failed:
            raise UserError("; ".join(failed[:3]))
        images = [image for image in pixels if isinstance(image, Tensor)]
        return centre_crop(images, self._saved.preprocess.resize, self.img_size)

    def _answers(self, crops_BHWC: Tensor, raw: bool) -> list[Answer]:
        saved, calibration = self._saved, self._saved.calibration
        images_BCHW = saved.normalise(crops_BHWC.to(self.device))
        with torch.inference_mode():
            heads = [saved.by_label(logits_BK).float().cpu() for logits_BK in self._heads.forward_heads(images_BCHW)]  # type: ignore[operator]
        logits_BK = (heads[0] + heads[1]) / 2
        temperature = calibration.temperatures.get("AVG", 1.0) if calibration and not raw else 1.0
        probabilities_BK = (logits_BK / temperature).softmax(-1)
        student = self.kind == "student"
        return [
            Answer(
                label,
                self.classes[label],
                float(probabilities_BK[i, label]),
                probabilities_BK[i],
                logits_BK[i],
                heads[0][i] if student else None,
                heads[1][i] if student else None,
            )
            for i, label in enumerate(logits_BK.argmax(1).tolist())
        ]


def load(path: str | Path, *, device: str = "auto", arch: str = "", num_classes: int = 0, img_size: int = 224) -> Model:
    """Open a model for inference.

    Args:
        path: a run, a model folder, or a released checkpoint (.pth, .safetensors), of a student or a teacher.
        device: auto, cpu or cuda.
        arch, num_classes, img_size: of a released teacher's checkpoint alone, which does not state them.

    Raises:
        UserError: no such file or folder, damaged, holds code, or not a model; another device; ``arch`` for a folder.
    """
    where = Path(os.path.expanduser(path))
    if device not in DEVICES:
        raise UserError(f"device: got {device!r}, expected {', '.join(DEVICES)}. Set CUDA_VISIBLE_DEVICES for one GPU.")
    if arch and where.is_dir():
        raise UserError(f"arch: got {arch!r} for folder {path}, which states its own and its input. Remove arch.")
    saved = open_released_teacher(where, arch, num_classes, img_size) if arch else open_saved(where)
    return Model(saved, where, distributed.device_of(device))


def evaluate(model: Model | str | Path, data: Any = None, split: str = "test", **settings: Any) -> Result:
    """Score a model on a split by class and group.

    The heads are AVG, CLS and DIST, or TEACHER.

    Args:
        model: from ``load``, or a path for it.
        data: a folder of images, a recipe or a Config; None: those of the model's run.
        split: train, val or test. All images of a folder without split folders are scored, unless its training images
            are the model's: then those held out, as in training.
        settings: over those of ``data``, see ``fit``.

    Raises:
        UserError: see ``evaluation.evaluate.evaluate_saved``.
    """
    model = model if isinstance(model, Model) else load(model)
    run = run_of(model.path)
    own = config.load(str(run / "config.yaml")) if run else None
    data = os.path.expanduser(data) if isinstance(data, str | Path) else data
    is_folder = isinstance(data, str) and os.path.isdir(data)
    if own and data is None:
        cfg = own
    elif own and is_folder and (same := _training_folder(model, own, data)):
        cfg = same  # split as in training
    elif data is None:
        raise UserError(f"data: {model.path} is not in a run folder, expected a folder of images, recipe or Config")
    elif is_folder:
        whole = {"data.val_holdout": 0, "data.test_holdout": 0}
        cfg = config.build({"data.dataset": "folder", "data.root": data, **whole})
        split = split if split_folders(data)[0] else "train"
    else:
        cfg = data
    cfg = config.load_evaluation(cfg, {"train.device": model.device.type, **settings})
    with distributed.group(cfg.train.device, cfg.train.timeout_s):
        return evaluate_saved(model._saved, cfg, split).result


def _training_folder(model: Model, own: Config, folder: str) -> Config | None:
    """Return the run's settings if a folder has its images, which may have moved.

    None: other images.
    """
    if own.data.root and os.path.realpath(own.data.root) == os.path.realpath(folder):
        return own
    if own.data.dataset != "folder":
        return None
    moved = config.load(own, {"data.root": folder})
    try:
        train = open_sets(moved.data).train
    except UserError:  # no training split, too few images for the hold-out
        return None
    saved = model._saved  # counts first: a fingerprint reads the size of each file
    is_same = train.counts == saved.class_counts and fingerprint(train) == saved.info.get("data_sha256")
    return moved if is_same else None


@dataclass(frozen=True)
class Run:
    """A finished training of a student or a teacher."""

    folder: Path

    @cached_property
    def files(self) -> RunFiles:
        """Configuration, records of every evaluation and results, as the folder has them."""
        return read_run(self.folder)

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return config.load(str(self.folder / "config.yaml"))

    @property
    def result(self) -> Result | None:
        """Scores of the selected weights on test, else validation images, else None."""
        return self.files.tested

    @property
    def report(self) -> Path:
        """The page of a student's run."""
        return self.folder / "report.html"

    @cached_property
    def model(self) -> Model:
        """The chosen weights."""
        return load(self.folder)


def fit(recipe: Recipe, *, with_teacher: Recipe | None = None, resume: str = "auto", **settings: Any) -> Run:
    """Train a student as ``fastdeitlt train`` does.

    A call with the same arguments resumes an interrupted run.

    Args:
        recipe: a shipped recipe, a YAML file, or a Config.
        with_teacher: recipe of the teacher to train first.
        resume: auto, never, must, or a run folder.
        settings: over the recipe's: a section's as a mapping (``train={"epochs": 5}``), others by name (``name="a"``),
            dotted names as ``**{"train.epochs": 5}``. Those of ``teacher_training`` are over ``with_teacher``'s.

    Raises:
        UserError: see ``train`` and ``config.load_student``.
    """
    from fastdeitlt.tools.demo import train_both
    from fastdeitlt.train import train

    cfg, teacher = config.load_student(recipe, settings, with_teacher)
    set_up_logging()
    return Run(train_both(cfg, teacher, resume) if teacher else train(cfg, resume))


def fit_teacher(recipe: Recipe, *, resume: str = "auto", **settings: Any) -> Run:
    """Train a teacher as ``fastdeitlt train-teacher`` does.

    Arguments as ``fit``. The student's ``teacher.path`` is its folder.

    Raises:
        UserError: see ``train_teacher`` and ``config.load_teacher``.
    """
    from fastdeitlt.train_teacher import train_teacher

    set_up_logging()
    return Run(train_teacher(config.load_teacher(recipe, settings), resume).parents[1])


def plan(root: str | Path, hours: float | None = None, **options: Any) -> tuple[Config, Config]:
    """Choose recipes for a folder of images; see ``tools.plan.make_plan``."""
    from fastdeitlt.tools.plan import make_plan

    return make_plan(root, hours, **options).choice.configs


def _as_pictures(images: Any) -> tuple[list[Picture], bool]:
    """(pictures, whether one was given)."""
    images = _as_array(images)
    is_many = images.ndim > 3 if isinstance(images, np.ndarray) else isinstance(images, Iterable)
    if not is_many or isinstance(images, str | bytes | Path | Image.Image):
        return [images], True
    return [_as_array(image) for image in images], False


def _as_array(image: Any) -> Any:
    return image.detach().cpu().numpy() if isinstance(image, Tensor) else image
