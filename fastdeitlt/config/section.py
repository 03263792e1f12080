"""Base class and number types of configuration sections."""

import os
import reprlib
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 200
"""Formatter of values in error messages."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INT64_MAX, FLOAT_MAX = 2**63 - 1, 1e30
"""Limits of numbers; FLOAT_MAX leaves room for products within float32."""


class Section(BaseModel):
    """Base of a configuration section: frozen, without unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _fits(self) -> "Section":
        """Refuse numbers that do not fit 64-bit integers or float32."""
        for name, value in self:
            for number in _numbers(value):
                if abs(number) > (INT64_MAX if isinstance(number, int) else FLOAT_MAX):
                    got = SHORT.repr(number)
                    raise ValueError(f"{name}: got {got}, expected at most {INT64_MAX} (whole) or {FLOAT_MAX:g}")
        return self


def _numbers(value: object) -> list[int | float]:
    if isinstance(value, tuple):
        return [number for part in value for number in _numbers(part)]
    return [value] if isinstance(value, int | float) else []


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"expected a range (low, high). Use [{bounds[1]}, {bounds[0]}].")
    return bounds


def _of_unit_range(values: tuple[float, float, float]) -> tuple[float, float, float]:
    if max(map(abs, values)) > 1:
        raise ValueError("expected values for images in 0..1. Divide those for 0..255 by 255.")
    return values


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Place = Annotated[str, AfterValidator(os.path.expanduser)]
Positive = Annotated[float, Field(gt=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Range = Annotated[tuple[Positive, Positive], AfterValidator(_rising)]
TrackerNames = Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], BeforeValidator(_as_list)]
ChannelMeans = Annotated[tuple[float, float, float], AfterValidator(_of_unit_range)]
ChannelDeviations = Annotated[tuple[Positive, Positive, Positive], AfterValidator(_of_unit_range)]
