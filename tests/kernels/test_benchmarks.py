"""Benchmarks of kernels that only a GPU times: every candidate runs here once at a small shape, and they agree."""

import pytest
import torch

from benchmarks import bench_add_layernorm, bench_attention, bench_bias_gelu

GPU = torch.cuda.is_available()
SMALL = {
    bench_attention: ((2, 20, 2, 32), (1, 66, 1, 64)),
    bench_add_layernorm: ((10, 3, 64),),
    bench_bias_gelu: ((12, 512),),
}


@pytest.fixture(params=SMALL, ids=lambda bench: bench.__name__.split("_", 1)[1])
def bench(request, monkeypatch):
    monkeypatch.setattr(request.param, "SHAPES", SMALL[request.param])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    if not GPU:
        monkeypatch.setattr(bench_attention, "IMPLS", ("triton", "flash", "sdpa"))
    return request.param


def test_candidates_of_every_case_run_and_agree(bench, device):
    seen = set()
    for case in bench.cases(device):
        results = {name: call() for name, call in case.candidates.items()}
        assert case.baseline in results and case.useful_bytes + case.useful_flops > 0
        expected = results[case.baseline]
        if "forward" in case.name:  # each candidate has an upstream gradient of its own
            for result in results.values():
                torch.testing.assert_close(result, expected, rtol=5e-2, atol=5e-2)
        seen.add(case.name)
    assert any("backward" in name for name in seen)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("No backward kernel")


def test_a_backend_without_a_backward_is_left_out(capsys):
    def implementation(x, impl):
        return NoBackward.apply(x) if impl == "cudnn" else x * 2

    calls = bench_attention.runnable(implementation, [torch.ones(2, requires_grad=True)])
    assert list(calls) == [impl for impl in bench_attention.IMPLS if impl != "cudnn"]
    assert "cudnn: not measured, No backward kernel" in capsys.readouterr().out
