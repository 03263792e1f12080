"""The check before a student's first step and the order of classes of equal size, with a teacher that reads colours."""

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdeitlt import config
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError
from fastdeitlt.models.teacher import Teacher, teacher_input
from fastdeitlt.store.manifest import Manifest
from fastdeitlt.teachers.check import check_decisions
from fastdeitlt.teachers.decisions import Decisions, class_sample
from fastdeitlt.teachers.opening import ORDER_FILE, settle_order

COUNTS = [400, 200, 100, 60, 40, 20, 12, 8, 6, 4]
SIZE, MEAN, STD = 8, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
OWN = {"mean": (0.1, 0.15, 0.2), "std": (0.6, 0.5, 0.4), "img_size": SIZE}


class Colours(nn.Module):
    """Classifies images by their mean colour, if they are normalised and sized as it expects; class -1 never is."""

    def __init__(self, num_classes: int, mean: tuple, std: tuple, img_size: int, classes: list[int] | None) -> None:
        super().__init__()
        values = torch.linspace(0.25, 0.75, num_classes)
        palette = torch.cat([torch.stack([values, values.flip(0), values], 1), torch.full((1, 3), 9.0)])
        self.palette_KC = nn.Parameter(palette[list(range(num_classes)) if classes is None else classes])
        self.mean_C, self.std_C, self.img_size = torch.tensor(mean), torch.tensor(std), img_size

    def forward(self, images_BCHW: Tensor) -> Tensor:
        colour_BC = images_BCHW.mean((2, 3)) * self.std_C + self.mean_C
        if images_BCHW.shape[-1] != self.img_size:
            colour_BC = colour_BC * 0.2
        return -torch.cdist(colour_BC, self.palette_KC)


def squares(counts: list[int]) -> LongTailSet:
    """Images of one colour a class."""
    labels = np.repeat(np.arange(len(counts)), counts)
    palette = Colours(len(counts), MEAN, STD, SIZE, None).palette_KC.detach().numpy()
    pixels = np.broadcast_to((palette[labels] * 255).round()[:, None, None], (len(labels), SIZE, SIZE, 3))
    names = [f"colour {k}" for k in range(len(counts))]
    paths = [f"{i}.png" for i in range(len(labels))]
    return LongTailSet(paths, labels, counts, class_names=names, images_NHWC=pixels.astype(np.uint8))


def manifest(num_classes: int, **facts: object) -> Manifest:
    model = {"arch": "resnet8", "num_classes": num_classes}
    return Manifest.model_validate({"format": "fastdeitlt", "files": {}, "kind": "teacher", "model": model, **facts})


def checked(
    classes: list[int] | None = None,
    stated: dict | None = None,
    expects: dict | None = None,
    settings: dict | None = None,
    network: nn.Module | None = None,
    counts: list[int] = COUNTS,
) -> float:
    """Check a teacher of colours; ``expects`` is what it was trained with, by default what its folder states."""
    images = squares(counts)
    base = {"train.device": "cpu", "evaluate.crop_pct": 1.0, "teacher.path": "folder"}
    cfg = config.build(base | {f"teacher.{name}": value for name, value in (settings or {}).items()})
    facts = None if stated is None else manifest(len(counts), **stated)
    trained = {"mean": MEAN, "std": STD, "img_size": SIZE} | (expects or {})
    teacher = Teacher(network or Colours(len(counts), **trained, classes=classes), len(counts))
    teacher.manifest = facts
    teacher = teacher.fed(teacher_input(cfg.teacher, facts, MEAN, STD, SIZE), MEAN, STD)
    source = open_source(images, cfg.data, torch.device("cpu"))
    try:
        return check_decisions(teacher, images, source, cfg, SIZE)
    finally:
        source.close()


NEW, OLD = {"balanced_accuracy": {"train": 98.0}, "accuracy": {"train": 99.0}}, {"accuracy": {"train": 99.0}}


@pytest.mark.parametrize("stated", [None, NEW, OLD], ids=["released", "folder", "old folder"])
def test_a_right_teacher_passes_with_its_balanced_accuracy(stated):
    assert checked(stated=stated) == 100.0


@pytest.mark.parametrize("stated", [None, NEW, OLD], ids=["released", "folder", "old folder"])
def test_permuted_tail_classes_are_found_though_nearly_all_images_are_right(stated):
    """Of 850 images 832 are right."""
    words = r"100\.0 % are right with another order of its classes \('colour 7', 'colour 8', 'colour 9'\)"
    with pytest.raises(UserError, match=words):
        checked([0, 1, 2, 3, 4, 5, 6, 8, 9, 7], stated)


def test_two_exchanged_classes_of_many_are_found_though_little_is_lost():
    with pytest.raises(UserError, match=r"96\.0 % right .*; 100\.0 % are right .* \('colour 20', 'colour 21'\)"):
        checked([*range(20), 21, 20, *range(22, 50)], counts=[6] * 50)


@pytest.mark.parametrize(("order", "num_warnings"), [([20, 21], 0), ([21, 20], 1)])
def test_two_exchanged_classes_within_the_stated_accuracy_are_a_warning(caplog, order, num_warnings):
    stated = {"balanced_accuracy": {"train": 100.0}}
    checked([*range(20), *order, *range(22, 50)], stated, counts=[6] * 50)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == num_warnings
    assert all("96.0 % right" in text and "classes ('colour 20', 'colour 21')" in text for text in warnings)


@pytest.mark.parametrize("stated", [None, NEW, OLD], ids=["released", "folder", "old folder"])
def test_constant_answers_are_called_so(stated):
    constant = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    nn.init.zeros_(constant[2].weight)
    constant[2].bias.data = torch.arange(10.0).flip(0)
    with pytest.raises(UserError, match=r"it predicts 'colour 0' for 100 % of the images: untrained") as error:
        checked(stated=stated, network=constant)
    assert "order of its classes" not in str(error.value)


def test_an_untrained_network_is_called_so():
    """Its answers are many, none of them related to the classes."""

    class Noise(nn.Sequential):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            return torch.randn(len(images_BCHW), 10, generator=torch.Generator().manual_seed(len(images_BCHW)))

    with pytest.raises(UserError, match="near chance in any class order and with any input tried"):
        checked(stated=NEW, network=Noise(nn.Linear(1, 1)))


@pytest.mark.parametrize("stated", [None, NEW, OLD], ids=["released", "folder", "old folder"])
def test_the_best_order_of_an_untrained_network_is_no_cause(stated):
    """Three of its answers go with classes, as chance has it."""
    with pytest.raises(UserError, match="near chance in any class order"):
        checked([-1, 7, -1, -1, 1, -1, -1, 4, -1, -1], stated)


@pytest.mark.parametrize(
    ("stated", "expects", "settings", "words"),
    [
        (
            NEW | {"preprocess": OWN},
            {"mean": OWN["mean"], "std": OWN["std"]},
            {"normalise": "student"},
            "100.0 % are right with its folder's mean and std: set teacher.normalise=auto",
        ),
        (None, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}, {}, "are right with values of 0 to 1"),
        (NEW, {}, {"img_size": 12}, "100.0 % are right with images of 8 pixels: set teacher.img_size=8"),
        (
            NEW | {"preprocess": OWN | {"img_size": 12}},
            OWN | {"img_size": 12},
            {"normalise": "student", "img_size": SIZE},
            "100.0 % are right with the size, mean and std stated in its folder",
        ),
    ],
    ids=["folder's", "released", "size", "all"],
)
def test_another_input_is_found_by_trying_it_and_the_class_map_is_not_accused(stated, expects, settings, words):
    with pytest.raises(UserError) as error:
        checked(stated=stated, expects=expects, settings=settings)
    assert words in str(error.value)
    assert "order" not in str(error.value)


def test_another_input_and_another_order_are_found_together():
    with pytest.raises(UserError, match=r"100\.0 % are right with values of 0 to 1 and another order of its classes"):
        checked(list(range(10))[::-1], None, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})


def test_what_a_folder_states_is_obeyed_and_a_passing_check_tries_nothing(monkeypatch):
    monkeypatch.setattr(Teacher, "fed", with_calls := counted(Teacher.fed))
    own = {"mean": OWN["mean"], "std": OWN["std"], "img_size": 12}
    assert checked(stated=NEW | {"preprocess": own}, expects=own) == 100.0
    assert with_calls.calls == [12]


def counted(plain):
    def fed(self, own, *student):
        fed.calls.append(own.img_size)
        return plain(self, own, *student)

    fed.calls = []
    return fed


def test_a_little_below_is_a_warning_with_both_numbers(caplog):
    without_last = [0, 1, 2, 3, 4, 5, 6, 7, 8, -1]
    assert checked(without_last, NEW) == 90.0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "90.0 % right (mean over classes)" in warning and "98.0 % stated in its folder" in warning
    caplog.clear()
    assert checked(without_last, NEW | {"balanced_accuracy": {"train": 92.0}}) == 90.0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_poor_teacher_is_told_from_a_wrong_one():
    """Four of ten classes are right, which its folder states or not."""
    four = [0, -1, -1, 3, -1, -1, 6, -1, -1, 9]
    with pytest.raises(UserError, match="no class order and no input tried is better"):
        checked(four, NEW)
    assert checked(four, {"balanced_accuracy": {"train": 42.0}}) == 40.0


def test_the_sample_has_all_images_of_the_tail_and_few_of_the_head():
    labels = np.repeat(np.arange(100), [500] * 50 + [5] * 50)
    assert np.bincount(labels[class_sample(labels)]).tolist() == [40] * 50 + [5] * 50
    many = np.repeat(np.arange(8142), 3)
    assert set(np.bincount(many[class_sample(many)])) == {2}


def test_decisions_are_matched_within_groups_and_doubts_are_named():
    labels = np.repeat(np.arange(6), 4)
    decided = np.array([1] * 4 + [0] * 4 + [3] * 3 + [2] + [2] * 3 + [5] + [0] * 4 + [4, 5, 0, 1])
    label_K, clear_K = Decisions(decided, labels, 6).matched(np.array([2, 2, 1, 1, 0, 0]))
    assert label_K.tolist() == [1, 0, 3, 2, 4, 5]
    assert clear_K.tolist() == [True, True, True, True, False, False]
    mine = Decisions(decided, labels, 6).exchanged()
    assert mine.tolist() == [1, 0, 2, 3, 4, 5]  # 2 and 3 differ by four images, which is no proof


def test_random_decisions_on_many_small_classes_are_no_exchange():
    """Each class has an image by which chance matches it with another."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(300), [1, 2, 3] * 100)
    assert Decisions(rng.integers(0, 300, len(labels)), labels, 300).exchanged().tolist() == list(range(300))


def test_the_order_of_classes_of_equal_size_follows_the_teachers_decisions(tmp_path, caplog):
    """The official code's sort is unstable; the order is stored, so that a resumed run has the same."""
    caplog.set_level(logging.INFO, "fastdeitlt")
    counts = [5, 9, 5, 5, 9, 2, 5]
    images, cfg = squares(counts), config.build({"train.device": "cpu", "evaluate.crop_pct": 1.0})
    stable, true = [1, 4, 0, 2, 3, 6, 5], [4, 1, 3, 0, 6, 2, 5]
    source = open_source(images, cfg.data, torch.device("cpu"))

    def teacher(classes: list[int]) -> Teacher:
        return Teacher(Colours(7, MEAN, STD, SIZE, classes), 7, stable)

    first = teacher(true)
    settle_order(first, images, source, cfg, SIZE, tmp_path)
    assert first.class_map.tolist() == true
    assert "6 of 6 classes of equal size are in another order" in caplog.text
    again = teacher(true)
    (tmp_path / ORDER_FILE).write_text((tmp_path / ORDER_FILE).read_text().replace(str(true), str(stable)))
    settle_order(again, images, source, cfg, SIZE, tmp_path)
    assert again.class_map.tolist() == stable  # as stored
    caplog.clear()
    half_blind = teacher([4, 1, 3, 0, 6, -1, 5])  # never decides on class 2, which is the only one left
    settle_order(half_blind, images, source, cfg, SIZE, tmp_path)
    assert half_blind.class_map.tolist() == true
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    blind = teacher([4, 1, 3, 0, -1, -1, 5])
    settle_order(blind, images, source, cfg, SIZE, tmp_path)
    assert blind.class_map.tolist()[:4] == true[:4]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "do not distinguish 2 of 6 classes of equal size" in warning and "'colour 2', 'colour 6'" in warning
    source.close()
