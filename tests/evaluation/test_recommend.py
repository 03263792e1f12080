"""The recommendation: the best of teacher, AVG, CLS and DIST, with an interval that few images widen."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from fastdeitlt import cli
from fastdeitlt.config import build, dump
from fastdeitlt.evaluation.metrics import score, score_heads
from fastdeitlt.evaluation.recommend import Recommendation, Scored, balanced_interval, recommend
from fastdeitlt.models import create_teacher
from fastdeitlt.reporting.recommended import command, recommendation_section, recommended_lines
from fastdeitlt.reporting.report import write_report
from fastdeitlt.run.run_files import read_run
from fastdeitlt.store.checkpoint import save_model_folder
from fastdeitlt.teachers.opening import ORDER_FILE

LABELS = torch.arange(4).repeat_interleave(10)
COUNTS = [100, 50, 20, 5]


def logits(num_right):
    """Logits [40, 4] that are right on the first ``num_right`` images of each class."""
    right_N = torch.arange(40) % 10 < num_right
    decided_N = torch.where(right_N, LABELS, (LABELS + 1) % 4)
    return torch.nn.functional.one_hot(decided_N, 4).float() * 3


def results(cls, dist, teacher):
    student = score(logits(cls), logits(dist), LABELS, COUNTS)
    return student, score_heads({"TEACHER": logits(teacher)}, LABELS, COUNTS)


@pytest.mark.parametrize(
    ("cls", "dist", "teacher", "best"), [(9, 5, 3, "CLS"), (3, 8, 7, "DIST"), (2, 3, 9, "TEACHER"), (6, 6, 6, "AVG")]
)
def test_the_best_balanced_accuracy_is_recommended(cls, dist, teacher, best):
    found = recommend(*results(cls, dist, teacher))
    assert found.best.name == best and found.best.accuracy == pytest.approx(10 * max(cls, dist, teacher))
    assert [s.accuracy for s in found.scored] == sorted((s.accuracy for s in found.scored), reverse=True)
    assert found.best.low < found.best.accuracy <= found.best.high
    assert Recommendation.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_the_rank_is_by_class_and_not_by_image():
    """One is right on all of the large class, the other on half of every class."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    head = torch.nn.functional.one_hot(torch.zeros(100, dtype=torch.long), 2).float()
    half = torch.nn.functional.one_hot(torch.where(torch.arange(100) % 10 < 6, labels, 1 - labels), 2).float()
    found = recommend(score(head, head, labels, [90, 10]), score_heads({"TEACHER": half}, labels, [90, 10]))
    assert found.best.name == "TEACHER" and found.best.accuracy == pytest.approx(60)


def test_others_within_the_interval_are_named():
    close = recommend(*results(2, 3, 9))
    assert close.alike == ()
    assert "Not distinguishable" not in close.sentence() and "use TEACHER: balanced accuracy 90.0 %" in close.sentence()
    near = recommend(*results(7, 8, 8))
    assert "TEACHER" in near.alike and "Not distinguishable on these images: " in near.sentence()
    assert recommend(None, None) is None


def test_the_worse_ones_interval_counts_too():
    """One of two images right is no proof against none."""
    few = Recommendation((Scored("TEACHER", 50.0, 10.3, 89.7), Scored("AVG", 0.0, 0.0, 56.0)), 2)
    assert few.alike == ("AVG",)


def test_the_interval_covers_and_does_not_vanish_where_every_image_is_right():
    low, high = balanced_interval([1, 1, 1, 1], [1, 1, 1, 1])
    assert low < 70 and high == 100  # a bootstrap would say 100 to 100
    narrow = balanced_interval([50] * 10, [100] * 10)
    wide = balanced_interval([5] * 10, [10] * 10)
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    assert balanced_interval([5, 0], [10, 0]) == balanced_interval([5], [10])
    generator, truth, support = np.random.default_rng(0), np.array([0.95, 0.7, 0.4, 0.9]), np.array([20, 20, 5, 3])
    drawn = [balanced_interval(generator.binomial(support, truth).tolist(), support.tolist()) for _ in range(500)]
    covered = np.mean([low <= 100 * truth.mean() <= high for low, high in drawn])
    assert 0.93 <= covered <= 1.0


def run_folder(tmp_path, found):
    student, teacher = results(2, 3, 9)
    folder = tmp_path / "runs" / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    cfg = build({"name": "mine", "teacher.path": "runs/my teacher/checkpoints/best"})
    (folder / "config.yaml").write_text(dump(cfg))
    tree = {"test": student.to_json(), "teacher": teacher.to_json(), "recommendation": found and found.to_json()}
    (folder / "results.json").write_text(json.dumps(tree))
    return folder


def test_the_report_and_the_log_say_what_to_use_and_how(tmp_path):
    folder = run_folder(tmp_path, recommend(*results(2, 3, 9)))
    run = read_run(folder)
    lines = recommended_lines(run)
    assert lines[0].startswith("use TEACHER")
    assert lines[1] == "fastdeitlt predict 'runs/my teacher/checkpoints/best' IMAGES"
    assert command(run, "DIST").endswith("mine IMAGES --head DIST") and command(run, "AVG").endswith("mine IMAGES")
    page = write_report(folder).read_text()
    assert page.index("Recommendation") < page.index("Top-1 accuracy in per cent")
    assert "MOVER" in page and "runs/my teacher/checkpoints/best" in page


def test_the_command_for_a_released_teacher_works(tmp_path, capsys):
    folder, released = run_folder(tmp_path, recommend(*results(2, 3, 9))), tmp_path / "a teacher.pth.tar"
    network = create_teacher("resnet8", 4)
    with torch.no_grad():
        network.linear.bias.copy_(torch.tensor([0.0, 0, 1e4, 0]))
    torch.save({"state_dict": network.state_dict()}, released)
    cfg = build({"name": "mine", "teacher.path": str(released), "teacher.arch": "resnet8", "augment.mean": [0.2] * 3})
    (folder / "config.yaml").write_text(dump(cfg))
    (folder / ORDER_FILE).write_text(json.dumps({"class_map": [1, 2, 3, 0]}))  # the teacher's class 2 is label 3
    facts = {"kind": "student", "model": {"num_classes": 4}, "class_names": ["ant", "bee", "cat", "dog"]}
    save_model_folder(folder / "checkpoints/best", {"weight": torch.zeros(1)}, facts)
    python, flag, code, then, *arguments = shlex.split(command(read_run(folder), "TEACHER"))
    assert (python, flag, then, arguments[:2]) == ("python", "-c", "&&", ["fastdeitlt", "predict"])
    exec(code, {})  # noqa: S102
    Image.new("RGB", (40, 40), "gray").save(tmp_path / "x.png")
    assert cli.main([*arguments[1:-1], str(tmp_path / "x.png"), "--top-k", "1"]) == 0
    shown = capsys.readouterr().out
    assert "dog" in shown and "cat" not in shown
    stated = json.loads((folder / "teacher/manifest.json").read_text())["preprocess"]
    assert (stated["mean"], stated["crop_pct"]) == ([0.2] * 3, cfg.evaluate.crop_pct)


def test_without_validation_images_nothing_is_recommended(tmp_path):
    run = read_run(run_folder(tmp_path, None))
    assert recommended_lines(run) == [] and recommendation_section(run).blocks == []
    assert "Recommendation" not in write_report(run.folder).read_text()
