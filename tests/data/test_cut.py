"""Long tails cut from CIFAR and Fashion-MNIST: checksums before reading, the reference's choice of images."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fastdeitlt.config import DataConfig
from fastdeitlt.data.sets import cut
from fastdeitlt.data.sets.counts import cifar_lt_counts
from fastdeitlt.errors import UserError

CLASSES, PER_CLASS = 10, 20
RANDOM = np.random.RandomState(3)
LABELS = RANDOM.permutation(np.repeat(np.arange(CLASSES), PER_CLASS))
PIXELS = RANDOM.randint(0, 256, (len(LABELS), 3 * 32 * 32)).astype(np.uint8)
FOLDER = "cifar-10-batches-py"
PACKED = "cifar-10-python.tar.gz"


class Trap:
    """A pickle that runs code when it is read without care."""

    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def make_archive(monkeypatch):
    """Write a small archive of CIFAR-10's structure, packed or unpacked, and let torchvision expect its checksums."""

    def make(root: Path, labels_key: str = "labels", unpacked: bool = False, extra: dict | None = None) -> None:
        half = len(LABELS) // 2
        contents = {
            "data_batch_1": {"data": PIXELS[:half], labels_key: LABELS[:half].tolist()},
            "data_batch_2": {"data": PIXELS[half:], labels_key: LABELS[half:].tolist()},
            "test_batch": {"data": PIXELS[:CLASSES], labels_key: list(range(CLASSES))},
            "batches.meta": {"label_names": [f"class {i}" for i in range(CLASSES)]},
        }
        files = {name: pickle.dumps(value | (extra or {}), protocol=2) for name, value in contents.items()}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(f"{FOLDER}/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        if unpacked:
            (root / FOLDER).mkdir()
            for name, data in files.items():
                (root / FOLDER / name).write_bytes(data)
        else:
            (root / PACKED).write_bytes(buffer.getvalue())
        published, sums = cut.datasets.CIFAR10, {name: md5(data) for name, data in files.items()}
        monkeypatch.setattr(published, "tgz_md5", md5(buffer.getvalue()))
        monkeypatch.setattr(published, "train_list", [[n, sums[n]] for n in ("data_batch_1", "data_batch_2")])
        monkeypatch.setattr(published, "test_list", [["test_batch", sums["test_batch"]]])
        monkeypatch.setattr(published, "meta", published.meta | {"md5": sums["batches.meta"]})

    return make


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", lambda *a, **k: pytest.fail("tried to download"))


def config(root: Path, **fields) -> DataConfig:
    return DataConfig(dataset="cifar10_lt", root=str(root), **{"imbalance_factor": 0.1} | fields)


@pytest.mark.parametrize("labels_key", ["labels", "fine_labels"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_long_tail_has_the_reference_codes_images_in_its_order(tmp_path, make_archive, offline, labels_key, unpacked):
    make_archive(tmp_path, labels_key, unpacked)
    sets = cut.open_cut(config(tmp_path))
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


def test_an_archive_is_unpacked_once_and_again_when_a_file_is_damaged(tmp_path, make_archive, offline):
    make_archive(tmp_path)
    first = cut.open_cut(config(tmp_path))
    assert cut.prepare("cifar10", str(tmp_path)) == tmp_path / FOLDER
    (tmp_path / FOLDER / "data_batch_2").write_bytes(b"cut")
    again = cut.open_cut(config(tmp_path))
    np.testing.assert_array_equal(first.train.images_NHWC, again.train.images_NHWC)
    (tmp_path / PACKED).unlink()
    assert len(cut.open_cut(config(tmp_path)).train) == len(first.train)


def test_an_unpacked_archive_is_read_from_a_folder_that_cannot_be_written(tmp_path, make_archive, offline, monkeypatch):
    make_archive(tmp_path)
    cut.prepare("cifar10", str(tmp_path))

    def refuse(file):
        raise PermissionError(f"Permission denied: {file}")

    monkeypatch.setattr(cut, "FileLock", refuse)
    assert len(cut.open_cut(config(tmp_path)).test) == CLASSES


@pytest.mark.parametrize("unpacked", [False, True])
def test_a_wrong_checksum_is_refused_before_anything_is_unpickled(
    tmp_path, make_archive, offline, monkeypatch, unpacked
):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    make_archive(tmp_path, unpacked=unpacked, extra={"trap": Trap()})
    file = tmp_path / (f"{FOLDER}/data_batch_2" if unpacked else PACKED)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"published md5 .* run `fastdeitlt data prepare cifar10"):
        cut.open_cut(config(tmp_path))
    assert not (tmp_path / "sprung").exists()


def test_nothing_is_downloaded_unasked(tmp_path, offline):
    with pytest.raises(UserError, match=r"data prepare cifar100 --root .* --download"):
        cut.open_cut(DataConfig(dataset="cifar100_lt", root=str(tmp_path)))


def test_download_when_asked_and_its_failure(tmp_path, make_archive, monkeypatch):
    store = tmp_path / "store"
    store.mkdir()
    make_archive(store)
    asked = []

    def fetch(url, filename, **options):
        asked.append(url)
        Path(filename).write_bytes((store / PACKED).read_bytes())

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **options: url)
    assert cut.prepare("cifar10_lt", str(tmp_path / "new"), download=True).is_dir()
    assert asked == [cut.datasets.CIFAR10.url]

    def fail(url, filename, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fail)
    with pytest.raises(UserError, match="no route to host"):
        cut.prepare("cifar10_lt", str(tmp_path / "other"), download=True)


def test_a_root_that_cannot_be_written_is_named(tmp_path, make_archive, monkeypatch):
    make_archive(tmp_path)

    def refuse(*arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        cut.open_cut(config(tmp_path))


def test_other_sets_need_no_preparation():
    with pytest.raises(UserError, match="'imagenet_lt', expected cifar10, cifar100 or fashion_mnist;"):
        cut.prepare("imagenet_lt", "/nowhere")


def idx(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


GREY = RANDOM.randint(0, 256, (len(LABELS), 28, 28)).astype(np.uint8)


@pytest.fixture
def make_idx(monkeypatch):
    """Write four small IDX files of Fashion-MNIST's names, and expect their checksums."""

    def make(folder: Path, level: int = 9) -> Path:
        arrays = (GREY, LABELS.astype(np.uint8), GREY[:CLASSES], np.arange(CLASSES, dtype=np.uint8))
        folder.mkdir(parents=True, exist_ok=True)
        sums = {}
        for (name, _), array in zip(cut.datasets.FashionMNIST.resources, arrays, strict=True):
            sums[name] = md5(idx(array))
            (folder / name).write_bytes(gzip.compress(idx(array), level))
        monkeypatch.setattr(cut, "IDX_MD5", sums)
        return folder

    return make


def fashion(root: Path | str) -> DataConfig:
    return DataConfig(dataset="fashion_mnist_full_lt", root=str(root), imbalance_factor=0.1)


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"], ids=["root", "where torchvision downloads to"])
def test_fashion_mnist_is_cut_like_cifar_and_becomes_rgb(tmp_path, make_idx, offline, place):
    folder = make_idx(tmp_path / place)
    assert cut.prepare("fashion_mnist", str(tmp_path)) == folder
    sets = cut.open_cut(fashion(tmp_path))
    assert sets.train.counts == cifar_lt_counts(len(LABELS), CLASSES, 0.1)
    chosen = cut.long_tail_indices(LABELS, sets.train.counts)
    assert sets.train.labels.tolist() == LABELS[chosen].tolist()
    assert sets.train.images_NHWC.shape == (len(chosen), 28, 28, 3)
    for channel in range(3):
        np.testing.assert_array_equal(sets.train.images_NHWC[..., channel], GREY[chosen])
    assert sets.test.labels.tolist() == list(range(CLASSES)) and sets.train.class_names[9] == "Ankle boot"


def test_fashion_mnist_without_a_root_is_debians(tmp_path, make_idx, offline, monkeypatch):
    monkeypatch.setattr(cut, "DEBIAN_FOLDER", make_idx(tmp_path))
    assert len(cut.open_cut(fashion("")).test) == CLASSES


def test_the_checksum_is_of_the_content_so_that_files_compressed_anew_are_taken(tmp_path, make_idx, offline):
    files = [(make_idx(tmp_path / str(level), level) / "train-images-idx3-ubyte.gz") for level in (1, 9)]
    assert files[0].read_bytes() != files[1].read_bytes()
    one, other = (cut.open_cut(fashion(file.parent)).train.images_NHWC for file in files)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: gzip.compress(gzip.decompress(data)[:-1] + b"?"), "train-images-idx3-ubyte.gz: got md5"),
        (lambda data: data[:-40], "in .*: .*; expected train-images-idx3-ubyte.gz"),
        (lambda data: data[:20] + b"????" + data[24:], "in .*: .*; expected train-images-idx3-ubyte.gz"),
        (lambda data: b"not gzip", "Not a gzipped file"),
        (None, r"No such file .* data prepare fashion_mnist --root .* --download"),
    ],
    ids=["another image", "cut off", "garbled", "no gzip", "missing"],
)
def test_a_damaged_or_missing_idx_file_is_one_line(tmp_path, make_idx, offline, damage, words):
    file = make_idx(tmp_path) / "train-images-idx3-ubyte.gz"
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    else:
        file.unlink()
    with pytest.raises(UserError, match=words) as caught:
        cut.prepare("fashion_mnist", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_fashion_mnist_is_downloaded_when_asked(tmp_path, make_idx, monkeypatch):
    store = make_idx(tmp_path / "store")
    published = cut.datasets.FashionMNIST
    monkeypatch.setattr(published, "resources", [(n, md5((store / n).read_bytes())) for n, _ in published.resources])

    def fetch(url, filename, **options):
        Path(filename).write_bytes((store / Path(url).name).read_bytes())

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **options: url)
    root = tmp_path / "new"
    assert cut.prepare("fashion_mnist", str(root), download=True) == root / "FashionMNIST" / "raw"
    assert len(cut.open_cut(fashion(root)).test) == CLASSES
