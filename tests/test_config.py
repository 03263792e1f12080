"""The schema, its overrides and its error messages."""

import contextlib
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeitlt import config
from fastdeitlt.config import DataConfig
from fastdeitlt.config.schema import STUDENT_ONLY
from fastdeitlt.data.sets.counts import CUT_SETS
from fastdeitlt.errors import UserError

RECIPES = sorted(str(p) for p in config.find("quickstart").parent.rglob("*.yaml") if p.parent.name != "ablation")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.rpartition("configs/")[2])
def test_every_shipped_recipe_loads_and_opens_with_its_command(path):
    cfg = config.load(path)
    assert cfg.is_teachers == (Path(path).parent.name == "teacher")
    assert cfg.is_teachers or cfg.train.virtual_ranks, "the number of GPUs must not change the recipe"
    with open(path, encoding="utf-8") as file:
        header = "".join(line for line in file if line.startswith("#"))
    assert "fastdeitlt train" in header


def test_overrides_win_over_the_file_and_origins_say_so():
    cfg = config.load("quickstart", ["optim.lr=5e-4", "train.epochs=7", "loss.drw_epoch=-1"])
    assert (cfg.optim.lr, cfg.train.epochs) == (5e-4, 7)
    assert cfg.origins["optim.lr"] == "override"
    assert cfg.origins["name"] == "quickstart.yaml"
    assert cfg.origins["optim.eps"] == "default"


@pytest.mark.parametrize(("text", "value"), [("1e3", 1000), ("1E+3", 1000), ("1.e3", 1000), ("7", 7)])
def test_a_number_is_the_same_in_a_file_and_in_an_override(text, value, tmp_path):
    (tmp_path / "c.yaml").write_text(f"train:\n  epochs: {text}\naugment:\n  crop_scale: [5e-1, 1]\n")
    cfg = config.load(str(tmp_path / "c.yaml"), ["loss.drw_epoch=-1"])
    overridden = config.load("quickstart", [f"train.epochs={text}", "loss.drw_epoch=-1"])
    assert cfg.train.epochs == overridden.train.epochs == value
    assert cfg.augment.crop_scale == (0.5, 1.0)


@pytest.mark.parametrize("text", ["nan", "1e5", "true", "null", "2026", "007", "off", "1_000"])
def test_a_name_that_yaml_would_make_a_number_of_stays_text(text, tmp_path):
    cfg = config.load("quickstart", [f"name={text}", f"runs_dir={text}", "train.epochs=60"])
    assert (cfg.name, cfg.runs_dir, cfg.train.epochs) == (text, text, 60)
    (tmp_path / "c.yaml").write_text(config.dump(cfg))
    assert config.load(str(tmp_path / "c.yaml")).name == text


def test_texts_may_be_quoted_and_emptied():
    cfg = config.load("quickstart", ["name='a-b'", 'data.root="/a: b"'])
    assert (cfg.name, cfg.data.root) == ("a-b", "/a: b")
    assert config.load("quickstart", ["teacher.path=x", "teacher.path="]).teacher.path == ""


def test_a_place_in_the_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = config.load("quickstart", ["runs_dir=~/runs", "teacher.path=~/t", "student.init=~/w"])
    assert (cfg.runs_dir, cfg.teacher.path, cfg.student.init) == ("/home/me/runs", "/home/me/t", "/home/me/w")


def test_dumped_config_reads_back_equal(tmp_path):
    cfg = config.load("quickstart", ["name=x"])
    (tmp_path / "c.yaml").write_text(config.dump(cfg))
    assert config.flatten(config.load(str(tmp_path / "c.yaml"))) == config.flatten(cfg)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", r"train\.epoch.*did you mean train\.epochs"),
        ("epochs=3", r"did you mean train\.epochs"),
        ("optim.lr=fast", r"optim\.lr: got 'fast'.*number"),
        ("optim.lr=-1", r"optim\.lr.*greater than 0"),
        ("optim.lr=.nan", r"optim\.lr"),
        ("train.batch_size=7", r"train\.batch_size.*7.*even.*6 or 8"),
        ("loss.drw_epoch=100000", r"loss\.drw_epoch.*train\.epochs"),
        ("loss.tau=3", r"loss\.tau.*loss\.distillation=hard"),
        ("train.cuda_graphs=true", r"train\.cuda_graphs.*train\.compile=false"),
        ("train.autotune=true", r"train\.autotune.*train\.compile=false"),  # as the quick start has it
        ("train.precision=fp16", r"train\.precision: got 'fp16', expected 'bf16', 'fp32' or 'fp8'"),
        (["evaluate.weights=ema", "optim.ema_decay=0"], r"evaluate\.weights: got ema.*evaluate\.weights=model"),
        ("nothing", r"section\.field=value"),
        ("augment.crop_scale=[2, 1]", r"crop_scale: got \[2, 1\], expected a range \(low, high\)\. Use \[1\.0, 2\.0\]"),
        ("augment.crop_ratio=[2, 1]", r"crop_ratio: got \[2, 1\], expected a range \(low, high\)\. Use \[1\.0, 2\.0\]"),
        ("augment.std=[0,1,1]", "expected (greater|less) than"),
        ("optim.betas=[0.9,1]", "expected (greater|less) than"),
        ("augment.crop_scale=[0,1]", "expected (greater|less) than"),
        (
            "augment.mean=[0.5, 0.4]",
            r"mean: got \[0\.5, 0\.4\], expected a list like \[0\.485, 0\.456, 0\.406\]",
        ),
        ("augment.mean=[123.7, 116.3, 103.5]", r"mean: got \[123\.7.*\], expected values for images in 0\.\.1\. Div"),
        ("teacher.std=[0.2, 58, 0.2]", r"teacher\.std: got \[0\.2, 58, 0\.2\], expected values for images in 0\.\.1"),
        ("augment.mean=0.5", r"augment\.mean: got 0\.5, expected a list like \[0\.485"),
        ("teacher_training.lr_steps=[[1]]", r"lr_steps: got \[\[1\]\], expected a list like \[\[160, 0\.01\]"),
        ("teacher_training.sam_rho_steps=3", r"sam_rho_steps: got 3, expected a list like \[\[0, 0\.05\]\]"),
        ("name=a b", "name: got 'a b', expected letters, digits, dots, dashes and underscores, beginning with a l"),
        ("data=folder", r"data: got 'folder', expected a section of settings, such as data\.dataset='folder'"),
    ],
)
def test_bad_override_is_one_line_with_the_fix(override, words):
    with pytest.raises(UserError, match=words) as caught:
        config.load("quickstart", [override] if isinstance(override, str) else override)
    assert "\n" not in str(caught.value)


def test_a_range_may_be_one_value():
    assert config.load("quickstart", ["augment.crop_scale=[0.5, 0.5]", "augment.crop_ratio=[1, 1]"])


@pytest.mark.parametrize(
    "text", ["a: [", "- 1\n- 2\n", "train:\n  epochs: {}\n", "train: 3\n", "? {a: b}\n: c\n", "\x00"]
)
def test_broken_files_are_refused_in_one_line(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        config.load(str(tmp_path / "c.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\ntrain:\n  epochs: 3\nname: b\n", r"c\.yaml: name is set twice \(line 4\)"),
        ("train:\n  epochs: 3\n  seed: 1\n  epochs: 4\n", r"c\.yaml: epochs is set twice \(line 4\)"),
        ("train: {epochs: 3}\ntrain: {seed: 1}\n", "train is set twice"),
        ("loss: {drw_epoch: 3}\nloss.drw_epoch: 7\n", r"c\.yaml: loss\.drw_epoch is set twice, by its dotted name"),
    ],
)
def test_a_name_given_twice_is_refused(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        config.load(str(tmp_path / "c.yaml"))


def test_merge_keys_may_be_overridden(tmp_path):
    (tmp_path / "c.yaml").write_text("data: &a {num_threads: 1}\ndata2: {<<: *a, num_threads: 2}\n")
    assert config.read_yaml(tmp_path / "c.yaml")["data2"] == {"num_threads": 2}


@given(st.dictionaries(st.sampled_from(config.FIELDS), st.none() | st.integers() | st.floats() | st.text(max_size=5)))
def test_any_values_give_a_config_or_a_user_error(values):
    with contextlib.suppress(UserError):
        config.build(values)


def test_every_field_is_documented():
    assert [name for name in config.FIELDS if not config.describe(name)] == []


@pytest.mark.parametrize("dataset", ["folder", "list"])
def test_own_images_are_called_by_their_folder(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root in ("birds/", str(tmp_path / "birds"), "../birds"):
        assert config.DataConfig(dataset=dataset, root=root).title == "birds"
    assert config.DataConfig(dataset=dataset, root="/").title == dataset
    assert config.DataConfig(dataset="imagenet_lt", root="birds").title == "imagenet_lt"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"train.seed={'9' * 6000}", "Exceeds the limit"),
        (f"train.seed={2**63}", "train.seed: got 9223372036854775808, expected at most 9223372036854775807"),
        ("optim.lr=1e300", r"optim.lr: got 1e\+300, expected at most .* 1e\+30"),
        (f"optim.lr={'9' * 4000}", r"optim.lr: got 9+\.\.\.9+, expected a valid number"),
        ("teacher_training.lr_steps=[[1, 1e300]]", r"lr_steps: got 1e\+300"),
        ("optim.lr=.inf", "optim.lr: got inf, expected a finite number"),
        ("train.epochs=2001-99-99", "not a number or date"),
    ],
)
def test_numbers_that_tensors_cannot_hold_are_refused(override, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        config.load("quickstart", [override])
    assert len(str(caught.value)) < 250
    name, value = override.split("=")
    section, field = name.split(".")
    (tmp_path / "c.yaml").write_text(f"{section}:\n  {field}: {value}\n")
    with pytest.raises(UserError):
        config.load(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=3", r"^train\.epochs: no effect on a teacher\. Use teacher_training\.epochs\.$"),
        ("optim.lr=0.5", r"Use teacher_training\.lr\.$"),
        ("loss.drw_epoch=2", r"Use teacher_training\.drw_epoch\.$"),
        ("student.img_size=64", r"Use teacher_training\.img_size\.$"),
        ("mixup.prob=1", r"^mixup\.prob: no effect on a teacher\. Remove it\.$"),
        ("augment.repeats=3", r"Remove it\.$"),
        ("train.epoch=3", r"did you mean train\.epochs"),
    ],
)
def test_a_setting_of_students_is_refused_for_a_teacher(override, message):
    for settings in ([override], {"augment.pad": 3, override.partition("=")[0]: 3}):
        with pytest.raises(UserError, match=message):
            config.load_teacher("teacher/quickstart", settings)


def test_the_recipe_of_the_other_kind_is_refused():
    with pytest.raises(UserError, match=r"^train: got teacher/quickstart, a recipe of a teacher.* Use train-teacher"):
        config.load_student("teacher/quickstart")
    for load in (config.load_teacher, lambda recipe: config.load_student("quickstart", (), recipe)):
        with pytest.raises(UserError, match=r"^train-teacher: got quickstart, which sets nothing of teacher_training"):
            load("quickstart")


def test_a_teacher_accepts_what_its_training_reads_and_the_students_settings_of_a_file():
    read = ["train.seed=3", "train.precision=fp32", "augment.pad=3", "evaluate.every=2", "data.sampling=sqrt"]
    cfg = config.load_teacher("quickstart", [*read, "teacher_training.epochs=3"])
    epochs = config.load("quickstart").train.epochs
    assert (cfg.train.seed, cfg.teacher_training.epochs, cfg.train.epochs) == (3, 3, epochs)
    assert all(any(name.startswith(start) for name in config.FIELDS) for start in STUDENT_ONLY)


@pytest.mark.parametrize(
    "name", ["evaluate.crop_pct=0.5", "augment.mean=[0,0,0]", "data.exif=apply", "student.depth=1", "train.epochs=3"]
)
def test_settings_without_effect_on_a_finished_model_are_refused(name):
    with pytest.raises(UserError, match=rf"^{name.partition('=')[0]}: no effect on a finished model, expected data"):
        config.load_evaluation("quickstart", [name])
    read = ["data.num_threads=2", "evaluate.batch_size=3", "train.device=cpu", "train.precision=fp32"]
    assert config.load_evaluation("quickstart", read).evaluate.batch_size == 3


@pytest.mark.parametrize(
    ("dataset", "setting"),
    [
        ("fashion_mnist_lt", "data.imbalance_factor=0.02"), ("imagenet_lt", "data.imbalance_kind=step"),
        ("folder", "data.train_list=train.txt"), ("cifar10_lt", "data.test_list=test.txt"),
    ],
)  # fmt: skip
def test_settings_without_effect_on_the_data_set_are_refused(dataset, setting):
    name = setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"^{name}: no effect on data\.dataset={dataset}\. Remove it"):
        config.load("quickstart", [f"data.dataset={dataset}", setting])
    assert config.load("cifar10_lt_r50", [f"data.dataset={dataset}", "data.train_list="]).data.imbalance_factor == 0.02
    cut = [name for name in get_args(DataConfig.model_fields["dataset"].annotation)
           if "imbalance_factor" not in DataConfig(dataset=name).ignored]  # fmt: skip
    assert sorted(cut) == sorted(CUT_SETS)


def test_yaml_that_does_not_parse_is_found_by_line_and_column(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("data:\n  root: [a\ntrain: {}\n")
    with pytest.raises(UserError, match=r"a\.yaml: not valid YAML \(line 3, column 6: expected ',' or '\]'") as caught:
        config.load(str(file))
    assert "unicode string" not in str(caught.value)


def test_an_empty_section_is_one_without_settings(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("data:\n#  root: a\ntrain:\n  epochs: 3\n")
    assert config.flatten(config.load(str(file))) == config.flatten(config.build({"train.epochs": 3}))


def test_a_grid_in_place_of_a_recipe_names_its_command():
    with pytest.raises(UserError, match=r"got a grid, expected a recipe\. Use fastdeitlt ablate ablation/embedded\.$"):
        config.load("ablation/embedded")


def test_an_unknown_recipe_names_the_command_that_lists_them():
    with pytest.raises(UserError, match=r"config zz: no such file or recipe; list: fastdeitlt config list$"):
        config.load("zz")
    for path in ("~nobody-has-this-name/a.yaml", "a" * 5000):
        with pytest.raises(UserError, match="no such file or recipe"):
            config.load(path)
