"""fastdeitlt: train Vision Transformers from scratch on long-tailed images (DeiT-LT, arXiv 2404.02900).

The Python API is imported at its first use: ``load``, ``evaluate``, ``fit``, ``fit_teacher``, ``plan`` (api.py).
"""

from importlib import import_module

__version__ = "0.2.0"
__all__ = ["Answer", "Model", "Run", "evaluate", "fit", "fit_teacher", "load", "plan"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("fastdeitlt.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
