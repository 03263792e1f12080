"""Folding of batch norms into the convolutions before them, for fewer passes in eval mode."""

import copy
import logging
from collections import Counter

from timm.layers import BatchNormAct2d
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_log = logging.getLogger("fastdeitlt")


class _LayerTracer(fx.Tracer):
    """Tracer of layers, with batch norms (also timm's with an activation) as single layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def fold_batchnorm(network: nn.Module) -> nn.Module:
    """Copy a network in eval mode with folded batch norms.

    Each is folded into the plain convolution before it, if nothing else reads that convolution. Outputs are equal up to
    rounding. A network that torch.fx cannot trace is copied unchanged, and this is logged.
    """
    network = copy.deepcopy(network).eval()
    try:
        graph = _LayerTracer().trace(network)
    except (fx.proxy.TraceError, TypeError, ValueError, AttributeError) as error:
        _log.info("%s: torch.fx cannot trace it, batch norms not folded (%s)", type(network).__name__, error)
        return network
    layers = dict(network.named_modules())
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        norm, conv = layers[str(node.target)], layers[str(source.target)]
        if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d) or type(conv) is not nn.Conv2d:
            continue
        if calls[str(node.target)] > 1 or calls[str(source.target)] > 1 or norm.running_mean is None:
            continue
        network.set_submodule(str(source.target), fuse_conv_bn_eval(conv, norm))
        network.set_submodule(str(node.target), norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
    return network
