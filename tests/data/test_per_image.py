"""What a test leaves image by image, and `eval --predictions`."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import CLASS_NAMES, read_csv, save_images, save_student
from tiny_run import tiny_run

from fastdeitlt import cli
from fastdeitlt.config import Config, DataConfig
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation import per_image
from fastdeitlt.evaluation.evaluate import evaluate
from fastdeitlt.evaluation.metrics import LEFT_OUT
from fastdeitlt.evaluation.per_image import NUM_MISTAKES, PICTURE_SIDE, confusion, decisions, image_facts, picture
from fastdeitlt.reporting.report import write_report
from fastdeitlt.run.run_files import read_run
from fastdeitlt.store.manifest import preprocess_of
from fastdeitlt.tools.predict import predict
from fastdeitlt.train import train

PREPROCESS = preprocess_of(Config(evaluate={"crop_pct": 0.8}), 32)
"""The central 32 of 40 pixels."""


def decided(*classes, num_classes=4, strength=5.0):
    """Logits of images that are decided as ``classes``, the later the surer."""
    strength_N1 = strength + torch.arange(len(classes))[:, None]
    return strength_N1 * torch.nn.functional.one_hot(torch.tensor(classes), num_classes)


def coloured(number=30, side=40):
    """A set of images that come decoded, each of its own colour."""
    colours_N3 = np.random.default_rng(0).integers(0, 256, (number, 3), dtype=np.uint8)
    images_NHWC = np.broadcast_to(colours_N3[:, None, None], (number, side, side, 3)).copy()
    labels_N = np.arange(number) % 4
    return LongTailSet(
        [f"{i}.png" for i in range(number)], labels_N, np.bincount(labels_N).tolist(), images_NHWC=images_NHWC
    )


def test_decisions_are_softmax_at_a_temperature_whatever_the_chunks(monkeypatch):
    logits_NK = 4 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    expected = (logits_NK.double() / 2.5).softmax(1).max(1)
    for chunk in (2**18, 7, 20):
        monkeypatch.setattr(per_image, "CHUNK", chunk)
        predicted_N, probability_N = decisions(logits_NK, 2.5)
        assert torch.equal(predicted_N, expected.indices)
        assert torch.allclose(probability_N, expected.values, atol=1e-12)


def test_confusion_counts_every_pair_for_every_head_without_unreadable_images():
    labels_N = torch.tensor([0, 0, 0, 1, 3, LEFT_OUT])
    heads = {"AVG": decided(0, 0, 2, 1, 3, 3), "CLS": decided(0, 1, 2, 1, 3, 3)}
    assert confusion(heads, labels_N) == [[0, 0, 2, 1], [0, 1, 0, 1], [0, 2, 1, 1], [1, 1, 1, 1], [3, 3, 1, 1]]


def test_the_most_confident_mistakes_come_first_with_the_pixels_that_were_scored():
    images = coloured()
    labels_N = torch.as_tensor(images.labels)
    wrong_N = torch.arange(30) % 2 == 1
    answers_N = torch.where(wrong_N, (labels_N + 1) % 4, labels_N)
    labels_N[29] = LEFT_OUT  # the surest of them
    logits_NK = decided(*answers_N.tolist(), strength=1.0) / 8
    source = open_source(images, DataConfig(), torch.device("cpu"), scored=True)
    facts = image_facts(
        {"AVG": logits_NK, "CLS": logits_NK},
        labels_N,
        images,
        source,
        PREPROCESS,
        {"AVG": 2.0, "CLS": 9.0},
    )
    chosen = list(range(27, 27 - 2 * NUM_MISTAKES, -2))
    assert [item["path"] for item in facts["mistakes"]] == [f"{i}.png" for i in chosen]
    assert facts["temperature"] == 2.0 and facts["heads"] == ["AVG", "CLS"]
    for item, index in zip(facts["mistakes"], chosen, strict=True):
        assert (item["label"], item["predicted"]) == (index % 4, (index + 1) % 4)
        assert item["probability"] == pytest.approx(float((logits_NK[index] / 2).softmax(0).max()))
        shown = Image.open(io.BytesIO(base64.b64decode(item["picture"].partition(",")[2])))
        assert shown.format == "PNG" and np.array_equal(np.asarray(shown), images.images_NHWC[index, 4:36, 4:36])
    json.dumps(facts)


def test_a_model_without_mistakes_has_no_pictures_and_few_mistakes_are_all_shown():
    images = coloured(5)
    right_NK = decided(*images.labels.tolist())
    source = open_source(images, DataConfig(), torch.device("cpu"))
    assert image_facts({"AVG": right_NK}, torch.as_tensor(images.labels), images, source, PREPROCESS)["mistakes"] == []
    one_NK = decided(0, 1, 2, 0, 0)
    facts = image_facts({"AVG": one_NK}, torch.as_tensor(images.labels), images, source, PREPROCESS)
    assert [item["path"] for item in facts["mistakes"]] == ["3.png"]


@pytest.mark.parametrize(
    ("side", "kind", "shown"), [(32, "PNG", 32), (64, "PNG", 64), (65, "JPEG", 65), (224, "JPEG", PICTURE_SIDE)]
)
def test_pictures_are_small(side, kind, shown):
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    address = picture(Image.fromarray(noise))
    image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert address.startswith(f"data:image/{kind.lower()};base64,")
    assert (image.format, image.size) == (kind, (shown, shown)) and len(address) < 40_000


@pytest.fixture
def set_of_files(tmp_path):
    """Four classes of images with names that a spreadsheet would compute; settings to score them."""
    rows = []
    for label, name in enumerate(("=1+1", "b", "c", "d")):
        rows += [f"{p.relative_to(tmp_path)},{label}" for p in save_images(tmp_path / "images" / name)]
    (tmp_path / "images" / "=1+1" / "0.png").rename(tmp_path / "=0.png")
    rows[0] = "=0.png,0"
    (tmp_path / "test.csv").write_text("path,label\n" + "\n".join(rows))
    settings = ["train.precision=fp32", "train.device=cpu", "data.dataset=list", f"data.root={tmp_path}"]
    return [*settings, f"data.test_list={tmp_path / 'test.csv'}"]


def test_predictions_are_those_of_predict_for_every_image_and_head(tmp_path, set_of_files):
    calibration = {"temperatures": {"AVG": 2.0, "CLS": 1.5, "DIST": 0.5}, "num_fitted": 9}
    save_student(tmp_path / "model", calibration=calibration)
    out = tmp_path / "out.csv"
    assert cli.main(["eval", str(tmp_path / "model"), *set_of_files, "--predictions", str(out)]) == 0
    rows = read_csv(out)
    listed = [line.split(",") for line in (tmp_path / "test.csv").read_text().splitlines()[1:]]
    assert [(row["path"].lstrip("'"), row["label"]) for row in rows] == [(path, label) for path, label in listed]
    assert rows[0]["path"] == "'=0.png"
    expected = predict(tmp_path / "model", [tmp_path / path for path, _ in listed], top_k=1)
    for row, answer in zip(rows, expected, strict=True):
        for head, choice in (("avg", answer.top[0]), ("cls", answer.cls), ("dist", answer.dist)):
            assert (int(row[f"{head}_label"]), row[f"{head}_class"]) == (choice.class_id, CLASS_NAMES[choice.class_id])
            assert float(row[f"{head}_probability"]) == pytest.approx(choice.probability, abs=2e-4)
    assert len({row[f"{head}_label"] for row in rows for head in ("avg", "cls", "dist")}) > 1
    assert {row["error"] for row in rows} == {""}
    assert [row["class"] for row in rows[::5]] == CLASS_NAMES


def test_class_names_are_no_formulas(tmp_path, set_of_files):
    save_student(tmp_path / "model", class_names=["=cmd()", "b", "c", "d"])
    evaluate(tmp_path / "model", set_of_files, predictions_path=tmp_path / "out.csv")
    assert read_csv(tmp_path / "out.csv")[0]["class"] == "'=cmd()"
    assert not any(value.startswith("=") for row in read_csv(tmp_path / "out.csv") for value in row.values())


def test_an_image_that_cannot_be_read_has_an_empty_row(tmp_path, set_of_files):
    save_student(tmp_path / "model")
    (tmp_path / "images" / "b" / "0.png").write_bytes(b"no image")
    result = evaluate(tmp_path / "model", [*set_of_files, "data.on_error=skip"], predictions_path=tmp_path / "out.csv")
    (bad,) = [row for row in read_csv(tmp_path / "out.csv") if row["error"]]
    assert (bad["path"], bad["label"], bad["avg_label"], bad["dist_probability"]) == ("images/b/0.png", "1", "", "")
    assert result.left_out == 1 and len(read_csv(tmp_path / "out.csv")) == 20


def test_predictions_replace_a_file_whole_or_not_at_all(tmp_path, set_of_files, monkeypatch):
    save_student(tmp_path / "model")
    out = tmp_path / "out.csv"
    out.write_text("before")
    with pytest.raises(UserError, match=r"expected a \.csv file"):
        evaluate(tmp_path / "model", set_of_files, predictions_path=tmp_path / "out.json")
    with pytest.raises(UserError, match="no such folder"):
        evaluate(tmp_path / "model", set_of_files, predictions_path=tmp_path / "absent" / "out.csv")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("fastdeitlt.store.files.flush", fail)
    with pytest.raises(OSError, match="disk full"):
        evaluate(tmp_path / "model", set_of_files, predictions_path=out)
    assert out.read_text() == "before" and [p.name for p in tmp_path.glob("*out*")] == ["out.csv"]


def test_a_run_leaves_what_its_report_shows_of_single_images(tmp_path):
    run = train(tiny_run(tmp_path))
    facts = json.loads((run / "analysis" / "images.json").read_text())
    result = read_run(run).tested
    assert facts["heads"] == ["AVG", "CLS", "DIST"] and 0 < len(facts["mistakes"]) <= NUM_MISTAKES
    matrix_KK = np.zeros((10, 10), int)
    for label, predicted, *numbers in facts["confusion"]:
        matrix_KK[label, predicted] = numbers[0]
    assert matrix_KK.sum(1).tolist() == result.support_K
    assert matrix_KK.diagonal().tolist() == result.heads["AVG"].correct_K
    rows = read_csv(run / "report-confusion.csv")
    assert sum(int(row["AVG"]) for row in rows) == result.num_images
    manifest = json.loads((run / "checkpoints" / "best" / "manifest.json").read_text())
    assert facts["temperature"] == manifest["calibration"]["temperatures"]["AVG"]
    shutil.rmtree(run / "checkpoints")
    (run / "report.html").unlink()
    write_report(run)  # needs no model
    assert "Most confident errors" in (run / "report.html").read_text()
