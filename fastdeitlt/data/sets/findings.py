"""Findings about counts, classes and names, without opening images.

K classes.
"""

from fastdeitlt.config import Config, DataConfig
from fastdeitlt.data.sets.class_names import listed
from fastdeitlt.data.sets.counts import CUT_SETS, KNOWN_COUNTS, cifar_lt_counts
from fastdeitlt.data.sets.types import Finding, LongTailSet, Sets
from fastdeitlt.errors import counted

FEW_IMAGES = 5
NUM_EXAMPLES = 3


def known_findings(cfg: DataConfig, sets: Sets) -> list[Finding]:
    """Return differences from the published counts, of the lists before a hold-out."""
    published = dict(KNOWN_COUNTS.get(cfg.dataset, {}))
    if source := CUT_SETS.get(cfg.dataset):
        counts = cifar_lt_counts(source.num_train, source.classes, cfg.imbalance_factor, cfg.imbalance_kind)
        published = {"train": (sum(counts), source.classes, max(counts), min(counts))}
        per_class = source.num_test // source.classes
        published["test"] = (source.num_test, source.classes, per_class, per_class)
    findings = []
    for split, images in sets:
        counts = images.counts
        if split == "train":
            parts = [counts, *(held.counts for name, held in sets if name in sets.held_out)]
            counts = [sum(part) for part in zip(*parts, strict=True)]
        got = (sum(counts), len(counts), max(counts), min(counts))
        if split in published and split not in sets.held_out and got != published[split]:
            sizes = "{:,} images in {:,} classes of {:,} to {:,}"
            message = f"got {sizes.format(*got)}; the published set has {sizes.format(*published[split])}"
            findings.append(Finding("error", split, message))
    return findings


def opening_findings(sets: Sets) -> list[Finding]:
    """Return findings about empty classes and about files that are not read."""
    findings, train = list(sets.remarks), sets.train
    present = [k for k, n in enumerate(train.counts) if n]
    if len(present) < 2:
        name = f" ({listed(train.class_names[k] for k in present)})" if train.class_names and present else ""
        message = (
            f"got {counted(len(present), 'class')} with training images{name}, expected at least 2. Add images of "
            "another class."
        )
        findings.append(Finding("error", "train", message))
    if gaps := [k for k, n in enumerate(train.counts) if n == 0]:
        message = f"label gap: {len(gaps):,} of {train.num_classes:,} classes without training images"
        findings.append(Finding("warning", "train", message, _some(train, gaps)))
    for split, images in sets:
        absent = [k for k, n in enumerate(images.counts) if n == 0 and train.counts[k]]
        if split != "train" and absent:
            message = f"{counted(len(absent), 'class')} without {split} images, not scored"
            findings.append(Finding("warning", split, message, _some(train, absent)))
        if images.left_out and split not in sets.held_out:
            message = f"{counted(len(images.left_out), 'file')} ignored: not in a class folder, or no image suffix"
            findings.append(Finding("warning", split, message, tuple(images.left_out[:NUM_EXAMPLES])))
    return findings


def class_findings(config: Config, sets: Sets) -> list[Finding]:
    """Return findings about classes with few images and missing or unbalanced splits."""
    findings = []
    if few := [k for k, n in enumerate(sets.train.counts) if 0 < n < FEW_IMAGES]:
        message = f"{counted(len(few), 'class')} with fewer than {FEW_IMAGES} training images"
        findings.append(Finding("note", "train", message, _some(sets.train, few)))
    if sets.test is None:
        findings.append(Finding("warning", "test", "no test set: no test accuracy"))
    elif len({n for n in sets.test.counts if n}) > 1:
        message = "the test set is unbalanced: the overall accuracy favours frequent classes"
        findings.append(Finding("note", "test", message))
    for split, share in {"val": config.data.val_holdout, "test": config.data.test_holdout}.items():
        if share and getattr(sets, split) is not None and split not in sets.held_out:
            message = f"data.{split}_holdout={share:g} has no effect: the data set has its own {split} split"
            findings.append(Finding("warning", split, message))
    if sets.val is None and config.evaluate.select_on == "val":
        message = "evaluate.select_on=val without a validation list and with data.val_holdout=0: keeping the last epoch"
        findings.append(Finding("warning", "val", message))
    return findings


def _some(train: LongTailSet, classes: list[int]) -> tuple[str, ...]:
    """Format the first few classes by number, and by name if they have one."""
    names = train.class_names
    return tuple(f"{k} ({names[k]})" if names else f"class {k}" for k in classes[:NUM_EXAMPLES])
