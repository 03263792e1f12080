"""`plan`: recipes of teacher and student for a folder of images, machine and time."""

import math
import os
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastdeitlt import config, distributed
from fastdeitlt.config import DataConfig
from fastdeitlt.data.check.pixel_stats import PixelStats, pixel_stats
from fastdeitlt.data.check.scan import check_files
from fastdeitlt.data.pixels.files import UnreadableError, read_encoded
from fastdeitlt.data.sets.findings import opening_findings
from fastdeitlt.data.sets.folders import SPLIT_FOLDERS, is_image, split_of, walk
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.data.sets.shards import SUFFIXES as SHARD_SUFFIXES
from fastdeitlt.data.sets.shards import names_split
from fastdeitlt.data.sets.splits import DEFAULT_LISTS
from fastdeitlt.data.sets.types import SPLITS, LongTailSet, Sets
from fastdeitlt.errors import UserError, counted, printable
from fastdeitlt.models.start import shape_of
from fastdeitlt.models.vit import PATCHES
from fastdeitlt.tools.plan_facts import Choice, Facts, Rates, Rung, Setting
from fastdeitlt.tools.plan_rates import measure_rates
from fastdeitlt.tools.plan_rules import choose, default_hours, holdout_shares

LIST_SUFFIXES = (".txt", ".csv", ".json")


@dataclass(frozen=True)
class Planned:
    """Two recipes and the facts they are based on."""

    choice: Choice
    facts: Facts
    rates: Rates
    sets: Sets
    pixels: PixelStats
    hours: float


def make_plan(
    root: str | Path, hours: float | None = None, weights: str | Path = "", name: str = "plan", device: str = "auto"
) -> Planned:
    """Read the images' layout and statistics, measure the machine, choose recipes.

    Args:
        root: a folder of class folders, of split folders or of lists; or a list file.
        hours: hours for teacher and student together; None: by the size of the set.
        weights: initial weights of the student, which determine its architecture.
        name: name of the student's run; the teacher's has the suffix ``-teacher``.
        device: auto, cpu or cuda.

    Raises:
        UserError: an invalid name, no images, unreadable images, fewer than two classes, or too few hours.
    """
    if hours is not None and not 0 < hours < math.inf:
        raise UserError(f"--hours: got {hours:g}, expected a number above 0, such as 0.5")
    config.build({"name": name})  # an invalid name is an error before the measurement
    architecture = _architecture(weights) if weights else None
    settings = layout(root)
    sets = open_sets(DataConfig(**settings, val_holdout=0, test_holdout=0))
    if sum(count > 0 for count in sets.train.counts) < 2:
        raise UserError(f"data {root}: got images of 1 class, expected at least 2. Add images of another class.")
    holdouts = holdout_shares(sets.train.counts, sets.val is not None, sets.test is not None)
    none_held = {f"{split}_holdout": 0.0 for split in ("val", "test")}
    cfg = DataConfig(**settings, **none_held | {f"{split}_holdout": share for split, share in holdouts.items()})
    sets = open_sets(cfg)
    data = shlex.join(f"data.{name}={value}" for name, value in settings.items())
    check_files(sets, cfg, f"Repair or remove them; to list all: fastdeitlt data check quickstart {data}")
    pixels = pixel_stats(sets.train, cfg)
    where = distributed.device_of(device)
    facts = Facts(
        dataset=settings["dataset"],
        root=settings["root"],
        lists={split: settings[f"{split}_list"] for split in SPLITS if f"{split}_list" in settings},
        counts=sets.train.counts,
        num_val=len(sets.val) if sets.val else 0,
        holdouts=holdouts,
        mean=pixels.mean,
        std=pixels.std,
        short_side=pixels.short_side,
        gray=pixels.gray,
        gpu=where.type == "cuda",
        init=str(Path(os.path.expanduser(weights)).resolve()) if weights else "",
        architecture=architecture,
        unreadable=pixels.num_unreadable,
    )
    hours = default_hours(facts.num_images) if hours is None else hours
    rates = measure_rates(sets.train, facts, hours, where)
    return Planned(choose(facts, rates, hours, name), facts, rates, sets, pixels, hours)


def layout(root: str | Path) -> dict[str, str]:
    """Return the data settings of a folder or list file: dataset, root and lists.

    Lists in the folder take precedence over class folders, the published ones over ``train.txt``, ``train.csv`` and
    ``train.json``. Lists of validation and test images are found beside the training list. Shards are found in the
    folder itself or in a split's, if there are no class folders with images.

    Raises:
        UserError: no such folder or file.
    """
    place = Path(os.path.expanduser(root))
    if place.is_file() and place.suffix in LIST_SUFFIXES:
        return _lists(place)
    if not place.is_dir():
        what = f"no list file ({', '.join(LIST_SUFFIXES)})" if place.exists() else "no such folder"
        expected = "a folder with <class>/<image>, train/<class>/<image> or train.txt"
        raise UserError(f"plan {root}: {what}, expected {expected}")
    whole = str(place.resolve())
    for dataset in ("imagenet_lt", "inat18", "places_lt"):
        if any((place / name).is_file() for name in DEFAULT_LISTS[dataset]["train"]):
            return {"dataset": dataset, "root": whole}
    for train in (place / f"{stem}{suffix}" for stem in SPLIT_FOLDERS["train"] for suffix in LIST_SUFFIXES):
        if train.is_file():
            return _lists(train)
    places = [place, *(folder for folder in place.iterdir() if folder.is_dir() and names_split(folder.name))]
    has_shards = any(file.suffix in SHARD_SUFFIXES for folder in places for file in folder.iterdir() if file.is_file())
    return {"dataset": "shards" if has_shards and not _has_class_folders(place) else "folder", "root": whole}


def _lists(train: Path) -> dict[str, str]:
    """Return the settings of a training list and of the lists named alike beside it.

    Those of ``my-train.csv`` are ``my-val.csv`` and ``my-test.csv``, or with another suffix.
    """
    folder = train.parent.resolve()
    settings = {"dataset": "list", "root": str(folder), "train_list": str(folder / train.name)}
    word = next((word for word in reversed(SPLIT_FOLDERS["train"]) if word in train.stem), "")
    for split in ("val", "test") if word else ():
        stems = [train.stem.replace(word, name) for name in SPLIT_FOLDERS[split]]
        files = [folder / f"{stem}{suffix}" for stem in stems for suffix in (train.suffix, *LIST_SUFFIXES)]
        if file := next((file for file in files if file.is_file()), None):
            settings[f"{split}_list"] = str(file)
    return settings


def _has_class_folders(root: Path) -> bool:
    """Return whether a folder has images in <split>/<class> or <class>.

    Beside split folders, <class> is not read.
    """
    depth = 2 if any(split_of(folder.name) for folder in root.iterdir() if folder.is_dir()) else 1
    images = (Path(file).parts for file in walk(root) if is_image(file))
    return any(len(parts) > depth and (depth == 1 or split_of(parts[0])) for parts in images)


def _architecture(weights: str | Path) -> Rung:
    """Return the architecture of initial weights, with a supported patch size.

    Raises:
        UserError: see ``shape_of``.
    """
    width, patch, depth, img_size = shape_of(weights)
    patch = min(PATCHES, key=lambda known: abs(known - patch))
    return Rung(max(img_size // patch, 1) * patch, patch, width, depth, "", 0)


def main(root: str, *, hours: float | None, weights: str, out: str) -> int:
    """Run `plan`: write both recipes; print choice, times and the next command.

    Raises:
        UserError: see ``make_plan``; or a file exists.
    """
    place = Path(root).resolve()
    title = place.name if place.is_dir() else place.stem
    default = re.sub(r"[^A-Za-z0-9._-]+", "-", title).strip("-._") or "plan"
    name = Path(out).name.removesuffix(".yaml").removesuffix(".yml") or default
    folder = Path(out).parent
    files = folder / f"{name}.yaml", folder / f"{name}-teacher.yaml"
    for file in files:
        if file.exists():
            raise UserError(f"plan {file}: exists, expected a new name. Remove it, or use --out NAME.")
    if not folder.is_dir():
        raise UserError(f"--out {out}: no such folder {folder}. Create it first.")
    planned = make_plan(root, hours, weights, name)
    titles = (
        f"Student for the images in {planned.facts.root}; teacher: {files[1].name}.",
        f"Teacher of {files[0].name}; keep the data settings of both files equal.",
    )
    for file, title, settings in zip(files, titles, (planned.choice.student, planned.choice.teacher), strict=True):
        file.write_text(to_yaml(title, settings), encoding="utf-8")
    for line in describe(planned):
        print(printable(line))
    print(f"wrote      {files[0]}, {files[1]}")
    print(f"next       fastdeitlt train {shlex.quote(str(files[0]))} --with-teacher {shlex.quote(str(files[1]))}")
    return 0


def to_yaml(title: str, settings: dict[str, Setting]) -> str:
    """Format a recipe as YAML with the reason of each setting in a comment."""
    lines, section = (
        [f"# {' '.join(printable(title).split())}", "# Written by `fastdeitlt plan`; edit as needed."],
        "",
    )
    for dotted, (value, reason) in sorted(settings.items(), key=lambda item: _rank(item[0])):
        part, _, field = dotted.rpartition(".")
        if part != section:
            lines.append(f"{part}:")
            section = part
        lines.append(f"{'  ' if part else ''}{field}: {config.dump_value(value)} # {reason}")
    return "\n".join(lines) + "\n"


def _rank(dotted: str) -> int:
    return config.FIELDS.index(dotted)


def describe(planned: Planned) -> list[str]:
    """Return terminal lines on the data, the measurements, the choice and the times."""
    sets, facts, rates, choice = planned.sets, planned.facts, planned.rates, planned.choice
    student, teacher = choice.configs
    held = {split: f"{share:.0%} of each class" for split, share in facts.holdouts.items()}
    sizes = ", ".join(
        f"{split} {len(images):,}{f' ({held[split]})' if split in held else ''}" for split, images in sets
    )
    lines = [f"data       {facts.root}: {counted(sets.num_classes, 'class')}, {sizes}", *_smallest(sets)]
    lines += [f"note       {finding}" for finding in opening_findings(sets) if finding.level == "warning"]
    lines.append(
        f"pixels     mean {list(facts.mean)}, deviation {list(facts.std)}, median short side {facts.short_side:,} px"
        + (f", {facts.gray:.0%} gray" if facts.gray else "")
    )
    lines += _turned(sets.train)
    for rung, rate in rates.student.items():
        mark = "selected" if rung == choice.rung else ""
        what = f"{rung.student}, {counted(rung.depth, 'block')}: {rate:,.0f} images/s"
        lines.append(f"measured   {what}; teacher {rung.teacher}: {rates.teacher[rung]:,.0f} images/s  {mark}".rstrip())
    t = teacher.teacher_training
    lines.append(f"teacher    {t.arch} at {t.img_size} px, {counted(t.epochs, 'epoch')}, {t.loss}, sam {t.sam}")
    drw = student.loss.drw_epoch
    lines.append(
        f"student    {student.student.name}, {counted(student.student.depth, 'block')}, "
        f"{counted(student.train.epochs, 'epoch')}, {choice.images_seen:,} images seen, "
        + (f"re-weighting from epoch {drw}" if drw >= 0 else "no re-weighting")
    )
    times = ", ".join(f"{part} {seconds / 60:,.1f} min" for part, seconds in choice.seconds.items())
    total = sum(choice.seconds.values()) / 60
    lines.append(f"time       {times}; together {total:,.1f} of {planned.hours * 60:,.1f} min")
    return lines + [f"note       {remark}" for remark in choice.remarks]


def _turned(images: LongTailSet) -> list[str]:
    """Return a line on EXIF orientations, if some of 512 images have one."""
    if images.images_NHWC is not None:
        return []
    sample = range(0, len(images), -(-len(images) // 512))
    number = 0
    for place in map(images.place, sample):
        with suppress(UnreadableError):
            upright, stored = (read_encoded(place, exif=exif, header_only=True) for exif in ("apply", "ignore"))
            number += upright.orientation != stored.orientation
    found = f"{number} of {counted(len(sample), 'sampled image')} with an EXIF orientation"
    return [f"note       {found}, ignored; data.exif=apply in both recipes turns them upright"] if number else []


def _smallest(sets: Sets) -> list[str]:
    """Return a line on the smallest classes, if images are held out of them."""
    if not sets.held_out:
        return []
    parts = {name: images.counts for name, images in sets if name in ("train", *sets.held_out)}
    totals = [sum(counts) for counts in zip(*parts.values(), strict=True)]
    smallest = [k for k in sorted(range(sets.num_classes), key=lambda k: totals[k]) if totals[k]][:3]
    shown = (", ".join(f"{counts[k]} {name}" for name, counts in parts.items()) for k in smallest)
    return [f"smallest   {'; '.join(f'{sets.train.class_name(k)} {s}' for k, s in zip(smallest, shown, strict=True))}"]
