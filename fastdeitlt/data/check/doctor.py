"""Reports of a data set: statistics (``stats``) and findings (``check``).

N images in the set, K classes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from fastdeitlt.config import Config
from fastdeitlt.data.check.images import duplicate_findings, image_findings
from fastdeitlt.data.check.pixel_stats import PixelStats, pixel_stats
from fastdeitlt.data.sampler import Plan, plan_of
from fastdeitlt.data.sets.counts import has_official_split, shot_groups
from fastdeitlt.data.sets.findings import Finding, class_findings, known_findings, opening_findings
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.data.sets.types import LongTailSet, Sets
from fastdeitlt.data.teacher_plan import teacher_plan_of
from fastdeitlt.errors import UserError, counted, printable

_NUMBERS = ("images", "classes", "empty", "largest", "smallest", "rho", "Gini", "head", "mid", "tail", "rank")
_SHOT_SPLITS = {"threshold": "threshold (>100, 20-100, <20)", "official": "official (class ranges)"}
_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True)
class SplitStats:
    """Class-size statistics of one split."""

    split: str
    num_images: int
    num_classes: int
    num_empty_classes: int
    largest: int
    """Images of the largest class."""
    smallest: int
    """Images of the smallest class that has any."""
    imbalance_ratio: float
    """largest / smallest (rho)."""
    gini: float
    """Gini coefficient of the class sizes: 0 = balanced, near 1 = all in one class."""
    counts: list[int]
    """Images of each class [K]."""


@dataclass(frozen=True)
class Report:
    """Result of ``stats`` or ``check``."""

    dataset: str
    title: str
    splits: list[SplitStats]
    groups: dict[str, dict[str, dict[str, int]]]
    """Shot split -> head/mid/tail -> {"classes", "images"} of the training set."""
    schedule: dict[str, int]
    """Predicted training steps of the config; empty if the config does not fit the set."""
    class_names: list[str] | None = None
    findings: list[Finding] = field(default_factory=list)
    trained: str = "a student"
    """Model trained by the config: "a student" or "a teacher"."""
    checked: bool = False
    """Whether this is a result of ``check``."""
    pixels: PixelStats | None = None
    """Statistics of the training images' pixels (``stats``)."""

    @property
    def exit_code(self) -> int:
        """2 if there are errors, else 0."""
        return 2 if any(finding.level == "error" for finding in self.findings) else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-able dict."""
        return asdict(self) | {"exit_code": self.exit_code}

    def print(self, as_json: bool = False) -> None:
        """Print tables (at least 120 columns wide if stdout is no terminal) or json."""
        if as_json:
            print(json.dumps(self.to_dict()))
        else:
            console = Console()
            console = console if console.is_terminal else Console(width=max(console.width, 120))
            console.print(self.render())

    def render(self) -> Group:
        """Return tables for a rich console."""
        splits = _table(
            f"data {self.title}", "split", "images", "classes", "empty", "largest", "smallest", "rho", "Gini"
        )
        for s in self.splits:
            sizes = (s.num_images, s.num_classes, s.num_empty_classes, s.largest, s.smallest)
            splits.add_row(s.split, *(f"{n:,}" for n in sizes), f"{s.imbalance_ratio:.1f}", f"{s.gini:.3f}")
        groups = _table("training classes and images", "split", "head", "mid", "tail")
        names = _SHOT_SPLITS
        if not has_official_split(self.splits[0].num_classes, self.dataset):
            names = names | {"official": "thirds by class size"}
        for name, parts in self.groups.items():
            cells = (f"{parts[g]['classes']:,} / {parts[g]['images']:,}" for g in ("head", "mid", "tail"))
            groups.add_row(names[name], *cells)
        tables = [splits, groups, self._classes()]
        if self.pixels:
            tables.append(self._pixels(self.pixels))
        if self.schedule:
            schedule = _table(f"training {self.trained}", "", "")
            for name, value in self.schedule.items():
                schedule.add_row(name.replace("_", " "), f"{value:,}")
            tables.append(schedule)
        return Group(*tables, self._findings()) if self.checked or self.findings else Group(*tables)

    def _pixels(self, pixels: PixelStats) -> Table:
        """Return a table of mean and deviation, in recipe syntax."""
        table = _table("training pixels", "", "")
        unreadable = f", without {pixels.num_unreadable:,} unreadable" if pixels.num_unreadable else ""
        table.add_row("augment.mean", escape(str(list(pixels.mean))))
        table.add_row("augment.std", escape(str(list(pixels.std))))
        table.add_row("median short side", f"{pixels.short_side:,} px")
        table.add_row("gray images", f"{pixels.gray:.0%}")
        table.add_row("measured on", f"{counted(pixels.num_images, 'image')}{unreadable}")
        return table

    def _classes(self, num_rows: int = 20) -> Table:
        """Return up to ``num_rows`` class sizes from head to tail, evenly spaced."""
        table = _table("training images by class", "rank", "class", "images", "")
        counts = self.splits[0].counts
        order = sorted(range(len(counts)), key=lambda k: -counts[k])
        ranks = sorted(set(np.linspace(0, len(order) - 1, num_rows).astype(int).tolist()))
        for rank in ranks:
            k = order[rank]
            name = f" {self.class_names[k]}" if self.class_names else ""
            bar = "█" * round(40 * counts[k] / max(counts))
            table.add_row(str(rank), escape(printable(f"{k}{name}")), f"{counts[k]:,}", bar)
        return table

    def _findings(self) -> Table:
        table = _table("findings" if self.findings else "no findings", "level", "split", "finding", "examples")
        for f in self.findings:
            level = f"[{_COLOURS[f.level]}]{f.level}[/]"
            table.add_row(level, f.split, escape(printable(f.message)), escape("\n".join(map(printable, f.examples))))
        return table


def stats(config: Config) -> Report:
    """Report class sizes, groups, predicted steps and pixel statistics.

    Decodes up to 4,096 training images for their mean and deviation.

    Raises:
        UserError: the data set cannot be opened (see ``open_sets``), or no image can be read.
    """
    sets = open_sets(config.data)
    return replace(_report(config, sets), pixels=pixel_stats(sets.train, config.data))


def check(config: Config) -> Report:
    """Decode every image; report class sizes, predicted steps and all findings.

    Raises:
        UserError: the data set cannot be opened; see ``open_sets``.
    """
    sets = open_sets(config.data)
    report = replace(_report(config, sets), checked=True)
    report.findings.extend(known_findings(config.data, sets))
    report.findings.extend(opening_findings(sets))
    report.findings.extend(class_findings(config, sets))
    digests: dict[str, list[bytes]] = {}
    for split, images in sets:
        found, digests[split] = image_findings(split, images, config.data)
        report.findings.extend(found)
    report.findings.extend(duplicate_findings(config.data, sets, digests))
    report.findings.sort(key=lambda finding: list(_COLOURS).index(finding.level))
    return report


def gini(counts: Sequence[int]) -> float:
    """Return the Gini coefficient of the class sizes, including empty classes."""
    ranked_K = np.sort(np.asarray(counts, dtype=np.float64))
    classes = len(ranked_K)
    weighted = 2 * (np.arange(1, classes + 1) * ranked_K).sum() / (classes * ranked_K.sum())
    return float(weighted - (classes + 1) / classes)


def split_stats(split: str, images: LongTailSet) -> SplitStats:
    """Return the class-size statistics of one split."""
    present = [n for n in images.counts if n]
    return SplitStats(
        split=split,
        num_images=len(images),
        num_classes=images.num_classes,
        num_empty_classes=images.num_classes - len(present),
        largest=max(present),
        smallest=min(present),
        imbalance_ratio=max(present) / min(present),
        gini=gini(images.counts),
        counts=images.counts,
    )


def _report(config: Config, sets: Sets) -> Report:
    counts = np.asarray(sets.train.counts)
    groups = {
        split: {
            name: {"classes": len(ids), "images": int(counts[ids.numpy()].sum())}
            for name, ids in shot_groups(sets.train.counts, split, config.data.dataset).items()
        }
        for split in _SHOT_SPLITS
    }
    splits = [split_stats(split, images) for split, images in sets]
    trained = "a teacher" if config.is_teachers else "a student"
    names = sets.train.class_names
    report = Report(config.data.dataset, config.data.title, splits, groups, {}, names, trained=trained)
    try:
        if config.is_teachers:
            report.schedule.update(_teacher_schedule(config, len(sets.train)))
        else:
            plan = plan_of(config, len(sets.train))
            report.schedule.update(_schedule(config, plan))
            if plan.is_partial:
                report.findings.append(Finding("warning", "train", plan.describe_epoch()))
    except UserError as error:
        report.findings.append(Finding("error", "train", str(error)))
    return report


def _schedule(config: Config, plan: Plan) -> dict[str, int]:
    epochs = config.train.epochs
    return {
        "virtual_ranks": plan.virtual_ranks,
        "micro_batches_a_rank_an_epoch": plan.micro_steps,
        "optimizer_steps_an_epoch": plan.optimizer_steps,
        "images_an_optimizer_step": plan.images_per_step,
        "images_an_epoch": plan.images_per_epoch,
        "distinct_images_an_epoch": plan.distinct_images,
        "epochs": epochs,
        "optimizer_steps": plan.optimizer_steps * epochs,
        "images": plan.images_per_epoch * epochs,
    }


def _teacher_schedule(config: Config, num_images: int) -> dict[str, int]:
    plan, epochs = teacher_plan_of(config, num_images), config.teacher_training.epochs
    images_per_epoch = sum(len(sample_B) for sample_B, _ in plan.batches(epoch=0))
    return {
        "optimizer_steps_an_epoch": plan.steps,
        "images_an_optimizer_step": plan.batch_size,
        "images_an_epoch": images_per_epoch,
        "epochs": epochs,
        "optimizer_steps": plan.steps * epochs,
        "images": images_per_epoch * epochs,
    }


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    return table
