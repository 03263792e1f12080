"""Published accuracies of models trained from scratch on the same long-tailed set.

Top-1 in % on the balanced test set. Source: the tables of DeiT-LT (arXiv 2404.02900) as on its project page and
in val-iisc/DeiT-LT, README.md; the page has its two CIFAR columns swapped, as that README and val-iisc/Saddle-LongTail
show. Teachers are in brackets.

LiVT (arXiv 2212.02015) pretrains a ViT-B by masked generation on the same long-tailed images and fine-tunes it; at 224
px it is above DeiT-LT's ViT-B. All eight values are those of the results table of XuZhengzhuo/LiVT, README.md, not
checked against the paper. That table has 63.8 and 81.0 after fine-tuning at 384 px. Higher results of CNNs are not
listed, such as 63.2 on ImageNet-LT of two ResNeXt-101 (dvlab-research/Parametric-Contrastive-Learning, README.md).

Head, mid and tail of ImageNet-LT rows follow two conventions in one table. ``split`` is the one that reproduces the
row's overall accuracy; empty if neither does or it cannot be checked.
"""

from dataclasses import dataclass

from fastdeitlt.config import DataConfig
from fastdeitlt.evaluation.metrics import GROUPS
from fastdeitlt.run.run_files import RunFiles


@dataclass(frozen=True)
class Published:
    """One row of a published table."""

    method: str
    overall: float
    head: float | None = None
    mid: float | None = None
    tail: float | None = None
    split: str = ""
    """"official", "threshold", "both" (the same classes), or "" for unknown."""

    @property
    def by_group(self) -> dict[str, float]:
        """Accuracies by group, without unknown ones."""
        values = zip(GROUPS, (self.overall, self.head, self.mid, self.tail), strict=True)
        return {group: value for group, value in values if value is not None}


_CIFAR = (
    "CB Focal (ResNet-32)",
    "CAM (ResNet-32)",
    "GCL (ResNet-32)",
    "LDAM+DRW+SAM (ResNet-32)",
    "PaCo+SAM (ResNet-32)",
    "ViT-B",
    "ViT-B (cRT)",
    "DeiT-B (RegNetY-16GF)",
    "DeiT-III-B",
    "DeiT-LT-B (LDAM+DRW+SAM)",
)


def _cifar(values: tuple[float, ...], best: Published) -> tuple[Published, ...]:
    return (*(Published(method, value) for method, value in zip(_CIFAR, values, strict=True)), best)


_BEST = "DeiT-LT-B (PaCo+SAM)"
TABLES: dict[str, tuple[Published, ...]] = {
    "CIFAR-10-LT, imbalance 100": _cifar(
        (74.6, 80.0, 82.7, 81.9, 86.8, 62.6, 68.9, 70.2, 59.1, 84.8),
        Published(_BEST, 87.5, 94.5, 84.1, 85.0, "official"),
    ),
    "CIFAR-10-LT, imbalance 50": _cifar(
        (79.3, 83.6, 85.5, 84.8, 88.6, 70.1, 74.5, 77.5, 68.2, 87.5),
        Published(_BEST, 89.8, 94.9, 87.0, 88.6, "official"),
    ),
    # the published tail, 31.4, is omitted: it does not reproduce the overall accuracy under the split of the others
    "CIFAR-100-LT, imbalance 100": _cifar(
        (38.3, 47.8, 48.7, 45.4, 52.8, 35.0, 38.9, 31.3, 38.1, 52.0), Published(_BEST, 55.6, 72.8, 55.4)
    ),
    "CIFAR-100-LT, imbalance 50": _cifar(
        (46.2, 51.7, 53.6, 49.4, 56.6, 39.0, 42.2, 39.1, 44.1, 54.1),
        Published(_BEST, 60.5, 74.8, 60.3, 43.1, "official"),
    ),
    "ImageNet-LT": (
        Published("LDAM (ResNet-50)", 49.8, 60.4, 46.9, 30.7, "threshold"),
        Published("RIDE, 3 experts (ResNet-50)", 54.9, 66.2, 51.7, 34.9, "threshold"),
        Published("BCL (ResNet-50)", 57.1, 67.9, 54.2, 36.6, "threshold"),
        Published("LDAM+DRW+SAM (ResNet-50)", 53.1, 62.0, 52.1, 32.8),
        Published("PaCo+SAM (ResNet-50)", 57.5, 62.1, 58.8, 39.3, "threshold"),
        Published("ViT-B", 37.5, 56.9, 30.4, 10.3, "official"),
        Published("DeiT-III-B", 48.4, 70.4, 40.9, 12.8, "threshold"),
        Published("DeiT-LT-B (LDAM+DRW+SAM)", 55.6, 65.2, 54.0, 37.1, "official"),
        Published(_BEST, 59.1, 66.6, 58.3, 40.0, "threshold"),
        Published("LiVT (ViT-B)", 60.9, 73.6, 56.4, 41.0, "threshold"),
    ),
    "iNaturalist 2018": (
        Published("cRT (ResNet-50)", 65.2, 69.0, 66.0, 63.2, "both"),
        Published("RIDE, 3 experts (ResNet-50)", 72.2, 70.2, 72.2, 72.7, "both"),
        Published("CBD-ENS (ResNet-50)", 73.6, 75.9, 74.7, 71.5, "both"),
        Published("LDAM+DRW+SAM (ResNet-50)", 70.1, 64.1, 70.5, 71.2, "both"),
        Published("PaCo+SAM (ResNet-50)", 73.4, 66.3, 73.6, 75.2, "both"),
        Published("ViT-B", 54.2, 64.3, 53.9, 52.1, "both"),
        Published("DeiT-III-B", 61.0, 72.9, 62.8, 55.8, "both"),
        Published("DeiT-LT-B (LDAM+DRW+SAM)", 72.9, 69.0, 73.3, 73.3, "both"),
        Published(_BEST, 75.1, 70.3, 75.2, 76.2, "both"),
        Published("LiVT (ViT-B)", 76.1, 78.9, 76.5, 74.8, "both"),
    ),
}


def published_table(cfg: DataConfig) -> tuple[str, tuple[Published, ...]] | None:
    """Return (title, rows) of the published table for a run's training set, or None."""
    name = {"imagenet_lt": "ImageNet-LT", "inat18": "iNaturalist 2018"}.get(cfg.dataset, "")
    if cfg.dataset in ("cifar10_lt", "cifar100_lt") and cfg.imbalance_kind == "exp":
        classes = cfg.dataset.removeprefix("cifar").removesuffix("_lt")
        name = f"CIFAR-{classes}-LT, imbalance {1 / cfg.imbalance_factor:.0f}"
    return (name, TABLES[name]) if name in TABLES else None


def published_for(run: RunFiles, split: str) -> dict[str, float]:
    """Return the published accuracies, by group, to show beside a run's.

    Figures of a shipped recipe are a row of TABLES. They are left out if the run has another training set, and head,
    mid and tail are left out under another split. Figures outside TABLES are the user's own and are kept.
    """
    rows = {
        name: row
        for name, table in TABLES.items()
        for row in table
        if row.by_group == run.published and row.method.startswith("DeiT-LT") != run.is_teacher
    }
    if not rows:
        return run.published
    name, _ = (run.cfg and published_table(run.cfg.data)) or ("", ())
    if name not in rows:
        return {}
    return run.published if rows[name].split in (split, "both") else {"all": rows[name].overall}
