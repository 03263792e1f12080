"""How ops are registered: nothing is done in a call but what the op does, and the compiler traces no launch."""

import pytest
import torch
from fastdeitlt.kernels import add_layernorm, attention, bias_gelu, joint_loss
from fastdeitlt.kernels._operator import Operator
from torch._dynamo.utils import counters

OPS = [op for module in (attention, add_layernorm, bias_gelu, joint_loss) for op in (module._forward, module._backward)]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_an_op_is_called_as_torch_knows_it(op):
    """One schema, which writes no argument and returns no argument's memory, with all that a compiler needs."""
    schema = op.overload._schema
    assert op.overload is getattr(torch.ops.fastdeitlt, op.name).default
    assert not schema.is_mutable and all(value.alias_info is None for value in schema.returns)
    assert torch.Tag.pt2_compliant_tag in op.overload.tags
    for key in ("CUDA", "CPU", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.qualified, key), key
    backward = op.name.endswith("_backward")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.qualified, "Autograd") != backward


def test_the_compiler_traces_no_launch():
    """``custom_op`` would hide the function; here the compiled graph calls it where the compiler is off."""
    seen = []
    step = torch.compile(lambda x: doubled(x * 3).sum(), backend="aot_eager", fullgraph=True)
    doubled = Operator(
        "test_doubled", lambda x: seen.append(torch.compiler.is_compiling()) or x * 2, "(Tensor x) -> Tensor"
    )
    doubled.on_cpu(lambda x: seen.append(torch.compiler.is_compiling()) or x * 2)
    doubled.fake(torch.empty_like)
    doubled.autograd(lambda ctx, grad: grad * 2, lambda ctx, inputs, output: None)
    counters.clear()
    for _ in range(3):
        x = torch.ones(4, requires_grad=True)
        step(x).backward()
        assert torch.equal(x.grad, torch.full((4,), 6.0))
    assert seen == [False] * 3 and counters["stats"]["unique_graphs"] == 1
