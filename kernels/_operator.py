"""Registration of ops with torch: schema, implementation for each device, fake and autograd.

Like ``torch.library.custom_op`` without its overhead in every call: a wrapper that hides the function from the
compiler, and a search for outputs that share memory with inputs. A step has a hundred calls.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
_LIBRARY = torch.library.Library("fastdeitlt", "FRAGMENT")


class Operator:
    """The op ``torch.ops.fastdeitlt.<name>``, which mutates no argument and returns no alias of one.

    Args:
        name: name of the op.
        launch: implementation on CUDA; its annotations are the schema.
        schema: schema without the name. None = inferred from ``launch``.
    """

    def __init__(self, name: str, launch: Callable[..., Any], schema: str | None = None) -> None:
        self.qualified = f"fastdeitlt::{name}"
        schema = schema or torch.library.infer_schema(launch, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, launch, "CUDA")
        self.name, self.overload = name, getattr(torch.ops.fastdeitlt, name).default

    def __call__(self, *arguments: Any) -> Any:
        return self.overload(*arguments)

    def on_cpu(self, function: F) -> F:
        """Register the implementation for CPU tensors."""
        _LIBRARY.impl(self.name, function, "CPU")
        return function

    def fake(self, function: F) -> F:
        """Register the function that allocates the outputs, for the compiler."""
        torch.library.register_fake(self.qualified, function, lib=_LIBRARY)
        return function

    def autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Register ``backward`` and ``setup_context`` as in torch.autograd.Function."""
        torch.library.register_autograd(self.qualified, backward, setup_context=setup_context, lib=_LIBRARY)
