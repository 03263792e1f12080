"""GPU measurements other than the whole step, in one process: facts, torch's attention backends, floors, each op.

    python -m benchmarks.gpu_ops facts|ops [--rounds 10] [--check] [--red OP ...] [--small]

``facts`` prints versions, torch's default attention backend, and the rates of a copy and a product.
``ops`` times the matrix products of a DeiT-B step and every kernel beside its peers, at the shapes of that step, then
compares the gradients of torch's attention backends and of the kernel with float64. An op that fails is reported and
the others are measured. With ``--check`` every candidate runs once, which fills the compilers' caches.
On a CPU ``--small`` runs the same at small shapes, with torch's implementations.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from fastdeitlt.kernels._pick import torch_backend
from fastdeitlt.kernels.attention import attention, attention_first, reference
from torch import Tensor
from torch.nn.attention import SDPBackend
from triton.runtime.errors import TritonError

from benchmarks import (
    bench_adamw_ema,
    bench_add_layernorm,
    bench_attention,
    bench_augment,
    bench_bias_gelu,
    bench_joint_loss,
    harness,
)
from fastdeitlt.core.measure.timer import bandwidth, capturing_stream, matmul_rate
from fastdeitlt.errors import UserError

TOLERANCE = 2e-2
"""Largest error of a bfloat16 gradient relative to the largest value of the float64 one: several roundings."""
TOKENS, ROWS_OF_LAST_BLOCK = (66, 198), 2
LAYERS = {"qkv": (768, 3 * 768), "proj": (768, 768), "fc1": (768, 4 * 768), "fc2": (4 * 768, 768)}
"""Inputs and outputs of the products in a block of DeiT-B."""


def floors(device: torch.device, batches: Sequence[int]) -> Iterator[harness.Case]:
    """Yield the matrix products of a step, in all passes, and a copy."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for batch, (name, (inner, outer)) in itertools.product(batches, LAYERS.items()):
        rows = batch * 198
        x, upstream = (torch.randn(rows, size, device=device, dtype=dtype) for size in (inner, outer))
        weight = torch.randn(outer, inner, device=device, dtype=dtype)
        products = {"forward": (x, weight.T), "input gradient": (upstream, weight), "weight gradient": (upstream.T, x)}
        for kind, (a, b) in products.items():
            shape = f"{a.shape[0]}x{a.shape[1]}x{b.shape[1]}"
            call = {"matmul": functools.partial(torch.mm, a, b)}
            yield harness.Case(f"{name} {kind} {shape}", call, "matmul", useful_flops=2 * rows * inner * outer)
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 26) // 4, device=device)
    copy = {"copy": functools.partial(torch.empty_like(source).copy_, source)}
    yield harness.Case("copy", copy, "copy", useful_bytes=2 * source.numel() * 4)


Cases = Callable[[torch.device, Any], Iterable[harness.Case]]
OPS: dict[str, tuple[Cases, Any, Any]] = {
    "floors": (floors, (1,), (256,)),
    "joint_loss": (bench_joint_loss.cases, ((16, 10),), ((256, 1000), (1024, 1000), (1024, 8142))),
    "adamw_ema": (bench_adamw_ema.cases, (), (bench_adamw_ema.DEPTH,)),
    "bias_gelu": (bench_bias_gelu.cases, ((12, 512),), bench_bias_gelu.SHAPES[2:3]),
    "add_layernorm": (bench_add_layernorm.cases, ((10, 3, 64),), bench_add_layernorm.SHAPES[2:3]),
    "attention": (bench_attention.cases, ((2, 20, 2, 32),), bench_attention.SHAPES[:1]),
    "augment": (bench_augment.gpu_cases, (), bench_augment.GPU_SHAPES[:1]),
}
"""Op -> its cases, small shapes, and the shapes of a DeiT-B step of 256 images; the least risky op first."""


def facts(device: torch.device) -> None:
    """Print the machine's properties and peak rates; append a row of the copy."""
    print(harness.machine())
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        print(f"{gpu.name}: compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, "
              f"{gpu.multi_processor_count} multiprocessors, cuDNN {torch.backends.cudnn.version()}")  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (torch.randn(8, 12, 198, 64, device=device, dtype=dtype) for _ in range(3))
        default = SDPBackend(torch._fused_sdp_choice(q, k, v)).name
        print(f"attention in {dtype}: torch's default is {default}, auto is {torch_backend(dtype, device)}")
    copy, product = bandwidth(device), matmul_rate(device)
    print(f"copy {copy / 1e9:.0f} GB/s, matrix product {product / 1e12:.2f} TFLOP/s")
    row = {"op": "floors", "case": "copy", "candidate": "copy", "gb_per_s": copy / 1e9, "tflop_per_s": product / 1e12}
    harness.append("floors", [row])


def gradient_errors(tokens: int, rows: int, device: torch.device) -> Iterator[tuple[str, float]]:
    """Yield each implementation and its largest error from float64, maybe NaN.

    Args:
        tokens: tokens of an image.
        rows: query rows; fewer than ``tokens`` as in the last block.
    """
    generator = torch.Generator().manual_seed(0)
    few = rows < tokens
    sizes = [(rows, 12, 64), (tokens, 2, 12, 64)] if few else [(tokens, 3, 12, 64)]
    exact = [torch.randn(4, *size, generator=generator).bfloat16().double().requires_grad_() for size in sizes]
    upstream = torch.randn(4, rows, 12 * 64, generator=generator).bfloat16()
    expected = [out := reference(*exact), *torch.autograd.grad(out, exact, upstream.double())]
    for impl in bench_attention.IMPLS:
        inputs = [x.detach().to(device, torch.bfloat16).requires_grad_() for x in exact]
        try:
            out = (attention_first if few else attention)(*inputs, impl=impl)
            got = [out, *torch.autograd.grad(out, inputs, upstream.to(device))]
        except (RuntimeError, TritonError, UserError) as error:
            print(f"N={tokens} M={rows} {impl}: not measured, {' '.join(str(error).split())[:120]}")
            continue
        errors = [_error(a.detach().cpu().double(), b.detach()) for a, b in zip(got, expected, strict=True)]
        yield impl, float(torch.stack(errors).max())  # unlike Python's max, NaN if one is


def _error(got: Tensor, expected: Tensor) -> Tensor:
    return (got - expected).abs().max() / expected.abs().max()


def backends(device: torch.device) -> bool:
    """Append each attention's errors; return whether those of ``auto`` are correct."""
    right = True
    for tokens in TOKENS:
        for rows in (tokens, ROWS_OF_LAST_BLOCK):
            errors = []
            for impl, error in gradient_errors(tokens, rows, device):
                good = error <= TOLERANCE  # not so for NaN
                errors.append({"op": "backends", "case": f"N={tokens} M={rows}", "candidate": impl, "error": error})
                print(f"gradients N={tokens} M={rows} {impl}: error {error:.1e}{'' if good else '  <- WRONG'}")
                right &= good or impl not in ("triton", torch_backend(torch.bfloat16, device))
            harness.append("backends", errors)
    return right


def run(op: str, device: torch.device, rounds: int, small: bool) -> None:
    """Measure an op's cases, or with 0 rounds call every candidate once."""
    cases, small_shapes, shapes = OPS[op]
    for case in cases(device, small_shapes if small else shapes):
        if rounds:
            harness.run(op, case, device, rounds)
            continue
        for call in case.candidates.values():
            call()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("facts", "ops"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--check", action="store_true", help="call every candidate once, without timing")
    parser.add_argument("--red", nargs="*", default=[], metavar="OP", help="ops that failed their tests, not measured")
    parser.add_argument("--small", action="store_true", help="tiny shapes, without compiling")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if options.what == "facts":
        facts(device)
        return 0
    good = True
    stance = torch.compiler.set_stance("force_eager") if options.small else nullcontext()
    limit = torch._dynamo.config.patch(recompile_limit=harness.RECOMPILES)
    with stance, limit, capturing_stream(device):
        for op in OPS:
            if op in options.red:
                print(f"{op}: not measured, its tests failed")
                continue
            try:
                run(op, device, 0 if options.check else options.rounds, options.small)
            except (RuntimeError, TritonError, UserError) as error:
                print(f"{op}: FAILED, {' '.join(str(error).split())[:300]}", flush=True)
                good = False
    if not options.check:
        good &= backends(device)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
