"""Images in shards (WebDataset tars, zips, parquet files) and their index.

Tars and zips are read in place. A parquet file stores its columns compressed in row groups, so its encoded images are
copied once to the user cache, next to the index.
"""

# N images in the set

import hashlib
import json
import os
import posixpath
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
from filelock import FileLock

from fastdeitlt.data.sets.blobs import Blobs, inflated
from fastdeitlt.data.sets.class_names import is_utf8, listed, normalised, numbered
from fastdeitlt.data.sets.folders import is_image, split_of, walk
from fastdeitlt.data.sets.types import LongTailSet, class_counts
from fastdeitlt.errors import UserError
from fastdeitlt.store.files import draft_file, user_cache

SUFFIXES = (".tar", ".zip", ".parquet")
LABEL_SUFFIXES = (".cls", ".json")
"""Suffixes of label files named like their image; an image without one has the class of its folder."""
MAX_LABEL_BYTES = 2**16
VERSION = 2
"""Index version; an index of another version is rebuilt."""


@dataclass(frozen=True)
class Entry:
    """Location and class of an image in a shard."""

    name: str
    start: int
    size: int
    """Bytes in the shard."""
    is_deflated: bool
    label: int | str | None
    """Class number or name; None: the class of its folder."""


@dataclass(frozen=True)
class Shard:
    """The images of a shard."""

    file: str
    """File with the encoded images."""
    entries: list[Entry]
    class_names: list[str] | None = None
    left_out: list[str] = field(default_factory=list)
    """Entries that are neither images nor labels."""


def split_shards(root: str | Path) -> dict[str, list[str]]:
    """Return the shards of each split, relative to ``root``.

    Without splits all are train. Linked folders are followed.

    Raises:
        UserError: no shards, a folder that cannot be read, or only some shards name a split.
    """
    names = sorted(name for name in walk(root) if name.endswith(SUFFIXES))
    if not names:
        raise UserError(f"data.root {root}: got no shards, expected {', '.join(SUFFIXES)} files. Set data.root=FOLDER.")
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(names_split(name), []).append(name)
    if "" not in splits:
        return splits
    if len(splits) == 1:
        return {"train": splits[""]}
    raise UserError(
        f"data.root {root}: got {splits[''][0]}, expected a split in the name, as in the other shards. Rename it, "
        f"for example to train-{Path(splits[''][0]).name}, or move it out."
    )


def names_split(name: str) -> str:
    """Return the split in a shard's file or folder name, or "".

    It is a word of the name, as in ``train-0001.tar`` and ``imagenet1k-validation-00.tar``.
    """
    for part in reversed(Path(name).parts):
        for word in re.split("[-_.]", part.lower()):
            if split := split_of(word.rstrip("0123456789")):
                return split
    return ""


def read_shards(root: str | Path, shards: Sequence[str]) -> LongTailSet:
    """Read the index of a split's shards, built once in the user cache.

    Raises:
        UserError: an unreadable shard, images without a class, split folders inside a shard, or a mix of class numbers
            and names.
    """
    files = [os.path.join(root, shard) for shard in shards]
    index = _index_of(root, files)
    with np.load(index, allow_pickle=False) as arrays:
        blobs = Blobs(
            json.loads(str(arrays["files"])),
            arrays["file_N"],
            arrays["start_N"],
            arrays["size_N"],
            arrays["deflated_N"],
        )
        names = json.loads(str(arrays["class_names"]))
        labels_N = arrays["labels_N"]
        paths = str(arrays["names"]).split("\n")
        left_out = json.loads(str(arrays["left_out"]))
    return LongTailSet(paths, labels_N, class_counts(labels_N, len(names) if names else int(labels_N.max()) + 1),
                       str(root), names, left_out=left_out, blobs=blobs)  # fmt: skip


def _index_of(root: str | Path, files: list[str]) -> Path:
    """Return the index of these shards; build it if missing or outdated."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    for file in files:
        status = os.stat(file)
        names = f"{os.path.realpath(file)}\n{os.path.relpath(file, root)}"  # the latter begins the images' names
        digest.update(f"{names}\n{status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    index = user_cache("shards") / f"{digest.hexdigest()[:32]}.npz"
    if not _is_whole(index):
        try:
            index.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(index.with_suffix(".lock")):  # one rank builds it
                if not _is_whole(index):
                    _make_index(root, files, index)
        except OSError as error:
            raise UserError(
                f"index of shards {index}: cannot be written ({error.strerror}). Set XDG_CACHE_HOME to another folder."
            ) from None
    return index


def _is_whole(index: Path) -> bool:
    """Return whether the index and all files it refers to exist."""
    if not index.is_file():
        return False
    with np.load(index, allow_pickle=False) as arrays:
        return all(os.path.isfile(file) for file in json.loads(str(arrays["files"])))


def _make_index(root: str | Path, files: list[str], index: Path) -> None:
    shards = [_read_shard(file, index) for file in files]
    for file, shard in zip(files, shards, strict=True):
        if not shard.entries:
            raise UserError(f"shard {file}: no images. Move it out of data.root.")
    level = _class_level(root, shards)
    names, left_out, labels, parts = [], [], [], []
    for file, shard in zip(files, shards, strict=True):
        prefix = os.path.relpath(file, root)
        names += [f"{prefix}/{entry.name}" for entry in shard.entries]
        left_out += [f"{prefix}/{name}" for name in shard.left_out]
        for entry in shard.entries:
            label = _folders(entry.name)[level] if entry.label is None else entry.label
            labels.append(shard.class_names[label] if shard.class_names and isinstance(label, int) else label)
        parts.append(np.array([(entry.start, entry.size, entry.is_deflated) for entry in shard.entries], np.int64))
    class_names, labels_N = _numbers(labels, names, root)
    if odd := [name for name in (*names, *(class_names or ())) if "\n" in name or not is_utf8(name)]:
        raise UserError(f"shards in {root}: got the name {odd[0]!r}, expected UTF-8 without line breaks. Rename it.")
    rows_N3 = np.concatenate(parts)
    with draft_file(index) as draft, draft.open("wb") as out:
        np.savez(
            out,
            files=json.dumps([shard.file for shard in shards]),
            file_N=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts]),
            start_N=rows_N3[:, 0],
            size_N=rows_N3[:, 1],
            deflated_N=rows_N3[:, 2].astype(bool),
            labels_N=labels_N,
            class_names=json.dumps(class_names),
            names="\n".join(names),
            left_out=json.dumps(sorted(left_out)),
        )


def _folders(name: str) -> list[str]:
    """Return the folders of an entry."""
    return [part for part in name.split("/")[:-1] if part not in ("", os.curdir, os.pardir)]


def _class_level(root: str | Path, shards: list[Shard]) -> int:
    """Return the depth of the class folders, below the folders that all images share.

    Raises:
        UserError: split folders, or another top folder in each shard.
    """
    folders = [[_folders(entry.name) for entry in shard.entries] for shard in shards]
    flat = [parts for shard in folders for parts in shard]
    entries = [entry for shard in shards for entry in shard.entries]
    level = _shared(flat)
    tops = {parts[level] for parts in flat if len(parts) > level}
    by_folder = [parts for parts, entry in zip(flat, entries, strict=True) if entry.label is None]
    if len({split_of(top) for top in tops} - {""}) > 1 or (
        any(split_of(parts[level]) for parts in by_folder if len(parts) > level + 1)
    ):
        raise UserError(
            f"shards in {root}: got the folders {listed(sorted(tops))} inside, expected the images of one split. "
            "Unpack them, or pack each split by itself as train-*, val-* and test-*."
        )
    if by_folder and all(_shared(shard) > level for shard in folders):
        raise UserError(
            f"shards in {root}: got another top folder in each ({listed(sorted(tops))}), expected the same one or "
            "class folders. Unpack them, or pack them again from one folder."
        )
    return level


def _shared(folders: list[list[str]]) -> int:
    """Return the number of folders that all images share, without their last one."""
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(min(folders), max(folders), strict=False))
    return max(0, min(len(list(equal)), min(map(len, folders)) - 1))


def _numbers(labels: list[int | str], names: list[str], root: str | Path) -> tuple[list[str] | None, np.ndarray]:
    """Return class names in sorted order (None: numbers) and labels [N]."""
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        number, name = (next(i for i, label in enumerate(labels) if isinstance(label, kind)) for kind in (int, str))
        raise UserError(
            f"shards in {root}: {names[number]} has class {labels[number]} and {names[name]} class "
            f"{str(labels[name])!r}, expected only numbers or only names. Label all images alike."
        )
    if int in kinds:
        if (bad := min(labels)) < 0:  # type: ignore[type-var, operator]
            raise UserError(f"shards in {root}: got class {bad}, expected 0 or more. Remove such images.")
        return None, np.array(labels, np.int64)
    number_of = numbered(sorted({str(label) for label in labels}, key=normalised), f"shards in {root}")
    return list(number_of), np.array([number_of[normalised(str(label))] for label in labels], np.int64)


def _read_shard(file: str, index: Path) -> Shard:
    """List the images of a shard."""
    try:
        if file.endswith(".parquet"):
            return _read_parquet(file, index)
        with open(file, "rb") as data:
            members = _tar_members(data) if file.endswith(".tar") else _zip_members(file, data)
            return _label(members, file, partial(os.pread, data.fileno()))
    except (OSError, tarfile.TarError, zipfile.BadZipFile, struct.error, EOFError) as error:
        raise UserError(
            f"shard {file}: cannot be read ({error}). Copy it again, or move it out of data.root."
        ) from None


Member = tuple[str, int, int, bool]
"""Name, start, bytes, deflated."""


def _tar_members(data: object) -> Iterator[Member]:
    """Yield the files of a tar, and links with the bytes of their target.

    A link without target has no bytes, so its image is reported as unreadable.
    """
    with tarfile.open(fileobj=data, mode="r:") as tar:  # type: ignore[call-overload]
        members = tar.getmembers()
    files = {posixpath.normpath(member.name): member for member in members if member.isreg()}
    for member in members:
        if member.isreg():
            yield member.name, member.offset_data, member.size, False
        elif member.islnk() or member.issym():
            folder = posixpath.dirname(member.name) if member.issym() else ""
            target = files.get(posixpath.normpath(posixpath.join(folder, member.linkname)))
            yield member.name, *((target.offset_data, target.size) if target else (0, 0)), False


def _zip_members(file: str, data: object) -> Iterator[Member]:
    read = partial(os.pread, data.fileno())  # type: ignore[attr-defined]
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"shard {file}: {info.filename} is encrypted or not stored or deflated. Pack the shard again."
                )
            name_bytes, extra_bytes = struct.unpack("<26xHH", read(30, info.header_offset))
            start = info.header_offset + 30 + name_bytes + extra_bytes
            yield info.filename, start, info.compress_size, info.compress_type == zipfile.ZIP_DEFLATED


def _label(members: Iterator[Member], file: str, read: Callable[[int, int], bytes]) -> Shard:
    """List the images of a shard, with classes from label files.

    Hidden entries are ignored.
    """
    images: list[Member] = []
    beside: dict[str, Member] = {}
    left_out: list[str] = []
    for member in members:
        if any(part.startswith(".") for part in (*_folders(member[0]), posixpath.basename(member[0]))):
            continue
        stem, suffix = _key(member[0])
        if is_image(member[0]):
            images.append(member)
        elif suffix not in LABEL_SUFFIXES:
            left_out.append(member[0])
        elif stem not in beside or suffix != ".json":
            beside[stem] = member
    entries = [Entry(*image, _class_of(image[0], beside.get(_key(image[0])[0]), file, read)) for image in images]
    return Shard(os.path.abspath(file), entries, left_out=left_out)


def _key(name: str) -> tuple[str, str]:
    """Return a member's WebDataset key (name up to the first dot) and last suffix."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}", os.path.splitext(base)[1].lower()


def _class_of(image: str, label: Member | None, file: str, read: Callable[[int, int], bytes]) -> int | str | None:
    """Return the class in a label file; None without one, for an image in a folder."""
    if label is None:
        if _folders(image):
            return None
        raise UserError(
            f"shard {file}: {image} has no class, expected a {' or '.join(LABEL_SUFFIXES)} file beside it, or a folder"
        )
    name, start, size, is_deflated = label
    if size > MAX_LABEL_BYTES:
        raise UserError(f"shard {file}: {name} has {size:,} bytes, expected a class. Repair the shard.")
    data = read(size, start)
    text = (inflated(data) if is_deflated else data).decode("utf-8", "replace").strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if isinstance(value, dict):
        value = next(
            (value[key] for key in ("label", "cls", "class", "category_id", "class_name") if key in value), None
        )
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise UserError(
            f"shard {file}: {name} contains {text[:40]!r}, expected the number or the name of a class. Repair the "
            "shard."
        )
    return value


def _read_parquet(file: str, index: Path) -> Shard:
    """Copy the encoded images of a parquet file into one file next to the index."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"shard {file}: parquet needs pyarrow. Run pip install 'fastdeitlt[parquet]'.") from None
    packed = index.with_suffix(f".{hashlib.sha256(file.encode()).hexdigest()[:16]}.images")
    entries: list[Entry] = []
    try:
        table = parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        label = next((name for name in ("label", "labels", "fine_label", "class") if name in columns), None)
        image = next((name for name in ("image", "img") if name in columns), None)
        if label is None or image is None:
            raise UserError(f"shard {file}: got the columns {', '.join(columns)}, expected image and label")
        facts = json.loads((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        names = facts.get("info", {}).get("features", {}).get(label, {}).get("names")
        with draft_file(packed) as draft, draft.open("wb") as out:
            for batch in table.iter_batches(256, columns=[image, label]):
                for cell, number in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                    data = cell.get("bytes") if isinstance(cell, dict) else cell
                    if not isinstance(data, bytes) or not isinstance(number, int | str):
                        raise UserError(
                            f"shard {file}: row {len(entries)} has no image bytes or no label. Repair the shard."
                        )
                    if isinstance(number, int) and names and not 0 <= number < len(names):
                        raise UserError(
                            f"shard {file}: row {len(entries)} has label {number}, expected below {len(names)}. Repair "
                            "the shard."
                        )
                    entries.append(Entry(f"{len(entries):06d}", out.tell(), len(data), False, number))
                    out.write(data)
    except ArrowException as error:
        raise UserError(
            f"shard {file}: cannot be read ({error}). Copy it again, or move it out of data.root."
        ) from None
    return Shard(str(packed), entries, names)
