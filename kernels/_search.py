"""Launch settings that `fastdeitlt tune` tries, by op and by key of a pass, the default first."""

from collections.abc import Mapping

import fastdeitlt.kernels._attention_launch as attending
import torch
from fastdeitlt.kernels import add_layernorm, bias_gelu, joint_loss
from fastdeitlt.kernels._launch import LaunchConfig
from fastdeitlt.kernels._measured import Key

Settings = Mapping[Key, list[LaunchConfig]]
CPU = torch.device("cpu")  # where launch settings are the defaults


def attention(problem: attending.Problem, device: torch.device) -> Settings:
    """Return settings of query rows a program, tiles, tail, warps and stages.

    The keys kernel comes before the backward, which needs it unless one program computes a whole head.
    """
    forward_key, backward_key, keys_key = (problem.key(name) for name in ("forward", "backward", "backward_keys"))
    sm = attending.architecture(device)
    defaults = attending.forward_config(problem, sm), attending.backward_config(problem, sm)
    if problem.rows <= attending.FEW_ROWS:
        blocks = [{"ROWS": attending.FEW_ROWS, "TAIL": 0, "BLOCK_N": n} for n in (32, 64, 128)]
        pairs = [(w, s) for w in (1, 2, 4) for s in (1, 2, 3)]
        forward = [LaunchConfig(b | {"BLOCK_M": attending.FEW_ROWS}, w, s) for b in blocks for w, s in pairs]
        backward = [LaunchConfig(b, w, s) for b in blocks for w, s in pairs]
        return {forward_key: [defaults[0], *forward], backward_key: [defaults[1], *backward]}
    whole = (attending.ONE_PROGRAM,) if problem.whole_row else ()
    parts = tuple(rows for rows in (64, 128) if rows < problem.rows)
    forward = [
        LaunchConfig({"ROWS": r, "BLOCK_M": m, "TAIL": t, "BLOCK_N": n}, w, s)
        for r in (64, 128, *whole) for m, w in ((64, 4), (128, 8)) if m <= r
        for t in (0, 16) for n in ((64,) if problem.whole_row else (64, 128)) for s in (1, 2, 3)
    ]  # fmt: skip
    backward = [
        LaunchConfig({"ROWS": r, "BLOCK_N": n, "TAIL": t}, w, s)
        for r in (*whole, *parts) for n in (32, 64) for t in (0, 16) for w in (4, 8) for s in (1, 2, 3)
    ]  # fmt: skip
    keys = [
        LaunchConfig({"BLOCK_N": n, "BLOCK_M": m}, w, s)
        for n in (64, 128) for m in (32, 64) for w in (4, 8) for s in (1, 2, 3)
    ]  # fmt: skip
    return {
        forward_key: [defaults[0], *forward],
        **({keys_key: [attending.keys_config(problem, sm), *keys]} if parts else {}),
        backward_key: [defaults[1], *backward],
    }


def add_layer_norm(width: int, stream: torch.dtype) -> Settings:
    """Return settings of rows per tile and warps.

    The backward also has stages and programs per multiprocessor.
    """
    forward_key, backward_key = (add_layernorm.key(forward, width, stream) for forward in (True, False))
    defaults = [add_layernorm.launch_config(forward, width, stream, CPU) for forward in (True, False)]
    block = forward_key[1]
    rows = [r for r in (1, 2, 4, 8, 16) if 512 <= r * block <= 8192] or [1]
    forward = [LaunchConfig({"ROWS": r, "BLOCK_D": block}, w) for r in rows for w in (1, 2, 4, 8)]
    backward = [
        LaunchConfig({"ROWS": r, "BLOCK_D": block, "PROGRAMS": p}, w, s)
        for r in rows for p in (1, 2, 3, 4, 6) for w in (2, 4, 8) for s in (1, 2, 3)
    ]  # fmt: skip
    return {forward_key: [defaults[0], *forward], backward_key: [defaults[1], *backward]}


def bias_gelus(width: int) -> Settings:
    """Return settings of tiles and warps.

    The backward also has stages and programs per multiprocessor.
    """
    tiles = [(r, b) for r in (1, 2, 4, 8, 16) for b in (128, 256, 512, 1024) if 1024 <= r * b <= 4096 and b <= width]
    forward = [LaunchConfig({"ROWS": r, "BLOCK": b}, w) for r, b in tiles for w in (2, 4, 8)]
    backward = [
        LaunchConfig({"ROWS": r, "BLOCK": b, "PROGRAMS": p}, w, s)
        for r, b in tiles for p in (2, 4, 8) for w in (4, 8) for s in (1, 2, 3)
    ]  # fmt: skip
    return {("forward", width): [bias_gelu.FORWARD, *forward], ("backward", width): [bias_gelu.BACKWARD, *backward]}


def joint_losses(num_classes: int, element_size: int) -> Settings:
    """Return settings of block and warps for both passes."""
    settings: dict[Key, list[LaunchConfig]] = {}
    for forward, largest in ((True, 16384), (False, 4096)):
        key = joint_loss.key(forward, num_classes, element_size)
        sizes = {size for size in (key[1], key[1] // 2, key[1] // 4, 4096, 2048, 1024) if 16 <= size <= largest}
        blocks = [LaunchConfig({"BLOCK": size}, w) for size in sorted(sizes) for w in (1, 2, 4, 8, 16)]
        settings[key] = [joint_loss.launch_config(forward, num_classes, element_size, CPU), *blocks]
    return settings


def elementwise(defaults: Mapping[Key, LaunchConfig]) -> Settings:
    """Return settings of block and warps for elementwise kernels.

    Up to twice the default's elements a thread: with more, ptxas takes minutes and registers run out.
    """
    pairs = [(b, w) for b in (256, 512, 1024, 2048, 4096) for w in (2, 4, 8, 16) if 32 * w <= b]

    def near(default: LaunchConfig) -> list[LaunchConfig]:
        most = 2 * default.blocks["BLOCK"] // default.num_warps  # of a warp
        return [LaunchConfig({"BLOCK": b}, w) for b, w in pairs if b <= most * w]

    return {key: [default, *near(default)] for key, default in defaults.items()}
