"""Floors of this machine: the matrix products of a DeiT-B step, and the copy.

    python -m benchmarks.bench_floors [--rounds 20] [--batch 256] [--dry]

Twelve products: qkv, proj, fc1 and fc2, each forward, for the gradient of its input and of its weight, at the 198
tokens of 224 pixels. bfloat16 on a GPU; float32 and a sixteenth of the batch on a CPU.
"""

import argparse
import functools
import sys
from collections.abc import Iterator

import torch

from benchmarks import harness

TOKENS, WIDTH = 198, 768
LAYERS = {"qkv": (WIDTH, 3 * WIDTH), "proj": (WIDTH, WIDTH), "fc1": (WIDTH, 4 * WIDTH), "fc2": (4 * WIDTH, WIDTH)}


def cases(device: torch.device, batch: int) -> Iterator[harness.Case]:
    """Yield one case a product (rows M, inner K, columns N), and the copy of 1 GiB (64 MiB on a CPU)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = batch * TOKENS
    for name, (inner, outer) in LAYERS.items():
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dry", action="store_true", help="write no rows")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    batch = options.batch if device.type == "cuda" else max(options.batch // 16, 1)
    for case in cases(device, batch):
        rows = harness.rows("floors", case, harness.measure(case.candidates, device, options.rounds), device)
        for row in rows:
            print(harness.line(row))
        if not options.dry:
            harness.append("floors", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
