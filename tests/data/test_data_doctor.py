"""The data set doctor: every fault that is put in is found, and a good set has none."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded
from PIL import Image

from fastdeitlt.config import Config, build, flatten
from fastdeitlt.data.check.doctor import check, gini, stats
from fastdeitlt.data.sets import cut
from fastdeitlt.data.sets.counts import cifar_lt_counts
from fastdeitlt.data.sets.findings import Finding
from fastdeitlt.data.sets.types import LongTailSet, class_counts
from fastdeitlt.errors import UserError

SEEDS = iter(range(10_000))


def pixels(height: int = 9, width: int = 13) -> np.ndarray:
    return np.random.RandomState(next(SEEDS)).randint(0, 256, (height, width, 3)).astype(np.uint8)


def make_set(root: Path, counts: dict[str, list[int]]) -> Config:
    """A good list data set under root; its config."""
    for split, sizes in counts.items():
        rows = []
        for label, size in enumerate(sizes):
            for number in range(size):
                name = f"{split}_{label}_{number}.png"
                (root / name).write_bytes(encoded(Image.fromarray(pixels()), "PNG"))
                rows.append(f"{name} {label}\n")
        (root / f"{split}.txt").write_text("".join(rows))
    lists = {f"data.{split}_list": f"{split}.txt" for split in counts}
    return build({"data.dataset": "list", "data.root": str(root), "train.batch_size": 2} | lists)


COUNTS = {"train": [8, 5], "val": [2, 2], "test": [3, 3]}


def found(config: Config) -> list[Finding]:
    return check(config).findings


def only(findings: list[Finding], text: str) -> Finding:
    """The one finding whose message holds ``text``."""
    matching = [finding for finding in findings if text in finding.message]
    assert len(matching) == 1, findings
    return matching[0]


def test_good_set_has_no_findings(tmp_path):
    report = check(make_set(tmp_path, COUNTS))
    assert report.findings == []
    assert report.exit_code == 0


@pytest.fixture(scope="module")
def embedded_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_embedded_set_is_good(embedded_cache):
    report = check(build({}))
    assert report.exit_code == 0
    assert {finding.message.split(": ")[1] for finding in report.findings} == {"gray"}


JPEG = encoded(Image.fromarray(pixels(60, 60)), "JPEG")
PNG = encoded(Image.fromarray(pixels(60, 60)), "PNG")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (None, "No such file"),
        (b"", "empty file"),
        (b"hello, I am no image", "not an image"),
        (JPEG[: len(JPEG) // 2], "truncated JPEG"),
        (PNG[: len(PNG) // 2], "truncated PNG"),
        (PNG[:60] + b"\xff" * 200 + PNG[260:], "truncated or damaged"),
        (encoded(Image.fromarray(pixels()), "GIF"), "GIF image, expected JPEG, PNG"),
    ],
    ids=["missing", "empty", "text", "half-jpeg", "half-png", "damaged-png", "gif"],
)
def test_unreadable_image_is_an_error_with_its_name(tmp_path, data, problem):
    config = make_set(tmp_path, COUNTS)
    victim = tmp_path / "train_1_3.png"
    victim.unlink()
    if data is not None:
        victim.write_bytes(data)
    report = check(config)
    finding = only(report.findings, problem)
    assert (finding.level, finding.split, finding.examples) == ("error", "train", ("train_1_3.png",))
    assert finding.message.startswith("1 image: ")
    assert report.exit_code == 2


def test_all_unreadable_images_are_listed(tmp_path):
    config = make_set(tmp_path, COUNTS)
    names = tuple(f"train_0_{i}.png" for i in range(5))
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert only(found(config), "empty file").examples == names


def test_folder_and_pipe_in_an_images_place_do_not_stop_the_check(tmp_path):
    config = make_set(tmp_path, COUNTS)
    for name, make in (("train_0_0.png", os.mkdir), ("train_0_1.png", os.mkfifo)):
        (tmp_path / name).unlink()
        make(tmp_path / name)
    assert only(found(config), "not a file").message.startswith("2 images")


def test_files_that_class_folders_pass_over_are_told(tmp_path):
    for split, name in (("train", "ant"), ("train", "bee"), ("val", "ant"), ("val", "bee")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "0.png").write_bytes(encoded(Image.fromarray(pixels()), "PNG"))
    for stray in ("train/ant/1.gif", "train/bee/.hidden", "train/2.png", "train/.DS_Store", "notes.txt"):
        (tmp_path / stray).write_bytes(b"")
    finding = only(found(build({"data.dataset": "folder", "data.root": str(tmp_path)})), "ignored")
    assert (finding.level, finding.split) == ("warning", "train")
    assert finding.examples == ("train/2.png", "train/ant/1.gif")


def test_folders_without_a_split_and_single_classes_are_found(tmp_path):
    for place in ("train/ant", "train/bee", "Validierung/ant"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "train" / "ant" / "0.png").write_bytes(encoded(Image.fromarray(pixels()), "PNG"))
    findings = found(build({"data.dataset": "folder", "data.root": str(tmp_path)}))
    assert only(findings, "'Validierung'").level == "warning"
    assert only(findings, "got 1 class with training images ('ant')").level == "error"


def test_link_out_of_the_root_is_noted(tmp_path):
    (tmp_path / "root").mkdir()
    config = make_set(tmp_path / "root", COUNTS)
    inside, outside = tmp_path / "root" / "test_0_0.png", tmp_path / "outside.png"
    inside.rename(outside)
    inside.symlink_to(outside)
    finding = only(found(config), "linked to a file outside the root")
    assert (finding.split, finding.examples) == ("test", ("test_0_0.png",))
    outside.unlink()
    assert only(found(config), "No such file").level == "error"


def test_images_shared_by_training_and_test_are_errors(tmp_path):
    config = make_set(tmp_path, COUNTS)
    (tmp_path / "test_1_2.png").write_bytes((tmp_path / "train_0_4.png").read_bytes())
    with (tmp_path / "val.txt").open("a") as file:
        file.write("train_1_1.png 1\n")
    report = check(config)
    leak = only(report.findings, "image of test also in train")
    assert (leak.level, leak.examples) == ("error", ("train_0_4.png = test_1_2.png",))
    assert only(report.findings, "1 image of val also in train").examples == ("train_1_1.png = train_1_1.png",)
    assert report.exit_code == 2


def test_images_twice_in_a_split_and_with_two_labels_are_reported(tmp_path):
    config = make_set(tmp_path, COUNTS)
    with (tmp_path / "train.txt").open("a") as file:
        file.write("train_0_0.png 0\ntrain_0_1.png 1\n")
    findings = found(config)
    assert only(findings, "2 images within the split").level == "note"
    conflict = only(findings, "1 image with several labels")
    assert (conflict.level, conflict.examples) == ("warning", ("train_0_1.png = train_0_1.png",))


def test_label_gaps_small_classes_and_classes_without_test_images_are_reported(tmp_path):
    counts = {"train": [8, 0, 5, 4], "val": [1, 0, 1, 1], "test": [2, 1, 0, 2]}
    findings = found(make_set(tmp_path, counts))
    assert only(findings, "label gap: 1 of 4 classes without training images").examples == ("class 1",)
    assert only(findings, "1 class with fewer than 5 training images").examples == ("class 3",)
    assert only(findings, "1 class without test images").examples == ("class 2",)
    assert only(findings, "test set is unbalanced").level == "note"


def test_missing_splits_are_warnings(tmp_path):
    findings = found(make_set(tmp_path, {"train": [8, 6]}))
    assert [finding.level for finding in findings] == ["warning", "warning"]
    only(findings, "no test set")
    only(findings, "data.val_holdout=0")


def test_a_holdout_beside_a_split_of_its_own_is_a_warning(tmp_path):
    config = make_set(tmp_path, COUNTS)
    shares = config.data.model_copy(update={"val_holdout": 0.2, "test_holdout": 0.0})
    (finding,) = found(config.model_copy(update={"data": shares}))
    assert (finding.level, finding.split) == ("warning", "val") and "data.val_holdout=0.2" in finding.message
    alone = make_set(tmp_path, {"train": [8, 7], "test": [3, 3]})
    shares = alone.data.model_copy(update={"val_holdout": 0.2})
    assert found(alone.model_copy(update={"data": shares})) == []


def test_config_that_does_not_fit_is_an_error(tmp_path):
    config = make_set(tmp_path, COUNTS)
    config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": 64})})
    report = check(config)
    assert only(report.findings, "train.batch_size: got 64").level == "error"
    assert report.schedule == {}
    assert report.exit_code == 2


def test_incomplete_published_set_is_an_error_with_both_counts(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / f"ImageNet_LT_{split}.txt").write_text("a.jpg 0\nb.jpg 1\n")
    config = build({"data.dataset": "imagenet_lt", "data.root": str(tmp_path), "train.batch_size": 2})
    finding = next(f for f in found(config) if "published" in f.message and f.split == "train")
    assert finding.message == (
        "got 2 images in 2 classes of 1 to 1; the published set has 115,846 images in 1,000 classes of 1,280 to 5"
    )
    assert finding.level == "error"


def decoded_set(images_NHWC: np.ndarray, labels_N: np.ndarray, names: list[str]) -> LongTailSet:
    paths = [f"{i:05d}" for i in range(len(labels_N))]
    return LongTailSet(paths, labels_N, class_counts(labels_N, len(names)), "", names, images_NHWC)


@pytest.mark.parametrize(
    ("dataset", "per_class", "images_left"), [("cifar10_lt", 5000, 12_406), ("fashion_mnist_full_lt", 6000, 14_886)]
)
def test_published_counts_hold_whatever_is_held_out(tmp_path, monkeypatch, dataset, per_class, images_left):
    labels = np.repeat(np.arange(10), per_class)
    images = np.arange(10 * per_class, dtype=np.uint32).view(np.uint8).reshape(-1, 1, 1, 4)
    test = np.repeat(np.arange(10), 1000)
    names = list("abcdefghij")
    whole = decoded_set(images, labels, names), decoded_set(images[:10_000], test, names)
    monkeypatch.setattr(cut, "_read", lambda *arguments: whole)
    base = {"data.dataset": dataset, "data.root": str(tmp_path)}
    for holdout in (0.0, 0.1):
        report = check(build(base | {"data.val_holdout": holdout}))
        assert not any("published" in finding.message for finding in report.findings)
        assert sum(s.num_images for s in report.splits if s.split != "test") == images_left
    # the made-up test images are training images: a published set keeps such duplicates, with a warning
    assert only(report.findings, "images of test also in train").level == "warning"
    fewer = decoded_set(images[10:], labels[10:], names), whole[1]
    monkeypatch.setattr(cut, "_read", lambda *arguments: fewer)
    assert only(check(build(base)).findings, "the published set has").level == "error"


@pytest.mark.parametrize(
    ("dataset", "batch_size", "accumulate", "ranks", "factor", "expected"),
    [
        ("cifar10_lt", 128, 4, 2, 0.01, (48, 12, 14_400)),
        ("cifar10_lt", 128, 4, 2, 0.02, (54, 14, 16_800)),
        ("cifar100_lt", 128, 4, 2, 0.01, (42, 11, 13_200)),
    ],
)
def test_predicted_steps_are_those_of_the_published_runs(
    tmp_path, monkeypatch, dataset, batch_size, accumulate, ranks, factor, expected
):
    classes = 10 if dataset == "cifar10_lt" else 100
    labels = np.repeat(np.arange(classes), 50_000 // classes)
    images = np.zeros((50_000, 1, 1, 3), np.uint8)
    names = [str(i) for i in range(classes)]
    whole = decoded_set(images, labels, names), decoded_set(images[:classes], np.arange(classes), names)
    monkeypatch.setattr(cut, "_read", lambda *arguments: whole)
    report = stats(
        build(
            {
                "data.dataset": dataset,
                "data.root": str(tmp_path),
                "data.imbalance_factor": factor,
                "train.batch_size": batch_size,
                "train.accumulate": accumulate,
                "train.virtual_ranks": ranks,
            }
        )
    )
    names = ("micro_batches_a_rank_an_epoch", "optimizer_steps_an_epoch", "optimizer_steps")
    assert tuple(report.schedule[name] for name in names) == expected
    assert report.splits[0].counts == cifar_lt_counts(50_000, classes, factor)


def test_an_epoch_that_leaves_out_many_images_is_a_finding(tmp_path):
    config = make_set(tmp_path, COUNTS)
    config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": 8})})
    report = check(config)
    finding = only(report.findings, "3 of 13 images per epoch, 8 with copies (augment.repeats=3)")
    assert (finding.level, finding.split) == ("warning", "train")
    assert report.schedule["distinct_images_an_epoch"] == 3
    plain = config.model_copy(update={"augment": config.augment.model_copy(update={"repeats": 1})})
    assert "use a train.batch_size below 8" in only(check(plain).findings, "8 of 13 images per epoch").message


def test_statistics_of_the_embedded_set(embedded_cache):
    report = stats(build({}))
    train = report.splits[0]
    assert (train.num_images, train.num_classes, train.largest, train.smallest) == (2478, 10, 1000, 10)
    assert train.imbalance_ratio == 100
    assert report.groups["threshold"] == {
        "head": {"classes": 5, "images": 2302},
        "mid": {"classes": 3, "images": 150},
        "tail": {"classes": 2, "images": 26},
    }
    assert {name: group["classes"] for name, group in report.groups["official"].items()} == {
        "head": 3,
        "mid": 4,
        "tail": 3,
    }


@pytest.mark.parametrize(
    ("counts", "expected"), [([7, 7, 7], 0), ([0, 0, 0, 8], 0.75), ([3, 1], 0.25), ([1, 2, 3, 4], 0.25)]
)
def test_gini(counts, expected):
    assert gini(counts) == pytest.approx(expected)
    assert gini(counts[::-1]) == pytest.approx(expected)


def test_report_prints_tables_and_json(tmp_path, capsys):
    config = make_set(tmp_path, COUNTS)
    (tmp_path / "train_0_0.png").unlink()
    (tmp_path / "classes.txt").write_text("[red]cat\ndog\n")
    report = check(config)
    report.print()
    text = capsys.readouterr().out
    assert f"data {tmp_path.name}" in text and "thirds by class size" in text and "official" not in text
    for part in (
        "[red]cat",
        "1 image: No such file",
        "train_0_0.png",
        "optimizer steps an epoch",
        "threshold",
        "findings",
    ):
        assert part in text
    stats(config).print()
    assert "findings" not in capsys.readouterr().out
    report.print(as_json=True)
    tree = json.loads(capsys.readouterr().out)
    assert tree["exit_code"] == 2
    assert tree["splits"][0]["counts"] == [8, 5]
    assert tree["findings"][0]["level"] == "error"


def test_faulty_list_stops_the_check_with_its_line(tmp_path):
    config = make_set(tmp_path, COUNTS)
    (tmp_path / "test.txt").write_text("a.png 0\n../b.png 1\n")
    with pytest.raises(UserError, match=r"test\.txt, line 2"):
        check(config)


def test_a_teachers_recipe_shows_the_plan_of_the_teacher(tmp_path, capsys):
    config = make_set(tmp_path, COUNTS)
    flat = {name: value for name, value in flatten(config).items() if name.startswith("data.")}
    teacher = build(flat | {"teacher_training.epochs": 7, "teacher_training.batch_size": 4})
    report = check(build(flatten(teacher)))  # with every field, as in a run folder
    assert report.schedule == {
        "optimizer_steps_an_epoch": 3,
        "images_an_optimizer_step": 4,
        "images_an_epoch": 13,
        "epochs": 7,
        "optimizer_steps": 21,
        "images": 91,
    }
    report.print()
    assert "training a teacher" in capsys.readouterr().out
    small = build(flat | {"teacher_training.batch_size": 1})
    assert only(check(small).findings, "teacher_training.batch_size: got 1").level == "error"
