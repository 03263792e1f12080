"""Class counts, weights, head/mid/tail and opening of data sets."""

import json
import os
from dataclasses import replace
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from image_files import class_folders
from PIL import Image

from fastdeitlt.config import DataConfig
from fastdeitlt.data.sets.counts import cifar_lt_counts, drw_weights, shot_groups
from fastdeitlt.data.sets.opening import hold_out, open_sets, open_splits, open_training_sets
from fastdeitlt.data.sets.splits import Classes
from fastdeitlt.data.sets.types import LongTailSet, class_counts
from fastdeitlt.errors import UserError


@pytest.mark.parametrize(
    "case", golden.load("cifar_lt_counts"), ids=lambda c: f"{c['classes']}-{c['imb_factor']}-{c['kind']}"
)
def test_counts_and_weights_are_the_reference_codes(case):
    counts = cifar_lt_counts(case["n"], case["classes"], case["imb_factor"], case["kind"])
    assert counts == case["counts"]
    assert sum(counts) == case["total"]
    weights = drw_weights(counts, 0.9999)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(case["drw_weights"]), rtol=0, atol=1e-6)


def test_balanced_factor_keeps_every_image():
    assert cifar_lt_counts(50_000, 10, 1.0) == [5000] * 10
    assert cifar_lt_counts(50_000, 10, 1.0, "step") == [5000] * 10


def test_step_with_odd_class_number_keeps_all_classes():
    assert cifar_lt_counts(500, 5, 0.1, "step") == [100, 100, 10, 10, 10]


@pytest.mark.parametrize(
    "arguments",
    [(50_000, 10, 0.0), (50_000, 10, 1.5), (50_000, 10, float("nan")), (5, 10, 0.1), (50_000, 0, 0.1)],
)
def test_impossible_long_tails_are_refused(arguments):
    with pytest.raises(UserError):
        cifar_lt_counts(*arguments)


def test_unknown_kind_is_named():
    with pytest.raises(UserError, match="exponential"):
        cifar_lt_counts(100, 10, 0.1, "exponential")


def test_weights_of_a_rare_class_exceed_those_of_a_frequent_one_by_the_published_ratio():
    weights = drw_weights([1280, 5])
    assert (weights[1] / weights[0]).item() == pytest.approx(240.4, abs=0.05)


def test_absent_class_gets_no_weight_and_the_sum_stays():
    weights = drw_weights([100, 0, 10])
    assert weights[1] == 0
    assert weights.sum().item() == pytest.approx(3)
    assert torch.isfinite(weights).all()


def test_beta_zero_turns_weights_off():
    torch.testing.assert_close(drw_weights([7, 300, 1], beta=0.0), torch.ones(3))


@pytest.mark.parametrize(("counts", "beta"), [([], 0.9), ([0, 0], 0.9), ([3, -1], 0.9), ([3, 1], 1.0), ([3, 1], -0.1)])
def test_weights_refuse_bad_input(counts, beta):
    with pytest.raises(UserError):
        drw_weights(counts, beta)


@pytest.mark.parametrize(
    ("factor", "sizes"), [(0.01, (35, 35, 30)), (0.02, (41, 41, 18)), (0.1, (69, 31, 0))], ids=["100", "50", "10"]
)
def test_threshold_groups_of_cifar100(factor, sizes):
    groups = shot_groups(cifar_lt_counts(50_000, 100, factor))
    assert tuple(len(groups[name]) for name in ("head", "mid", "tail")) == sizes


def test_threshold_bounds_are_inclusive_in_the_middle():
    groups = shot_groups([101, 100, 20, 19, 0])
    assert {name: ids.tolist() for name, ids in groups.items()} == {"head": [0], "mid": [1, 2], "tail": [3, 4]}


@pytest.mark.parametrize(
    ("classes", "dataset", "sizes"),
    [
        (10, "cifar10_lt", (3, 4, 3)),
        (10, "fashion_mnist_lt", (3, 4, 3)),
        (100, "cifar100_lt", (36, 35, 29)),
        (1000, "imagenet_lt", (390, 445, 165)),
        (8142, "inat18", (842, 3701, 3599)),
        (1000, None, (390, 445, 165)),
        (365, "places_lt", (121, 123, 121)),
        (100, "list", (33, 34, 33)),
        (3, "folder", (1, 1, 1)),
        (2, "folder", (1, 0, 1)),
        (1, None, (0, 1, 0)),
    ],
)
def test_official_groups_have_the_codes_sizes(classes, dataset, sizes):
    groups = shot_groups(list(range(classes, 0, -1)), "official", dataset)
    assert tuple(len(groups[name]) for name in ("head", "mid", "tail")) == sizes
    assert sorted(torch.cat(list(groups.values())).tolist()) == list(range(classes))


def test_official_groups_follow_frequency_and_keep_ties_in_order():
    counts = [5, 90, 5, 70, 5, 90, 5, 5, 80, 5]
    groups = shot_groups(counts, "official")
    assert groups["head"].tolist() == [1, 5, 8]
    assert groups["mid"].tolist() == [0, 2, 3, 4]
    assert groups["tail"].tolist() == [6, 7, 9]


def test_unknown_shot_split_is_refused():
    with pytest.raises(UserError, match="median"):
        shot_groups([1, 2], "median")


def make_set(counts: list[int], decoded: bool = False) -> LongTailSet:
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.RandomState(1).permutation(labels)
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1) if decoded else None
    return LongTailSet(
        [f"{i}.png" for i in range(len(labels))], labels, class_counts(labels, len(counts)), images_NHWC=images
    )


def test_hold_out_is_stratified_disjoint_complete_and_repeatable():
    images = make_set([100, 21, 5, 1, 0, 2], decoded=True)
    train, val, _ = hold_out(images, 0.2)
    assert val.counts == [20, 4, 1, 0, 0, 0]
    assert train.counts == [80, 17, 4, 1, 0, 2]
    assert sorted(train.paths + val.paths) == sorted(images.paths)
    assert [f"{i}.png" for i in val.images_NHWC[:, 0, 0, 0]] == val.paths
    assert hold_out(images, 0.2)[1].paths == val.paths != images.paths[:20]


def test_hold_out_depends_on_names_alone():
    images = make_set([100, 21, 50])
    parts = [set(part.paths) for part in hold_out(images, 0.1, 0.2)]
    shuffled = images.take(np.random.default_rng(0).permutation(len(images)))
    assert [set(part.paths) for part in hold_out(shuffled, 0.1, 0.2)] == parts
    without = images.take(np.arange(1, len(images)))  # one image of the first class is added later
    before = [set(part.paths) for part in hold_out(without, 0.1, 0.2)]
    moved = [path for was, now in zip(before, parts, strict=True) for path in now - was]
    assert len(moved) <= 3 and all(int(path.removesuffix(".png")) < 100 for path in moved)
    decomposed = replace(images, paths=[f"\u0065\u0301{path}" for path in images.paths])  # as macOS stores them
    composed = replace(images, paths=[f"\u00e9{path}" for path in images.paths])
    held = [[path.lstrip("e\u0301\u00e9") for path in hold_out(part, 0.1)[1].paths] for part in (decomposed, composed)]
    assert held[0] == held[1]


def test_hold_out_leaves_an_image_in_each_class():
    train, val, test = hold_out(make_set([40, 3, 2, 1, 0]), 0.49, 0.49)
    assert train.counts == [1, 1, 1, 1, 0] and val.counts == [20, 1, 1, 0, 0] and test.counts == [19, 1, 0, 0, 0]


def test_hold_out_that_holds_nothing_is_refused():
    with pytest.raises(UserError, match=r"data\.val_holdout: got 0\.01"):
        hold_out(make_set([4, 2, 1]), 0.01)
    with pytest.raises(UserError, match=r"data\.test_holdout: got 0\.01"):
        hold_out(make_set([4, 2, 1]), 0.4, 0.01)


def write_lists(root: Path, **lists: str) -> None:
    for name, text in lists.items():
        (root / f"{name}.txt").write_text(text)


@pytest.mark.parametrize(
    ("dataset", "names", "splits"),
    [
        ("imagenet_lt", ["ImageNet_LT_train", "ImageNet_LT_val", "ImageNet_LT_test"], ["train", "val", "test"]),
        ("places_lt", ["Places_LT_train", "Places_LT_test"], ["train", "test"]),
        ("inat18", ["iNaturalist18_train", "iNaturalist18_val"], ["train", "test"]),
    ],
)
def test_published_sets_are_found_by_their_usual_names(tmp_path, dataset, names, splits):
    write_lists(tmp_path, **{name: f"{name}/a.jpg 0\n{name}/b.jpg 1\n" for name in names})
    sets = open_sets(DataConfig(dataset=dataset, root=str(tmp_path)))
    assert [(split, images.paths[0]) for split, images in sets] == [
        (split, f"{name}/a.jpg") for split, name in zip(splits, names, strict=True)
    ]


def test_original_inaturalist_json_is_found(tmp_path):
    for name in ("train", "val"):
        tree = {
            "images": [{"id": 7, "file_name": f"{name}/x.jpg"}],
            "annotations": [{"image_id": 7, "category_id": 1}],
            "categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}],
        }
        (tmp_path / f"{name}2018.json").write_text(json.dumps(tree))
    sets = open_sets(DataConfig(dataset="inat18", root=str(tmp_path)))
    assert sets.test.paths == ["val/x.jpg"]
    assert sets.test.counts == [0, 1]
    assert sets.train.class_names == ["a", "b"]


def test_all_splits_have_the_classes_of_the_largest(tmp_path):
    write_lists(tmp_path, tr="a 0\n", te="b 3\n")
    sets = open_sets(DataConfig(dataset="list", root=str(tmp_path), train_list="tr.txt", test_list="te.txt"))
    assert sets.train.counts == [1, 0, 0, 0]
    assert sets.test.counts == [0, 0, 0, 1]


def test_class_names_come_from_classes_txt_when_they_fit(tmp_path):
    write_lists(tmp_path, tr="a 0\nb 1\n", classes="cat\nbig dog")
    config = DataConfig(dataset="list", root=str(tmp_path), train_list="tr.txt")
    assert open_sets(config).train.class_names == ["cat", "big dog"]
    for names in ("cat\n", "cat\nbig dog\neel"):
        write_lists(tmp_path, classes=names)
        number = len(names.splitlines())
        with pytest.raises(UserError, match=f"got {number} names?, expected one for each of the 2 classes"):
            open_sets(config)


def test_class_names_of_the_training_csv_number_the_test_csv(tmp_path):
    (tmp_path / "tr.csv").write_text("path,label\na,cat\nb,ant\nc,dog\n")
    (tmp_path / "te.csv").write_text("path,label\nd,dog\n")
    config = {"dataset": "list", "root": str(tmp_path), "train_list": "tr.csv"}
    assert open_sets(DataConfig(**config, test_list="te.csv")).test.labels.tolist() == [2]
    (tmp_path / "te.csv").write_text("path,label\nd,cow\n")
    with pytest.raises(UserError, match=r"te\.csv: classes differ by name, got 'cow', not in the training"):
        open_sets(DataConfig(**config, test_list="te.csv"))


def test_validation_is_held_out_of_training_only_when_there_is_no_list(tmp_path):
    rows = "".join(f"{i}.jpg {i % 2}\n" for i in range(20))
    write_lists(tmp_path, tr=rows, va="v.jpg 0\n")
    config = {"dataset": "list", "root": str(tmp_path), "train_list": "tr.txt", "val_holdout": 0.2}
    sets = open_sets(DataConfig(**config))
    assert (len(sets.train), len(sets.val), sets.held_out) == (16, 4, ("val",))
    sets = open_sets(DataConfig(**config, val_list="va.txt"))
    assert (len(sets.train), len(sets.val), sets.held_out) == (20, 1, ())


def test_folder_splits_share_the_training_classes(tmp_path):
    for name in ("train/b cat/1.jpg", "train/b cat/deep/2.PNG", "train/a/3.jpeg", "test/b cat/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "train" / "a" / "notes.txt").write_text("x")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "empty").mkdir()
    sets = open_sets(DataConfig(dataset="folder", root=str(tmp_path)))
    assert sets.train.class_names == ["a", "b cat", "empty"]
    assert sets.train.paths == ["train/a/3.jpeg", "train/b cat/1.jpg", "train/b cat/deep/2.PNG"]
    assert sets.train.labels.tolist() == [0, 1, 1]
    assert sets.test.labels.tolist() == [1]
    assert sets.test.counts == [0, 1, 0]
    assert sets.val is None
    (tmp_path / "test" / "zebra").mkdir()
    assert open_sets(DataConfig(dataset="folder", root=str(tmp_path))).test.counts == [0, 1, 0]
    Image.new("RGB", (2, 2)).save(tmp_path / "test" / "zebra" / "5.jpg")
    with pytest.raises(UserError, match="classes differ by name, got 'zebra', not in the training split"):
        open_sets(DataConfig(dataset="folder", root=str(tmp_path)))


def test_class_folders_and_names_in_a_wrong_place_name_the_right_one(tmp_path):
    with pytest.raises(UserError, match=r"no train\.txt in .* class folders need data\.dataset=folder"):
        open_sets(DataConfig(root=str(tmp_path)))
    write_lists(tmp_path, train="a.jpg cat\n")
    with pytest.raises(
        UserError, match=r"line 1: got the label 'cat', expected a class index .* \(names: in a \.csv list"
    ):
        open_sets(DataConfig(root=str(tmp_path)))


def test_folder_without_images_or_training_split_says_so(tmp_path):
    with pytest.raises(UserError, match=r"no images .* expected train/<class>/<image> or <class>/<image>"):
        open_sets(DataConfig(dataset="folder", root=str(tmp_path)))
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match=r"no training split \('test' is the test split; .* expected train/<class>/"):
        open_sets(DataConfig(dataset="folder", root=str(tmp_path)))
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="no images"):
        open_sets(DataConfig(dataset="folder", root=str(tmp_path)))
    (tmp_path / "test").rmdir()
    for folder, fix in (("train", "Rename 'train' if it is a class"), ("train/a", "Move it into a class folder")):
        Image.new("RGB", (2, 2)).save(tmp_path / folder / "1.jpg")
        root = tmp_path if folder == "train" else tmp_path / folder
        with pytest.raises(UserError, match=rf"got '[a-z/]*1\.jpg' outside a class folder, expected .*{fix}"):
            open_sets(DataConfig(dataset="folder", root=str(root)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dataset": "imagenet_lt"}, r"data\.root: empty"),
        ({"dataset": "imagenet_lt", "root": "/no/such"}, r"data\.root: no such folder '/no/such'"),
        ({"dataset": "cifar10_lt"}, r"data\.root: empty, expected the folder of cifar-10-python\.tar\.gz"),
        ({"dataset": "imagenet_lt", "root": "."}, r"data\.train_list: no ImageNet_LT_train\.txt"),
        ({"dataset": "list", "root": "."}, r"data\.train_list: empty"),
        ({"dataset": "list", "root": ".", "train_list": "nope.txt"}, r"data\.train_list: no such file 'nope\.txt'"),
    ],
)
def test_missing_data_is_named_with_the_field_to_set(config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        open_sets(DataConfig(**config))


def test_a_file_name_that_is_not_utf8_is_named(tmp_path):
    config = class_folders(tmp_path, {"train/a": 1, "train/b": 1})
    (tmp_path / "train" / "b" / "\udcff.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"got the file name 'train/b/\\udcff\.jpg', expected UTF-8"):
        open_sets(DataConfig(**config))


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "validation", "testing"), ("Train", "Val", "Test"), ("training", "valid", "TEST"), ("train", "dev", "")],
)
def test_usual_names_of_split_folders_are_taken(tmp_path, train, val, test):
    splits = [split for split in (train, val, test) if split]
    config = class_folders(tmp_path, {f"{split}/{name}": 1 for split in splits for name in "ab"})
    sets = open_sets(DataConfig(**config))
    assert [images.paths[0] for _, images in sets] == [f"{split}/a/0.png" for split in splits]
    assert sets.remarks == ()


def test_two_folders_for_one_split_are_refused_and_other_folders_are_named(tmp_path):
    config = class_folders(tmp_path, {"train/a": 1, "train/b": 1, "extra/a": 1, ".hidden/a": 1})
    (remark,) = open_sets(DataConfig(**config)).remarks
    assert remark.level == "warning" and "'extra'" in remark.message and "hidden" not in remark.message
    class_folders(tmp_path, {"val/a": 1, "Validation/a": 1})
    with pytest.raises(UserError, match="got 'Validation' and 'val' for the val split, expected one"):
        open_sets(DataConfig(**config))


def test_class_folders_without_splits_are_split_by_class_and_always_alike(tmp_path):
    config = class_folders(tmp_path, {"ant": 40, "bee/deep": 10, "cow": 3, "dog": 1, "docs": 0})
    sets = open_sets(DataConfig(**config))
    assert [images.counts for _, images in sets] == [[28, 7, 2, 1], [4, 1, 0, 0], [8, 2, 1, 0]]
    assert sets.train.class_names == ["ant", "bee", "cow", "dog"] and sets.train.left_out == ["docs/"]
    assert sorted(path for _, images in sets for path in images.paths)[-1] == "dog/0.png"
    assert len({path for _, images in sets for path in images.paths}) == 54
    assert [images.paths for _, images in open_sets(DataConfig(**config))] == [images.paths for _, images in sets]
    whole = open_sets(DataConfig(**config, val_holdout=0, test_holdout=0))
    assert len(whole.train) == 54 and whole.val is whole.test is None
    model = Classes("model m", 5, ["eel", "dog", "cow", "bee", "ant"])
    held = open_splits(DataConfig(**config), ("test",), ("val",), model)
    assert held["test"].counts == [0, 0, 1, 2, 8] and held["test"].paths == sets.test.paths and len(held["val"]) == 5
    only_test = open_sets(DataConfig(**config, val_holdout=0, test_holdout=0.4))
    assert only_test.held_out == ("test",) and only_test.test.counts == [16, 4, 1, 0]


def test_test_images_are_held_out_of_a_list_and_do_not_move_the_validation_images(tmp_path):
    write_lists(tmp_path, tr="".join(f"{i}.jpg {i % 2}\n" for i in range(20)))
    config = {"dataset": "list", "root": str(tmp_path), "train_list": "tr.txt", "val_holdout": 0.2}
    before, sets = open_sets(DataConfig(**config)), open_sets(DataConfig(**config, test_holdout=0.3))
    assert (len(sets.train), len(sets.val), len(sets.test)) == (10, 4, 6)
    assert sets.val.paths == before.val.paths and before.test is None


def test_linked_folders_are_followed_once_and_after_the_others(tmp_path):
    config = class_folders(tmp_path, {"train/a/z": 2, "train/b": 1, "elsewhere/deep": 3})
    (tmp_path / "train" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "again").symlink_to("z")
    (tmp_path / "train" / "a" / "z" / "loop").symlink_to(tmp_path / "train" / "a")
    sets = open_sets(DataConfig(**config))
    deep = [f"train/a/link/deep/{number}.png" for number in range(3)]
    assert sets.train.paths == ["train/a/z/0.png", "train/a/z/1.png", *deep, "train/b/0.png"]


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    config = class_folders(tmp_path, {"train/a": 1, "train/b": 1, "train/a/closed": 1})
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\)"):
        open_sets(DataConfig(**config))


def test_unicode_forms_of_a_class_folder_are_one_class(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    config = class_folders(tmp_path, {f"train/{composed}": 1, "train/tea": 1, f"test/{decomposed}": 1, "test/tea": 2})
    sets = open_sets(DataConfig(**config))
    assert sets.test.counts == [1, 2] and sets.train.class_names == [composed, "tea"]
    class_folders(tmp_path, {f"train/{decomposed}": 1})
    with pytest.raises(UserError, match="several classes are named"):
        open_sets(DataConfig(**config))


def write_json(file: Path, categories: dict[int, str], names: str) -> None:
    """Categories id -> name, and an image of each name; the image is called like its class."""
    number = {name: key for key, name in categories.items()}
    rows = [{"path": f"{name}.png", "category_id": number[name]} for name in names]
    listed = [{"id": key, "name": name} for key, name in categories.items()]
    file.write_text(json.dumps({"annotations": rows, "categories": listed}))


def test_json_categories_of_the_splits_are_matched_by_name(tmp_path):
    write_json(tmp_path / "train.json", {0: "a", 1: "b", 2: "c"}, "abbc")
    write_json(tmp_path / "test.json", {0: "c", 1: "a", 2: "b", 3: "unused"}, "abc")
    config = {"dataset": "list", "root": str(tmp_path), "train_list": "train.json", "test_list": "test.json"}
    sets = open_sets(DataConfig(**config))
    assert dict(zip(sets.test.paths, sets.test.labels.tolist(), strict=True)) == {"a.png": 0, "b.png": 1, "c.png": 2}
    assert sets.test.class_names == ["a", "b", "c"] and sets.test.counts == [1, 1, 1]
    write_json(tmp_path / "test.json", {0: "c", 1: "d"}, "cd")
    with pytest.raises(UserError, match=r"test\.json: classes differ by name, got 'd', not in the training split"):
        open_sets(DataConfig(**config))


def test_labels_beyond_the_named_classes_are_refused(tmp_path):
    (tmp_path / "tr.csv").write_text("path,label\na,cat\nb,ant\n")
    write_lists(tmp_path, te="c 2\n")
    config = {"dataset": "list", "root": str(tmp_path), "train_list": "tr.csv", "test_list": "te.txt"}
    with pytest.raises(UserError, match=r"te\.txt: got 3 classes, expected the 2 of the training split"):
        open_sets(DataConfig(**config))


def test_one_class_is_refused_before_training(tmp_path):
    config = class_folders(tmp_path, {"train/a": 4, "train/b": 0})
    with pytest.raises(UserError, match=r"got 1 class with training images \('a'\), expected at least 2"):
        open_training_sets(DataConfig(**config))


def test_what_is_odd_about_the_data_is_logged_before_training(tmp_path, caplog):
    config = class_folders(tmp_path, {"train/a": 4, "train/b": 3, "train/c": 0, "test/a": 1, "other/a": 1})
    (tmp_path / "train" / "a" / "film.gif").write_bytes(b"")
    with caplog.at_level("INFO", "fastdeitlt"):
        open_training_sets(DataConfig(**config))
    for part in ("label gap: 1 of 3", "2 (c)", "1 class without test", "film.gif", "'other'", "3 classes, train 7"):
        assert part in caplog.text


MODEL = Classes("model m", 3, ["a", "b", "c"])


def test_a_split_alone_is_opened_in_the_order_of_a_models_classes(tmp_path):
    config = DataConfig(**class_folders(tmp_path, {"test/c": 1, "test/b": 2}))
    images = open_splits(config, ("test",), ("val",), MODEL)["test"]
    assert images.counts == [0, 2, 1] and images.class_names == MODEL.names
    with pytest.raises(UserError, match=r"split: got 'val', expected a split of .* \(test\)\. Use --split test"):
        open_splits(config, ("val",), (), MODEL)
    with pytest.raises(UserError, match="got 2 classes, expected the 3 of model n"):
        open_splits(config, ("test",), (), Classes("model n", 3))
    class_folders(tmp_path, {"test/d": 1})
    with pytest.raises(UserError, match="got 'd', not in model m; expected 'a' of model m"):
        open_splits(config, ("test",), (), MODEL)


def test_a_list_without_names_follows_its_training_list_and_else_the_model(tmp_path, caplog):
    write_lists(tmp_path, te="x.png 0\n")
    lists = DataConfig(dataset="list", root=str(tmp_path), train_list="tr.csv", test_list="te.txt")
    assert open_splits(lists, ("test",), (), MODEL)["test"].counts == [1, 0, 0]
    assert "classes matched to model m by position" in caplog.text
    (tmp_path / "tr.csv").write_text("path,label\na.png,b\nb.png,c\n")
    assert open_splits(lists, ("test",), (), MODEL)["test"].counts == [0, 1, 0]
    (tmp_path / "tr.csv").write_text("path,label\na.png,0\nb.png,1\n")
    with pytest.raises(UserError, match="got 2 classes, expected the 3 of model m"):
        open_splits(lists, ("test",), (), MODEL)


def test_a_list_in_root_and_in_the_current_folder_is_refused(tmp_path, monkeypatch):
    root, here = tmp_path / "root", tmp_path / "here"
    for folder, rows in ((root, "a.png 0\nb.png 1\n"), (here, "a.png 1\nb.png 0\n")):
        folder.mkdir()
        (folder / "tr.txt").write_text(rows)
    monkeypatch.chdir(here)
    lists = DataConfig(dataset="list", root=str(root), train_list="tr.txt")
    with pytest.raises(UserError, match=r"data\.train_list: got 'tr\.txt', which is a file both in .*absolute path"):
        open_sets(lists)
    (here / "tr.txt").unlink()
    assert open_sets(lists).train.labels.tolist() == [0, 1]
    monkeypatch.chdir(root)  # the same file
    assert open_sets(lists).train.labels.tolist() == [0, 1]


def test_two_spellings_of_a_class_index_are_refused(tmp_path):
    (tmp_path / "tr.csv").write_text("path,label\na.png,1\nb.png,01\nc.png,0\n")
    with pytest.raises(UserError, match=r"tr\.csv, line 3: .*'01', expected one spelling of each class index"):
        open_sets(DataConfig(dataset="list", root=str(tmp_path), train_list="tr.csv"))
    (tmp_path / "tr.csv").write_text("path,label\na.png,01\nb.png,01\nc.png,00\n")
    assert open_sets(DataConfig(dataset="list", root=str(tmp_path), train_list="tr.csv")).train.counts == [1, 2]
