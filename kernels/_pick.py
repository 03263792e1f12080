"""Choice of an op's implementation: the requested one, or for "auto" the one measured fastest on the device.

The import neither needs Triton nor initialises CUDA.
"""

import functools
import importlib.util
import logging

import torch
from torch.nn import attention as torch_attention

from fastdeitlt.config import near
from fastdeitlt.errors import UserError

log = logging.getLogger("fastdeitlt")

FLASH_MODULES = {"fa3": "flash_attn_interface", "fa4": "flash_attn"}
"""FlashAttention 3 and 4, which torch can run in place of its FlashAttention 2 -> their package."""
IMPLS = {
    "attention": ("auto", "triton", "sdpa", "flash", "cudnn", "efficient", "math", *FLASH_MODULES),
    "add_layernorm": ("auto", "torch", "triton"),
    "bias_gelu": ("auto", "torch", "triton"),
    "joint_loss": ("auto", "torch", "triton"),
    "augment": ("auto", "torch", "triton"),
    "adamw_ema": ("auto", "torch", "fastdeitlt", "apex", "deepspeed"),
}
"""Op -> implementations accepted by a setting."""
HAS_TRITON = importlib.util.find_spec("triton") is not None
MAX_TOKENS = 1024
"""Longest sequence that the attention kernel supports."""

_refused: set[str] = set()


@functools.cache
def say_once(message: str, level: int = logging.WARNING) -> None:
    """Log a message once per process."""
    log.log(level, message)


def check_impl(op: str, impl: str) -> None:
    """Refuse an implementation that is unknown or not installed.

    Raises:
        UserError: see above.
    """
    impls = IMPLS[op]
    if impl not in impls:
        raise UserError(f"{op}: got impl {impl!r}, expected one of {', '.join(impls)}{near(impl, impls)}")
    if not installed(impl):
        package = FLASH_MODULES.get(impl, "triton")
        raise UserError(f"{op}: got impl {impl!r} without {package} for this torch. Install it or use auto.")


def installed(impl: str) -> bool:
    """Return whether an implementation's package is installed."""
    if impl in FLASH_MODULES:
        registry = hasattr(torch_attention, "restore_flash_attention_impl")
        return registry and importlib.util.find_spec(FLASH_MODULES[impl]) is not None
    return impl != "triton" or HAS_TRITON


def refuse(op: str, reason: str) -> None:
    """Make "auto" use torch for an op in this process; log the reason."""
    _refused.add(op)
    say_once(f"{op}: kernel not used, {reason}; please report this")


@torch.compiler.assume_constant_result
def pick(
    op: str,
    impl: str,
    key: tuple[str | int, ...],
    device: torch.device,
    fits: bool = True,
    torchs: str = "torch",
    on_gpu: str = "",
) -> str:
    """Return the implementation to run.

    Args:
        op: a key of ``IMPLS``.
        impl: the requested implementation, or "auto".
        key: the shape, as in the measurements.
        device: device of the inputs; on a CPU "auto" is torch's, so that an export there contains torch's operations.
        fits: whether our kernel supports shape and type; else "auto" is torch's.
        torchs: torch's implementation.
        on_gpu: "auto" on a GPU; "" = the implementation measured fastest, ``torchs`` without measurements.

    Raises:
        UserError: see ``check_impl``.
    """
    check_impl(op, impl)
    if impl != "auto":
        return impl
    if device.type != "cuda":
        return torchs
    if not (fits and HAS_TRITON) or op in _refused:
        chosen, reason = torchs, "no kernel for this case"
    elif on_gpu:
        chosen, reason = on_gpu, "default on a GPU"
    else:
        from fastdeitlt.kernels._measured import gpu_name, rows_of

        row = rows_of(device.index).get(("fastest", op, key))
        chosen = row.impl if row and installed(row.impl) else torchs
        reason = f"measured on {row.gpu}" if row else f"not measured on {gpu_name(device.index)}"
    shape = " ".join(map(str, key))
    say_once(f"{op} at {shape}: {chosen}, {reason}" if shape else f"{op}: {chosen}, {reason}", logging.INFO)
    return chosen


@torch.compiler.assume_constant_result
def pick_attention(impl: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> str:
    """Return the implementation of attention over ``tokens`` in heads of ``width``.

    Without measurements "auto" is one backend of torch, because torch's order of backends changes between versions:
    FlashAttention 2 in bfloat16 and float16, the memory-efficient one in float32 and on old GPUs. cuDNN's runs only if
    measured or requested.
    """
    torchs = torch_backend(dtype, device)
    if impl == "triton" and tokens > MAX_TOKENS:
        say_once(f"attention: the kernel supports up to {MAX_TOKENS} tokens, got {tokens}; using torch ({torchs})")
        return torchs
    fits = tokens <= MAX_TOKENS and dtype != torch.float32
    chosen = pick("attention", impl, (tokens, width), device, fits, torchs)
    if device.type == "cuda":
        _activate(chosen)
    return chosen


def torch_backend(dtype: torch.dtype, device: torch.device) -> str:
    """Return torch's attention: one backend on a GPU, "sdpa" on a CPU."""
    if device.type != "cuda":
        return "sdpa"
    half, modern = dtype in (torch.bfloat16, torch.float16), torch.cuda.get_device_capability(device.index)[0] >= 8
    return "flash" if half and modern and torch.backends.cuda.is_flash_attention_available() else "efficient"


def _activate(impl: str) -> None:
    """Set torch's flash backend to FlashAttention 2, 3 or 4 for the whole process.

    Raises:
        UserError: the package does not import or has no kernels.
    """
    if impl not in ("flash", *FLASH_MODULES) or not hasattr(torch_attention, "restore_flash_attention_impl"):
        return
    expected, active = impl.upper() if impl in FLASH_MODULES else None, torch_attention.current_flash_attention_impl()
    if expected == active:
        return
    if expected is None:
        torch_attention.restore_flash_attention_impl()
        return
    try:
        torch_attention.activate_flash_attention_impl(expected)
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"attention: got impl {impl!r}, which cannot run here ({error}). Use auto.") from None
