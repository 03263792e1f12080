"""Images inside shards: the same sets, batches, checks and runs as of the same images in folders."""

import io
import json
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from image_files import encoded, picture
from pyarrow import parquet
from tiny_run import SETTINGS

from fastdeitlt import config
from fastdeitlt.cli import main
from fastdeitlt.core.batches import train_batches
from fastdeitlt.data.check.scan import check_files
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.data.sampler import plan_of
from fastdeitlt.data.sets import embedded, shards
from fastdeitlt.data.sets.blobs import Blob
from fastdeitlt.data.sets.fingerprint import fingerprint
from fastdeitlt.data.sets.opening import open_sets, open_training_sets
from fastdeitlt.errors import UserError
from fastdeitlt.store.checkpoint import load_tensors
from fastdeitlt.train import train

CPU = torch.device("cpu")
NAMES = ["ant", "bee", "crow"]
KINDS = ["tar", "zip", "deflated", "parquet"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def photos(split):
    """{class/file: bytes} of a split, in the order in which folders are read."""
    sizes = {"train": [9, 5, 3], "val": [2, 2, 2], "test": [2, 3, 2]}[split]
    return {
        f"{name}/{i}.jpg": encoded(picture(30 + 7 * i, 41 + 3 * k, 100 * k + i + len(split)), quality=90)
        for k, name in enumerate(NAMES)
        for i in range(sizes[k])
    }


def in_folders(root):
    for split in ("train", "val", "test"):
        for name, data in photos(split).items():
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / name).write_bytes(data)
    return root


def write_tar(file, members):
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_zip(file, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_parquet(file, members, labels):
    feature = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}}}
    images = pyarrow.array([{"bytes": data, "path": name} for name, data in members.items()])
    table = pyarrow.table({"image": images, "label": pyarrow.array(labels, pyarrow.int64())})
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)}), file, row_group_size=4)


def in_shards(root, kind):
    """The same images, in two shards of training images and one each of the others."""
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        members = list(photos(split).items())
        parts = [members[:11], members[11:]] if split == "train" else [members]
        for number, part in enumerate(map(dict, parts)):
            file = root / f"{split}-{number:05d}.{'zip' if kind == 'deflated' else kind}"
            if kind == "tar":  # as WebDataset has them: the class in a file beside the image
                beside = {f"{name.removesuffix('.jpg')}.cls": name.split("/")[0].encode() for name in part}
                write_tar(file, dict(sorted((part | beside).items(), key=lambda item: item[0].split(".")[0])))
            elif kind == "parquet":
                write_parquet(file, part, [NAMES.index(name.split("/")[0]) for name in part])
            else:
                write_zip(file, part, zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED)
    return root


def cfg_of(root, dataset="shards", **more):
    flat = {"data.dataset": dataset, "data.root": str(root), "data.num_threads": 2, "train.batch_size": 4}
    return config.build(flat | {"augment.repeats": 1, "train.device": "cpu"} | more)


def batches_of(cfg):
    sets = open_sets(cfg.data)
    source = open_source(sets.train, cfg.data, CPU)
    micro_batches = [m for step in plan_of(cfg, len(sets.train)).steps(1) for m in step.micro_batches]
    made = list(train_batches(micro_batches, source, sets.train, cfg, mixing=True, size=24))
    source.close()
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residency", ["stream", "host"])
def test_sets_and_batches_are_those_of_the_same_images_in_folders(tmp_path, kind, residency):
    folders = cfg_of(in_folders(tmp_path / "folders"), "folder", **{"data.residency": residency})
    shard = cfg_of(in_shards(tmp_path / "shards", kind), **{"data.residency": residency})
    for (split, expected), (_, got) in zip(open_sets(folders.data), open_sets(shard.data), strict=True):
        assert got.class_names == expected.class_names == NAMES and got.counts == expected.counts
        assert (got.labels == expected.labels).all()
        assert [got.place(i).read() for i in range(len(got))] == list(photos(split).values())
    pairs = list(zip(batches_of(folders), batches_of(shard), strict=True))
    assert len(pairs) == 4
    for expected, got in pairs:
        assert torch.equal(got.images_BCHW, expected.images_BCHW) and torch.equal(got.labels_B, expected.labels_B)


def test_the_index_is_made_once_and_anew_when_a_shard_changes(tmp_path, monkeypatch):
    root = in_shards(tmp_path / "s", "tar")
    first = open_sets(cfg_of(root).data)
    opened = []
    read = shards._read_shard
    monkeypatch.setattr(shards, "_read_shard", lambda file, index: opened.append(Path(file).name) or read(file, index))
    again = open_sets(cfg_of(root).data)
    assert (
        opened == [] and again.train.paths == first.train.paths and fingerprint(again.train) == fingerprint(first.train)
    )
    write_tar(root / "val-00000.tar", {"ant/0.jpg": encoded(picture(50, 50, 3))})
    changed = open_sets(cfg_of(root).data)
    assert opened == ["val-00000.tar"] and len(changed.val) == 1
    assert fingerprint(changed.train) == fingerprint(first.train) != fingerprint(changed.val)


def test_names_and_hold_outs_follow_the_root_whichever_was_opened_first(tmp_path):
    members = {f"{name}/{i:02d}.jpg": encoded(picture(20, 20, i)) for name in NAMES for i in range(10)}
    (tmp_path / "below").mkdir()
    write_zip(tmp_path / "below" / "photos.zip", members)
    outer = open_sets(cfg_of(tmp_path).data)
    inner = open_sets(cfg_of(tmp_path / "below").data)
    assert outer.val.paths[0].startswith("below/photos.zip/") and inner.val.paths[0].startswith("photos.zip/")


def test_images_copied_out_of_parquet_are_copied_again_when_they_are_gone(tmp_path):
    root = in_shards(tmp_path / "s", "parquet")
    train_set = open_sets(cfg_of(root).data).train
    for file in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.images"):
        file.unlink()
    again = open_sets(cfg_of(root).data).train
    assert again.place(0).read() == train_set.place(0).read() == next(iter(photos("train").values()))


def test_labels_by_number_get_their_names_from_a_file(tmp_path):
    members = {
        "a/000.png": encoded(picture(9, 9), "PNG"),
        "a/000.cls": b"1\n",
        "a/001.x.png": encoded(picture(9, 9, 1), "PNG"),
    }
    members |= {"a/001.json": b'{"label": 0, "caption": "a.b"}', "readme.txt": b"no image"}
    write_tar(tmp_path / "train.tar", members)
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    train_set = open_sets(cfg_of(tmp_path, **{"data.val_holdout": 0}).data).train
    assert train_set.labels.tolist() == [1, 0] and train_set.class_names == ["one", "two"]
    assert train_set.name(0) == str(tmp_path / "train.tar/a/000.png")


def test_shards_that_name_no_split_are_split_by_class(tmp_path):
    members = {f"{name}/{i:02d}.jpg": encoded(picture(20, 20, i)) for name in NAMES for i in range(10)}
    write_zip(tmp_path / "photos.zip", members)
    sets = open_sets(cfg_of(tmp_path).data)
    assert (sets.train.counts, sets.val.counts, sets.test.counts) == ([7] * 3, [1] * 3, [2] * 3)
    assert "named as a split" in sets.remarks[0].message


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train-0000.tar", "val-0000.tar"), ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"),
        ("Training/a.tar", "dev/a.tar"), ("photos.train.tar", "photos_val2018.tar"),
    ],
)  # fmt: skip
def test_a_word_of_a_shards_name_is_its_split(tmp_path, train, val):
    image = encoded(picture(20, 20))
    (tmp_path / "elsewhere").mkdir()
    for number, name in enumerate((train, val), 1):
        file = tmp_path / "elsewhere" / name
        file.parent.mkdir(exist_ok=True)
        write_tar(file, {f"{label}/{i}.jpg": image for label in NAMES for i in range(number)})
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    sets = open_sets(cfg_of(root).data)
    assert (sets.train.counts, sets.val.counts, sets.test) == ([1] * 3, [2] * 3, None)
    (tmp_path / "elsewhere" / train).unlink()
    with pytest.raises(UserError, match=r"data\.root .*: no training split, expected train-\*\.tar"):
        open_sets(cfg_of(root).data)


def write_both(root, members, name="photos"):
    """The same entries in a tar and, in another root, a zip."""
    for kind, write in (("tar", write_tar), ("zip", write_zip)):
        (root / kind).mkdir(exist_ok=True)
        write(root / kind / f"{name}.{kind}", members)
    return root / "tar", root / "zip"


@pytest.mark.parametrize("top", ["", "./", "photos/", "photos/2024/", "train/"])
def test_nested_class_folders_give_the_classes_of_folders(tmp_path, top):
    nested = [f"{name}/{year}/{i}.jpg" for name in NAMES for year in (2020, 2021) for i in range(5)]
    members = {name: encoded(picture(20, 20, i)) for i, name in enumerate(nested)}
    for name, data in members.items():
        (tmp_path / "folders" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / name).write_bytes(data)
    whole = {"data.val_holdout": 0, "data.test_holdout": 0}
    expected = open_sets(cfg_of(tmp_path / "folders", "folder", **whole).data).train
    inside = {f"{top}{name}": data for name, data in members.items()} | {f"__MACOSX/{top}ant/._0.jpg": b"hidden"}
    for root in write_both(tmp_path, inside):
        train_set = open_sets(cfg_of(root, **whole).data).train
        assert train_set.class_names == expected.class_names == NAMES and train_set.counts == expected.counts
        images = [train_set.place(i).read() for i in range(len(train_set))]
        assert images == [members[name] for name in expected.paths]


def test_class_folders_are_those_of_all_shards_together(tmp_path):
    image = encoded(picture(20, 20))
    write_zip(tmp_path / "train-0.zip", {f"photos/ant/{year}/0.jpg": image for year in (2020, 2021)})
    write_zip(tmp_path / "train-1.zip", {"photos/bee/2020/0.jpg": image, "photos/crow/0.jpg": image})
    assert open_sets(cfg_of(tmp_path).data).train.class_names == NAMES
    write_zip(tmp_path / "train-1.zip", {"photos/bee/0.jpg": image})
    assert open_sets(cfg_of(tmp_path).data).train.class_names == NAMES[:2]


def test_class_names_are_in_nfc(tmp_path):
    image = encoded(picture(20, 20))
    write_zip(tmp_path / "train.zip", {f"{name}/0.jpg": image for name in ("fu\u0308r", "zoo")})
    assert open_sets(cfg_of(tmp_path).data).train.class_names == ["f\u00fcr", "zoo"]


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    image = encoded(picture(20, 20))
    write_zip(tmp_path / "train.zip", {f"{name}/0.jpg": image for name in ("bus", "car", "train")})
    assert open_sets(cfg_of(tmp_path).data).train.class_names == ["bus", "car", "train"]


@pytest.mark.parametrize("labelled", [False, True])
def test_links_in_a_tar_have_the_bytes_of_their_target(tmp_path, labelled):
    data = {f"{name}/0.jpg": encoded(picture(20, 20, k)) for k, name in enumerate(NAMES)}
    data |= {f"{name}/0.cls": name.encode() for name in NAMES} if labelled else {}
    write_tar(tmp_path / "train.tar", data)
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        for kind, name, target in (
            (tarfile.LNKTYPE, "ant/1.jpg", "ant/0.jpg"), (tarfile.SYMTYPE, "ant/2.jpg", "../ant/0.jpg"),
            (tarfile.LNKTYPE, "bee/1.jpg", "bee/absent.jpg"),
        ):  # fmt: skip
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
            if labelled:
                link.name, link.linkname = name.replace("jpg", "cls"), f"{name[:3]}/0.cls"
                link.type = tarfile.LNKTYPE
                tar.addfile(link)
    train_set = open_sets(cfg_of(tmp_path, **{"data.val_holdout": 0}).data).train
    assert train_set.counts == [3, 2, 1]
    read = {path.removeprefix("train.tar/"): train_set.place(i).read() for i, path in enumerate(train_set.paths)}
    assert read["ant/0.jpg"] == read["ant/1.jpg"] == read["ant/2.jpg"] == data["ant/0.jpg"]
    with pytest.raises(UserError, match=r"1 of 6 train images.*bee/1\.jpg"):
        check_files(open_sets(cfg_of(tmp_path).data), cfg_of(tmp_path).data)


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_at_the_start_reads_the_ends_of_images_in_shards(tmp_path, monkeypatch, kind):
    cfg = cfg_of(in_shards(tmp_path, kind)).data
    sets = open_sets(cfg)
    with monkeypatch.context() as patch:
        if kind != "deflated":
            patch.setattr(Blob, "read", lambda blob: pytest.fail("read whole"))
        check_files(sets, cfg)
    file = sets.train.place(0).file
    os.truncate(file, os.path.getsize(file) // 3)
    with pytest.raises(UserError, match=r"train images in .* unreadable"):
        check_files(sets, cfg)


def test_entries_that_are_no_images_are_a_warning_as_in_folders(tmp_path, caplog):
    members = {f"{name}/{i}.jpg": encoded(picture(20, 20, i)) for name in NAMES for i in range(3)}
    members |= {"ant/a.gif": b"GIF89a", "bee/b.HEIC": b"heic", "ant/0.cls": b"ant", "ant/.DS_Store": b"x"}
    for root in write_both(tmp_path, members, "train"):
        for _ in ("new index", "index in the cache"):
            caplog.clear()
            sets = open_training_sets(cfg_of(root).data)
            shard = f"train.{root.name}"
            assert sets.train.left_out == [f"{shard}/ant/a.gif", f"{shard}/bee/b.HEIC"]
            (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
            assert f"2 files ignored: not in a class folder, or no image suffix ({shard}/ant/a.gif" in warning


def spoil(root, what):
    image = encoded(picture(20, 20))
    match what:
        case "none":
            (root / "a.txt").write_text("")
        case "cut":
            write_tar(root / "train.tar", {f"a/{i}.jpg": image for i in range(9)})
            (root / "train.tar").write_bytes((root / "train.tar").read_bytes()[:3000])
        case "no zip":
            (root / "train.zip").write_bytes(b"PK\3\4 nothing")
        case "compressed tar":
            with tarfile.open(root / "train.tar", "w:gz") as tar:
                tar.add(__file__, "a/0.jpg")
        case "no class":
            write_tar(root / "train.tar", {"0.jpg": image})
        case "empty class":
            write_tar(root / "train.tar", {"0.jpg": image, "0.cls": b"  "})
        case "mixed":
            write_tar(root / "train.tar", {"a/0.jpg": image, "b/1.jpg": image, "b/1.cls": b"3"})
        case "negative":
            write_tar(root / "train.tar", {"0.jpg": image, "0.cls": b"-1"})
        case "no image":
            write_tar(root / "train.tar", {"a.txt": b"x"})
        case "split":
            write_tar(root / "train.tar", {"a/0.jpg": image})
            write_tar(root / "more.tar", {"a/0.jpg": image})
        case "splits inside":
            write_zip(root / "archive.zip", {f"photos/{split}/a/0.jpg": image for split in ("train", "Testing")})
        case "splits of labelled images":
            members = {f"{split}/0.jpg": image for split in ("train", "val")}
            write_tar(root / "a.tar", members | {f"{split}/0.cls": b"1" for split in ("train", "val")})
        case "splits in two shards":
            for split in ("train", "test"):
                write_zip(root / f"{split[:2]}.zip", {f"{split}/{name}/0.jpg": image for name in NAMES})
        case "a split and another folder":
            write_zip(root / "archive.zip", {"train/a/0.jpg": image, "train/b/0.jpg": image, "extra/0.jpg": image})
        case "tops":
            for part in ("p1", "p2"):
                write_zip(root / f"{part}.zip", {f"{part}/{name}/0.jpg": image for name in NAMES})
        case "method":
            write_zip(root / "train.zip", {"a/0.jpg": image}, zipfile.ZIP_BZIP2)
        case "columns":
            parquet.write_table(pyarrow.table({"x": [1]}), root / "train.parquet")
        case "rows":
            parquet.write_table(pyarrow.table({"image": [{"bytes": None}], "label": [1]}), root / "train.parquet")
        case "odd bytes":
            write_tar(root / "train.tar", {"a/\udcff.jpg": image, "b/0.jpg": image})
        case "odd class":
            write_tar(root / "train.tar", {"0.jpg": image, "0.cls": b'"\\ud800"'})
        case "odd shard":
            write_zip(root / "train-\udcff.zip", {f"{name}/0.jpg": image for name in NAMES})
        case "no parquet":
            (root / "train.parquet").write_bytes(b"PAR1 nothing PAR1")


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("none", "got no shards"),
        ("cut", "train.tar: cannot be read (unexpected end of data)"),
        ("no zip", "train.zip: cannot be read"),
        ("compressed tar", "train.tar: cannot be read"),
        ("no class", "0.jpg has no class, expected a .cls or .json file beside it, or a folder"),
        ("empty class", "0.cls contains ''"),
        ("mixed", "has class 3 and train.tar/a/0.jpg class 'a', expected only numbers or only names"),
        ("negative", "got class -1, expected 0 or more"),
        ("no image", "no images. Move it"),
        ("split", "got more.tar, expected a split in the name"),
        ("splits inside", "got the folders 'Testing', 'train' inside, expected the images of one split. Unpack"),
        ("splits of labelled images", "got the folders 'train', 'val' inside"),
        ("splits in two shards", "got the folders 'test', 'train' inside"),
        ("a split and another folder", "got the folders 'extra', 'train' inside"),
        ("tops", "got another top folder in each ('p1', 'p2'), expected the same one or class folders. Unpack"),
        ("method", "is encrypted or not stored or deflated"),
        ("columns", "got the columns x, expected image and label"),
        ("rows", "row 0 has no image bytes or no label"),
        ("odd bytes", r"got the name 'train.tar/a/\udcff.jpg', expected UTF-8"),
        ("odd class", r"got the name '\ud800', expected UTF-8"),
        ("odd shard", r"got the name 'train-\udcff.zip/ant/0.jpg', expected UTF-8"),
        ("no parquet", "train.parquet: cannot be read"),
    ],
)
def test_a_shard_that_cannot_be_used_is_one_line(tmp_path, capsys, what, text):
    spoil(tmp_path, what)
    assert main(["data", "stats", "quickstart", "data.dataset=shards", f"data.root={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1 and "Traceback" not in said


def test_damaged_images_are_found_by_check_and_named_in_training(tmp_path, capsys):
    image = encoded(picture(40, 40))
    members = {f"{name}/{i}.jpg": encoded(picture(40, 40, i)) for name in NAMES for i in range(4)}
    write_tar(tmp_path / "train.tar", members | {"ant/9.jpg": image[:200], "bee/9.jpg": b"text"})
    settings = ["quickstart", "data.dataset=shards", f"data.root={tmp_path}", "data.val_holdout=0"]
    assert main(["data", "check", *settings]) == 2
    found = " ".join(capsys.readouterr().out.split())
    assert "train.tar/ant/9.jpg" in found and "train.tar/bee/9.jpg" in found
    assert main(["train", *settings, f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert "2 of 14 train images" in capsys.readouterr().err
    bad = Path(tmp_path / "train.zip")
    (tmp_path / "train.tar").unlink()
    write_zip(bad, members, zipfile.ZIP_DEFLATED)
    data = bytearray(bad.read_bytes())
    (name_bytes,) = struct.unpack("<H", data[26:28])
    data[30 + name_bytes] = 255  # of no kind of block
    bad.write_bytes(data)
    train_set = open_sets(cfg_of(tmp_path, **{"data.val_holdout": 0}).data).train
    with pytest.raises(UserError, match=r"train.zip/ant/0.jpg: damaged entry of a zip"):
        next(iter(open_source(train_set, cfg_of(tmp_path, **{"data.residency": "stream"}).data, CPU).sizes()))


def test_a_run_from_shards_ends_with_the_weights_of_the_run_from_folders(tmp_path):
    root = embedded.unpack()
    for split, every in (("train", 19), ("val", 40), ("test", 40)):
        members = {}
        lines = (root / f"{split}.txt").read_text().splitlines()
        for line in {*lines[::every], *lines[-20::2]}:
            name, label = line.rsplit(" ", 1)
            members[f"{int(label):02d}/{Path(name).name}"] = (root / name).read_bytes()
        members = dict(sorted(members.items()))
        for name, data in members.items():
            (tmp_path / "folders" / split / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "folders" / split / name).write_bytes(data)
        (tmp_path / "shards").mkdir(exist_ok=True)
        write_tar(tmp_path / "shards" / f"{split}-0.tar", members)
    weights = {}
    for dataset in ("folder", "shards"):
        place = tmp_path / ("folders" if dataset == "folder" else "shards")
        flat = SETTINGS | {"data.dataset": dataset, "data.root": str(place), "runs_dir": str(tmp_path / "runs")}
        flat |= {"name": dataset, "train.epochs": 1, "train.virtual_ranks": 1, "train.accumulate": 1}
        flat |= {"loss.drw_epoch": -1, "data.residency": "stream"}
        weights[dataset] = load_tensors(train(config.build(flat)) / "checkpoints" / "last", "model")
    assert all(torch.equal(value, weights["folder"][name]) for name, value in weights["shards"].items())
    results = [json.loads((tmp_path / "runs" / name / "results.json").read_text())["test"] for name in weights]
    assert results[0] == results[1]


def test_a_large_index_is_small_work(tmp_path, monkeypatch):
    """100,000 images: members are listed once, and no image is opened."""
    entries = [(f"{i % 50}/{i}.jpg", 512 * i, 400, False) for i in range(100_000)]
    (tmp_path / "train.tar").write_bytes(b"x")
    monkeypatch.setattr(shards, "_tar_members", lambda data: iter(entries))
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("an image was read"))
    train_set = shards.read_shards(tmp_path, ["train.tar"])
    assert len(train_set) == 100_000 and train_set.counts == [2000] * 50
    assert np.array_equal(train_set.blobs.start_N, 512 * np.arange(100_000))
