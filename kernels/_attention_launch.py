"""Launch settings and launches of ``attention``; the device code is in ``_attention_device``.

N = 198 is no power of two, so tiles are unequal: keys 128 + 64 + 16 stay on chip, queries are loaded in three blocks
of 64, then one of 16. With whole rows on chip the softmax needs no running rescale, and one program per head computes
dQ, dK and dV. Longer sequences and wider heads stream the keys, and dQ and dK/dV are two launches.
"""

from typing import Any, NamedTuple

import torch
import triton
from fastdeitlt.kernels._attention_device import attention_bwd_kernel, attention_bwd_keys_kernel, attention_fwd_kernel
from fastdeitlt.kernels._launch import AotConfig, LaunchConfig, launch
from fastdeitlt.kernels._measured import setting
from torch import Tensor

FEW_ROWS, SHORT_ROW_TOKENS = 16, 80
WHOLE_ROW_TOKENS, WHOLE_ROW_WIDTH = 256, 64
ONE_PROGRAM = 1024  # ROWS of a program that computes a whole head


class Problem(NamedTuple):
    """Shapes that a launch is specialised for: N tokens, R query rows, H heads of width D, layout."""

    tokens: int
    rows: int
    heads: int
    width: int
    packed: bool

    @classmethod
    def of(cls, q: Tensor, kv: Tensor | None) -> "Problem":
        """Return the problem of a packed or separate input.

        Packed [B, N, 3, H, D], or queries [B, R, H, D] and [B, N, 2, H, D].
        """
        return cls((q if kv is None else kv).shape[1], q.shape[1], q.shape[-2], q.shape[-1], kv is None)

    @property
    def constexprs(self) -> dict[str, Any]:
        """Compile-time arguments of all three kernels; strides in elements."""
        hidden = self.heads * self.width
        return {
            "H": self.heads,
            "N": self.tokens,
            "D": self.width,
            "R": self.rows,
            "Q_TOKEN": 3 * hidden if self.packed else hidden,
            "KV_TOKEN": 3 * hidden if self.packed else 2 * hidden,
            "BLOCK_D": triton.next_power_of_2(self.width),
        }

    @property
    def whole_row(self) -> bool:
        """Whether all scores of a query row fit on chip."""
        return self.tokens <= WHOLE_ROW_TOKENS and self.width <= WHOLE_ROW_WIDTH

    def key(self, name: str) -> tuple[str, int, int, int]:
        """Return the key of a pass's measured setting.

        Pass, tokens, query rows, head width.
        """
        return name, self.tokens, self.rows, self.width


Chunks = tuple[tuple[int, int, bool], ...]
Loops = tuple[tuple[int, int, int, bool], ...]


def chunks(size: int, start: int, waste: float) -> Chunks:
    """Cover ``size`` by powers of two from 16 on: (start, width, masked).

    Each may idle ``waste * size`` rows.
    """
    covered: Chunks = ()
    while (left := size - sum(chunk[1] for chunk in covered)) > 0:
        width = max(16, triton.next_power_of_2(left))
        if width > 16 and width - left > waste * size:
            width //= 2
        covered += ((start + size - left, width, width > left),)
    return covered


def loops(size: int, block: int, tail: int) -> Loops:
    """Return loops (start, stop, block, masked): one, or whole blocks and a tail."""
    whole = size // block * block
    if not 0 < size - whole <= tail:
        return ((0, size, block, size > whole),)
    return ((0, whole, block, False),) * (whole > 0) + ((whole, size, tail, size - whole < tail),)


SETTINGS_OF = {80: 80, 86: 86, 89: 86, 90: 90, 100: 100, 120: 86}
"""Compute capability -> capability whose settings it uses; 86 for all with 99 KiB of shared memory a program."""


def architecture(device: torch.device) -> int:
    """Return the capability whose settings a device uses; 90 in the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return SETTINGS_OF.get(10 * major + minor, {8: 80, 9: 90, 10: 100}.get(major, 86))


def forward_config(problem: Problem, sm: int) -> LaunchConfig:
    """Return the forward's default: free of spills on its GPU, not measured.

    A tail of 16 saves work. At 198 tokens sm_80 has too few registers for it, and sm_100 would run fewer programs at
    once; so would loads in two stages there, which need up to four times the tensor memory.
    """
    if problem.rows <= FEW_ROWS:
        warps = 2 if sm == 86 and problem.whole_row else 4
        return LaunchConfig({"ROWS": FEW_ROWS, "BLOCK_M": FEW_ROWS, "TAIL": 0, "BLOCK_N": 64}, warps, 2)
    stages = 1 if sm == 100 else 2
    if problem.whole_row:
        tail = FEW_ROWS if problem.tokens <= SHORT_ROW_TOKENS or sm == 90 else 0
        return LaunchConfig({"ROWS": ONE_PROGRAM, "BLOCK_M": 64, "TAIL": tail, "BLOCK_N": 64}, 4, stages)
    return LaunchConfig({"ROWS": 128, "BLOCK_M": 128, "TAIL": 0, "BLOCK_N": 64}, 8, stages)


def backward_config(problem: Problem, sm: int) -> LaunchConfig:
    """Return the default of ``attention_bwd_kernel``: no spills, not measured."""
    if problem.rows <= FEW_ROWS:
        return LaunchConfig({"ROWS": FEW_ROWS, "BLOCK_N": 32, "TAIL": 0}, 4, 2)
    is_short = problem.whole_row and problem.rows <= SHORT_ROW_TOKENS
    if not problem.whole_row or (sm == 86 and not is_short):  # 86 has too few registers for a whole head
        wide = problem.width > 64
        block = 32 if wide and sm in (80, 86) else 64
        return LaunchConfig({"ROWS": 64, "BLOCK_N": block, "TAIL": 0}, 8 if wide else 4, 2)
    if is_short:
        return LaunchConfig({"ROWS": ONE_PROGRAM, "BLOCK_N": 64, "TAIL": 0 if sm in (80, 86) else 16}, 4, 2)
    block, tail, stages = {80: (32, 0, 1), 90: (64, 16, 2), 100: (64, 0, 1)}[sm]
    return LaunchConfig({"ROWS": ONE_PROGRAM, "BLOCK_N": block, "TAIL": tail}, 8, stages)


def keys_config(problem: Problem, sm: int) -> LaunchConfig:
    """Return the default of ``attention_bwd_keys_kernel``: no spills, not measured."""
    return LaunchConfig({"BLOCK_N": 64, "BLOCK_M": 32 if sm == 86 else 64}, 8 if problem.width > 64 else 4, 2)


def forward_constexprs(problem: Problem, config: LaunchConfig) -> dict[str, Any]:
    """Return the compile-time arguments of ``attention_fwd_kernel``."""
    rows, block = config.blocks["ROWS"], config.blocks["BLOCK_N"]
    streamed = 0 if problem.whole_row else (problem.tokens - 1) // block * block
    queries = loops(problem.rows, config.blocks["BLOCK_M"], config.blocks["TAIL"])
    return problem.constexprs | {
        "ROWS": rows,
        "QUERIES": queries if problem.rows <= rows else ((0, rows, config.blocks["BLOCK_M"], True),),
        "STREAMED": streamed,
        "BLOCK_N": block,
        "STREAM_CHUNK": ((0, block, False),),
        "RESIDENT": chunks(problem.tokens - streamed, streamed, waste=0.1),
    }


def one_program(problem: Problem, config: LaunchConfig) -> bool:
    """Return whether one backward program has all queries (and computes dK and dV)."""
    return problem.rows <= config.blocks["ROWS"]


def backward_constexprs(problem: Problem, config: LaunchConfig) -> dict[str, Any]:
    """Return the compile-time arguments of ``attention_bwd_kernel``."""
    rows, whole = config.blocks["ROWS"], one_program(problem, config)
    return problem.constexprs | {
        "ROWS": rows,
        "RESIDENT": chunks(problem.rows, 0, waste=0.3) if whole else ((0, rows, True),),
        "KEYS": loops(problem.tokens, config.blocks["BLOCK_N"], config.blocks["TAIL"]),
        "WRITE_DKV": whole,
    }


def _options(config: LaunchConfig) -> dict[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def launch_forward(q: Tensor, kv: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Fill ``out`` [B, R, H D] and ``lse`` [B, H, R]."""
    problem = Problem.of(q, kv)
    default = forward_config(problem, architecture(q.device))
    config = setting("attention", problem.key("forward"), q.device, default)
    grid = (q.shape[0] * problem.heads * triton.cdiv(problem.rows, config.blocks["ROWS"]),)
    keys = q[:, :, 1:] if kv is None else kv
    constexprs = forward_constexprs(problem, config)
    launch(attention_fwd_kernel, grid, q, q, keys, out, lse, **constexprs, **_options(config))


def launch_backward(
    q: Tensor, kv: Tensor | None, out: Tensor, grad_out: Tensor, lse: Tensor, dq: Tensor, dkv: Tensor, sums: bool
) -> Tensor:
    """Fill ``dq`` and ``dkv``; a packed gradient is all in ``dq``.

    Returns:
        [2, H, D] float32 sums over all rows of dQ and of ``grad_out``, if ``sums``; else empty.
    """
    problem = Problem.of(q, kv)
    default = backward_config(problem, architecture(q.device))
    config = setting("attention", problem.key("backward"), q.device, default)
    heads = q.shape[0] * problem.heads
    keys, dkeys = (q[:, :, 1:], dq[:, :, 1:]) if kv is None else (kv, dkv)
    whole = one_program(problem, config)
    delta = lse if whole else torch.empty_like(lse)
    parts = triton.cdiv(problem.rows, config.blocks["ROWS"])
    shape = (q.shape[0], parts, 2, problem.heads, problem.width) if sums else (0,)
    shares = torch.empty(shape, dtype=torch.float32, device=q.device)
    launch(
        attention_bwd_kernel, (heads * parts,), q,
        q, keys, out, grad_out, lse, delta, dq, dkeys, shares if sums else None,
        **backward_constexprs(problem, config), **_options(config),
    )  # fmt: skip
    if not whole:
        default = keys_config(problem, architecture(q.device))
        config = setting("attention", problem.key("backward_keys"), q.device, default)
        launch(
            attention_bwd_keys_kernel, (heads * triton.cdiv(problem.tokens, config.blocks["BLOCK_N"]),), q,
            q, keys, grad_out, lse, delta, dkeys, **problem.constexprs, **config.options,
        )  # fmt: skip
    return shares.sum((0, 1)) if sums else shares


def aot_configs() -> list[AotConfig]:
    """Return the shipped kernels.

    The students' token counts, every head width, the two first rows.

    In bfloat16, once in float16; the backward with the sums for the projection's bias, as in the student, and once
    without.
    """
    whole = [(66, 64), (198, 64), (198, 32), (258, 64), (198, 96), (578, 64), (578, 128)]
    problems = [Problem(tokens, tokens, 768 // width, width, packed=True) for tokens, width in whole]
    problems += [Problem(198, 2, 12, 64, packed=False), Problem(578, 2, 6, 128, packed=False)]
    cases = [("bf16", problem) for problem in problems] + [("fp16", problems[1])]
    settings = sorted(set(SETTINGS_OF.values()))
    found = [config for kind, problem in cases for sm in settings for config in _aot(kind, problem, sm, True)]
    return found + [_aot("bf16", problems[1], sm, False)[1] for sm in settings]


def _aot(kind: str, problem: Problem, sm: int, sums: bool) -> list[AotConfig]:
    forward, backward, keys = forward_config(problem, sm), backward_config(problem, sm), keys_config(problem, sm)
    launches = [
        (attention_fwd_kernel, forward_constexprs(problem, forward), forward),
        (attention_bwd_kernel, backward_constexprs(problem, backward) | ({} if sums else {"p_sums": None}), backward),
        (attention_bwd_keys_kernel, problem.constexprs | keys.blocks, keys),
    ]
    architectures = tuple(compiled for compiled, takes in SETTINGS_OF.items() if takes == sm)
    configs = []
    for kernel, constexprs, config in launches[: 2 if one_program(problem, backward) else 3]:
        floats = ("p_lse", "p_delta", "p_sums")
        types = {name: f"*{kind}" for name in kernel.arg_names if name not in floats}
        blocks = " ".join(f"{name}={size}" for name, size in config.blocks.items())
        note = f"N={problem.tokens} R={problem.rows} D={problem.width}{' packed' * problem.packed} {blocks}"
        note += "" if sums or kernel is not attention_bwd_kernel else " without p_sums"
        narrow = 0 if kernel is attention_bwd_keys_kernel else 4  # log-sum-exp or delta of a row
        options: dict[str, Any] = {"mma": True, "narrow_stores": narrow, "architectures": architectures, "note": note}
        configs.append(AotConfig.of(kernel, config, constexprs, types, **options))
    return configs
