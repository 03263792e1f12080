"""Augmentation of a batch from the decoded set on the device, from crop to mix, in a chain of kernels.

    convolve           antialiased bicubic crop + resize + flip to integer crops (Pillow's), in two passes
    histogram, table   statistics and lookup tables, only for images that drew auto_contrast, equalize or contrast
    operate            the first operation, only for images whose second needs more than a value (about one in six)
    finish             operation(s), normalise, erase, Mixup / CutMix; writes channels last

Equal bit for bit to ``reference`` in float32: Pillow rounds to uint8 after each resizing pass and each operation, so
these stages cannot be fused. The launches depend on draws on the host, so this is not an op of a compiled graph.
Moves, an image of side 224 in bfloat16: the source crop, 0.2 MB of packed pixels written and read twice, 0.3 MB out.
Shapes: B batch, S output side, K taps, J images that need statistics.
"""

from functools import partial
from typing import Any

import fastdeitlt.kernels._augment_device as gpu
import numpy as np
import torch
import triton
from fastdeitlt.kernels._augment_plan import LaunchPlan, make_plan
from fastdeitlt.kernels._launch import (
    AotConfig,
    LaunchConfig,
    check,
    check_launchable,
    context_failure,
    interpreted,
    launch,
)
from fastdeitlt.kernels._measured import setting
from fastdeitlt.kernels._pick import refuse
from torch import Tensor
from triton.runtime.errors import TritonError

from fastdeitlt.config import AugmentConfig
from fastdeitlt.data import mixup
from fastdeitlt.data.augment import transform as torch_augment
from fastdeitlt.data.augment.transform import Draws
from fastdeitlt.data.mixup import MixDraw
from fastdeitlt.data.pixels.resize import crop_resize
from fastdeitlt.errors import UserError

TWO_LEVELS = 2 / 255
"""Difference of two values of an image beyond which it is not rounding."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COEFFICIENT_BLOCK = 16
FP_FUSION = False
"""A fused multiply-add rounds once where Pillow rounds twice."""
_launch = partial(launch, enable_fp_fusion=FP_FUSION)
SEARCHED = ("convolve", "histogram", "operate", "finish")
"""Kernels whose setting may be measured; its key is the kernel and the output side."""


def augment(
    pixels: Tensor,
    starts_B: np.ndarray,
    sizes_B2: np.ndarray,
    draws: Draws,
    mix: MixDraw,
    cfg: AugmentConfig,
    size: int,
    *,
    boxes_B4: np.ndarray | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Augment and mix a batch by its draws.

    Args:
        pixels: uint8, decoded images [H, W, 3] one after the other (``DecodedSet.pixels``).
        starts_B, sizes_B2: each image's first byte in ``pixels`` and its (height, width); on the host.
        draws, mix: of the recipe ``deit``, ``crop_jitter`` without its jitter, or ``none``.
        cfg: mean and std.
        size: output side.
        boxes_B4: the crops (top, left, height, width); None = as drawn for images of ``sizes_B2``.
        dtype: type of the images; everything before is float64, float32 or integer.

    Returns:
        images_BCHW, normalised, channels last in memory.

    Raises:
        UserError: pixels that are not uint8 or not on a CUDA device; images outside them, crops outside images; a
            padded crop or more than two operations; an odd number of images to mix.
    """
    boxes_B4 = draws.boxes(sizes_B2) if boxes_B4 is None else boxes_B4
    _check(pixels, starts_B, sizes_B2, boxes_B4, draws, mix, dtype)
    check_launchable("augment", pixels)
    plan = make_plan(starts_B, sizes_B2, boxes_B4, draws, mix, size)
    rows, jobs = (_upload(array, pixels.device) for array in (plan.rows, plan.jobs))
    first, second, separate = jobs.split([2 * plan.num_first, 2 * plan.num_second, plan.num_separate])
    crops = _resize(pixels, rows, plan, size)
    tables = torch.empty(max(plan.num_first + plan.num_second, 1), 3, 256, dtype=torch.uint8, device=pixels.device)
    config = _setting("operate", size, pixels.device)
    blocks = triton.cdiv(size * size, config.blocks["BLOCK"])
    if plan.num_first:
        _make_tables(first, rows, crops, tables, 0, gpu.FIRST.value, size)
    operated = crops
    if plan.num_separate:
        operated = torch.empty_like(crops)
        _launch(
            gpu.operate_kernel, (plan.num_separate, blocks), crops,
            separate, rows, crops, operated, tables, S=size, **_steps(config),
        )  # fmt: skip
    if plan.num_second:
        _make_tables(second, rows, operated, tables, plan.num_first, gpu.SECOND.value, size)
    return _finish(rows, crops, operated, tables, mix, cfg, size, dtype)


_agrees: bool | None = None
"""Whether kernels and torch agreed on the first batch of this process; None before it."""


def augment_checked(*arguments: Any, **options: Any) -> Tensor:
    """Run ``augment`` if its kernels are correct here, else ``reference``.

    Both have the same arguments. Only the first batch of a process is checked: computed by both, unmixed and, if even,
    mixed by Mixup and CutMix. If a kernel fails or differs, ``_pick`` refuses the op with one warning.

    Raises:
        UserError: a kernel broke the CUDA context; or as ``augment``.
    """
    global _agrees
    if _agrees is None:
        reason = _difference(*arguments, **options)
        _agrees = not reason
        if reason:
            refuse("augment", f"{reason}, using torch operations")
    return (augment if _agrees else reference)(*arguments, **options)


def _difference(
    pixels: Tensor, starts_B: np.ndarray, sizes_B2: np.ndarray, draws: Draws, mix: MixDraw, cfg: AugmentConfig,
    size: int, **options: Any,
) -> str:  # fmt: skip
    """Return how the kernels fail or differ from torch; "" if they agree."""
    mixes = [MixDraw()] if len(draws) % 2 else [MixDraw(), MixDraw(0.3), MixDraw(0.75, (0, size // 2, 0, size // 2))]
    for mixed in mixes:
        arguments = (pixels, starts_B, sizes_B2, draws, mixed, cfg, size)
        error = ""
        try:
            got = augment(*arguments, **options)
        except torch.OutOfMemoryError:
            raise
        except (TritonError, RuntimeError) as caught:
            error = " ".join(str(caught).split())[:200]
        if failure := context_failure(pixels.device):
            raise UserError(
                f"augment.impl=auto: the kernels broke the CUDA context on the first batch ({failure}). Set "
                "augment.impl=torch. Please report this."
            )
        if error:
            return f"it failed on the first batch ({error})"
        difference = (got.float() - reference(*arguments, **options).float()).abs()
        share_B = (~(difference <= TWO_LEVELS / min(cfg.std))).flatten(1).float().mean(1)
        if share_B.max().item() > 0.01:
            return f"its first batch differs from torch in {share_B.max().item():.0%} of an image's values"
    return ""


def reference(
    pixels: Tensor,
    starts_B: np.ndarray,
    sizes_B2: np.ndarray,
    draws: Draws,
    mix: MixDraw,
    cfg: AugmentConfig,
    size: int,
    *,
    boxes_B4: np.ndarray | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Compute ``augment`` with torch operations on any device."""
    boxes_B4 = draws.boxes(sizes_B2) if boxes_B4 is None else boxes_B4
    _check(pixels, starts_B, sizes_B2, boxes_B4, draws, mix, dtype)
    places = zip(starts_B.tolist(), sizes_B2.tolist(), strict=True)
    sources = [pixels[start : start + 3 * height * width].view(height, width, 3) for start, (height, width) in places]
    crops = crop_resize(sources, boxes_B4, size, exact=True)
    return mixup.apply(torch_augment.apply(crops, draws, cfg), mix).to(dtype)


def _check(
    pixels: Tensor, starts_B: np.ndarray, sizes_B2: np.ndarray, boxes_B4: np.ndarray, draws: Draws, mix: MixDraw,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    check("augment", "pixels", pixels, (None,), (torch.uint8,))
    batch, ends_B = len(draws), starts_B + 3 * sizes_B2.astype(np.int64).prod(axis=1)
    if starts_B.shape != (batch,) or sizes_B2.shape != (batch, 2):
        raise UserError(
            f"augment: got starts {starts_B.shape} and sizes {sizes_B2.shape}, expected {batch} of each, as draws"
        )
    if batch and (starts_B.min() < 0 or ends_B.max() > len(pixels)):
        raise UserError(
            f"augment: images: got an end at byte {ends_B.max()}, expected at most {len(pixels)}, the size of pixels"
        )
    if boxes_B4.shape != (batch, 4) or (boxes_B4[:, :2] + boxes_B4[:, 2:] > sizes_B2).any() or (boxes_B4 < 0).any():
        raise UserError(f"augment: boxes: got {boxes_B4.shape}, some outside the images, expected {batch} boxes inside")
    if dtype not in DTYPES:
        raise UserError(f"augment: got dtype {dtype}, expected one of {', '.join(str(d) for d in DTYPES)}")
    if draws.shift_B2.any() or draws.op_B2.shape[1] > 2:
        raise UserError(
            "augment: got padded crops or more than two operations, expected neither. Use data.augment.apply."
        )
    if batch % 2 and mix.lam != 1.0:
        raise UserError(f"augment: got a batch of {batch} images to mix, expected an even number")


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def default_config(kernel: str) -> LaunchConfig:
    """Return a kernel's setting without measurements."""
    return LaunchConfig({"BLOCK": 512 if kernel in ("operate", "finish") else 1024}, num_warps=4)


def _steps(config: LaunchConfig) -> dict[str, int]:
    """Return launch options with STEP, one pixel per thread.

    Half a block in the interpreter.
    """
    return config.options | {"STEP": config.blocks["BLOCK"] // 2 if interpreted() else 32 * config.num_warps}


def _setting(kernel: str, size: int, device: torch.device) -> LaunchConfig:
    return setting("augment", (kernel, size), device, default_config(kernel))


def _resize(pixels: Tensor, rows: Tensor, plan: LaunchPlan, size: int) -> Tensor:
    """Return the plan's crops [B, S, S], mirrored; a pixel is an int32, red lowest."""
    batch, device = len(rows) - 1, pixels.device
    weights = torch.empty(batch, 2, plan.taps, size, dtype=torch.int32, device=device)
    first = torch.empty(batch, 2, size, dtype=torch.int32, device=device)
    _launch(
        gpu.coefficients_kernel, (batch, 2, triton.cdiv(size, COEFFICIENT_BLOCK)), rows,
        rows, weights, first, S=size, K=plan.taps, BLOCK=COEFFICIENT_BLOCK, num_warps=4,
    )  # fmt: skip
    between = torch.empty(batch, plan.intermediate, dtype=torch.int32, device=device)
    crops = torch.empty(batch, size, size, dtype=torch.int32, device=device)
    config = _setting("convolve", size, device)
    passes = ((pixels, between, 0, plan.intermediate), (between, crops, plan.intermediate, size * size))
    for number, (source, target, source_size, target_size) in enumerate(passes):
        _launch(
            gpu.convolve_kernel, (batch, triton.cdiv(target_size, config.blocks["BLOCK"])), rows,
            rows, weights, first, source, target, source_size, target_size,
            PASS=number, S=size, K=plan.taps, **_steps(config),
        )  # fmt: skip
    return crops


def _make_tables(jobs: Tensor, rows: Tensor, images: Tensor, tables: Tensor, slot: int, field: int, size: int) -> None:
    """Fill the tables from index ``slot`` on, one for each job (image, statistic)."""
    num_jobs, config = len(jobs) // 2, _setting("histogram", size, images.device)
    counts = torch.zeros(num_jobs, 3, 256, dtype=torch.int32, device=images.device)
    lumas = torch.zeros(num_jobs, dtype=torch.int32, device=images.device)
    _launch(
        gpu.histogram_kernel, (num_jobs, triton.cdiv(size * size, config.blocks["BLOCK"])), images,
        jobs, images, counts, lumas, S=size, **config.options,
    )  # fmt: skip
    _launch(
        gpu.table_kernel, (num_jobs, 3), images,
        jobs, rows, counts, lumas, tables, slot, FIELD=field, S=size, num_warps=1,
    )  # fmt: skip


def _finish(
    rows: Tensor, crops: Tensor, operated: Tensor, tables: Tensor, mix: MixDraw, cfg: AugmentConfig,
    size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    batch, device = len(crops), crops.device
    scale, offset = torch_augment.affine(cfg.mean, cfg.std, device)
    images_BHWC = torch.empty(batch, size, size, 3, dtype=dtype, device=device)
    how = gpu.UNMIXED if mix.lam == 1.0 else gpu.CUTMIX if mix.box else gpu.MIXUP
    config = _setting("finish", size, device)
    _launch(
        gpu.finish_kernel, ((batch + 1) // 2, triton.cdiv(size * size, config.blocks["BLOCK"])), crops,
        rows, crops, operated, tables, torch_augment.normal_table(device), scale, offset, images_BHWC, batch,
        MIX=how.value, S=size, **_steps(config),
    )  # fmt: skip
    return images_BHWC.permute(0, 3, 1, 2)


def aot_configs() -> list[AotConfig]:
    """Return the shipped kernels.

    Side 224, bfloat16, for crops of up to 392 and up to 840 pixels per side.
    """
    types = {"rows": "*fp64", "tables": "*u8"}
    pixels = ("crops", "operated", "source", "target", "images")
    types |= dict.fromkeys((*pixels, "weights", "first", "jobs", "counts", "lumas"), "*i32")
    types |= dict.fromkeys(("source_size", "target_size", "slot", "B"), "i32")
    types |= dict.fromkeys(("quantiles", "scale", "offset"), "*fp32")

    def config(kernel: Any, constexprs: dict[str, Any], warps: int = 4, **others: str) -> AotConfig:
        signature = {name: (types | others)[name] for name in kernel.arg_names if name not in constexprs}
        sizes = tuple(name for name in ("source_size", "target_size") if name in signature)
        return AotConfig(kernel, signature, constexprs, num_warps=warps, divisible_by_16=sizes, fp_fusion=FP_FUSION)

    def block(kernel: str) -> dict[str, int]:
        config = default_config(kernel)
        return {"S": 224, "STEP": 32 * config.num_warps, **config.blocks}

    return [
        *(config(gpu.coefficients_kernel, {"S": 224, "K": k, "BLOCK": COEFFICIENT_BLOCK}) for k in (8, 16)),
        *(
            config(gpu.convolve_kernel, block("convolve") | {"PASS": number, "K": k}, source=kind)
            for number, kind in ((0, "*u8"), (1, "*i32"))
            for k in (8, 16)
        ),
        config(gpu.histogram_kernel, {"S": 224, **default_config("histogram").blocks}),
        config(gpu.table_kernel, {"S": 224, "FIELD": gpu.FIRST.value}, warps=1),
        config(gpu.operate_kernel, block("operate")),
        *(config(gpu.finish_kernel, block("finish") | {"MIX": mix}, images="*bf16") for mix in (0, 1, 2)),
    ]
