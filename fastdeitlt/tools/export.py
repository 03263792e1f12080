"""Export of students and teachers to timm, ONNX and torch.export, with checks.

timm: a folder for ``timm.create_model("local-dir:<folder>", pretrained=True)``, with a model card; bit-exact with
timm's default attention, but for LDAM's scale, which is multiplied into the classifier. onnx: one file with dynamic
batch size and outputs avg, cls and dist, or a teacher's logits. pt2: the same through torch.export. Logits are
uncalibrated; fitted temperatures, if any, are in ``facts``.
"""

# B batch, H height, W width, C channels, K classes

import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor, nn

from fastdeitlt.data.pixels.resize import centre_crop
from fastdeitlt.data.sets import embedded
from fastdeitlt.errors import UserError
from fastdeitlt.models.classifier import NormedLinear
from fastdeitlt.models.saved import Saved, open_saved
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT
from fastdeitlt.tools.model_card import model_card

log = logging.getLogger("fastdeitlt")
OUTPUTS, TEACHER_OUTPUTS = ("avg", "cls", "dist"), ("logits",)
FACTS = "fastdeitlt.json"
"""Name of the extra file in a .pt2 with ``facts``."""
INHERITED = ("architecture", "input_size", "fixed_input_size", "crop_mode", "first_conv", "classifier")
"""Entries kept of timm's pretrained_cfg."""
BATCH = {"images_BCHW": {0: torch.export.Dim("batch")}}
"""The dynamic axis."""
NUM_CHECKED = 5  # odd, and different from the traced batch size
MAX_DIFFERENCE = {"timm": 1e-5, "onnx": 1e-3, "pt2": 1e-3}
"""Format -> tolerance of logits, relative to the largest; another summation order gives 1e-7 to 1e-6."""


class ThreeOutputs(nn.Module):
    """Export interface of a student: images_BCHW to (avg, cls, dist) logits_BK."""

    def __init__(self, student: DistilledViT) -> None:
        super().__init__()
        self.student = student

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of the heads' mean, the CLS head and the DIST head."""
        cls_logits_BK, dist_logits_BK = self.student.forward_heads(images_BCHW)
        return (cls_logits_BK + dist_logits_BK) / 2, cls_logits_BK, dist_logits_BK


class OneOutput(nn.Module):
    """Export interface of a teacher: images_BCHW to (scaled logits_BK,)."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.network, self.logit_scale = teacher.network, teacher.logit_scale

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor]:
        """Return the network's scaled logits."""
        return (self.network(images_BCHW) * self.logit_scale,)


def _outputs(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the export interface of a model and its output names."""
    if isinstance(model, DistilledViT):
        return ThreeOutputs(model), OUTPUTS
    assert isinstance(model, Teacher)
    return OneOutput(model).eval(), TEACHER_OUTPUTS


def export(model_folder: str | Path, out: str | Path, format: str = "timm") -> Path:
    """Export a student or a teacher and verify the result.

    Args:
        model_folder: a model folder or a run folder, of a student or a teacher, or a released student checkpoint.
        out: the folder (timm) or file (onnx, pt2) to write; must not exist.
        format: timm, onnx or pt2.

    Returns:
        ``out``.

    Raises:
        UserError: an unknown format, an existing ``out``, a teacher without timm equivalent, a missing package, a full
            disk, or an export with different logits.
    """
    writers = {"timm": _to_timm, "onnx": _to_onnx, "pt2": _to_pt2}
    out = Path(out)
    if format not in writers:
        raise UserError(f"export: got format {format!r}, expected one of {', '.join(writers)}")
    if out.exists():
        raise UserError(f"export {out}: exists, expected a new name. Remove it or use another name.")
    saved = open_saved(model_folder)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    _refuse_full_disk(out, saved.model)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as folder:
        draft = Path(folder) / "export"
        difference = writers[format](saved.model, saved, draft)
        if not difference <= MAX_DIFFERENCE[format]:
            raise UserError(
                f"export {out}: logits of real images got a relative difference of {difference:.1e} from the model's, "
                f"expected at most {MAX_DIFFERENCE[format]}; nothing was written"
            )
        draft.rename(out)
    log.info(
        "%s: logits of %d real images agree with the model's (largest difference %.1e)", out, NUM_CHECKED, difference
    )
    return out


def _refuse_full_disk(out: Path, model: nn.Module) -> None:
    """Raise UserError if the disk is too full, before writers fail in different ways."""
    needed = int(1.2 * sum(tensor.nbytes for tensor in model.state_dict().values())) + 2**20  # the graph, the card
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise UserError(f"export {out}: {free // 2**20} MiB free, expected {needed // 2**20} MiB. Free space.")


def facts(saved: Saved) -> dict[str, Any]:
    """Return an export's metadata: classes, preprocessing, temperatures."""
    fitted = saved.calibration.temperatures if saved.calibration else {}
    return {
        "class_names": saved.class_names,
        "class_map": saved.class_map.tolist(),
        **saved.preprocess.model_dump(include={"mean", "std", "img_size", "crop_pct", "exif"}),
        "interpolation": "bicubic",
        "dataset": saved.info.get("dataset"),
        "outputs": _outputs(saved.model)[1],
        "temperatures": {head.lower(): value for head, value in fitted.items()} or None,
    }


def _real_images(saved: Saved) -> Tensor:
    """Return embedded test images with the model's preprocessing: images_BCHW."""
    paths = sorted(embedded.unpack().rglob("*.png"))[-NUM_CHECKED:]
    pixels = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths]
    return saved.normalise(centre_crop(pixels, saved.preprocess.resize, saved.preprocess.img_size)).contiguous()


def _difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest logit difference relative to the largest logit."""
    worst = max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))
    return worst / max(float(head.abs().max()) for head in expected)


def _to_timm(model: nn.Module, saved: Saved, out: Path) -> float:
    architecture, model_args = timm_teacher(model, saved) if isinstance(model, Teacher) else timm_architecture(model)
    network = model.network if isinstance(model, Teacher) else model
    twin: Any = timm.create_model(architecture, pretrained=False, num_classes=saved.num_classes, **model_args)
    twin.load_state_dict(network.state_dict())
    if isinstance(model, Teacher):
        for parameter in twin.get_classifier().parameters():
            parameter.data *= model.logit_scale
    # timm's tag, licence and origin are those of Facebook's weights
    twin.pretrained_cfg = {key: twin.pretrained_cfg[key] for key in INHERITED}
    side = saved.preprocess.img_size
    own = ("mean", "std", "crop_pct", "interpolation")
    travels = facts(saved)
    save_for_hf(
        twin,
        str(out),
        model_config={"label_names": saved.class_names}
        | {name: travels[name] for name in ("class_map", "exif", "temperatures")},
        model_args=model_args,
        safe_serialization=True,
        data_config={"input_size": (3, side, side)} | {name: travels[name] for name in own},
    )
    weights = out / "model.safetensors"
    weights.chmod((out / "config.json").stat().st_mode)  # safetensors creates files with mode 0600
    (out / "README.md").write_text(model_card(saved, architecture, model_args), encoding="utf-8")
    images_BCHW = _real_images(saved)
    with torch.inference_mode():
        loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        return _difference([loaded(images_BCHW)], _outputs(model)[0](images_BCHW)[:1])


def timm_teacher(teacher: Teacher, saved: Saved) -> tuple[str, dict[str, Any]]:
    """Return timm's name of a teacher's network and its arguments.

    Raises:
        UserError: timm has no such network, or only with another classifier.
    """
    arch = saved.info["model"]["arch"]
    has_cosine = any(isinstance(module, NormedLinear) for module in teacher.modules())
    if has_cosine or not timm.is_model(arch):
        what = f"{arch} with LDAM's cosine classifier" if has_cosine else arch
        raise UserError(f"--format: got timm, which has no {what}, expected onnx or pt2")
    return arch, {}


def timm_architecture(student: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return timm's name of a student and its non-default arguments."""
    assert isinstance(student, DistilledViT)
    name, width, heads = {192: ("tiny", 192, 3), 384: ("small", 384, 6)}.get(student.width, ("base", 768, 12))
    defaults = {"img_size": 224, "patch_size": 16, "embed_dim": width, "depth": 12, "num_heads": heads}
    values = {
        "img_size": student.img_size,
        "patch_size": student.patch,
        "embed_dim": student.width,
        "depth": len(student.blocks),
        "num_heads": student.get_submodule("blocks.0.attn").heads,
    }
    return f"deit_{name}_distilled_patch16_224", {key: values[key] for key in values if values[key] != defaults[key]}


def _trace(model: nn.Module, saved: Saved) -> torch.export.ExportedProgram:
    side = saved.preprocess.img_size
    example = (torch.zeros(2, 3, side, side),)
    return torch.export.export(_outputs(model)[0], example, dynamic_shapes=BATCH)


def _to_onnx(model: nn.Module, saved: Saved, out: Path) -> float:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UserError(f"export: {error.name} is missing. Run pip install 'fastdeitlt[onnx]'.") from None
    whole, names = _outputs(model)
    program = torch.onnx.export(
        _trace(model, saved),
        input_names=["images"],
        output_names=list(names),
        dynamic_shapes=BATCH,  # else the axis has a generated name
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # only the old exporter returns None
    program.model.metadata_props.update({name: json.dumps(value) for name, value in facts(saved).items()})
    program.save(str(out))
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    images_BCHW = _real_images(saved)
    got = [torch.from_numpy(head) for head in session.run(list(names), {"images": images_BCHW.numpy()})]
    with torch.inference_mode():
        return _difference(got, whole(images_BCHW))


def _to_pt2(model: nn.Module, saved: Saved, out: Path) -> float:
    program = _trace(model, saved)
    with out.open("wb") as file:
        torch.export.save(program, file, extra_files={FACTS: json.dumps(facts(saved))})
    images_BCHW = _real_images(saved)
    with out.open("rb") as file, torch.inference_mode():
        return _difference(torch.export.load(file).module()(images_BCHW), _outputs(model)[0](images_BCHW))
