"""predict: the right class names in the right order, equal to evaluation, and one bad file does not spoil the rest."""

import csv
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded, picture
from PIL import Image
from rich.console import Console
from small_model import CLASS_NAMES, MANIFEST, SIZE, evaluated, read_csv, save_images, save_student, save_teacher

from fastdeitlt.config import DataConfig, build
from fastdeitlt.data.pixels.request import CropRequest
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation import evaluate as evaluation
from fastdeitlt.models.saved import open_saved
from fastdeitlt.store.checkpoint import add_facts
from fastdeitlt.tools import predict as predict_module
from fastdeitlt.tools.pictures import PictureReader
from fastdeitlt.tools.predict import Choice, Prediction, main, predict, table, to_csv


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder / "model", save_student(folder / "model"), save_images(folder / "images")


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_predictions_equal_those_of_evaluation_through_the_training_reader(saved, batch_size):
    folder, student, paths = saved
    cls_logits, dist_logits = evaluated(student, paths)
    probs = ((cls_logits + dist_logits) / 2).softmax(1)
    rows = predict(folder, [paths[0].parent], top_k=4, batch_size=batch_size, device="cpu")
    assert [row.path for row in rows] == [str(path) for path in paths]
    for row, prob, cls, dist in zip(rows, probs, cls_logits, dist_logits, strict=True):
        order = prob.argsort(descending=True).tolist()
        assert [choice.class_id for choice in row.top] == order
        assert [choice.name for choice in row.top] == [CLASS_NAMES[k] for k in order]
        assert [choice.probability for choice in row.top] == pytest.approx(prob[order].tolist(), abs=1e-5)
        assert row.cls.class_id == int(cls.argmax()) and row.dist.class_id == int(dist.argmax())
    assert len({round(row.top[0].probability, 3) for row in rows}) == 5  # images tell apart, so order matters


def test_fitted_temperatures_are_applied_and_told_and_leave_the_order(saved, tmp_path, capsys, monkeypatch):
    paths = saved[2]
    fitted = {"AVG": 2.5, "CLS": 4.0, "DIST": 0.5}
    save_student(tmp_path / "model")
    add_facts(tmp_path / "model", {"calibration": {"temperatures": fitted, "num_fitted": 40}})
    raw, warm = (predict(tmp_path / "model", paths, top_k=4, device="cpu", raw=raw) for raw in (True, False))
    assert raw == predict(saved[0], paths, top_k=4, device="cpu") and raw[0].temperatures is None
    for before, after in zip(raw, warm, strict=True):
        assert [choice.class_id for choice in after.top] == [choice.class_id for choice in before.top]
        logs = torch.tensor([choice.probability for choice in before.top], dtype=torch.float64).log()
        expected = (logs / fitted["AVG"]).softmax(0).tolist()
        assert [choice.probability for choice in after.top] == pytest.approx(expected, abs=1e-5)
        assert after.cls.probability < before.cls.probability and after.dist.probability > before.dist.probability
        assert after.temperatures == fitted
    for options, told, words in (({}, fitted, "AVG 2.50"), ({"raw": True}, None, "uncalibrated probabilities")):
        assert main(tmp_path / "model", paths, top_k=2, out=tmp_path / "rows.json", strict=True, **options) == 0
        assert [row["temperatures"] for row in json.loads((tmp_path / "rows.json").read_text())] == [told] * len(paths)
        assert main(tmp_path / "model", paths, top_k=2, out=tmp_path / "rows.csv", strict=True, **options) == 0
        lines = read_csv(tmp_path / "rows.csv")
        assert {float(line["cls_temperature"]) for line in lines} == {told["CLS"] if told else 1.0}
        monkeypatch.setenv("COLUMNS", "200")
        main(tmp_path / "model", paths, top_k=2, out=None, strict=True, **options)
        assert words in capsys.readouterr().out


def test_temperatures_that_make_no_sense_are_refused(saved, tmp_path):
    for fitted in ({"AVG": 0.0}, {"AVG": "hot"}, {"TEACHER": 1.0}):
        save_student(tmp_path / "model", calibration={"temperatures": fitted, "num_fitted": 40})
        with pytest.raises(UserError, match=r"manifest\.json, calibration\.temperatures"):
            predict(tmp_path / "model", saved[2])


def test_a_class_map_gives_each_class_of_the_model_its_own_name(saved, tmp_path):
    class_map = [2, 0, 3, 1]  # the model's class of each label
    save_student(tmp_path / "model", class_map=class_map)
    mapped = predict(tmp_path / "model", saved[2], device="cpu")
    for row, mapped_row in zip(predict(saved[0], saved[2], device="cpu"), mapped, strict=True):
        label = class_map.index(row.top[0].class_id)
        assert (mapped_row.top[0].class_id, mapped_row.top[0].name) == (label, CLASS_NAMES[label])
        assert (mapped_row.cls.class_id, mapped_row.dist.class_id) == tuple(
            class_map.index(choice.class_id) for choice in (row.cls, row.dist)
        )


def test_unreadable_files_get_a_line_each_and_the_rest_an_answer(saved, tmp_path, capsys):
    folder, _, paths = saved
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes(paths[1].read_bytes()[:-40])
    (tmp_path / "cut.png").write_bytes(paths[0].read_bytes()[:-40])
    inputs = [paths[0], tmp_path, tmp_path / "absent.png", paths[1]]
    rows = predict(folder, inputs, device="cpu", batch_size=2)
    assert [bool(row.error) for row in rows] == [False, True, True, True, True, False]
    assert "No such file" in rows[4].error and "truncated" in rows[1].error and "not an image" in rows[3].error
    assert main(folder, inputs, top_k=2, out=tmp_path / "rows.json", strict=False) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4 and all(line.startswith("fastdeitlt: ") for line in told)
    with pytest.raises(UserError, match=r"cut\.jpg: truncated"):
        predict(folder, inputs, device="cpu", strict=True)


def test_a_file_that_cannot_be_read_is_told_once(saved, tmp_path, capsys):
    folder, _, paths = saved
    absent = tmp_path / "absent.png"
    for inputs, shown in (([absent], 0), ([absent, paths[0]], 1)):
        assert main(folder, inputs, top_k=1, out=None, strict=False) == 2
        told = capsys.readouterr()
        assert told.err == f"fastdeitlt: {absent}: No such file or directory\n"
        assert told.out.count("AVG") == shown and "absent" not in told.out


def test_csv_and_json_hold_the_same_rows(saved, tmp_path):
    folder, _, paths = saved
    bad = tmp_path / "text.png"
    bad.write_text("no image")
    for name in ("rows.csv", "rows.json"):
        assert main(folder, [*paths, bad], top_k=2, out=tmp_path / name, strict=False) == 2
    from_json = json.loads((tmp_path / "rows.json").read_text())
    from_csv = read_csv(tmp_path / "rows.csv")
    assert len(from_csv) == len(from_json) == 6 and from_csv[5]["error"] == from_json[5]["error"] != ""
    for line, row in zip(from_csv[:5], from_json[:5], strict=True):
        assert [line["class1"], line["class2"]] == [choice["name"] for choice in row["top"]]
        assert float(line["probability1"]) == pytest.approx(row["top"][0]["probability"], abs=1e-6)
        assert (line["cls_class"], line["dist_class"]) == (row["cls"]["name"], row["dist"]["name"])


def test_names_can_neither_drive_a_terminal_nor_be_formulas_of_a_spreadsheet(saved, capsys, tmp_path):
    evil = tmp_path / "\x1b[2J\udcff.png"
    evil.write_text("no image")
    main(saved[0], [evil], top_k=1, out=tmp_path / "rows.csv", strict=False)
    assert r"\x1b[2J\udcff.png: " in capsys.readouterr().err
    rows = [Prediction("=1+1.png", [Choice(0, "+1\x1b", -0.5)], Choice(0, "@a", 0.5), Choice(0, "-a", 0.5))]
    (row,) = csv.DictReader(to_csv(rows).splitlines())
    assert list(row.values())[:5] == ["'=1+1.png", r"'+1\x1b", "-0.5", "'@a", "0.5"]
    Console().print(table(rows))
    assert "\x1b" not in capsys.readouterr().out


def test_the_terminal_table_shows_class_names_literally(saved, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(saved[0], saved[2][:1], top_k=4, out=None, strict=False) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in CLASS_NAMES)


def test_bad_requests_are_refused_before_the_model_is_read(saved, tmp_path):
    folder, _, paths = saved
    with pytest.raises(UserError, match="got top_k 0, expected at least 1"):
        predict(folder, paths, top_k=0)
    with pytest.raises(UserError, match="no images in"):
        predict(folder, [tmp_path])
    with pytest.raises(UserError, match=r"expected a \.csv or \.json file"):
        main(folder, paths, top_k=1, out=tmp_path / "rows.txt", strict=False)
    with pytest.raises(UserError, match=r"expected a \.csv or \.json file"):
        main(folder, paths, top_k=1, out=tmp_path / "absent" / "rows.csv", strict=False)
    with pytest.raises(UserError, match="manifest"):
        predict(tmp_path, paths)
    with pytest.raises(UserError, match=r"got a \.png file, expected a run folder such as runs/NAME"):
        predict(next(path for path in paths if path.suffix == ".png"), paths)


def test_class_names_that_do_not_fit_are_named(saved, tmp_path):
    save_student(tmp_path / "model", class_names=["one", "two"])
    with pytest.raises(UserError, match="got 2 class names, expected 4"):
        predict(tmp_path / "model", saved[2])


def test_the_csv_of_nothing_readable_still_has_a_header(saved, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    lines = to_csv(predict(saved[0], [tmp_path / "text.png"], device="cpu")).splitlines()
    assert lines[0].startswith("path,cls_class") and len(lines) == 2


def odd_files(folder):
    """Kinds of file that decoders disagree on; their paths in order."""
    gray16 = Image.fromarray((np.asarray(picture(40, 61).convert("L")).astype(np.uint16)) * 257)
    files = {"gray16.png": encoded(gray16, "PNG"), "gray16.tif": encoded(gray16, "TIFF")}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = orientation, "camera"
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            options = {"lossless": True} if kind == "WEBP" else {}
            image = picture(40, 61, orientation)
            files[f"turned{orientation}.{kind.lower()}"] = encoded(image, kind, exif=exif, **options)
    for mode in ("CMYK", "RGBA", "P", "1"):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        files[f"{mode}.{kind.lower()}"] = encoded(picture(40, 61).convert(mode), kind)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_predict_streaming_and_held_sets_have_the_same_pixels(tmp_path, monkeypatch, exif):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_student(tmp_path / "model", preprocess=MANIFEST["preprocess"] | {"exif": exif})
    paths = odd_files(tmp_path / "images")
    seen, normalise = [], predict_module.Saved.normalise
    monkeypatch.setattr(
        predict_module.Saved, "normalise", lambda self, crops: seen.append(crops) or normalise(self, crops)
    )
    rows = predict(tmp_path / "model", paths, batch_size=7, device="cpu", strict=True)
    crops = torch.cat(seen)
    images = LongTailSet([p.name for p in paths], np.zeros(len(paths), np.int64), [len(paths)], str(paths[0].parent))
    request = CropRequest(np.arange(len(paths)), SIZE, resize=40)
    for residency in ("stream", "host"):
        data = DataConfig(num_threads=2, exif=exif, residency=residency)
        opened = open_source(images, data, torch.device("cpu"))
        assert torch.equal(next(opened.crops([request]))[1], crops)
        opened.close()
    predict(tmp_path / "model", [Image.open(path) for path in paths], batch_size=64, device="cpu", strict=True)
    assert torch.equal(seen[-1], crops), "images in memory obey the same rule"
    chosen = []
    monkeypatch.setattr(evaluation, "open_source", lambda _, cfg, *rest, **how: chosen.append(cfg.exif) or 1 / 0)
    other = build({"data.exif": "ignore" if exif == "apply" else "apply", "train.device": "cpu"})
    with pytest.raises(ZeroDivisionError):
        evaluation._logits(open_saved(tmp_path / "model"), images, other)
    assert chosen == [exif] and len({row.top[0].probability for row in rows}) > 20


def test_one_path_one_image_or_a_list_of_either(saved, tmp_path):
    folder, _, paths = saved
    whole = predict(folder, paths, device="cpu", batch_size=1)
    for one in (str(paths[0]), paths[0]):
        assert predict(folder, one, device="cpu", batch_size=1) == whole[:1]
    image = Image.open(paths[0])
    (row,) = predict(folder, image, device="cpu", batch_size=1)
    assert row.path == "image 0" and row.top == whole[0].top
    mixed = predict(folder, [str(paths[2]), image, paths[1], Image.new("F", (40, 40))], device="cpu", batch_size=1)
    assert [row.path for row in mixed] == [str(paths[2]), "image 1", str(paths[1]), "image 3"]
    assert [row.top for row in mixed[:3]] == [whole[index].top for index in (2, 0, 1)]
    assert mixed[3].error == "mode F, expected 8 or 16 bits per channel"


def test_an_image_given_often_is_loaded_by_one_thread(saved):
    """Two threads that load one file of Pillow's read it in turns: errors, or wrong pixels."""
    with closing(PictureReader("ignore")) as read:
        first, *others = read([Image.open(saved[2][0])] * 40)
    assert isinstance(first, torch.Tensor) and all(pixels is first for pixels in others)


def test_hidden_files_of_a_folder_are_left_out(saved, tmp_path):
    for name in ("a.png", "._a.png", ".cache/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(saved[2][0].read_bytes())
    assert [row.path for row in predict(saved[0], tmp_path, device="cpu")] == [str(tmp_path / "a.png")]


def test_files_of_a_folder_without_an_image_suffix_are_a_warning(saved, tmp_path, caplog):
    for name in ("a.png", "b.heic"):
        (tmp_path / name).write_bytes(saved[2][0].read_bytes())
    assert [row.path for row in predict(saved[0], tmp_path, device="cpu")] == [str(tmp_path / "a.png")]
    assert f"{tmp_path}: 1 file ignored, no image suffix: 'b.heic'" in caplog.text


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_predictions_interrupted_while_they_are_written_leave_the_old_file(saved, tmp_path, monkeypatch, suffix):
    out, real = tmp_path / f"out.{suffix}", Path.write_text
    out.write_text("old")

    def interrupted(self, text, **named):
        real(self, text[: len(text) // 2], **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(saved[0], saved[2], top_k=1, out=out, strict=False)
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_a_teacher_predicts_at_the_scale_it_was_trained_with(saved, tmp_path, capsys, monkeypatch):
    network, paths = save_teacher(tmp_path / "teacher"), saved[2]
    logits, _ = evaluated(evaluation.OneHead(network, 30.0), paths)
    rows = predict(tmp_path / "teacher", paths, top_k=4, device="cpu")
    for row, prob in zip(rows, logits.softmax(1), strict=True):
        assert (row.head, row.cls, row.dist) == ("TEACHER", None, None)
        assert [choice.class_id for choice in row.top] == prob.argsort(descending=True).tolist()
        assert row.top[0].probability == pytest.approx(float(prob.max()), abs=1e-4)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(tmp_path / "teacher", paths, top_k=1, out=None, strict=True) == 0
    shown = capsys.readouterr().out
    assert "TEACHER" in shown and "CLS" not in shown
    assert main(tmp_path / "teacher", paths, top_k=1, out=tmp_path / "rows.csv", strict=True) == 0
    assert all(line["class1"] and not line["cls_class"] for line in read_csv(tmp_path / "rows.csv"))
    with pytest.raises(UserError, match="which has one head"):
        predict(tmp_path / "teacher", paths, device="cpu", head="CLS")


def test_another_head_orders_the_classes(saved):
    folder, _, paths = saved
    average = predict(folder, paths, top_k=4, device="cpu")
    for head, own in (("CLS", "cls"), ("DIST", "dist")):
        rows = predict(folder, paths, top_k=4, device="cpu", head=head)
        assert [row.top[0] for row in rows] == [getattr(row, own) for row in average]
        assert {row.head for row in rows} == {head}
        assert [row.top for row in rows] != [row.top for row in average]
    with pytest.raises(UserError, match="expected one of AVG, CLS, DIST"):
        predict(folder, paths, head="TEACHER")
