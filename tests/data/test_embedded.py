"""The embedded data set: what is in it, and unpacking that survives crowds and accidents."""

import gzip
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdeitlt.config import DataConfig
from fastdeitlt.data.sets import embedded
from fastdeitlt.data.sets.embedded import build
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastdeitlt"


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_long_tail_and_balanced_sets_share_no_image(cache):
    sets = open_sets(DataConfig())
    assert sets.train.counts == [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]
    assert sets.val.counts == [50] * 10
    assert sets.test.counts == [100] * 10
    assert sets.train.class_names[0] == "T-shirt/top"
    digests = []
    for split, images in sets:
        for path in images.paths:
            with Image.open(Path(images.root) / path) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))
                digests.append(image.tobytes())
        assert all(path.startswith(f"{split}/") for path in images.paths)
    assert len(set(digests)) == len(digests) == 3978


def test_archive_is_the_one_the_module_names():
    assert hashlib.sha256(embedded.ARCHIVE.read_bytes()).hexdigest() == embedded.SHA256
    assert embedded.ARCHIVE.stat().st_size < 3_000_000


def test_unpacks_once(cache):
    folder = embedded.unpack()
    marked = folder / "train.txt"
    before = marked.stat().st_mtime_ns
    assert embedded.unpack() == folder
    assert marked.stat().st_mtime_ns == before


def test_half_made_cache_is_made_whole(cache):
    folder = embedded.unpack()
    whole = tree(folder)
    (folder / "train" / "0" / "43279.png").unlink()
    shutil.rmtree(folder / "test")
    (folder / "val.txt").write_text("")
    (cache / f"{folder.name}.leftover").mkdir()
    assert tree(embedded.unpack()) == whole


def test_file_in_the_folders_place_is_replaced(cache):
    cache.mkdir()
    embedded.cache_folder().write_text("not a folder")
    assert (embedded.unpack() / "train.txt").is_file()


def test_processes_at_once_all_find_the_whole_set(cache):
    code = "from fastdeitlt.data.sets import embedded; f = embedded.unpack(); print(sum(1 for p in f.rglob('*.png')))"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(4)
    ]
    assert [run.communicate()[0].strip() for run in runs] == ["3978"] * 4
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [embedded.SHA256[:16]]


def test_damaged_archive_is_refused(cache, tmp_path, monkeypatch):
    damaged = tmp_path / "damaged.zip"
    data = bytearray(embedded.ARCHIVE.read_bytes())
    data[5000] ^= 1
    damaged.write_bytes(data)
    monkeypatch.setattr(embedded, "ARCHIVE", damaged)
    with pytest.raises(UserError, match=r"got sha256 .* Reinstall"):
        embedded.unpack()
    damaged.write_bytes(data[:9000])
    with pytest.raises(UserError, match=r"damaged .* Reinstall"):
        embedded.unpack()
    assert not embedded.cache_folder().exists()


def test_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Set XDG_CACHE_HOME"):
        embedded.unpack()


def test_a_user_without_a_home_folder_is_told_to_set_one(monkeypatch):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54_321)  # no account
    with pytest.raises(UserError, match=r"export HOME=FOLDER"):
        embedded.unpack()


def write_idx(folder: Path, name: str, per_class: int, seed: int) -> None:
    labels = np.tile(np.arange(10, dtype=np.uint8), per_class)
    images = np.random.RandomState(seed).randint(0, 256, (len(labels), 28, 28)).astype(np.uint8)
    images[11::20] = images[1]  # half of class 1 is the same image, which may be taken once
    header = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
    (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    header = struct.pack(">4BI", 0, 0, 8, 1, len(labels))
    (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))


def test_build_is_repeatable_and_takes_no_image_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "TRAIN_COUNTS", [8, 4, 4, 3, 2, 2, 2, 1, 1, 1])
    monkeypatch.setattr(build, "VAL_COUNT", 1)
    monkeypatch.setattr(build, "TEST_COUNT", 2)
    write_idx(tmp_path, "train", 12, 0)
    write_idx(tmp_path, "t10k", 6, 1)
    digest = build.build(tmp_path, tmp_path / "a.zip")
    assert build.build(tmp_path, tmp_path / "b.zip") == digest
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        pngs = [archive.read(name) for name in archive.namelist() if name.endswith(".png")]
        assert len(set(pngs)) == len(pngs) == 28 + 10 + 20
        rows = archive.read("train.txt").decode().splitlines()
    assert [int(row.split()[1]) for row in rows] == [0] * 8 + [1] * 4 + [2] * 4 + [3] * 3 + [4, 4, 5, 5, 6, 6, 7, 8, 9]
    original = build.read_idx(tmp_path / "train-images-idx3-ubyte.gz")
    index = int(Path(rows[0].split()[0]).stem)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open(rows[0].split()[0]) as file:
        np.testing.assert_array_equal(np.asarray(Image.open(file)), original[index])
