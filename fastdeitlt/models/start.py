"""Initial weights of a student from a run, a checkpoint or timm, adapted to its size, patch, depth and classes."""

# K classes, D width, C channels, h w patch side

import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdeitlt.errors import UserError, counted
from fastdeitlt.models.convert import check_dimensions, official_info, resample_pos_embed, size_of
from fastdeitlt.models.state import State, load_exact, read_safetensors, read_torch, tensors
from fastdeitlt.models.teacher import check_class_map
from fastdeitlt.models.vit import NUM_PREFIX, DistilledViT
from fastdeitlt.store.checkpoint import read_folder

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_LAYER_SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
"""Layer scale of a block -> the linear layer whose output it multiplies."""
_NEEDED = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "patch_embed.proj.bias": 1, "norm.weight": 1}
_PARTS = ("blocks", "cls_token", "dist_token", "head", "head_dist", "norm", "patch_embed", "pos_embed")
_UNUSED = ("mask_token", "pre_logits")
_HEADS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")

log = logging.getLogger("fastdeitlt")


@dataclass(frozen=True)
class Start:
    """Initial weights under timm's names, with their classes and normalisation."""

    state: State
    class_names: list[str] | None = None
    """Name of each label."""
    class_map: list[int] | None = None
    """Row of each label in the heads; None: the same."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def start_from(
    student: DistilledViT,
    path: str | Path,
    class_names: list[str] | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Load a plain or distilled ViT's weights into a student; log the adaptations.

    A plain ViT's CLS token and head initialise the DIST token and head too. Position embeddings and patches are
    resampled as in timm. A shallower student gets the first blocks; in a deeper one further blocks are identities. Head
    rows are matched by class name if both sides have names, else kept if there are as many classes; others are random.
    A different input normalisation is compensated in the patch embedding; a file without one is assumed to have the
    student's.

    Args:
        path: run or model folder, a folder with config.json of timm, .safetensors, or .pth.
        class_names: names of the student's classes.
        mean, std: normalisation of the student's input.

    Raises:
        UserError: no such file, damaged, contains code, another width, or not a ViT under timm's names.
    """
    start = _read(Path(path))
    what, notes = f"student.init {path}", []
    _check(start.state, student, what)
    state, is_plain = _with_dist(_without_layer_scale(start.state))
    if is_plain:
        notes.append("DIST token copied from CLS")
    patch = state["patch_embed.proj.weight"]
    if patch.shape[-1] != student.patch:
        notes.append(f"patches resampled from {patch.shape[-1]} to {student.patch} pixels")
        from timm.layers import resample_patch_embed  # timm is slow to import

        state["patch_embed.proj.weight"] = resample_patch_embed(patch, [student.patch, student.patch])
    tokens = state["pos_embed"].shape[1]
    if tokens != student.pos_embed.shape[1]:
        state["pos_embed"] = resample_pos_embed(state["pos_embed"], student.pos_embed.shape[1])
        sides = (round((n - NUM_PREFIX) ** 0.5) for n in (tokens, student.pos_embed.shape[1]))
        notes.append("positions resampled from {0}x{0} to {1}x{1}".format(*sides))
    if start.mean and start.std and (start.mean, start.std) != (tuple(mean), tuple(std)):
        _renormalise(state, start, mean, std)
        notes.append("input normalisation compensated")
    notes += _fit_depth(state, student)
    notes.append(_fit_heads(state, student, start, class_names))
    if not (start.mean and start.std):
        notes.append("input normalisation not stated, assumed to be augment.mean and augment.std")
    load_exact(student, state, what)
    log.info("student: initial weights from %s (%s)", path, ", ".join(notes))


def shape_of(path: str | Path) -> tuple[str, int, int, int]:
    """Return width name, patch, depth and image size in pixels of initial weights.

    Raises:
        UserError: no such file, damaged, contains code, a width that no student has, or not a ViT under timm's names.
    """
    state, what = _read(Path(path)).state, f"student.init {path}"
    check_dimensions(state, _NEEDED, "ViT with a CLS token", what)
    size, patch = size_of(state, what), state["patch_embed.proj.weight"].shape[-1]
    depth = len({found[1] for key in state if (found := _BLOCK.fullmatch(key))})
    side = math.isqrt(_with_dist(state)[0]["pos_embed"].shape[1] - NUM_PREFIX)
    return size, patch, depth, side * patch


def _read(path: Path) -> Start:
    if path.is_dir() and (path / "config.json").is_file():
        return _read_timm(path)
    if path.is_dir():
        state, manifest = read_folder(path, "student")
        norms = (manifest.preprocess.mean, manifest.preprocess.std) if manifest.preprocess else ()
        return Start(state, manifest.class_names, manifest.class_map, *norms)
    if not path.is_file():
        raise UserError(
            f"student.init {path}: no such file or folder, expected a run folder, a .pth or a .safetensors file"
        )
    if path.suffix == ".safetensors":
        return Start(tensors(read_safetensors(path), path))
    content = read_torch(path)
    return Start(tensors(content, path, ("model", "state_dict")), class_map=official_info(content).get("class_map"))


def _read_timm(folder: Path) -> Start:
    """Read a folder in the layout of timm's ``local-dir:`` and the Hugging Face hub."""
    try:
        info = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"student.init {folder}: config.json cannot be read ({error}). Export it again.") from None
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"student.init {folder}: no model.safetensors beside config.json. Copy the folder again.")
    info = info if isinstance(info, dict) else {}
    inner = info.get("pretrained_cfg")
    facts = (inner if isinstance(inner, dict) else {}) | info
    names = facts.get("label_names")
    return Start(
        tensors(read_safetensors(weights), weights),
        names if isinstance(names, list) else None,
        mean=_three(facts.get("mean")),
        std=_three(facts.get("std")),
    )


def _three(value: Any) -> tuple[float, ...] | None:
    is_triple = isinstance(value, list) and len(value) == 3 and all(isinstance(part, int | float) for part in value)
    return tuple(map(float, value)) if is_triple else None


def _check(state: State, student: DistilledViT, what: str) -> None:
    check_dimensions(state, _NEEDED, "ViT with a CLS token", what)
    if alien := sorted({key.split(".")[0] for key in state} - {*_PARTS, *_UNUSED}):
        raise UserError(f"{what}: got key {alien[0]}, expected a plain or distilled ViT with timm's keys")
    width = state["cls_token"].shape[-1]
    if width != student.width:
        remedy = f"Use student.name=deit_{size_of(state, what)}_distilled_patch..."
        raise UserError(f"{what}: got width {width}, expected {student.width}. {remedy}")
    num_rows = len(state["head.weight"]) if "head.weight" in state else 0
    expected = dict(zip(_HEADS, [(num_rows, width), (num_rows,)] * 2, strict=True)) | {"pos_embed": (1, -1, width)}
    for key in state.keys() & expected.keys():
        shape = tuple(-1 if size == -1 else got for got, size in zip(state[key].shape, expected[key], strict=False))
        if shape != expected[key]:
            raise UserError(f"{what}: {key} has shape {list(state[key].shape)}, expected {list(expected[key])}")


def _without_layer_scale(state: State) -> State:
    """Fold layer scale, a factor by channel, into the branch's last linear layer."""
    folded = {key: value for key, value in state.items() if not key.startswith(_UNUSED)}
    for key, gamma_D in state.items():
        found = _BLOCK.fullmatch(key)
        layer = found and found[2] in _LAYER_SCALES and f"blocks.{found[1]}.{_LAYER_SCALES[found[2]]}"
        if layer and gamma_D.shape == folded.get(f"{layer}.bias", torch.empty(0)).shape:
            del folded[key]
            folded[f"{layer}.weight"] = folded[f"{layer}.weight"] * gamma_D[:, None]
            folded[f"{layer}.bias"] = folded[f"{layer}.bias"] * gamma_D
    return folded


def _with_dist(state: State) -> tuple[State, bool]:
    """Add a DIST token to a plain ViT: copies of the CLS token, position and head."""
    if "dist_token" in state:
        return state, False
    pos_embed_1ND, cls_token = state["pos_embed"], state["cls_token"]
    has_cls = round((pos_embed_1ND.shape[1]) ** 0.5) ** 2 != pos_embed_1ND.shape[1]
    cls_pos_11D = pos_embed_1ND[:, :1] if has_cls else torch.zeros_like(cls_token)
    patches_1ND = pos_embed_1ND[:, 1:] if has_cls else pos_embed_1ND
    more = {"dist_token": cls_token.clone(), "pos_embed": torch.cat((cls_pos_11D, cls_pos_11D, patches_1ND), 1)}
    heads = {f"head_dist.{key[5:]}": value.clone() for key, value in state.items() if key.startswith("head.")}
    return state | more | heads, True


def _renormalise(state: State, start: Start, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Adapt the patch embedding to another input mean and std, with the same output."""
    weight_DChw = state["patch_embed.proj.weight"]
    old_mean_C, mean_C, old_std_C, std_C = (torch.tensor(value) for value in (start.mean, mean, start.std, std))
    shift_C = (mean_C - old_mean_C) / old_std_C
    bias_D = state["patch_embed.proj.bias"] + (weight_DChw.sum((2, 3)) @ shift_C)
    scale_C = (std_C / old_std_C)[None, :, None, None]
    state |= {"patch_embed.proj.weight": weight_DChw * scale_C, "patch_embed.proj.bias": bias_D}


def _fit_depth(state: State, student: DistilledViT) -> list[str]:
    """Drop the last blocks or add identities to fit the depth; return notes."""
    depth, own = 1 + max((int(m[1]) for key in state if (m := _BLOCK.fullmatch(key))), default=-1), len(student.blocks)
    if depth > own:
        for key in [key for key in state if (m := _BLOCK.fullmatch(key)) and int(m[1]) >= own]:
            del state[key]
        return [f"the first {own} of {depth} blocks"]
    for key, value in student.state_dict().items():
        if (found := _BLOCK.fullmatch(key)) and int(found[1]) >= depth:
            ends = found[2].startswith(("attn.proj", "mlp.fc2"))
            state[key] = torch.zeros_like(value) if ends else value
    return [f"blocks {depth + 1} to {own} initialised as identities"] if depth < own else []


def _fit_heads(state: State, student: DistilledViT, start: Start, new: list[str] | None) -> str:
    """Move each class's row of the heads to its label; return a note for the log."""
    number, old = student.num_classes, start.class_names
    num_rows = len(state["head.weight"]) if "head.weight" in state else 0
    map_K = check_class_map(start.class_map or range(num_rows), num_rows).tolist() if num_rows else []
    by_name = bool(old and new and len(old) == num_rows)
    if by_name:
        label_of = {name: label for label, name in enumerate(old or ())}
        pairs = [(label, map_K[label_of[name]]) for label, name in enumerate(new or ()) if name in label_of]
    else:
        pairs = list(enumerate(map_K)) if num_rows == number else []
    labels, rows = [label for label, _ in pairs], [row for _, row in pairs]
    for key in _HEADS:
        value = student.state_dict()[key].detach().cpu().clone()
        if key in state:
            value[labels] = state[key][rows].to(value.dtype)
        state[key] = value
    if not pairs:
        return f"new heads for {counted(number, 'class')}"
    return f"heads of {len(pairs)} of {counted(number, 'class')} kept" + (" by name" if by_name else "")
