"""Findings about the images of a data set: file problems and duplicates."""

import hashlib
from collections import defaultdict

from fastdeitlt.config import DataConfig
from fastdeitlt.data.check.scan import scan_files
from fastdeitlt.data.sets.counts import KNOWN_CLASSES
from fastdeitlt.data.sets.findings import NUM_EXAMPLES
from fastdeitlt.data.sets.types import Finding, Level, LongTailSet, Sets
from fastdeitlt.errors import counted


def image_findings(split: str, images: LongTailSet, cfg: DataConfig) -> tuple[list[Finding], list[bytes]]:
    """Return findings about single images, and each one's sha256 (else its path)."""
    if images.images_NHWC is not None:
        return [], [hashlib.sha256(image.tobytes()).digest() for image in images.images_NHWC]
    paths_by_finding: dict[tuple[Level, str], list[str]] = defaultdict(list)
    digests = []
    for path, scan in zip(images.paths, scan_files(images.root, images.paths, cfg, images.blobs), strict=True):
        if scan.problem:
            paths_by_finding["error", scan.problem].append(path)
        if scan.doubt:
            paths_by_finding["warning", scan.doubt].append(path)
        for note in scan.notes:
            paths_by_finding["note", note].append(path)
        digests.append(scan.digest or path.encode())
    findings = [
        _finding(level, split, f"{counted(len(paths), 'image')}: {what}", paths)
        for (level, what), paths in paths_by_finding.items()
    ]
    return findings, digests


def duplicate_findings(cfg: DataConfig, sets: Sets, digests: dict[str, list[bytes]]) -> list[Finding]:
    """Return findings on duplicates.

    In published sets they are only warnings, so that the sets stay comparable.
    """
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
    findings += [_named("note", split, "within the split", names) for split, names in repeated.items()]
    findings += [_named("warning", split, "with several labels", names) for split, names in conflicting.items()]
    return findings


def _named(level: Level, split: str, what: str, names: list[str]) -> Finding:
    return _finding(level, split, f"duplicate: {counted(len(names), 'image')} {what}", names)


def _finding(level: Level, split: str, message: str, names: list[str]) -> Finding:
    """Return a finding with all names of an error, which are to be corrected."""
    return Finding(level, split, message, tuple(names if level == "error" else names[:NUM_EXAMPLES]))
