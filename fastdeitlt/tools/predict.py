"""Image classification with a saved student or teacher: top-k and heads."""

# B batch, H height, W width, C channels, K classes

import csv
import io
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from fastdeitlt import distributed
from fastdeitlt.data.pixels.resize import centre_crop
from fastdeitlt.data.sets.class_names import listed
from fastdeitlt.data.sets.folders import is_image, walk
from fastdeitlt.errors import UserError, counted, csv_name, printable
from fastdeitlt.evaluation.metrics import heads_of
from fastdeitlt.models.saved import Saved, open_saved
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.store.files import write_atomically
from fastdeitlt.tools.pictures import PictureReader

log = logging.getLogger("fastdeitlt")

HEADS = ("AVG", "CLS", "DIST")
Input = str | Path | Image.Image
"""A file, a folder or an image in memory."""


@dataclass(frozen=True)
class Choice:
    """A class and its probability by a head."""

    class_id: int
    """Label of the data set, as in ``eval --predictions``; not the network's output if the model has a class map."""
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """Prediction for one image, or why it is unreadable."""

    path: str
    """The file, or the input number of an image in memory."""
    top: list[Choice]
    """Classes by ``head``, best first."""
    cls: Choice | None = None
    dist: Choice | None = None
    error: str = ""
    temperatures: dict[str, float] | None = None
    """Temperatures of the logits by head; None: not fitted, or ``raw``."""
    head: str = "AVG"
    """Head of ``top``: AVG (the mean of the heads' logits), CLS or DIST; TEACHER for a teacher."""


def predict(
    model_folder: str | Path,
    inputs: Input | Sequence[Input],
    top_k: int = 5,
    batch_size: int = 64,
    device: str = "auto",
    strict: bool = False,
    raw: bool = False,
    head: str = "AVG",
) -> list[Prediction]:
    """Classify images, files and folders of files, in order.

    Files of a folder are sorted by name. Preprocessing is that of evaluation.

    Args:
        model_folder: a model folder or a run folder, of a student or a teacher, or a released student checkpoint.
        inputs: one or several files, folders (without hidden files) and Pillow images.
        top_k: classes per image, at most all.
        device: auto, cpu or cuda.
        strict: raise for unreadable files, instead of an ``error`` in their rows.
        raw: probabilities without the temperatures fitted on validation images (with equal class weights). The order of
            the classes does not depend on it.
        head: head of a student that ranks the classes: AVG, CLS or DIST. A teacher has one.

    Raises:
        UserError: no model, no images, a ``top_k`` or ``batch_size`` below 1, a head that the model does not have, or
            with ``strict`` an unreadable file.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"predict: got {name} {value}, expected at least 1")
    inputs = [inputs] if isinstance(inputs, Input) else list(inputs)
    pictures = list(_images(inputs))
    if not pictures:
        raise UserError(f"predict: no images in {', '.join(map(str, inputs)) or '[]'}, expected files or folders")
    if head not in HEADS:
        raise UserError(f"--head: got {head!r}, expected one of {', '.join(HEADS)}")
    saved = open_saved(model_folder)
    if saved.kind == "teacher" and head != "AVG":
        raise UserError(f"--head: got {head} for the teacher {model_folder}, which has one head. Remove the option.")
    where = distributed.device_of(device)
    saved.model.to(where)
    temperatures = saved.calibration.temperatures if saved.calibration and not raw else None
    rows: list[Prediction] = []
    with closing(PictureReader(saved.preprocess.exif)) as reader:
        for start in range(0, len(pictures), batch_size):
            part = pictures[start : start + batch_size]
            outcomes = reader([image for _, image in part])
            both = list(zip([name for name, _ in part], outcomes, strict=True))
            if strict and (errors := [f"{name}: {error}" for name, error in both if isinstance(error, str)]):
                raise UserError("; ".join(errors[:3]))
            images = [image for image in outcomes if isinstance(image, Tensor)]
            answers = iter(_predict_batch(saved, images, top_k, where, temperatures, head) if images else [])
            rows += [
                Prediction(name, [], error=outcome) if isinstance(outcome, str) else replace(next(answers), path=name)
                for name, outcome in both
            ]
    return rows


def _images(inputs: Sequence[Input]) -> Iterator[tuple[str, Path | Image.Image]]:
    """Yield each image with its name."""
    for number, entry in enumerate(inputs):
        if isinstance(entry, Image.Image):
            yield f"image {number}", entry
        elif (path := Path(entry)).is_dir():
            names = walk(path)
            if others := [name for name in names if not is_image(name)]:
                log.warning("%s: %s ignored, no image suffix: %s", path, counted(len(others), "file"), listed(others))
            yield from ((str(path / name), path / name) for name in names if is_image(name))
        else:
            yield str(path), path


def _predict_batch(
    saved: Saved,
    images: list[Tensor],
    top_k: int,
    device: torch.device,
    temperatures: dict[str, float] | None,
    head: str,
) -> list[Prediction]:
    crops_BHWC = centre_crop(images, saved.preprocess.resize, saved.preprocess.img_size).to(device)
    with torch.inference_mode():
        heads = _heads(saved, saved.normalise(crops_BHWC))
    head = head if head in heads else next(iter(heads))
    best = {
        name: _best(logits_BK / (temperatures or {}).get(name, 1), top_k if name == head else 1, saved.label_names)
        for name, logits_BK in heads.items()
    }
    cls, dist = ([row[0] for row in best[name]] if name in best else [None] * len(images) for name in ("CLS", "DIST"))
    return [
        Prediction("", top, cls[i], dist[i], temperatures=temperatures, head=head) for i, top in enumerate(best[head])
    ]


def _heads(saved: Saved, images_BCHW: Tensor) -> dict[str, Tensor]:
    """Return logits [B, K] of the labels by head; a teacher's at its training scale."""
    if isinstance(saved.model, Teacher):
        return {"TEACHER": saved.by_label(saved.model(images_BCHW)) * saved.model.logit_scale}
    return heads_of(*map(saved.by_label, saved.model.forward_heads(images_BCHW)))  # type: ignore[operator]


def _best(logits_BK: Tensor, top_k: int, names: Sequence[str]) -> list[list[Choice]]:
    values, classes = logits_BK.float().softmax(-1).topk(min(top_k, len(names)))
    return [
        [Choice(k, names[k], p) for k, p in zip(*row, strict=True)]
        for row in zip(classes.tolist(), values.tolist(), strict=True)
    ]


def main(
    model: Path,
    inputs: Sequence[Path],
    *,
    top_k: int,
    out: Path | None,
    strict: bool,
    raw: bool = False,
    head: str = "AVG",
) -> int:
    """Run `predict`: print a table or write a file; return 2 for unreadable files.

    Raises:
        UserError: see ``predict``; or ``out`` is neither .csv nor .json.
    """
    if out is not None and (out.suffix not in (".csv", ".json") or not out.absolute().parent.is_dir()):
        raise UserError(f"--out: got {out}, expected a .csv or .json file in an existing folder")
    rows = predict(model, inputs, top_k, strict=strict, raw=raw, head=head)
    failed = [row for row in rows if row.error]
    if out is None:
        if read := [row for row in rows if not row.error]:
            console = Console()
            console = console if console.is_terminal else Console(width=max(console.width, 120))
            console.print(table(read))
    elif out.suffix == ".json":
        write_atomically(out, json.dumps([asdict(row) for row in rows], indent=1))
    else:
        write_atomically(out, to_csv(rows))
    for row in failed:
        print(printable(f"fastdeitlt: {row.path}: {row.error}"), file=sys.stderr)
    return 2 if failed else 0


def table(rows: Sequence[Prediction]) -> Table:
    """Return a terminal table of the best classes and the decisions of CLS and DIST."""
    fitted = next((row.temperatures for row in rows if row.temperatures), None)
    temperatures = ", ".join(f"{head} {value:.2f}" for head, value in (fitted or {}).items())
    how = f"temperatures fitted on validation images: {temperatures}" if temperatures else "uncalibrated probabilities"
    main = rows[0].head
    others = () if main == "TEACHER" else ("CLS", "DIST")
    table = Table(Column("image", overflow="fold"), main, *others, caption=how, caption_justify="left")
    for row in rows:
        best = ", ".join(f"{choice.name} {choice.probability:.0%}" for choice in row.top)
        heads = [f"{choice.name} {choice.probability:.0%}" for choice in (row.cls, row.dist) if choice]
        table.add_row(*(Text(printable(cell)) for cell in (row.path, best, *heads)))
    return table


def to_csv(rows: Sequence[Prediction]) -> str:
    """Return CSV, a line per image: path, ranks, CLS and DIST, temperatures, error."""
    ranks = range(1, 1 + max((len(row.top) for row in rows), default=0))
    header = [f"{what}{rank}" for rank in ranks for what in ("class", "probability")]
    text = io.StringIO()
    writer = csv.writer(text)
    heads = ["cls_class", "cls_probability", "dist_class", "dist_probability"]
    temperatures = [f"{head.lower()}_temperature" for head in HEADS]
    writer.writerow(["path", *header, *heads, *temperatures, "error"])
    for row in rows:
        cells: list[str | float] = []
        for choice in [*row.top, *[None] * (len(ranks) - len(row.top)), row.cls, row.dist]:
            cells += [csv_name(choice.name), round(choice.probability, 6)] if choice else ["", ""]
        cells += [round((row.temperatures or {}).get(head, 1.0), 6) for head in HEADS] if row.top else [""] * len(HEADS)
        writer.writerow([csv_name(row.path), *cells, csv_name(row.error)])
    return text.getvalue()
