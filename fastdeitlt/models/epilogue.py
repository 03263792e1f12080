"""Fusion of bias, shortcut and ReLU into a frozen network's convolutions, so that each output is written once.

Otherwise the compiler adds a further pass over the output of every convolution.
"""

# B batch, C channels, H W height and width

import copy
import logging
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastdeitlt.kernels._operator import Operator

log = logging.getLogger("fastdeitlt")
RELU_CALLS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
ADD_CALLS = (operator.add, operator.iadd, torch.add, "add", "add_")


def _on_gpu(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    window = (stride, padding, dilation, groups)
    if shortcut is None:
        return torch.cudnn_convolution_relu(images, weight, bias, *window)
    return torch.cudnn_convolution_add_relu(images, weight, shortcut, 1.0, bias, *window)


conv_relu = Operator("conv_relu", _on_gpu)


@conv_relu.on_cpu
def _(images: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, *window: Any) -> Tensor:
    out = F.conv2d(images, weight, bias, *window)
    return F.relu(out if shortcut is None else out + shortcut)


@conv_relu.fake
def _(images: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, *window: Any) -> Tensor:
    return F.conv2d(images, weight, bias, *window)


class ConvRelu(nn.Module):
    """Layer relu(convolution + bias + shortcut) of a frozen convolution, without gradient."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        if conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=False)

    def forward(self, x_BCHW: Tensor, shortcut_BCHW: Tensor | None = None) -> Tensor:
        """Apply the layer in the weight's type, as autocast does not convert inputs."""
        conv, dtype = self.conv, self.conv.weight.dtype
        shortcut_BCHW = None if shortcut_BCHW is None else shortcut_BCHW.to(dtype)
        window = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return conv_relu(x_BCHW.to(dtype), conv.weight, conv.bias, shortcut_BCHW, *window)


def fuse_epilogues(network: nn.Module) -> nn.Module:
    """Return a copy of an eval-mode network with fused epilogues.

    ReLU, and the sum before it, move inside the plain convolutions. Outputs are equal. Batch norms must be folded
    before. A network that torch.fx cannot trace is copied unchanged, with a warning.
    """
    network = copy.deepcopy(network)
    try:
        traced = fx.symbolic_trace(network)
    except (fx.proxy.TraceError, TypeError, ValueError, AttributeError) as error:
        name = type(network).__name__
        log.warning("teacher.fuse_epilogues: torch.fx cannot trace %s, not fused (%s)", name, error)
        return network
    layers = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(layers[str(node.target)], nn.Identity | nn.Dropout):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    for node in list(traced.graph.nodes):
        if _is_relu(node, layers) and isinstance(node.args[0], fx.Node):
            _fuse(traced, node, layers)
    traced.graph.lint()
    traced.recompile()
    return traced.eval()


def _is_relu(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(layers[str(node.target)]) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in RELU_CALLS


def _fuse(traced: fx.GraphModule, relu: fx.Node, layers: dict[str, nn.Module]) -> None:
    """Replace a ReLU, its convolution and a sum between by one call if possible."""
    before = relu.args[0]
    assert isinstance(before, fx.Node)
    conv, shortcut = before, None
    if before.op in ("call_function", "call_method") and before.target in ADD_CALLS:
        terms = [term for term in before.args if isinstance(term, fx.Node)]
        if len(terms) != 2 or len(before.args) != 2 or before.kwargs or len(before.users) != 1:
            return
        conv = next((term for term in terms if _is_plain(term, layers)), before)
        shortcut = terms[1 - terms.index(conv)] if conv in terms else None
    if not _is_plain(conv, layers):
        return
    name = f"{conv.target}_relu".replace(".", "_")
    traced.add_submodule(name, ConvRelu(layers[str(conv.target)]))  # type: ignore[arg-type]
    with traced.graph.inserting_before(relu):
        inputs = (conv.args[0],) if shortcut is None else (conv.args[0], shortcut)
        relu.replace_all_uses_with(traced.graph.call_module(name, inputs))
    for node in dict.fromkeys((relu, before, conv)):
        traced.graph.erase_node(node)


def _is_plain(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    """Return whether a convolution is fusible: one call, one reader, zero padding."""
    layer = layers.get(str(node.target)) if node.op == "call_module" else None
    if type(layer) is not nn.Conv2d or len(node.users) != 1 or node.kwargs or len(node.args) != 1:
        return False
    calls = [other for other in node.graph.nodes if other.op == "call_module" and other.target == node.target]
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and len(calls) == 1
