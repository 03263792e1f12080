"""CIFAR archives: checksums, safe reading, the reference's choice of images."""

import hashlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fastdeitlt.config import DataConfig
from fastdeitlt.data import cifar
from fastdeitlt.data.longtail import cifar_lt_counts
from fastdeitlt.errors import UserError

CLASSES, PER_CLASS = 10, 20
RANDOM = np.random.RandomState(3)
LABELS = RANDOM.permutation(np.repeat(np.arange(CLASSES), PER_CLASS))
PIXELS = RANDOM.randint(0, 256, (len(LABELS), 3 * 32 * 32)).astype(np.uint8)


class Trap:
    """A pickle that runs code when it is read without care."""

    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """{"data": pixels, "labels": labels} byte for byte as numpy under Python 2 pickled it (the published archives)."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\0K\1\x87R(K\3" + text(b"|") + b"NNNJ" + b"\xff" * 4
    dtype += b"J" + b"\xff" * 4 + b"K\0tb"
    shape = b"".join(b"J" + struct.pack("<i", n) for n in pixels.shape) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    array += b"(K\1" + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\2}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def make_archive(root: Path, labels_key: str = "labels", extra: dict | None = None, unpacked: bool = False):
    """A small archive with the structure of torchvision's, and its description."""
    folder = "cifar-x-batches-py"
    half = len(LABELS) // 2
    contents = {
        "data_batch_1": {"data": PIXELS[:half], labels_key: LABELS[:half].tolist()},
        "data_batch_2": {"data": PIXELS[half:], labels_key: LABELS[half:].tolist()},
        "test_batch": {"data": PIXELS[:CLASSES], labels_key: list(range(CLASSES))},
        "batches.meta": {"label_names": [f"class {i}" for i in range(CLASSES)]},
    }
    files = {name: pickle.dumps(value | (extra or {}), protocol=2) for name, value in contents.items()}
    sums = {name: md5(data) for name, data in files.items()}
    if unpacked:
        (root / folder).mkdir()
        for name, data in files.items():
            (root / folder / name).write_bytes(data)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in {**files, "../escape": b"x"}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if not unpacked:
        (root / "cifar-x.tar.gz").write_bytes(buffer.getvalue())
    return cifar.Archive(
        num_classes=CLASSES,
        filename="cifar-x.tar.gz",
        url="file:///nowhere",
        md5=md5(buffer.getvalue()),
        folder=folder,
        train_files={name: sums[name] for name in ("data_batch_1", "data_batch_2")},
        test_files={"test_batch": sums["test_batch"]},
        meta_file=("batches.meta", sums["batches.meta"]),
        names_key="label_names",
    )


def config(root: Path, **fields) -> DataConfig:
    return DataConfig(dataset="cifar10_lt", root=str(root), **{"imbalance_factor": 0.1} | fields)


@pytest.mark.parametrize("labels_key", ["labels", "fine_labels"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_long_tail_has_the_reference_codes_images_in_its_order(tmp_path, labels_key, unpacked):
    archive = make_archive(tmp_path, labels_key, unpacked=unpacked)
    sets = cifar.open_cifar(config(tmp_path), archive)
    counts = cifar_lt_counts(len(LABELS), CLASSES, 0.1)
    assert sets.train.counts == counts

    np.random.seed(0)  # what LDAM-DRW's imbalance_cifar.py does
    expected = []
    for label, count in enumerate(counts):
        members = np.where(label == LABELS)[0]
        np.random.shuffle(members)
        expected += members[:count].tolist()
    images_NHWC = PIXELS.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(sets.train.images_NHWC, images_NHWC[expected])
    np.testing.assert_array_equal(sets.train.labels, LABELS[expected])
    assert sets.train.paths == [f"train/{i:05d}" for i in expected]
    assert sets.train.class_names[3] == "class 3"
    assert (len(sets.test), sets.test.labels.tolist(), sets.val) == (CLASSES, list(range(CLASSES)), None)


def test_pickle_of_python_2_is_read(tmp_path):
    archive = make_archive(tmp_path, unpacked=True)
    data = python2_pickle(PIXELS[:30], LABELS[:30].tolist())
    (tmp_path / archive.folder / "test_batch").write_bytes(data)
    archive.test_files["test_batch"] = md5(data)
    test = cifar.open_cifar(config(tmp_path), archive).test
    assert test.labels.tolist() == LABELS[:30].tolist()
    np.testing.assert_array_equal(test.images_NHWC[:, 5, 7, 2], PIXELS[:30, 2 * 1024 + 5 * 32 + 7])


def test_conversion_is_made_once_and_again_when_damaged(tmp_path):
    archive = make_archive(tmp_path)
    first = cifar.open_cifar(config(tmp_path), archive)
    converted = cifar.prepare("cifar10", str(tmp_path), archive=archive)
    (tmp_path / "cifar-x.tar.gz").rename(tmp_path / "away")
    again = cifar.open_cifar(config(tmp_path), archive)
    np.testing.assert_array_equal(first.train.images_NHWC, again.train.images_NHWC)
    converted.write_bytes(converted.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"neither cifar-x\.tar\.gz nor"):
        cifar.open_cifar(config(tmp_path), archive)
    (tmp_path / "away").rename(tmp_path / "cifar-x.tar.gz")
    assert len(cifar.open_cifar(config(tmp_path), archive).train) == len(first.train)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cifar-x.npz", "cifar-x.tar.gz"]


@pytest.mark.parametrize("unpacked", [False, True])
def test_wrong_checksum_is_refused_before_reading(tmp_path, unpacked):
    archive = make_archive(tmp_path, unpacked=unpacked)
    file = tmp_path / ("cifar-x-batches-py/data_batch_2" if unpacked else "cifar-x.tar.gz")
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"md5 is [0-9a-f]{32}, expected [0-9a-f]{32}"):
        cifar.open_cifar(config(tmp_path), archive)
    assert not (tmp_path / "cifar-x.npz").exists()


def test_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    archive = make_archive(tmp_path, extra={"trap": Trap()})
    with pytest.raises(UserError, match=r"not a CIFAR file \(it names .*mkdir\)"):
        cifar.open_cifar(config(tmp_path), archive)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("extra", [{"data": PIXELS[:3]}, {"data": "text"}, {"labels": None}])
def test_batch_of_another_shape_is_refused(tmp_path, extra):
    with pytest.raises(UserError, match="not a CIFAR file"):
        cifar.open_cifar(config(tmp_path), make_archive(tmp_path, extra=extra))


def test_archive_without_a_batch_is_refused(tmp_path):
    archive = make_archive(tmp_path)
    archive.train_files["data_batch_9"] = "0"
    with pytest.raises(UserError, match="data_batch_9 is missing"):
        cifar.open_cifar(config(tmp_path), archive)


def test_nothing_is_downloaded_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "download_url", lambda *a: pytest.fail("tried to download"))
    with pytest.raises(UserError, match=r"data prepare cifar100 --root .* --download"):
        cifar.open_cifar(DataConfig(dataset="cifar100_lt", root=str(tmp_path)))


def test_download_when_asked_and_its_failure(tmp_path, monkeypatch):
    store = tmp_path / "store"
    store.mkdir()
    archive = make_archive(store)
    asked = []

    def fetch(url, root, filename, md5):
        asked.append((url, md5))
        os.makedirs(root, exist_ok=True)
        (Path(root) / filename).write_bytes((store / filename).read_bytes())

    monkeypatch.setattr(cifar, "download_url", fetch)
    assert cifar.prepare("cifar10_lt", str(tmp_path / "new"), download=True, archive=archive).is_file()
    assert asked == [(archive.url, archive.md5)]

    def fail(*arguments):
        raise OSError("no route to host")

    monkeypatch.setattr(cifar, "download_url", fail)
    with pytest.raises(UserError, match="no route to host"):
        cifar.prepare("cifar10_lt", str(tmp_path / "other"), download=True, archive=archive)


def test_root_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    archive = make_archive(tmp_path)

    def refuse(*arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cifar.np, "savez", refuse)
    with pytest.raises(UserError, match="must be writable once"):
        cifar.open_cifar(config(tmp_path), archive)


def test_published_archives_are_torchvisions():
    assert cifar.known_archive("cifar100_lt").md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    assert len(cifar.known_archive("cifar10_lt").train_files) == 5
    with pytest.raises(UserError, match="'imagenet_lt', expected cifar10 or cifar100;"):
        cifar.known_archive("imagenet_lt")
