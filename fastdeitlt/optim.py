"""The optimizer and its schedule, at their public names."""

from fastdeitlt.core.optim import Ema, build_optimizer, learning_rate

__all__ = ["Ema", "build_optimizer", "learning_rate"]
