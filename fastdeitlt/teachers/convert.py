"""Conversion of teachers to and from the released checkpoints' format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from fastdeitlt import config
from fastdeitlt.errors import UserError, first_fault
from fastdeitlt.models.saved import released_preprocess
from fastdeitlt.models.teacher import check_class_map, create_teacher, load_teacher, teacher_input
from fastdeitlt.store.checkpoint import MANIFEST, find_model_folder, read_folder, read_manifest, save_model_folder
from fastdeitlt.store.files import draft_file, read_json
from fastdeitlt.store.manifest import Preprocess, preprocess_of
from fastdeitlt.teachers.opening import ORDER_FILE

STYLES = ("official_ldam", "official_paco")


def export_official(folder: str | Path, style: str, path: str | Path) -> Path:
    """Export a teacher's model folder as a checkpoint for the official code.

    A plain CNN exported as official_paco gets its weights in both encoders, its head as ``linear`` and ``linear_k``,
    and a newly initialised projection and queue, which inference does not use.

    Args:
        folder: model or run folder of a teacher.
        style: official_ldam (bare keys) or official_paco (PaCo's wrapper).
        path: the file to write.

    Raises:
        UserError: ``path`` exists; an unknown style; a PaCo teacher with official_ldam; a cosine head with
            official_paco.
    """
    if Path(path).exists():
        raise UserError(f"export {path}: exists, expected a new name. Remove it or use another name.")
    state, manifest = read_folder(Path(folder), "teacher")
    is_paco = any(key.startswith("encoder_q.") for key in state)
    if style not in STYLES:
        raise UserError(f"style: got {style!r}, expected one of {', '.join(STYLES)}")
    if is_paco and style != "official_paco":
        raise UserError(f"teacher {folder}: got style {style!r} for a PaCo teacher, expected official_paco")
    if style == "official_paco" and not is_paco:
        state = _wrap(state, manifest.model.arch, manifest.model.num_classes, str(folder))
    content = {f"module.{key}": value for key, value in state.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with draft_file(Path(path)) as draft:
        torch.save({"arch": manifest.model.arch, "state_dict": content}, draft)
    return Path(path)


def _wrap(state: dict[str, torch.Tensor], arch: str, num_classes: int, what: str) -> dict[str, torch.Tensor]:
    """Wrap a plain CNN's state dict as PaCo's."""
    head = "linear" if "linear.weight" in state else "fc"
    if f"{head}.bias" not in state:
        raise UserError(f"teacher {what}: got style official_paco for a cosine head, expected official_ldam")
    body = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
    paco = create_teacher(arch, num_classes, "official_paco")
    wrapped = paco.state_dict()
    for encoder, linear in (("encoder_q", "linear"), ("encoder_k", "linear_k")):
        wrapped |= {f"{encoder}.{key}": value for key, value in body.items()}
        wrapped |= {f"{linear}.{kind}": state[f"{head}.{kind}"] for kind in ("weight", "bias")}
    paco.load_state_dict(wrapped)
    return paco.state_dict()


def import_official(
    path: str | Path,
    folder: str | Path,
    *,
    arch: str,
    num_classes: int,
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    class_map: Sequence[int] | None = None,
) -> Path:
    """Convert a released checkpoint to a model folder.

    Args:
        path: the checkpoint; its style is detected from its keys.
        folder: the folder to write: a new one, an empty one, or a model folder, which is replaced.
        arch, num_classes: architecture and number of classes.
        img_size: side in pixels of its input; the crop is that of ``released_preprocess``.
        mean, std: normalisation of its input.
        class_map: the teacher's class of each data-set label; None = identical.

    Raises:
        UserError: see ``load_teacher``; an invalid size, mean, std or class map; ``folder`` has other files.
    """
    stated = released_preprocess(img_size).model_dump() | {"mean": list(mean), "std": list(std)}
    try:
        Preprocess.model_validate(stated)
    except ValidationError as error:
        raise UserError(f"import {path}: {first_fault(error)}, expected three numbers each, std above 0") from None
    manifest = {
        "kind": "teacher",
        "model": {"arch": arch, "num_classes": num_classes, "img_size": img_size, "style": "fastdeitlt"},
        "class_map": check_class_map(class_map, num_classes).tolist() if class_map is not None else None,
        "preprocess": stated,
    }
    return _save(folder, load_teacher(path, arch, num_classes).network, manifest)


def import_teacher(run_folder: str | Path, folder: str | Path) -> Path:
    """Convert the released teacher of a student's run to a model folder.

    Its class order, class names and preprocessing are those of the run.

    Args:
        run_folder: the student's run.
        folder: the folder to write, as for ``import_official``.

    Raises:
        UserError: not a finished student's run; see ``load_teacher``; ``folder`` has other files.
    """
    run = Path(run_folder)
    cfg, student = config.load(str(run / "config.yaml")), read_manifest(find_model_folder(run))
    num_classes = student["model"]["num_classes"]
    own = teacher_input(cfg.teacher, None, cfg.augment.mean, cfg.augment.std, cfg.student.side)
    network = load_teacher(cfg.teacher.path, cfg.teacher.arch, num_classes, cfg.teacher.style).network
    order = read_json(run / ORDER_FILE).get("class_map")
    preprocess = preprocess_of(cfg, own.img_size).model_dump()
    manifest = {
        "kind": "teacher",
        "model": {"arch": cfg.teacher.arch, "num_classes": num_classes, "img_size": own.img_size},
        "class_map": np.argsort(order).tolist() if order else None,
        "class_names": student.get("class_names"),
        "preprocess": preprocess | {"mean": list(own.mean), "std": list(own.std)},
    }
    return _save(folder, network, manifest)


def _save(folder: str | Path, network: nn.Module, manifest: dict[str, Any]) -> Path:
    """Write a model folder, which replaces only another model folder."""
    place = Path(folder)
    if place.is_file() or (place.is_dir() and any(place.iterdir()) and not (place / MANIFEST).is_file()):
        raise UserError(f"teacher folder {folder}: exists and is not a model folder, expected a new name")
    return save_model_folder(folder, network.state_dict(), manifest)
