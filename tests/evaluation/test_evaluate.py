"""Evaluation: every image once, the right mean for every group, honest gaps where there is nothing to measure."""

import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from small_model import MANIFEST, NAME, read_csv, save_student
from tiny_run import embedded_lists
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
)

from fastdeitlt.data.pixels.request import CropRequest
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation import evaluate as evaluation
from fastdeitlt.evaluation.evaluate import OneHead, collect_logits, evaluate
from fastdeitlt.evaluation.metrics import (
    Result,
    calibration_error,
    reliability_bins,
    score,
    score_heads,
    wilson_interval,
)
from fastdeitlt.evaluation.posthoc import post_hoc, temperatures
from fastdeitlt.models import create_student
from fastdeitlt.store.checkpoint import save_model_folder
from fastdeitlt.store.manifest import Preprocess

COUNTS = [500, 300, 150, 90, 60, 40, 21, 12, 6, 3]  # threshold groups: 3 head, 4 mid, 3 tail
SIZE, RESIZE = 8, 9
PREPROCESS = {
    "preprocess": Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, img_size=SIZE, crop_pct=SIZE / RESIZE),
    "device": torch.device("cpu"),
}


def logits_and_labels(num_images=501, num_classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(num_classes, (num_images,), generator=generator)
    heads = []
    for gain in (1.5, 3.0):
        noise = torch.randn(num_images, num_classes, generator=generator)
        heads.append(noise + gain * torch.nn.functional.one_hot(labels_N, num_classes))
    return (*heads, labels_N)


class Stub:
    """Crops whose every pixel is the sample's number, in the order asked for."""

    def __init__(self, unreadable=()):
        self.batches, self.unreadable = [], set(unreadable)

    def crops(self, requests):
        for request in requests:
            assert isinstance(request, CropRequest) and (request.size, request.resize) == (SIZE, RESIZE)
            assert request.draws is None
            self.batches.append(len(request.sample_B))
            pixels = torch.as_tensor(request.sample_B, dtype=torch.uint8)
            yield request, pixels[:, None, None, None].expand(-1, SIZE, SIZE, 3).contiguous()


class Echo(torch.nn.Module):
    """CLS logits are the normalised pixel, DIST logits its negative."""

    def forward_heads(self, images_BCHW):
        assert not self.training
        pixel_B3 = images_BCHW[:, :, 0, 0]
        return pixel_B3, -pixel_B3


def long_tail_set(num_images):
    labels_N = np.arange(num_images, dtype=np.int64) % 3
    return LongTailSet([f"{i}.png" for i in range(num_images)], labels_N, np.bincount(labels_N, minlength=3).tolist())


@pytest.mark.parametrize(("num_images", "batch_size", "batches"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 5, [2])])
def test_every_image_is_seen_once_and_in_order_for_any_remainder(num_images, batch_size, batches):
    source, images = Stub(), long_tail_set(num_images)
    cls_logits, dist_logits, labels = collect_logits(Echo(), source, images, batch_size=batch_size, **PREPROCESS)
    expected = (torch.arange(num_images) / 255 - 0.5) / 0.25
    assert source.batches == batches
    assert torch.allclose(cls_logits[:, 0], expected, atol=1e-6) and torch.equal(dist_logits, -cls_logits)
    assert labels.tolist() == images.labels.tolist() and labels.dtype == torch.int64


def test_evaluation_in_training_puts_the_model_back_into_training_mode():
    model = Echo().train()
    collect_logits(model, Stub(), long_tail_set(4), batch_size=4, **PREPROCESS)
    assert model.training
    teacher = torch.nn.Flatten().eval()
    collect_logits(OneHead(teacher), Stub(), long_tail_set(4), batch_size=4, **PREPROCESS)
    assert not teacher.training


@pytest.mark.parametrize("world_size", [3, 23])
def test_the_parts_of_several_ranks_score_the_same_as_one_rank(world_size):
    images, parts = long_tail_set(20), []
    for rank in range(world_size):
        sample_N = np.arange(rank, 20, world_size)
        parts.append(collect_logits(Echo(), Stub(), images, batch_size=4, sample_N=sample_N, **PREPROCESS))
    gathered = [torch.cat(column) for column in zip(*parts, strict=True)]
    alone = collect_logits(Echo(), Stub(), images, batch_size=7, **PREPROCESS)
    counts = [200, 50, 5]
    assert score(*gathered, counts).to_json() == score(*alone, counts).to_json()


def test_images_that_cannot_be_read_are_left_out_of_all_scores():
    images = long_tail_set(20)
    whole = collect_logits(Echo(), Stub(), images, batch_size=7, **PREPROCESS)
    marked = collect_logits(Echo(), Stub(unreadable=[3, 11, 19]), images, batch_size=7, **PREPROCESS)
    kept = [part[np.setdiff1d(np.arange(20), [3, 11, 19])] for part in whole]
    result = score(*marked, [200, 50, 5])
    assert result == replace(score(*kept, [200, 50, 5]), left_out=3)
    assert "17 images (without 3 unreadable)" in result.table().title
    assert Result.from_json(result.to_json()) == result
    assert temperatures(marked, [200, 50, 5]) == temperatures(kept, [200, 50, 5])
    assert post_hoc(marked, marked, [200, 50, 5]) == post_hoc(kept, kept, [200, 50, 5])


@pytest.mark.parametrize("residency", ["stream", "host"])
def test_unreadable_test_images_do_not_count_as_others(tmp_path, monkeypatch, residency):
    """All of class b and some of class a are cut: no other image is scored in their place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, index, name in product(("train", "test"), range(4), "abcd"):
        (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
        path = tmp_path / split / name / f"{index}.png"
        Image.effect_noise((40, 40), 50).save(path)
        if split == "test" and (name == "b" or (name == "a" and index > 1)):
            path.write_bytes(path.read_bytes()[:-50])
    save_student(tmp_path / "model", class_names=list("abcd"))
    data = [f"data.root={tmp_path}", "data.dataset=folder", f"data.residency={residency}", "train.device=cpu"]
    with pytest.raises(UserError, match="truncated PNG"):
        evaluate(tmp_path / "model", data)
    result = evaluate(tmp_path / "model", [*data, "data.on_error=skip"], json_path=tmp_path / "scores.json")
    assert result.support_K == [2, 0, 4, 4] and result.left_out == 6
    assert json.loads((tmp_path / "scores.json").read_text())["left_out"] == 6


def test_accuracies_equal_torchmetrics():
    cls_logits, dist_logits, labels = logits_and_labels()
    result = score(cls_logits, dist_logits, labels, COUNTS)
    heads = {"AVG": (cls_logits + dist_logits) / 2, "CLS": cls_logits, "DIST": dist_logits}
    for name, logits in heads.items():
        ours = result.heads[name]
        options = {"preds": logits, "target": labels, "num_classes": 10}
        assert ours.top1["threshold"]["all"] == pytest.approx(
            100 * multiclass_accuracy(**options, average="micro").item(), abs=1e-4
        )
        assert ours.top5["threshold"]["all"] == pytest.approx(
            100 * multiclass_accuracy(**options, average="micro", top_k=5).item(), abs=1e-4
        )
        assert ours.balanced_accuracy == pytest.approx(100 * multiclass_accuracy(**options).item(), abs=1e-4)
        assert ours.macro_f1 == pytest.approx(100 * multiclass_f1_score(**options, average="macro").item(), abs=1e-4)
        assert ours.ece["threshold"]["all"] == pytest.approx(
            100 * multiclass_calibration_error(logits.softmax(1), labels, num_classes=10, n_bins=15).item(), abs=1e-3
        )
        expected_nll = torch.nn.functional.cross_entropy(
            logits.double(), labels
        )  # unbalanced set: nll all is per image
        assert ours.nll["threshold"]["all"] == pytest.approx(expected_nll.item(), rel=1e-9)


def test_avg_is_the_mean_of_the_logits_not_of_the_probabilities():
    cls_logits = torch.tensor([[9.0, 0.0, 5.0]])
    dist_logits = torch.tensor([[0.0, 9.0, 5.5]])
    result = score(cls_logits, dist_logits, torch.tensor([2]), [200, 50, 5])
    assert [result.accuracy(head) for head in ("AVG", "CLS", "DIST")] == [100, 0, 0]
    for wrong in (("TEACHER",), ("AVG", "rare"), ("AVG", "all", "paper")):
        with pytest.raises(UserError, match=f"got '{wrong[-1]}', expected names of AVG, CLS, DIST; threshold, "):
            result.accuracy(*wrong)


def test_groups_are_means_over_classes_and_all_is_over_images():
    labels = torch.tensor([0] * 8 + [1] * 2 + [2])  # head class 0, head class 1, tail class 2
    predicted = torch.tensor([0] * 8 + [1, 0] + [0])
    logits = torch.nn.functional.one_hot(predicted, 3).float()
    result = score(logits, logits, labels, [500, 400, 5])
    assert result.accuracy(group="all") == pytest.approx(100 * 9 / 11)
    assert result.accuracy(group="head") == pytest.approx((100 + 50) / 2)
    assert result.accuracy(group="tail") == 0
    assert [(c.label, c.predicted, c.num_images) for c in result.heads["AVG"].confusions] == [(1, 0, 1), (2, 0, 1)]


def test_both_split_conventions_are_reported_and_differ():
    cls_logits, dist_logits, labels = logits_and_labels()
    result = score(cls_logits, dist_logits, labels, COUNTS, dataset="cifar10_lt")
    sizes = {split: tuple(groups[g] for g in ("head", "mid", "tail")) for split, groups in result.num_classes.items()}
    assert sizes == {"threshold": (3, 4, 3), "official": (3, 4, 3)}
    steep = [500, 300, 150, 90, 19, 9, 8, 7, 6, 3]
    result = score(cls_logits, dist_logits, labels, steep, dataset="cifar10_lt")
    accuracy_K = result.class_accuracy("AVG")
    assert result.accuracy(group="tail", split="threshold") == pytest.approx(accuracy_K[4:].mean())
    assert result.accuracy(group="tail", split="official") == pytest.approx(accuracy_K[7:].mean())


def test_only_a_published_split_is_called_official():
    logits = torch.eye(10)
    for dataset in (None, "cifar10_lt", "folder", "fashion_mnist_lt"):
        name = "official split" if dataset in (None, "cifar10_lt") else "thirds by class size"
        result = score(logits, logits, torch.arange(10), COUNTS, dataset)
        assert result.split_name() == name and name in str(result.table("official").title)
        assert "threshold split" in str(result.table().title)
        assert Result.from_json(result.to_json()).split_name() == name
    old = score(logits, logits, torch.arange(10), COUNTS).to_json()
    del old["thirds"]
    assert Result.from_json(old).split_name() == "official split"


def test_an_absent_class_or_group_is_a_dash_and_never_pulls_a_mean_down():
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.nn.functional.one_hot(labels, 4).float()
    result = score(logits, logits, labels, [500, 50, 40, 3])  # classes 2 (mid) and 3 (tail) have no test image
    assert result.accuracy(group="mid") == 100 and result.heads["AVG"].balanced_accuracy == 100
    three_right = score(*[torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 3]), 4).float()] * 2, labels, [9, 9, 9, 9])
    assert three_right.heads["AVG"].macro_f1 == pytest.approx(100 * (1 + 2 / 3) / 2)  # of the two classes with images
    assert math.isnan(result.accuracy(group="tail")) and math.isnan(result.class_accuracy("AVG")[3])
    console = Console(width=100)
    with console.capture() as capture:
        console.print(result.table())
    rows = {
        line.split()[1]: line.split()[2:] for line in capture.get().splitlines() if "AVG" in line or "chance" in line
    }
    assert [value for value in rows["AVG"] if value != "│"] == ["100.0", "100.0", "100.0", "-"]
    assert [value for value in rows["chance"] if value != "│"] == ["25.0"] * 4
    assert "nan" not in capture.get().lower()


def test_result_survives_strict_json_with_gaps():
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.nn.functional.one_hot(labels, 4).float()
    result = score(logits, logits, labels, [500, 50, 40, 3])
    text = json.dumps(result.to_json(), allow_nan=False)
    again = Result.from_json(json.loads(text))
    assert again.to_json() == result.to_json() and math.isnan(again.accuracy(group="tail"))
    with pytest.raises(UserError, match="heads"):
        Result.from_json({"counts_K": [1]})


def test_a_single_head_is_scored_the_same_way():
    _, dist_logits, labels = logits_and_labels()
    teacher = score_heads({"TEACHER": dist_logits}, labels, COUNTS)
    student = score(dist_logits, dist_logits, labels, COUNTS)
    assert list(teacher.heads) == ["TEACHER"]
    assert teacher.heads["TEACHER"] == student.heads["DIST"]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(student.table(teacher=teacher))
    assert "teacher" in capture.get()


def test_wilson_intervals_equal_the_textbook():
    interval = wilson_interval(np.array([8, 0, 10, 0]), np.array([10, 10, 10, 0]))
    assert interval[0] == pytest.approx([49.0162, 94.3318], abs=1e-3)  # Wilson 95 % for 8 of 10
    assert interval[1] == pytest.approx([0, 27.7533], abs=1e-3)
    assert interval[2] == pytest.approx([72.2467, 100], abs=1e-3)
    assert np.isnan(interval[3]).all()


def test_calibration_counts_confidence_one_and_skips_empty_bins():
    confidence = torch.tensor([1.0, 1.0, 0.9, 0.1])
    bins = reliability_bins(confidence, torch.tensor([True, False, True, False]))
    assert [b.num_images for b in bins] == [1, 1, 2]
    assert calibration_error(bins) == pytest.approx(100 * (0.25 * 0.1 + 0.25 * 0.1 + 0.5 * 0.5))
    assert math.isnan(calibration_error([]))


def test_calibration_of_a_group_is_over_its_images():
    _, dist_logits, labels = logits_and_labels()
    tail = labels >= 7
    whole = score_heads({"TEACHER": dist_logits}, labels, COUNTS)
    part = score_heads({"TEACHER": dist_logits[tail]}, labels[tail], COUNTS)
    assert whole.heads["TEACHER"].ece["threshold"]["tail"] == pytest.approx(
        part.heads["TEACHER"].ece["threshold"]["all"]
    )


def test_bfloat16_logits_of_many_classes_with_fewer_than_five_classes_too():
    labels = torch.tensor([0, 1])
    result = score(torch.eye(2).bfloat16(), torch.eye(2).bfloat16(), labels, [200, 3])
    assert result.accuracy() == 100 and result.heads["AVG"].top5["threshold"]["all"] == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 3])}, r"got 0\.\.3, expected 0\.\.2"),
        ({"cls": torch.zeros(2, 4)}, r"got shape \(2, 4\), expected \(2, 3\)"),
        ({"dist": torch.tensor([[0.0, 1.0, math.nan], [0.0, 0.0, 0.0]])}, "DIST logits: non-finite for 1 of 2 images"),
        (
            {"cls": torch.zeros(0, 3), "dist": torch.zeros(0, 3), "labels": torch.zeros(0)},
            "no images, expected at least one",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"cls": torch.zeros(2, 3), "dist": torch.zeros(2, 3), "labels": torch.tensor([0, 1])} | change
    with pytest.raises(UserError, match=message):
        score(given["cls"], given["dist"], given["labels"], [200, 50, 5])


TEN_CLASSES = {"class_names": None, "class_counts": None, "dataset": "fashion_mnist_lt"}


def save_ten(folder, class_map=None):
    """A student of ten classes with random weights, its class outputs in the order of ``class_map``."""
    torch.manual_seed(0)
    student = create_student(NAME, 10, depth=1)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if class_map is not None:
        for head in (student.head, student.head_dist):
            order = torch.tensor(class_map).argsort()
            head.weight.data, head.bias.data = head.weight[order].clone(), head.bias[order].clone()
    model = {"name": NAME, "num_classes": 10, "img_size": 32, "depth": 1}
    facts = MANIFEST | TEN_CLASSES | {"model": model, "class_map": class_map or list(range(10))}
    save_model_folder(folder, student.state_dict(), facts)
    return folder


def test_the_verb_scores_a_model_folder_and_undoes_its_class_map(tmp_path, capsys):
    class_map = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    fp32 = ["train.precision=fp32", "train.device=cpu", "data.residency=host"]
    plain = evaluate(save_ten(tmp_path / "plain"), fp32, json_path=tmp_path / "scores.json")
    mapped = evaluate(save_ten(tmp_path / "mapped", class_map), fp32)
    assert plain.num_images == 1000 and plain.counts_K[0] == 1000 and plain.counts_K[-1] == 10
    assert mapped.heads["CLS"].correct_K == plain.heads["CLS"].correct_K and len(set(plain.heads["CLS"].correct_K)) > 1
    assert Result.from_json(json.loads((tmp_path / "scores.json").read_text())) == plain
    assert "threshold split" in capsys.readouterr().out


def test_the_verb_names_a_split_or_data_set_that_does_not_fit(tmp_path):
    folder = save_ten(tmp_path / "model")
    with pytest.raises(UserError, match=r"txt: classes differ by name, got 'T-shirt/top', .* and 7 more, not in model"):
        save_student(tmp_path / "four")
        evaluate(tmp_path / "four")
    with pytest.raises(UserError, match=r"\(train, val, test\)\. Use --split test"):
        evaluate(folder, split="holdout")
    with pytest.raises(UserError, match="manifest"):
        evaluate(tmp_path)


def test_classes_are_matched_by_name_and_grouped_by_the_models_own_counts(tmp_path, caplog):
    """A data set with a test split only, which lists three of four classes in another order."""
    save_student(tmp_path / "model", class_names=["ant", "bee", "cow", "dog"])
    for name, shade in (("bee", 80), ("cow", 160), ("dog", 240)):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        for number in range(3):
            colour = (shade, 40 * number, 255 - shade)
            Image.new("RGB", (40, 40), colour).save(tmp_path / "data" / "test" / name / f"{number}.png")
    settings = ["train.precision=fp32", "train.device=cpu", f"data.root={tmp_path / 'data'}"]
    by_folder = evaluate(tmp_path / "model", [*settings, "data.dataset=folder"], csv_path=tmp_path / "classes.csv")
    assert by_folder.counts_K == MANIFEST["class_counts"] and by_folder.support_K == [0, 3, 3, 3]
    assert "no images for 1 of 4 classes ('ant')" in caplog.text
    assert "no test split" not in caplog.text
    flat = [*settings, "data.dataset=folder", f"data.root={tmp_path / 'data' / 'test'}", "data.val_holdout=0"]
    assert evaluate(tmp_path / "model", flat).support_K == [0, 1, 1, 1]
    assert "data test: no test split, scored are 20 % of each class. All images: --split train" in caplog.text
    assert [row["name"] for row in read_csv(tmp_path / "classes.csv")] == ["ant", "bee", "cow", "dog"]
    rows = [f"test/{name}/{number}.png,{name}" for name in ("dog", "bee", "cow") for number in range(3)]
    (tmp_path / "test.csv").write_text("path,label\n" + "\n".join(rows))
    settings += ["data.dataset=list", f"data.test_list={tmp_path / 'test.csv'}"]
    assert evaluate(tmp_path / "model", settings).heads["AVG"].correct_K == by_folder.heads["AVG"].correct_K
    (tmp_path / "test.csv").write_text("path,label\ntest/bee/0.png,wasp\n")
    with pytest.raises(UserError, match=r"got 'wasp', not in model .*; expected 'ant', 'bee', 'cow' and 1 more"):
        evaluate(tmp_path / "model", settings)


def test_class_counts_that_do_not_fit_are_refused(tmp_path):
    save_student(tmp_path / "model", class_counts=[3, 2])
    with pytest.raises(UserError, match="got 2 class counts, expected 4"):
        evaluate(tmp_path / "model")


def test_several_ranks_score_as_one_does_whatever_is_left_over(tmp_path):
    """77 test and 39 validation images on two ranks: one has an image more, and the last batches are smaller."""
    settings = ["train.precision=fp32", "train.device=cpu", "data.residency=host", "evaluate.batch_size=8"]
    settings += [f"{name}={value}" for name, value in embedded_lists(tmp_path, train=9, val=13, test=13).items()]
    model = save_ten(tmp_path / "model")
    paths = {"json_path": tmp_path / "one.json", "csv_path": tmp_path / "one.csv"}
    evaluate(model, settings, **paths, predictions_path=tmp_path / "one-images.csv")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    verb = ["-m", "fastdeitlt.cli", "eval", str(model), *settings, "--json", str(tmp_path / "two.json")]
    verb += ["--csv", str(tmp_path / "two.csv"), "--predictions", str(tmp_path / "two-images.csv")]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([*launch, *verb], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("threshold split") == 1  # one rank prints
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert sum(one["support_K"]) == 77 and one["posthoc"]["num_fitted"] == 39
    assert two["support_K"] == one["support_K"]
    for head, scores in one["heads"].items():
        assert two["heads"][head]["correct_K"] == scores["correct_K"]
        assert two["heads"][head]["nll"]["threshold"]["all"] == pytest.approx(
            scores["nll"]["threshold"]["all"], rel=1e-4
        )
    first, second = (list(csv.reader((tmp_path / f"{name}-images.csv").open())) for name in ("one", "two"))
    texts = [[[row[i] for i in (0, 1, 2, 3, 6, 9)] for row in table] for table in (first, second)]
    assert (
        len(first) == 78 and texts[0] == texts[1]
    )  # paths, labels and answers; probabilities differ in their last bits
    rows = list(csv.reader((tmp_path / "two.csv").open()))
    assert rows == list(csv.reader((tmp_path / "one.csv").open()))
    assert (
        rows[0][:7] == ["class", "name", "training images", "images", "AVG", "AVG low", "AVG high"] and len(rows) == 11
    )


@pytest.mark.parametrize("kind", ["json_path", "csv_path"])
def test_scores_interrupted_while_they_are_written_leave_the_old_file(tmp_path, monkeypatch, kind):
    path, real = tmp_path / "scores", Path.write_text
    path.write_text("old")

    def interrupted(self, text, **named):
        real(self, text[: len(text) // 2], **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    result = score(*logits_and_labels(), COUNTS, "other", torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        images = LongTailSet([], np.zeros(0, np.int64), COUNTS)
        found = evaluation.Evaluation(result, None, images, {}, torch.zeros(0))
        evaluation._write(found, **({"json_path": None, "csv_path": None} | {kind: path}))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
