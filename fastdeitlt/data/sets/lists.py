"""List files (txt, csv, json) to image paths and labels, without opening images.

N images in the set, K classes, H height, W width, C channels.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdeitlt.data.sets.class_names import is_utf8, listed, normalised
from fastdeitlt.data.sets.types import LongTailSet, class_counts
from fastdeitlt.errors import UserError, counted

MAX_CLASSES = 1_000_000
"""Labels from here on are refused: memory is allocated for every class up to the largest label."""
PATH_COLUMNS = ("path", "image", "file", "filename", "file_name", "fpath")
SPLIT_COLUMNS = ("split", "subset", "partition")
LABEL_COLUMNS = ("label", "class", "category", "category_id", "target")
_UNSAFE = re.compile(r"^$|^/|^[A-Za-z]:|\\|\0|(^|/)\.\.(/|$)")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass
class _Rows:
    """The rows of a list before validation; ``where`` has their line numbers or indices."""

    paths: list[str]
    labels: Sequence[str | int]
    where: Sequence[int]
    unit: str = "line"
    names_allowed: bool = True
    num_classes: int | None = None
    categories: dict[str | int, str] | None = None
    """JSON category id -> name, in class order."""


def read_list(path: str | Path, root: str | Path, num_classes: int | None = None) -> LongTailSet:
    """Read a list file in time and memory linear in its lines.

    txt: ``relpath label`` per line; paths may contain spaces, the last field is the label.
    csv: a header with a path column (path, image, file, filename, file_name, fpath) and a label column (label, class,
    category, category_id, target). json: iNaturalist (images, annotations, categories), BagOfTricks / NCL
    (annotations with fpath and category_id, num_classes), or a plain list of {path, label}.
    In csv and json a label may be a class name; names are numbered in sorted order. JSON categories are the classes,
    numbered by their ids if these are 0..K-1, else (ids from 1, or with gaps) in listed order.
    UTF-8 with or without a byte order mark, any line endings; blank lines are skipped. A class without images has
    count 0.

    Args:
        path: the list file.
        root: folder of the listed paths.
        num_classes: K. None: the json's num_classes, else the largest label + 1 or the number of names.

    Raises:
        UserError: the file is missing, empty or not UTF-8; a row without path or label; a label that is not a class
            index or name; a path outside the root. The message has the line.
    """
    path = Path(path)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise UserError(f"list {path}: got the suffix {path.suffix!r}, expected .txt, .csv or .json")
    rows = readers[path.suffix.lower()](path, _read_text(path))
    if not rows.paths:
        raise UserError(f"list {path}: empty, expected one image per line")
    _check_paths(path, rows)
    labels, names = _number_labels(path, rows)
    stated_classes = num_classes or rows.num_classes
    limit, largest = stated_classes or MAX_CLASSES, max(labels)
    if largest >= limit:
        raise _bad(path, rows, labels.index(largest), f"the label {largest}", f"a class index below {limit}")
    classes = stated_classes or max(largest + 1, len(names or ()))
    labels_N = np.array(labels, dtype=np.int64)
    names = names if names and len(names) == classes else None
    if odd := next((name for name in names or () if not is_utf8(name)), None):
        raise UserError(f"list {path}: got the class name {odd!r}, expected valid UTF-8. Rename the class.")
    return LongTailSet(rows.paths, labels_N, class_counts(labels_N, classes), str(root), names)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"list {path}: cannot be read ({error.strerror}), expected a list file") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"list {path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8. Save the list as UTF-8."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _bad(path: Path, rows: _Rows, index: int, got: str, expected: str) -> UserError:
    return UserError(f"list {path}, {rows.unit} {rows.where[index]}: got {got}, expected {expected}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_txt(path: Path, text: str) -> _Rows:
    paths, labels, where = [], [], []
    for number, line in enumerate(text.split("\n"), 1):
        fields = line.rsplit(None, 1)
        if len(fields) == 2:
            paths.append(fields[0].lstrip())
            labels.append(fields[1])
            where.append(number)
        elif fields:
            raise UserError(f"list {path}, line {number}: got {_short(line)}, expected 'relpath label'")
    return _Rows(paths, labels, where, names_allowed=False)


def _column(path: Path, header: list[str], names: tuple[str, ...]) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    commas = ", separated by commas" if len(header) == 1 else ""
    expected = f"a column {' or '.join(names)}{commas}"
    raise UserError(f"list {path}, line 1: got the header {_short(header)}, expected {expected}")


def _read_csv(path: Path, text: str) -> _Rows:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    splits: set[str] = set()
    paths, labels, where = [], [], []
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        path_column, label_column = _column(path, header, PATH_COLUMNS), _column(path, header, LABEL_COLUMNS)
        split_columns = [index for index, name in enumerate(header) if name in SPLIT_COLUMNS]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"list {path}, line {reader.line_num}: got {counted(len(row), 'field')}, expected {len(header)}. "
                    "Quote fields that contain a comma."
                )
            paths.append(row[path_column].strip())
            labels.append(row[label_column].strip())
            where.append(reader.line_num)
            splits.update(row[column].strip() for column in split_columns)
    except csv.Error as error:
        raise UserError(f"list {path}, line {reader.line_num}: not valid csv ({error})") from None
    _refuse_several(path, splits)
    return _Rows(paths, labels, where)


def _read_json(path: Path, text: str) -> _Rows:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"list {path}: not valid json ({error})") from None
    tree = {"annotations": tree} if isinstance(tree, list) else tree
    records = tree.get("annotations") if isinstance(tree, dict) else None
    if not isinstance(records, list):
        raise UserError(f"list {path}: expected a list of {{path, label}} or an object with 'annotations'")
    splits: set[str] = set()
    paths, labels = [], []
    try:
        files = {image["id"]: _value(image, PATH_COLUMNS, str) for image in tree.get("images", ())}
        for record in records:
            paths.append(files[record["image_id"]] if files else _value(record, PATH_COLUMNS, str))
            labels.append(_value(record, LABEL_COLUMNS, (int, str)))
            splits.update(str(record[name]) for name in SPLIT_COLUMNS if name in record)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"list {path}, annotation {len(labels)}: {type(error).__name__} {error}; expected image_id of an image "
            "with id and file_name, or path (fpath), and label (category_id)"
        ) from None
    _refuse_several(path, splits)
    classes, categories = tree.get("num_classes"), _categories(path, tree.get("categories"))
    classes = classes if type(classes) is int and 0 < classes <= MAX_CLASSES else None
    return _Rows(paths, labels, range(len(paths)), "annotation", num_classes=classes, categories=categories)


def _refuse_several(path: Path, splits: set[str]) -> None:
    """Raise UserError for a list of several splits: all would be read as one."""
    if len(splits) > 1:
        found = listed(sorted(splits))
        raise UserError(f"list {path}: got images of the splits {found}, expected one. Write a list for each.")


def _value(record: dict[str, Any], keys: tuple[str, ...], kind: type | tuple[type, ...]) -> Any:
    """Return the first present key's value.

    Raises KeyError, or TypeError for its type.
    """
    for key in keys:
        if key in record:
            if not isinstance(record[key], kind):
                raise TypeError(f"{key} {_short(record[key])}")
            return record[key]
    raise KeyError(" or ".join(keys))


def _categories(path: Path, categories: object) -> dict[str | int, str] | None:
    """Map JSON category ids to names in class order; None if they have no ids.

    Raises:
        UserError: two categories with one id.
    """
    if not isinstance(categories, list) or not all(isinstance(c, dict) for c in categories):
        return None
    ids = [c.get("id") for c in categories]
    if not ids or not all(isinstance(number, str) or type(number) is int for number in ids):
        return None
    names = {number: str(c.get("name", number)) for number, c in zip(ids, categories, strict=True)}
    if len(names) < len(ids):
        twice = next(number for number in ids if ids.count(number) > 1)
        raise UserError(f"list {path}: got several categories with id {_short(twice)}, expected one. Renumber them.")
    own = set(names) == set(range(len(names)))
    return {number: names[number] for number in range(len(names))} if own else names


def _check_paths(path: Path, rows: _Rows) -> None:
    joined = "\n".join(["", *rows.paths, ""])
    if any(mark in joined for mark in ("\n\n", "\n/", "..", "\\", ":", "\0")):
        for index, name in enumerate(rows.paths):
            if _UNSAFE.search(name):
                expected = "one relative to data.root, with / and without '..'"
                raise _bad(path, rows, index, f"the path {_short(name)}", expected)
    try:
        joined.encode()
    except UnicodeEncodeError as error:
        ends = itertools.accumulate(len(name) + 1 for name in rows.paths)
        index = next(i for i, end in enumerate(ends) if end >= error.start)
        raise _bad(path, rows, index, f"the path {_short(rows.paths[index])}", "a name that is valid UTF-8") from None


def _is_index(label: str | int) -> bool:
    if isinstance(label, str):
        return label.isdigit() and label.isascii() and len(label) < 19
    return type(label) is int and label >= 0


def _is_name(label: str | int) -> bool:
    return isinstance(label, str) and label != "" and not _NUMBER.fullmatch(label)


def _number_labels(path: Path, rows: _Rows) -> tuple[list[int], list[str] | None]:
    """Return the labels as class indices, and the class names if there are any."""
    distinct = set(rows.labels)
    number: dict[str | int, int]
    names: list[str] | None = None
    if rows.categories:
        names = list(rows.categories.values())
        by_name = not distinct <= rows.categories.keys() and distinct <= set(names) and len(set(names)) == len(names)
        number = {key: index for index, key in enumerate(names if by_name else rows.categories)}
        wrong, expected = distinct - number.keys(), "the id of a category"
    elif all(map(_is_index, distinct)):
        number = {label: int(label) for label in distinct}
        spelled = {int(label): str(label) for label in sorted(distinct, key=str)}
        wrong = {label for label in distinct if str(label) != spelled[int(label)]}
        expected = "one spelling of each class index"
    elif not rows.names_allowed or any(map(_is_index, distinct)):
        number = {}
        wrong, expected = {label for label in distinct if not _is_index(label)}, "a class index 0, 1, 2, ..."
        expected += "" if rows.names_allowed else " (names: in a .csv list)"
    else:
        forms = {label: normalised(str(label)) for label in distinct}
        names = sorted(set(forms.values()))
        index_of = {name: index for index, name in enumerate(names)}
        number = {label: index_of[form] for label, form in forms.items()}
        wrong, expected = {label for label in distinct if not _is_name(label)}, "a class index or a class name"
    if wrong:
        index = next(index for index, label in enumerate(rows.labels) if label in wrong)
        raise _bad(path, rows, index, f"the label {_short(rows.labels[index])}", expected)
    return [number[label] for label in rows.labels], names
