"""`plan` on real folders: every layout, the smallest classes, rates of this machine, files that train reads."""

import io
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from image_files import class_folders
from PIL import Image
from safetensors.torch import save_file

from fastdeitlt import config
from fastdeitlt.cli import main
from fastdeitlt.data.pixels import source as source_module
from fastdeitlt.data.pixels.reader import Stream
from fastdeitlt.data.pixels.resident import Resident
from fastdeitlt.data.sets.blobs import Blob
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student
from fastdeitlt.models.start import shape_of
from fastdeitlt.tools import plan as plan_module
from fastdeitlt.tools import plan_rates
from fastdeitlt.tools.plan import layout, make_plan, to_yaml
from fastdeitlt.tools.plan_facts import Rates

SIZES = {"cat": 12, "dog": 6, "eel": 3}


def list_of(folder, sizes):
    return "".join(f"{name}/{i}.png {k}\n" for k, (name, number) in enumerate(sizes.items()) for i in range(number))


@pytest.fixture
def rates(monkeypatch):
    """Rates of a machine that needs no measuring."""

    def measured(images, facts, hours, device):
        return Rates(dict.fromkeys(facts.rungs, 500.0), dict.fromkeys(facts.rungs, 800.0), 20.0)

    monkeypatch.setattr(plan_module, "measure_rates", measured)


def test_layouts_are_told_apart(tmp_path):
    assert layout(tmp_path)["dataset"] == "folder"
    (tmp_path / "val.csv").write_text("")
    assert layout(tmp_path)["dataset"] == "folder"  # without a training list
    (tmp_path / "train.txt").write_text("")
    assert layout(tmp_path) == {
        "dataset": "list", "root": str(tmp_path), "train_list": str(tmp_path / "train.txt"),
        "val_list": str(tmp_path / "val.csv"),
    }  # fmt: skip
    assert layout(tmp_path / "train.txt") == layout(tmp_path)
    (tmp_path / "Places_LT_train.txt").write_text("")
    assert layout(tmp_path) == {"dataset": "places_lt", "root": str(tmp_path)}
    with pytest.raises(UserError, match="no such folder"):
        layout(tmp_path / "absent")
    (tmp_path / "train.tsv").write_text("")
    with pytest.raises(UserError, match=r"train.tsv: no list file \(.txt, .csv, .json\), expected a folder with"):
        layout(tmp_path / "train.tsv")


@pytest.mark.parametrize(
    ("train", "beside", "used"),
    [
        ("train.csv", ["val.csv", "test.csv", "train.txt", "val.txt"], ["val.csv", "test.csv"]),
        ("training.txt", ["dev.json", "testing.txt"], ["dev.json", "testing.txt"]),
        ("my-train.txt", ["my-val.txt", "my-test.csv", "val.txt"], ["my-val.txt", "my-test.csv"]),
        ("Places_LT_train.txt", ["Places_LT_test.txt"], [None, "Places_LT_test.txt"]),
        ("photos.csv", ["val.csv", "test.csv"], [None, None]),
        ("val.csv", ["test.csv"], [None, None]),
    ],
)
def test_lists_beside_a_training_list_are_used(tmp_path, train, beside, used):
    for name in (train, *beside):
        (tmp_path / name).write_text("")
    paths = {f"{split}_list": str(tmp_path / name) for split, name in zip(("val", "test"), used, strict=True) if name}
    alone = {"dataset": "list", "root": str(tmp_path), "train_list": str(tmp_path / train)}
    assert layout(tmp_path / train) == alone | paths


@pytest.mark.parametrize("splits", [("",), ("train", "test"), ("Training", "dev")])
@pytest.mark.parametrize("stray", ["archive.zip", "train.tar", "test.parquet"])
def test_an_archive_beside_class_folders_is_not_the_data(tmp_path, splits, stray):
    for split in splits:
        class_folders(tmp_path / split, {"cat": 1, "dog": 1})
    (tmp_path / stray).write_bytes(b"")
    assert layout(tmp_path)["dataset"] == "folder"


def test_folders_without_class_folders_leave_the_shards_in_use(tmp_path):
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(b"")
    class_folders(tmp_path, {"figures": 1})  # beside split folders it is no class
    (tmp_path / "figures" / "0.png").rename(tmp_path / "train" / "preview.png")
    class_folders(tmp_path, {"more": 1})
    assert layout(tmp_path)["dataset"] == "shards"


@pytest.mark.parametrize("kind", ["classes", "splits", "train and test", "lists", "shards"])
def test_every_layout_gives_three_splits_and_both_files_agree(tmp_path, rates, kind):
    root = tmp_path / "photos"
    if kind == "classes":
        class_folders(root, SIZES)
    elif kind == "shards":
        class_folders(tmp_path / "files", SIZES)
        root.mkdir()
        shutil.make_archive(str(root / "photos"), "zip", tmp_path / "files")
    elif kind == "lists":
        class_folders(root, SIZES)
        (root / "train.txt").write_text(list_of(root, SIZES))
    else:
        for split in ("train", "test") if kind == "train and test" else ("train", "val", "test"):
            class_folders(root / split, SIZES)
    student, teacher = make_plan(root, hours=0.1).choice.configs
    assert student.data == teacher.data
    sets = open_sets(student.data)
    assert sets.val is not None and sets.test is not None
    assert (student.data.val_holdout, student.data.test_holdout) == {
        "splits": (None, None), "train and test": (0.1, None)
    }.get(kind, (0.1, 0.2))  # fmt: skip
    places = [sets.train.place(i) for i in range(len(sets.train))]
    files = [io.BytesIO(p.read() if isinstance(p, Blob) else Path(p).read_bytes()) for p in places]
    small = [np.asarray(Image.open(file).resize((64, 64), Image.Resampling.BICUBIC)) for file in files]
    pixels = np.concatenate(small).reshape(-1, 3)
    assert student.augment.mean == pytest.approx(pixels.mean(0) / 255, abs=0.02)


def test_the_verb_writes_two_files_whose_lines_have_reasons(tmp_path, rates, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "photos", SIZES)
    (tmp_path / "photos" / "cat" / "new.heic").write_bytes(b"")
    for file in (tmp_path / "photos" / "dog").iterdir():
        Image.open(file).save(file, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06" + bytes(7))
    assert main(["plan", "photos", "--hours", "0.1", "--out", "mine"]) == 0
    shown = capsys.readouterr().out
    assert "fastdeitlt train mine.yaml --with-teacher mine-teacher.yaml" in shown
    assert "smallest   eel 2 train, 0 val, 1 test; dog 4 train, 1 val, 1 test" in shown
    assert "note       1 class without val images, not scored (2 (eel))" in shown
    assert "note       1 file ignored: not in a class folder, or no image suffix (cat/new.heic)" in shown
    assert "note       4 of 15 sampled images with an EXIF orientation, ignored; data.exif=apply" in shown
    for name, trains in (("mine.yaml", False), ("mine-teacher.yaml", True)):
        text = (tmp_path / name).read_text()
        assert config.load(name).is_teachers is trains
        for line in text.splitlines():
            assert line.startswith("#") or line.endswith(":") or " # " in line, line
    written = config.load("mine.yaml"), config.load("mine-teacher.yaml")
    planned = make_plan("photos", 0.1, name="mine").choice.configs
    assert list(map(config.flatten, written)) == list(map(config.flatten, planned))
    assert main(["plan", "photos", "--out", "mine"]) == 2
    assert "mine.yaml: exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "name"),
    [
        (["--out", "mine.yml"], "mine"),
        (["--out", "mine.yaml"], "mine"),
        (["--out", "1e5"], "1e5"),
        (["--out", "2026"], "2026"),
        ([], "photos.v2"),
    ],
)
def test_names_can_be_those_of_files_and_folders_and_look_like_numbers(tmp_path, rates, monkeypatch, out, name):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "photos.v2", SIZES)
    assert main(["plan", "photos.v2", "--hours", "0.1", *out]) == 0
    assert sorted(file.name for file in tmp_path.glob("*.yaml")) == sorted([f"{name}.yaml", f"{name}-teacher.yaml"])
    assert config.load(str(tmp_path / f"{name}.yaml")).name == name


def test_an_invalid_name_writes_no_files(tmp_path, rates, capsys):
    class_folders(tmp_path / "photos", SIZES)
    assert main(["plan", str(tmp_path / "photos"), "--hours", "0.1", "--out", str(tmp_path / "my plan")]) == 2
    assert "name: got 'my plan', expected letters, digits" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.yaml"))


def test_values_and_names_survive_the_file():
    settings = {
        "data.root": ("/a: #b/ü 'c'", "odd"), "optim.lr": (5e-05, "small"), "augment.mean": ([0.1, 0.2, 0.3], "m"),
        "name": ("2026", "a number"), "student.depth": (3, "few"), "train.compile": (False, "no"),
    }  # fmt: skip
    read = yaml.safe_load(to_yaml("a\ntitle", settings))
    assert read["data"]["root"] == "/a: #b/ü 'c'" and read["name"] == "2026" and read["train"]["compile"] is False
    assert read["augment"]["mean"] == [0.1, 0.2, 0.3]


def test_bad_requests_are_one_line(tmp_path, rates, capsys):
    class_folders(tmp_path / "one", {"cat": 4})
    class_folders(tmp_path / "two", SIZES)
    for arguments, words in (
        ([str(tmp_path / "one")], "got images of 1 class"),
        ([str(tmp_path / "two"), "--hours", "0"], "expected a number above 0"),
        ([str(tmp_path / "two"), "--hours", "inf"], "expected a number above 0"),
        ([str(tmp_path / "two"), "--hours", "0.001"], "expected at least"),
        ([str(tmp_path / "two"), "--from", str(tmp_path / "absent.pth")], "no such file"),
        ([str(tmp_path / "two"), "--out", str(tmp_path / "no" / "folder")], "no such folder"),
    ):
        assert main(["plan", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    (tmp_path / "two" / "cat" / "0.png").write_text("no image")
    assert main(["plan", str(tmp_path / "two"), "--from", str(tmp_path / "absent.pth")]) == 2
    assert "no such file" in capsys.readouterr().err, "before the images are read"
    assert main(["plan", str(tmp_path / "two")]) == 2
    error = capsys.readouterr().err
    assert "0.png" in error and "set data.on_error" not in error, "plan has no settings"
    assert main(shlex.split(error[error.index("data check") :])) == 2
    assert "0.png" in capsys.readouterr().out


def test_given_weights_set_the_students_start_and_shape(tmp_path, rates):
    class_folders(tmp_path / "photos", SIZES, side=150)
    torch.manual_seed(0)
    weights = create_student("deit_tiny_distilled_patch16_64", 5, depth=2).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    assert shape_of(tmp_path / "weights.safetensors") == ("tiny", 16, 2, 64)
    student, _ = make_plan(tmp_path / "photos", 0.1, tmp_path / "weights.safetensors").choice.configs
    assert student.student.init == str(tmp_path / "weights.safetensors")
    assert (student.student.name, student.student.depth) == ("deit_tiny_distilled_patch16_64", 2)


@pytest.mark.parametrize(("total", "sample"), [(108, 108), (108, 13), (65, 65)])
def test_rates_are_measured_on_fewer_images_than_a_batch_and_on_one_more(tmp_path, monkeypatch, total, sample):
    """Of the first student, after which the time is up; whatever the machine, many hours are enough for it."""
    for name, value in (("SAMPLE_S", 0.0), ("LIMIT_S", 0.0), ("LEAST_IMAGES", sample), ("MOST_IMAGES", sample)):
        monkeypatch.setattr(plan_rates, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plan_rates, "count", lambda: range(20))  # a stream without full batches ends
    for split in ("train", "val", "test"):
        class_folders(tmp_path / "photos" / split, {"cat": 60, "dog": total - 60})
    planned = make_plan(tmp_path / "photos", 1e4, device="cpu")
    assert list(planned.rates.student) == list(planned.rates.teacher) == [planned.facts.rungs[0]]
    assert all(0 < rate < 1e7 for rates in (planned.rates.student, planned.rates.teacher) for rate in rates.values())
    assert not (tmp_path / "cache").exists(), "measuring leaves no decoded set behind"


def test_rates_are_measured_with_the_residency_of_training_while_the_hours_are_enough(tmp_path, monkeypatch):
    class_folders(tmp_path / "photos", SIZES)
    sources = []
    monkeypatch.setattr(plan_rates, "_student_rate", lambda cfg, source, *_: sources.append(type(source)) or 2000.0)
    monkeypatch.setattr(plan_rates, "_teacher_rate", lambda *_: 2000.0)
    for free, kind in ((1_000, Stream), (10**9, Resident)):
        monkeypatch.setattr(source_module, "available_memory", lambda free=free: free)
        planned = make_plan(tmp_path / "photos", 0.1, device="cpu")
        assert sources.pop() is kind
        rungs, measured = list(planned.facts.rungs), list(planned.rates.student)
        enough = [rung for rung in rungs if rung.needs <= 360 * 2000]
        assert measured == enough == rungs[: len(enough)] and 1 < len(measured) < len(rungs)
