"""Teacher and student in one command, and the dry run."""

import re
import shutil

import pytest
import torch
from PIL import Image

from fastdeitlt import cli, config
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.tools import demo, dryrun


@pytest.fixture
def trained(monkeypatch):
    """What would be trained, in place of training it."""
    calls = []
    monkeypatch.setattr(demo, "train_teacher", lambda cfg: calls.append(cfg) or f"{cfg.runs_dir}/{cfg.name}/best")
    monkeypatch.setattr(demo, "train", lambda cfg, resume: calls.append(cfg) or cfg)
    return calls


def test_demo_trains_the_student_on_its_teacher_with_one_seed(trained, tmp_path):
    demo.demo(seed=3, runs_dir=str(tmp_path))
    teacher, student = trained
    assert student.teacher.path == f"{tmp_path}/{teacher.name}/best"
    assert (teacher.train.seed, student.train.seed, student.name) == (3, 3, "demo-3")
    assert config.flatten(teacher)["data.dataset"] == "fashion_mnist_lt"


def test_an_equal_teacher_is_found_again_and_another_is_not(trained):
    student, recipe = config.load("quickstart"), config.load("teacher/quickstart")
    changed = config.load("teacher/quickstart", ["teacher_training.sam_rho=0.3"])
    other_data = config.load("quickstart", ["data.val_holdout=0.1"])
    for pair in ((student, recipe), (student, recipe), (student, changed), (other_data, recipe)):
        demo.train_both(*pair)
    names = [cfg.name for cfg in trained[::2]]
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_the_teacher_takes_the_students_images_and_other_pixels_need_another(trained, tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "train.txt").write_text("a.png 0\nb.png 1\n")
    data = ["data.dataset=list", f"data.root={tmp_path}", "data.train_list=train.txt", "train.seed=5"]
    student = config.load("quickstart", [*data, "track=[]", "train.timeout_s=70", "train.main_timeout_s=80"])
    demo.train_both(student, config.load("teacher/quickstart"))
    assert (trained[0].data, trained[0].track, trained[0].runs_dir) == (student.data, (), student.runs_dir)
    assert (trained[0].train.seed, trained[0].train.timeout_s, trained[0].train.main_timeout_s) == (5, 70, 80)
    moved = (tmp_path / "moved", tmp_path / "moved" / "train.txt")
    shutil.copytree(tmp_path, moved[0])
    there = [f"data.root={moved[0]}", f"data.train_list={moved[1]}"]  # as plan names lists
    demo.train_both(config.load("quickstart", [*data, *there]), config.load("teacher/quickstart"))
    assert trained[2].name == trained[0].name
    Image.new("RGB", (8, 8), "green").save(tmp_path / "b.png")
    demo.train_both(student, config.load("teacher/quickstart"))
    assert trained[4].name != trained[0].name


def test_a_run_of_another_teacher_is_refused_before_one_is_trained(trained, tmp_path):
    student = config.load("quickstart", [f"runs_dir={tmp_path}", "name=a"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text(config.dump(config.load(student, {"teacher.path": "before"})))
    (tmp_path / "a" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"teacher\.path: 'before' -> .* named by its settings and images"):
        demo.train_both(student, config.load("teacher/quickstart"))
    assert not trained
    demo.train_both(student, config.load("teacher/quickstart"), "never")
    assert len(trained) == 2


def test_dry_run_takes_one_step_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dryrun.console, "_width", 200)
    overrides = ["train.batch_size=2", f"runs_dir={tmp_path}", "student.depth=1", "train.accumulate=2"]
    overrides += ["train.virtual_ranks=2", "train.ranks_per_forward=2"]
    overrides += ["train.epochs=4", "loss.drw_epoch=3", "optim.warmup_epochs=5"]
    assert cli.main(["train", "quickstart", *overrides, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "2,478 in 10 classes" in shown
    assert re.search(r"peak learning rate\W+0\.00064\W", shown)  # four fifths of the warm-up to 0.0008
    assert "one step on random images" in shown
    assert "first and last bytes of 3,978 files, not decoded (see 'data check')" in shown
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_a_run_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("a file in its place")
    with pytest.raises(UserError, match=r"run folder .*runs/.*cannot be written"):
        dryrun.dry_run(config.load("quickstart", [f"runs_dir={tmp_path / 'runs'}"]))


def test_settings_of_the_teachers_training_go_to_the_teacher(trained, tmp_path, capsys):
    student = ["train", "quickstart", f"runs_dir={tmp_path}", "train.batch_size=4", "student.depth=1"]
    both = [*student, "--with-teacher", "teacher/quickstart", "teacher_training.epochs=35"]
    assert cli.main(both) == 0
    taught, learnt = trained
    assert cli.main([*both, "train.precision=fp32"]) == 0
    own = config.load("quickstart")
    assert [cfg.train.precision for cfg in trained] == [own.train.precision] * 2 + ["fp32"] * 2
    assert (taught.teacher_training.epochs, learnt.train, learnt.teacher_training) == (
        35, own.train.model_copy(update={"batch_size": 4}), own.teacher_training
    )  # fmt: skip
    assert cli.main([*both, "--dry-run"]) == 0
    assert "39 per epoch, 1,365 in total" in capsys.readouterr().out
    for wrong, words in (
        ([*both, "teacher_training.epoch=3"], "did you mean teacher_training.epochs"),
        ([*student, "teacher_training.epochs=35"], "expected with --with-teacher RECIPE"),
        ([*both, "teacher.path=runs/a"], "Use one of the two"),
        (["train-teacher", "teacher/quickstart", "train.epochs=3", "--dry-run"], "Use teacher_training.epochs"),
    ):
        assert cli.main(wrong) == 2
        assert words in capsys.readouterr().err
    assert len(trained) == 4


def test_the_teachers_dry_run_takes_one_step_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dryrun.console, "_width", 200)
    settings = [f"runs_dir={tmp_path}", "teacher_training.batch_size=413", "teacher_training.accumulate=8"]
    settings += ["teacher_training.epochs=2", "teacher_training.drw_epoch=1"]
    assert cli.main(["train-teacher", "teacher/quickstart", *settings, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "2,478 in 10 classes" in shown and "first and last bytes of 3,978 files" in shown
    assert "resnet8, 75,280 parameters, ldam, images of 28 pixels" in shown
    assert "413 images, 52 at a time" in shown and "6 per epoch, 12 in total" in shown
    assert re.search(r"peak learning rate\W+0\.0467\W", shown)  # two thirds of the warm-up to 0.07
    assert "one step on random images: loss" in shown
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["train-teacher", "teacher/quickstart", *settings, "data.root=/absent", "--dry-run"]) == 2


def test_dry_run_refuses_a_teacher_that_training_would_refuse(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(create_teacher("resnet8", 10).state_dict(), tmp_path / "untrained.pth")
    settings = [f"teacher.path={tmp_path / 'untrained.pth'}", "teacher.arch=resnet8", "student.depth=1"]
    assert cli.main(["train", "quickstart", *settings, f"runs_dir={tmp_path / 'runs'}", "--dry-run"]) == 2
    assert "right (mean over classes) on 483 clean training images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "small", "rate"),
    [
        (["train", "quickstart"], ["train.batch_size=4", "student.depth=1"], "optim.lr"),
        (["train-teacher", "teacher/quickstart"], ["teacher_training.batch_size=8"], "teacher_training.lr"),
    ],
)
def test_dry_run_refuses_a_folder_with_another_run_and_patience_without_a_set(command, small, rate, tmp_path, capsys):
    settings = [*small, "train.virtual_ranks=1", f"runs_dir={tmp_path}", "name=begun"]
    cfg = config.load(command[1], settings)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.yaml").write_text(config.dump(cfg))
    (tmp_path / "begun/metrics.jsonl").write_text("")
    dry = [*command, *settings, "--dry-run"]
    assert cli.main(dry) == 0
    assert cli.main([*dry, f"{rate}=0.5"]) == 2
    assert f"begun: contains a run with other settings ({rate}: " in capsys.readouterr().err
    assert cli.main([*dry, f"{rate}=0.5", "--resume", "never"]) == 0
    assert cli.main([*dry, "train.patience=3", "evaluate.select_on=last", "--resume", "never"]) == 2
    assert "train.patience: got 3 without a selection set" in capsys.readouterr().err


def test_dry_run_accepts_the_run_whose_teacher_it_would_train(tmp_path, capsys):
    settings = ["train.batch_size=4", "student.depth=1", "train.virtual_ranks=1", f"runs_dir={tmp_path}"]
    cfg = config.load("quickstart", [*settings, "teacher.path=runs/teacher-1/checkpoints/best"])
    (tmp_path / cfg.name).mkdir()
    (tmp_path / cfg.name / "config.yaml").write_text(config.dump(cfg))
    (tmp_path / cfg.name / "metrics.jsonl").write_text("")
    command = ["train", "quickstart", *settings, "--with-teacher", "teacher/quickstart", "--dry-run"]
    assert cli.main([*command, "teacher_training.batch_size=8"]) == 0
    assert "Ready." in capsys.readouterr().out


def test_dry_run_finds_a_wrong_teacher(tmp_path):
    (tmp_path / "teacher.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"teacher\.pth"):
        dryrun.dry_run(config.load("quickstart", [f"teacher.path={tmp_path / 'teacher.pth'}"]))


def test_memory_of_vit_b_is_near_the_known_58_mb_an_image():
    with torch.device("meta"):
        student = create_student("deit_base_distilled_patch16_224", 1000)
    estimate = dryrun.memory_estimate(student, 1, bytes_per_value=2, with_ema=True)
    assert estimate["activations of a forward pass"] == pytest.approx(58e6 / 2**20, rel=0.1)
    assert estimate["averaged weights (EMA)"] == pytest.approx(4 * 87.3e6 / 2**20, rel=0.02)
