"""CUDA tensors on a machine without a GPU: torch's fake ones, which have a shape, a type and a device but no values.

Within ``fake_cuda`` an operation on two devices fails. Within ``step`` there, which is what repeats while the device
works, so does whatever makes the host wait for the device: ``item``, ``tolist``, ``if tensor``, shapes that depend on
values, any copy to the host, and a copy to the device that is blocking or large and from memory that is not pinned.

What cannot be seen here: values, streams, memory, Triton's kernels (their ops answer by their fakes), the code that
``torch.compile`` makes, NCCL, DALI.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
FUSED = (aten._fused_adamw_.default, aten._fused_adamw_.tensor_lr)
"""They have no fake of torch's own."""
INLINE = 1 << 16
"""Bytes that the driver takes along with the command, pinned or not."""


class HostWaitError(AssertionError):
    """The host would wait for the device."""


class FakeCuda(TorchDispatchMode):
    """What torch's fake tensors leave open: copies, reads, and the fused step."""

    def __init__(self) -> None:
        super().__init__()
        self.in_step = False

    @contextmanager
    def step(self, in_step: bool = True) -> Iterator[None]:
        """Nothing may wait within; outside, reading a value gives 0.5."""
        before, self.in_step = self.in_step, in_step
        try:
            yield
        finally:
            self.in_step = before

    @contextmanager
    def aside(self, stream: object) -> Iterator[list]:
        """For ``side_stream.aside``: what waits within does so for another stream than the step's."""
        with self.step(False):
            yield []

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Lets ``torch.compile`` trace within."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor) and not self.in_step:
            return 0.5
        if func is aten.bincount.default and not self.in_step:
            return args[0].new_empty(kwargs.get("minlength", args[2] if len(args) > 2 else 0))
        if func in FUSED:
            return _one_device(*args[:6], kwargs.get("lr"), kwargs.get("found_inf"))
        out = func(*args, **kwargs)
        if self.in_step and func is aten._to_copy.default:
            _check_copy(args[0], out, kwargs.get("non_blocking", False))
        if self.in_step and func is aten.copy_.default:
            _check_copy(args[1], args[0], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        return out


def _check_copy(source, target, non_blocking):
    places = source.device.type, target.device.type
    size, pinned = source.numel() * source.element_size(), getattr(source, "in_pinned_memory", False)
    if places == ("cuda", "cpu"):
        raise HostWaitError(f"a copy of {size} bytes to the host")
    if places == ("cpu", "cuda") and size and not (non_blocking and (pinned or size <= INLINE)):
        raise HostWaitError(f"a copy of {size} bytes to the device: pinned {pinned}, non_blocking {non_blocking}")


def _one_device(*tensors):
    leaves = [t for t in torch.utils._pytree.tree_leaves(tensors) if isinstance(t, torch.Tensor)]
    devices = {t.device for t in leaves}
    assert len(leaves) > 6 and len(devices) == 1, f"the fused step got tensors on {devices}"


def run_backward(roots, grads, keep_graph, create_graph, inputs=(), *_, **__):
    """What torch's engine does, node by node in the calling thread: its own wants a stream of the device."""
    order, incoming, found = _order(roots), {}, {}
    wanted = {_node(leaf): index for index, leaf in enumerate(inputs)}
    for root, grad in zip(roots, grads, strict=True):
        _add(incoming, root.grad_fn, root.output_nr, grad)
    with torch.set_grad_enabled(create_graph):
        for node in order:
            slots = incoming.pop(node, {})
            given = [_fit(slots.get(i), meta) for i, meta in enumerate(node._input_metadata)]
            if node in wanted:
                found[wanted[node]] = given[0]
            if all(grad is None for grad in given) or (node in wanted and not node.next_functions):
                continue
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            for (following, place), grad in zip(edges, _apply(node, given), strict=True):
                if grad is not None:
                    _add(incoming, following, place, grad)
    return tuple(found.get(i) for i in range(len(inputs)))


def _node(leaf):
    return leaf.grad_fn or torch.autograd.graph.get_gradient_edge(leaf).node


def _order(roots):
    """All nodes below the roots, each before those that it feeds."""
    seen, done = set(), []
    stack = [(root.grad_fn, False) for root in roots]
    while stack:
        node, left = stack.pop()
        if left:
            done.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return done[::-1]


def _add(incoming, node, place, grad):
    slots = incoming.setdefault(node, {})
    slots[place] = grad if place not in slots else slots[place] + grad


def _fit(grad, meta):
    """A gradient in the shape and type of what it is of, as torch's engine makes it; on another device it refuses."""
    if grad is None:
        return None
    assert grad.device == meta.device, f"a gradient on {grad.device} of a tensor on {meta.device}"
    if grad.shape != meta.shape:
        grad = grad.sum_to_size(meta.shape)
    return grad if grad.dtype == meta.dtype else grad.to(meta.dtype)


def _apply(node, grads):
    """The gradients of the node's inputs that have one."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # whether it takes None cannot be read
        pairs = zip(grads, node._input_metadata, strict=True)
        grads = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g for g, m in pairs]
        return [grad for grad, needed in zip(_many(node.apply(*grads)), node.needs_input_grad, strict=True) if needed]
    pairs = zip(_many(node(*grads)), node.next_functions, strict=True)
    return [grad for grad, (following, _) in pairs if following is not None]


def _many(out):
    return out if isinstance(out, tuple) else (out,)


def _pinned(tensor, device=None):
    held = tensor.clone()
    held.in_pinned_memory = True
    return held


def _move(module, *args, **kwargs):
    """``Module.to``, which itself would swap tensors in place; torch refuses that for fake ones."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)

    def moved(tensor):
        layout = memory_format if tensor.dim() == 4 else None
        to_type = dtype if tensor.is_floating_point() else None
        return tensor.detach().to(device or tensor.device, to_type, memory_format=layout or torch.preserve_format)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(moved(parameter), parameter.requires_grad)
        part._buffers.update({name: moved(b) for name, b in part._buffers.items() if b is not None})
    return module


def _layout(images, weight, _backend):
    """cuDNN's, which no CPU would choose: channels last where one of the two is."""
    last = torch.channels_last in (suggest_memory_format(images), suggest_memory_format(weight))
    return torch.channels_last if last else torch.contiguous_format


def outside(build):
    """The same function, whose tensors are real ones of the CPU: for what cannot be built of fake ones."""

    def built(*args, **kwargs):
        with unset_fake_temporarily():
            return build(*args, **kwargs)

    return built


@contextmanager
def fake_cuda():
    """A ``FakeCuda``; modules made outside move to ``CUDA`` with ``.to`` within. Autocast and backward work."""
    with ExitStack() as stack:
        for name, answer in (
            ("amp.common.amp_definitely_not_available", False),
            ("is_bf16_supported", True),
            ("get_device_name", "NVIDIA Fake"),
            ("get_device_capability", (9, 0)),
        ):
            stack.enter_context(mock.patch(f"torch.cuda.{name}", lambda *_, answer=answer, **__: answer))
        available = "torch.backends.cuda.is_flash_attention_available"
        stack.enter_context(mock.patch(available, lambda: True))
        # torch refuses its backends for CUDA where there is no GPU
        stack.enter_context(mock.patch.dict("fastdeitlt.kernels.attention.BACKENDS", flash=SDPBackend.MATH))
        stack.enter_context(mock.patch("torch.autograd._engine_run_backward", run_backward))
        stack.enter_context(mock.patch("torch.Tensor.pin_memory", _pinned))
        stack.enter_context(mock.patch("torch.nn.Module.to", _move))
        stack.enter_context(mock.patch("torch._C._conv_determine_backend_memory_format", _layout))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(FakeCuda())
