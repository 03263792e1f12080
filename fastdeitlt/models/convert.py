"""Student checkpoints of the official code, of timm and of a run. Teachers: teachers/convert.py."""
# N tokens (CLS, DIST, patches), D width, H W patch grid

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastdeitlt.errors import UserError, counted
from fastdeitlt.models.state import State, load_exact, read_safetensors, read_torch, tensors
from fastdeitlt.models.vit import NUM_PREFIX, SIZES, DistilledViT, create_student
from fastdeitlt.store.checkpoint import read_folder

_NEEDED = {"cls_token": 3, "dist_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "head.weight": 2}
"""Tensors of a distilled ViT -> their dimensions."""


def resample_pos_embed(pos_embed_1ND: Tensor, num_tokens: int) -> Tensor:
    """Resample position embeddings to a square grid by timm, keeping the prefix."""
    if pos_embed_1ND.shape[1] == num_tokens:
        return pos_embed_1ND
    from timm.layers import resample_abs_pos_embed  # timm is slow to import

    _side(pos_embed_1ND.shape[1])
    side = _side(num_tokens)
    return resample_abs_pos_embed(pos_embed_1ND, [side, side], num_prefix_tokens=NUM_PREFIX)


def _side(num_tokens: int) -> int:
    side = round(max(num_tokens - NUM_PREFIX, 0) ** 0.5)
    if side == 0 or side * side != num_tokens - NUM_PREFIX:
        raise UserError(
            f"pos_embed: got {num_tokens} tokens, expected CLS, DIST and a square grid of patches (a distilled ViT)"
        )
    return side


def check_dimensions(state: State, needed: Mapping[str, int], kind: str, what: str) -> None:
    """Check that a state, ``what``, has tensors of the ``needed`` dimensions.

    Raises:
        UserError: a tensor is missing or has other dimensions.
    """
    for key, ndim in needed.items():
        if key not in state or state[key].ndim != ndim:
            raise UserError(f"{what}: no {key} with {ndim} dimensions, expected a {kind} with timm's keys")


def size_of(state: State, what: str) -> str:
    """Return the name of the size ("tiny", ..) that a ViT's width belongs to.

    Raises:
        UserError: a width that no student has.
    """
    width = state["cls_token"].shape[-1]
    size = next((name for name, (known, _, _) in SIZES.items() if known == width), None)
    if size is None:
        known = ", ".join(str(known) for known, _, _ in SIZES.values())
        raise UserError(f"{what}: got width {width}, expected one of {known}")
    return size


def load_student_state(model: DistilledViT, state: State, what: str = "student checkpoint") -> None:
    """Load weights with timm's keys, interpolating position embeddings.

    Raises:
        UserError: not a distilled ViT, another class count, or keys and shapes that do not fit.
    """
    check_dimensions(state, _NEEDED, "distilled ViT", what)
    if len(state["head.weight"]) != model.num_classes:
        raise UserError(f"{what}: got {counted(len(state['head.weight']), 'class')}, expected {model.num_classes}")
    pos_embed = resample_pos_embed(state["pos_embed"], model.pos_embed.shape[1])
    load_exact(model, state | {"pos_embed": pos_embed}, what)


def load_student_checkpoint(path: str | Path) -> tuple[DistilledViT, dict[str, Any]]:
    """Load a student in eval mode from a folder, a checkpoint or timm's weights.

    Args:
        path: a folder with manifest.json, a .pth of {"model", "model_ema", "args", ...}, or .safetensors.

    Returns:
        The model, and its metadata: ``model`` {name, num_classes, img_size, depth}; if stored, ``class_map`` (the
        class of each label of the data set), ``class_names``, ``preprocess``, ``epoch``, ``args`` (the official
        command line) and accuracies.

    Raises:
        UserError: no such file, damaged, contains code, not a distilled ViT.
    """
    path = Path(path)
    info: dict[str, Any] = {}
    if path.is_dir():
        state, manifest = read_folder(path, "student")
        info = manifest.model_dump()
    elif not path.is_file():
        raise UserError(f"student {path}: no such file or folder, expected a model folder or a checkpoint")
    elif path.suffix == ".safetensors":
        state = tensors(read_safetensors(path), path)
    else:
        content = read_torch(path)
        state = tensors(content, path, ("model", "state_dict"))
        info = official_info(content)
    arch = _arch_of(state, f"student {path}")
    info["model"] = info.get("model", {}) | arch
    model = create_student(arch["name"], arch["num_classes"], drop_path=0.0, depth=arch["depth"])
    load_student_state(model, state, f"student {path}")
    return model.eval(), info


def _arch_of(state: State, what: str) -> dict[str, Any]:
    """Infer name, classes, image size and depth of a distilled ViT from its shapes."""
    check_dimensions(state, _NEEDED, "distilled ViT", what)
    size, patch = size_of(state, what), state["patch_embed.proj.weight"].shape[-1]
    img_size = _side(state["pos_embed"].shape[1]) * patch
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    name = f"deit_{size}_distilled_patch{patch}_{img_size}"
    return {"name": name, "num_classes": len(state["head.weight"]), "img_size": img_size, "depth": depth}


def official_info(content: Any) -> dict[str, Any]:
    """Return the metadata of an official checkpoint as plain Python."""
    if not isinstance(content, dict):
        return {}
    info: dict[str, Any] = {key: float(value) for key, value in content.items() if isinstance(value, float | np.number)}
    if isinstance(content.get("epoch"), int):
        info["epoch"] = content["epoch"]
    if isinstance(content.get("args"), argparse.Namespace):
        info["args"] = vars(content["args"])
        if info["args"].get("class_map") is not None:
            info["class_map"] = [int(c) for c in info["args"]["class_map"]]
    return info
