"""What can be wrong or odd with a data set: its counts, its classes, its files, duplicates.

K classes.
"""

import hashlib
from collections import defaultdict

from fastdeitlt.config import Config, DataConfig
from fastdeitlt.data.class_names import listed
from fastdeitlt.data.counts import CIFAR_CLASSES, KNOWN_CLASSES, KNOWN_COUNTS, cifar_lt_counts
from fastdeitlt.data.scan import scan_files
from fastdeitlt.data.sets import Finding, Level, LongTailSet, Sets

FEW_IMAGES = 5
NUM_EXAMPLES = 3


def _many(number: int, noun: str) -> str:
    plural = {"image": "images", "file": "files", "class": "classes"}[noun]
    return f"{number:,} {noun if number == 1 else plural}"


def known_findings(cfg: DataConfig, sets: Sets) -> list[Finding]:
    """Differences from the published counts (of what the list says, before a hold-out)."""
    known = dict(KNOWN_COUNTS.get(cfg.dataset, {}))
    if classes := CIFAR_CLASSES.get(cfg.dataset):
        counts = cifar_lt_counts(50_000, classes, cfg.imbalance_factor, cfg.imbalance_kind)
        known = {"train": (sum(counts), classes, max(counts), min(counts))}
        known["test"] = (10_000, classes, 10_000 // classes, 10_000 // classes)
    findings = []
    for split, images in sets:
        counts = images.counts
        if split == "train":
            parts = [counts, *(held.counts for name, held in sets if name in sets.held_out)]
            counts = [sum(part) for part in zip(*parts, strict=True)]
        got = (sum(counts), len(counts), max(counts), min(counts))
        if split in known and split not in sets.held_out and got != known[split]:
            sizes = "{:,} images in {:,} classes of {:,} to {:,}"
            message = f"got {sizes.format(*got)}; the published set has {sizes.format(*known[split])}"
            findings.append(Finding("error", split, message))
    return findings


def opening_findings(sets: Sets) -> list[Finding]:
    """What opening the splits shows: too few classes, classes without images, files and folders that are not read."""
    findings, train = list(sets.remarks), sets.train
    present = [k for k, n in enumerate(train.counts) if n]
    if len(present) < 2:
        name = f" ({listed(train.class_names[k] for k in present)})" if train.class_names and present else ""
        message = (
            f"got {len(present)} class with training images{name}, expected at least 2. Add images of another class."
        )
        findings.append(Finding("error", "train", message))
    if gaps := [k for k, n in enumerate(train.counts) if n == 0]:
        message = f"label gap: {len(gaps):,} of {train.num_classes:,} classes without training images"
        findings.append(Finding("warning", "train", message, _some(train, gaps)))
    for split, images in sets:
        absent = [k for k, n in enumerate(images.counts) if n == 0 and train.counts[k]]
        if split != "train" and absent:
            message = f"{_many(len(absent), 'class')} without {split} images, so without a measured accuracy"
            findings.append(Finding("warning", split, message, _some(train, absent)))
        if images.left_out and split not in sets.held_out:
            message = f"{_many(len(images.left_out), 'file')} left out: in no class folder, or not named as an image"
            findings.append(Finding("warning", split, message, tuple(images.left_out[:NUM_EXAMPLES])))
    return findings


def class_findings(config: Config, sets: Sets) -> list[Finding]:
    """Classes with few images, missing or lopsided splits."""
    findings = []
    if few := [k for k, n in enumerate(sets.train.counts) if 0 < n < FEW_IMAGES]:
        message = f"{_many(len(few), 'class')} with fewer than {FEW_IMAGES} training images"
        findings.append(Finding("note", "train", message, _some(sets.train, few)))
    if sets.test is None:
        findings.append(Finding("warning", "test", "no test set, so there is nothing to report accuracy on"))
    elif len({n for n in sets.test.counts if n}) > 1:
        message = "the test set is not balanced, so the overall accuracy favours its frequent classes"
        findings.append(Finding("note", "test", message))
    if sets.val is None and config.evaluate.select_on == "val":
        message = (
            "evaluate.select_on=val, but there is no validation list and data.val_holdout=0: the last epoch is kept"
        )
        findings.append(Finding("warning", "val", message))
    return findings


def _some(train: LongTailSet, classes: list[int]) -> tuple[str, ...]:
    """Return the first few classes by number, and by name if they have one."""
    names = train.class_names
    return tuple(f"{k} ({names[k]})" if names else f"class {k}" for k in classes[:NUM_EXAMPLES])


def image_findings(split: str, images: LongTailSet, cfg: DataConfig, decode: bool) -> tuple[list[Finding], list[bytes]]:
    """Findings about single images, and what tells each image from others: its sha256, or else its path."""
    if images.images_NHWC is not None:
        return [], [hashlib.sha256(image.tobytes()).digest() for image in images.images_NHWC]
    if not decode:
        return [], [path.encode() for path in images.paths]
    found: dict[tuple[Level, str], list[str]] = defaultdict(list)
    digests = []
    for path, scan in zip(images.paths, scan_files(images.root, images.paths, cfg), strict=True):
        if scan.problem:
            found["error", scan.problem].append(path)
        if scan.doubt:
            found["warning", scan.doubt].append(path)
        for note in scan.notes:
            found["note", note].append(path)
        digests.append(scan.digest or path.encode())
    findings = [
        Finding(level, split, f"{_many(len(paths), 'image')}: {what}", tuple(paths[:NUM_EXAMPLES]))
        for (level, what), paths in found.items()
    ]
    return findings, digests


def duplicate_findings(cfg: DataConfig, sets: Sets, digests: dict[str, list[bytes]]) -> list[Finding]:
    """The same image in two splits, twice in one, or with two labels. Published sets keep theirs, to be comparable."""
    places: dict[bytes, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for split, keys in digests.items():
        for index, key in enumerate(keys):
            places[key][split].append(index)
    splits = dict(sets)
    shared: dict[tuple[str, str], list[str]] = defaultdict(list)
    repeated: dict[str, list[str]] = defaultdict(list)
    conflicting: dict[str, list[str]] = defaultdict(list)
    for place in places.values():
        for split, indices in place.items():
            names = [splits[split].paths[i] for i in indices]
            if len(indices) > 1:
                repeated[split].append(" = ".join(names[:2]))
            if len(set(splits[split].labels[indices].tolist())) > 1:
                conflicting[split].append(" = ".join(names[:2]))
        if len(place) > 1:
            first, *others = ((split, splits[split].paths[indices[0]]) for split, indices in place.items())
            for split, name in others:
                shared[first[0], split].append(f"{first[1]} = {name}")
    leak: Level = "warning" if cfg.dataset in KNOWN_CLASSES else "error"
    findings = [_named(leak, b, f"of {b} also in {a}", names) for (a, b), names in shared.items()]
    findings += [_named("note", split, "more than once", names) for split, names in repeated.items()]
    findings += [_named("warning", split, "with several labels", names) for split, names in conflicting.items()]
    return findings


def _named(level: Level, split: str, what: str, names: list[str]) -> Finding:
    return Finding(level, split, f"duplicate: {_many(len(names), 'image')} {what}", tuple(names[:NUM_EXAMPLES]))
