"""Tensors of more than 2^31 elements: the last programs of every kernel, run alone at their real addresses."""

import math
import mmap

import pytest
import torch
import triton
import triton.language as tl
from fastdeitlt.kernels import _attention_launch as launch
from fastdeitlt.kernels import adamw_ema, add_layernorm, attention, bias_gelu
from fastdeitlt.kernels._add_layernorm_device import add_layernorm_bwd_kernel, add_layernorm_fwd_kernel
from fastdeitlt.kernels._attention_device import (
    attention_bwd_kernel,
    attention_bwd_keys_kernel,
    attention_fwd_kernel,
)

LIMIT = 2**31
MAP_NORESERVE = 0x4000  # of Linux; the module has it from Python 3.13 on
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's test; a GPU runs the whole tensor")


def huge(*shape, dtype=torch.bfloat16):
    """Memory that takes no room until it is touched."""
    size = math.prod(shape) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(shape)


def last_filled(tensor, rows=1):
    """The last rows of a huge tensor, filled with random numbers."""
    return tensor[-rows:].normal_(generator=torch.Generator().manual_seed(tensor.shape[0] % 97 + tensor.dim()))


@pytest.mark.parametrize("tokens", [66, 300], ids=["one_program", "streamed"])
def test_attention(tokens, far_program):
    heads, width = 64, 64
    batch = LIMIT // (tokens * 3 * heads * width) + 2
    qkv, dqkv = (huge(batch, tokens, 3, heads, width) for _ in range(2))
    assert qkv[:-1].numel() > LIMIT
    out, dout = (torch.empty(batch, tokens, heads * width, dtype=torch.bfloat16) for _ in range(2))
    lse, delta = (torch.empty(batch, heads, tokens) for _ in range(2))
    last = last_filled(qkv).double().requires_grad_()
    last_filled(dout)
    expected = attention.reference(last)
    (expected_gradient,) = torch.autograd.grad(expected, last, dout[-1:].double())

    problem = launch.Problem.of(qkv, None)
    forward, backward, keys = (
        launch.forward_config(problem, 90), launch.backward_config(problem, 90), launch.keys_config(problem, 90)
    )  # fmt: skip
    constexprs = launch.forward_constexprs(problem, forward), launch.backward_constexprs(problem, backward)

    def head(config, name, rows):
        """Run all programs of the last head of the last sample."""
        parts = -(-rows // config.blocks[name])
        far_program((batch * heads - 1) * parts)
        return (parts,)

    grid = head(forward, "ROWS", tokens)
    attention_fwd_kernel[grid](qkv, qkv[:, :, 1:], out, lse, **constexprs[0])
    got = out[-1:, :, -width:].double()
    assert (got - expected[..., -width:]).abs().max() < 2e-2 * expected.abs().max()
    grid = head(backward, "ROWS", tokens)
    sums = torch.full((batch, *grid, 2, heads, width), float("nan"))
    attention_bwd_kernel[grid](qkv, qkv[:, :, 1:], out, dout, lse, delta, dqkv, dqkv[:, :, 1:], sums, **constexprs[1])
    if not launch.one_program(problem, backward):
        grid = head(keys, "BLOCK_N", tokens)
        attention_bwd_keys_kernel[grid](
            qkv, qkv[:, :, 1:], dout, lse, delta, dqkv[:, :, 1:], **problem.constexprs, **keys.blocks
        )
    got, exact = dqkv[-1:, :, :, -1].double(), expected_gradient[..., -1, :]
    assert (got - exact).abs().max() < 2e-2 * exact.abs().max()
    got, exact = sums[-1, :, 0, -1].sum(0), expected_gradient[0, :, 0, -1].sum(0)
    assert (got - exact).abs().max() < 2e-2 * exact.abs().max()
    assert not sums[:, :, :, -1].isfinite()[:-1].any()


def test_add_layernorm(far_program):
    tokens, width, block = 3, 4096, {"ROWS": 1, "BLOCK_D": 4096}
    batch = LIMIT // (tokens * width) + 2
    x, branch, dr, dn, residual, normed, dx, dbranch = (huge(batch, tokens, width) for _ in range(8))
    weight, bias, scale = torch.rand(width), torch.rand(width), torch.full((batch,), 2.0)
    mean, rstd, rows = torch.empty(batch, tokens), torch.empty(batch, tokens), batch * tokens
    for tensor in (x, branch, dr, dn):
        last_filled(tensor)
    exact = [t[-1:].double().requires_grad_() for t in (x, branch)]
    outputs = add_layernorm.reference(*exact, weight.double(), bias.double(), scale[-1:])
    far_program(rows - tokens)
    add_layernorm_fwd_kernel[(tokens,)](
        x, branch, None, None, None, scale, weight, bias, residual, normed, mean, rstd, rows, 1e-6,
        TOKENS=tokens, D=width, **block,
    )  # fmt: skip
    for got, expected in zip((residual, normed), outputs, strict=True):
        assert (got[-1:].double() - expected).abs().max() < 2e-2 * expected.abs().max()
    programs = rows - tokens + 1
    far_program(rows - tokens)
    sums = huge(programs, 3, width, dtype=torch.float32)
    add_layernorm_bwd_kernel[(1,)](
        dr, dn, residual, None, None, scale, weight, mean, rstd, dx, dbranch, sums, rows,
        TOKENS=tokens, D=width, STAGES=1, BRANCH_BIAS=True, **block,
    )  # fmt: skip
    gradients = torch.autograd.grad(outputs, exact, [dr[-1:].double(), dn[-1:].double()])
    for got, expected in zip((dx, dbranch), gradients, strict=True):
        assert (got[-1:, 0].double() - expected[:, 0]).abs().max() < 3e-2 * expected.abs().max()


def test_bias_gelu(far_program):
    width = 4096
    rows = LIMIT // width + 8
    u, h, dh, du = (huge(rows, width) for _ in range(4))
    bias = torch.rand(width)
    exact = last_filled(u, 4).double().requires_grad_()
    last_filled(dh, 4)
    expected = bias_gelu.reference(exact, bias.double())
    far_program(rows // 4 - 1)
    bias_gelu.bias_gelu_fwd_kernel[(1, 8)](u, bias, h, rows, WIDTH=width, ROWS=4, BLOCK=512)
    assert (h[-4:].double() - expected).abs().max() < 2e-2 * expected.abs().max()
    sums = huge(rows // 4, width, dtype=torch.float32)
    bias_gelu.bias_gelu_bwd_kernel[(1, 8)](dh, u, bias, du, sums, rows, WIDTH=width, ROWS=4, BLOCK=512, STAGES=1)
    (gradient,) = torch.autograd.grad(expected, exact, dh[-4:].double())
    assert (du[-4:].double() - gradient).abs().max() < 2e-2 * gradient.abs().max()


def test_adamw_ema(far_program):
    size, block = LIMIT + 2048, 1024
    buffers = [huge(size, dtype=torch.float32) for _ in range(5)]
    for i, buffer in enumerate(buffers):
        buffer[-block:].normal_(generator=torch.Generator().manual_seed(i)).abs_()
    last = [buffer[-block:].double() for buffer in buffers]
    clock = {"lr": torch.tensor(1e-2), "step": torch.tensor(3.0)}
    adamw_ema.reference(*last[:4], **clock, num_decayed=block, weight_decay=0.05, ema=last[4], ema_decay=0.9)
    far_program(size // block - 1)
    adamw_ema._adamw_ema_kernel[(1,)](
        *buffers, clock["lr"], clock["step"], None, size, size, 0.05, math.log(0.9), math.log(0.999), 0.1, 0.001,
        1e-8, 0.1, BLOCK=block,
    )  # fmt: skip
    for got, expected in zip(buffers, last, strict=True):
        torch.testing.assert_close(got[-block:].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_interpreter_wraps_offsets_of_32_bits_as_a_gpu_does(far_program):
    @triton.jit
    def offsets(p_out, WIDTH: tl.constexpr):
        tl.store(p_out, tl.program_id(0) * WIDTH)
        tl.store(p_out + 1, tl.program_id(0).to(tl.int64) * WIDTH)

    out = torch.zeros(2, dtype=torch.int64)
    far_program(LIMIT // 4096)
    offsets[(1,)](out, WIDTH=4096)
    assert out.tolist() == [-LIMIT, LIMIT]
