"""Types of `plan`: facts of a data set, rates, candidate students, the choice.

N training images, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastdeitlt import config
from fastdeitlt.config import Config

Setting = tuple[Any, str]
"""A value and its reason."""


@dataclass(frozen=True)
class Rung:
    """A candidate student with its teacher's architecture."""

    img_size: int
    patch: int
    width: str
    """DeiT size: tiny, small or base."""
    depth: int
    teacher: str
    needs: int
    """Fewest images seen in training for this student to be worthwhile."""

    @property
    def student(self) -> str:
        """Name of the student."""
        return f"deit_{self.width}_distilled_patch{self.patch}_{self.img_size}"


SMALL_IMAGES = (
    Rung(32, 8, "tiny", 3, "resnet8", 0),
    Rung(32, 4, "tiny", 3, "resnet8", 500_000),
    Rung(32, 4, "tiny", 6, "resnet20", 2_000_000),
    Rung(32, 4, "small", 12, "resnet32", 6_000_000),
    Rung(32, 2, "base", 12, "resnet32", 12_000_000),
)
"""Students for images of up to 42 pixels, by ascending cost."""
PHOTOS = (
    Rung(32, 8, "tiny", 3, "resnet8", 0),
    Rung(64, 16, "tiny", 3, "resnet8", 30_000),
    Rung(64, 8, "tiny", 6, "resnet20", 300_000),
    Rung(128, 16, "tiny", 12, "resnet18", 1_500_000),
    Rung(160, 16, "small", 12, "resnet34", 5_000_000),
    Rung(224, 16, "base", 12, "resnet50", 14_000_000),
)
"""Students for images above 85 pixels, by ascending cost; the image size is below 1.5 times the short side."""
MEDIUM_IMAGES = (
    *PHOTOS[:3],
    Rung(64, 8, "tiny", 12, "resnet20", 1_500_000),
    Rung(64, 8, "small", 12, "resnet32", 5_000_000),
    Rung(64, 4, "base", 12, "resnet32", 14_000_000),
)
"""Students for images of 43 to 85 pixels, by ascending cost."""


def _teacher_for(side: int) -> str:
    return "resnet8" if side <= 64 else "resnet18" if side <= 160 else "resnet50"


@dataclass(frozen=True)
class Facts:
    """Inputs of the choice other than time."""

    dataset: str
    root: str
    lists: Mapping[str, str]
    """Split -> list file, for a set of lists."""
    counts: Sequence[int]
    """Training images of each class [K], without held-out ones."""
    num_val: int
    holdouts: Mapping[str, float]
    """Split -> share of each class held out for it."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    short_side: int
    """Median short side in pixels."""
    gray: float
    """Share of images without colour, 0..1."""
    gpu: bool
    init: str = ""
    """Initial weights of the student (`--from`)."""
    architecture: Rung | None = None
    """Architecture of the initial weights."""
    unreadable: int = 0
    """Unreadable images in the sample."""

    @property
    def num_images(self) -> int:
        """N."""
        return sum(self.counts)

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """Candidate students by ascending cost; at least one."""
        if (base := self.architecture) is not None:
            sides = sorted({max(p, side // p * p) for side in (64, 128, base.img_size) if (p := base.patch)})
            return tuple(
                Rung(side, base.patch, base.width, base.depth, _teacher_for(side), need)
                for side, need in zip(sides, (0, 100_000, 1_000_000), strict=False)
                if side <= base.img_size
            )
        if self.short_side <= 85:
            return SMALL_IMAGES if self.short_side <= 42 else MEDIUM_IMAGES
        side = max(rung.img_size for rung in PHOTOS if rung.img_size < 1.5 * self.short_side)
        return tuple(replace(rung, img_size=min(rung.img_size, side)) for rung in PHOTOS)


@dataclass(frozen=True)
class Rates:
    """Training throughput in images/s, with data, and epoch-independent seconds."""

    student: Mapping[Rung, float]
    """Full steps including the teacher's forward pass, by measured candidate."""
    teacher: Mapping[Rung, float]
    """Plain steps, without SAM's second pass."""
    start_s: float
    """Seconds of start, first decoding and report of both trainings."""


@dataclass(frozen=True)
class Choice:
    """Two recipes and their expected times."""

    student: dict[str, Setting]
    """Setting -> value and reason."""
    teacher: dict[str, Setting]
    seconds: dict[str, float]
    """Part of the work -> seconds at the measured rates."""
    images_seen: int
    """Images seen by the student in training."""
    rung: Rung
    remarks: tuple[str, ...] = ()

    @property
    def configs(self) -> tuple[Config, Config]:
        """Configurations of student and teacher."""
        return build_settings(self.student), build_settings(self.teacher)


@dataclass(frozen=True)
class Schedule:
    """A candidate with its epochs and batches."""

    rung: Rung
    epochs: int
    teacher_epochs: int
    sam: bool
    images_seen: int
    repeats: int
    batch: int
    micro_batches: int
    """Micro-batches per optimizer step: of virtual ranks on a GPU, accumulated on a CPU."""
    every: int
    teacher_every: int
    seconds: dict[str, float]


def build_settings(settings: Mapping[str, Setting]) -> Config:
    """Build a configuration from settings."""
    return config.build({name: value for name, (value, _) in settings.items()})
