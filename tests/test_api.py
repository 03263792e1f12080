"""The Python API: the pixels and logits of predict and eval, whatever an image comes as, and runs from Python."""

import shutil
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
import torch
from image_files import class_folders
from PIL import Image
from small_model import CLASS_NAMES, SIZE, evaluated, listed, save_images, save_student
from tiny_run import tiny_run

import fastdeitlt
from fastdeitlt import config
from fastdeitlt.config import DataConfig
from fastdeitlt.data.augment.transform import normalise
from fastdeitlt.data.pixels.reader import Stream
from fastdeitlt.data.pixels.request import CropRequest
from fastdeitlt.data.sets.fingerprint import fingerprint
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation.evaluate import evaluate as evaluate_verb
from fastdeitlt.models import create_teacher
from fastdeitlt.store.checkpoint import add_facts, save_model_folder
from fastdeitlt.tools.predict import predict

MEAN, STD, CPU = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_student(folder / "model")
    return folder / "model", save_images(folder / "images")


@pytest.fixture
def model(saved):
    opened = fastdeitlt.load(saved[0], device="cpu")
    yield opened
    opened.close()


def test_importing_the_package_imports_nothing_else():
    code = "import sys\nbefore = set(sys.modules)\nimport fastdeitlt\nprint(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fastdeitlt"]


def test_the_package_offers_the_api_and_nothing_it_lacks():
    assert set(fastdeitlt.__all__) <= set(dir(fastdeitlt))
    assert all(callable(getattr(fastdeitlt, name)) for name in fastdeitlt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = fastdeitlt.lod


def test_a_transformed_image_has_the_pixels_of_evaluation_bit_for_bit(model, saved):
    with closing(Stream(listed(saved[1]), DataConfig(num_threads=1), CPU)) as source:
        ((_, crops),) = source.crops([CropRequest(np.arange(len(saved[1])), size=SIZE, resize=40)])
    expected = normalise(crops, MEAN, STD)
    for path, image_CHW in zip(saved[1], expected, strict=True):
        assert torch.equal(model.transform(path), image_CHW)


def test_answers_have_the_logits_of_evaluation_and_the_probabilities_of_predict(model, saved):
    cls_logits, dist_logits = evaluated(model.module, saved[1], batch_size=64)
    answers, rows = model.predict(saved[1]), predict(saved[0], saved[1], device="cpu")
    assert torch.equal(torch.stack([a.cls_logits_K for a in answers]), cls_logits)
    assert torch.equal(torch.stack([a.dist_logits_K for a in answers]), dist_logits)
    assert [(a.label, a.name, a.probability) for a in answers] == [
        (r.top[0].class_id, r.top[0].name, r.top[0].probability) for r in rows
    ]
    assert len({a.probability for a in answers}) == 5  # so that their order matters


def test_an_image_is_the_same_as_path_pillow_image_or_array(model, saved):
    path = saved[1][0]
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
        forms = (str(path), path, image.copy(), pixels, torch.from_numpy(pixels.copy()))
        expected = model.predict(path)
        for form in forms:
            assert torch.equal(model.predict(form).logits_K, expected.logits_K)
            assert torch.equal(model.predict([form])[0].logits_K, expected.logits_K)
    both = model.predict(np.stack([pixels, pixels[::-1]]))
    assert len(both) == 2 and torch.equal(both[0].logits_K, model.predict([pixels, pixels[::-1]])[0].logits_K)
    gray = model.predict(pixels[:, :, 0])
    assert torch.equal(gray.logits_K, model.predict(pixels[:, :, :1].repeat(3, 2)).logits_K)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("/nowhere.png", "/nowhere.png: "),
        (np.zeros((3, 4, 5), np.uint8), r"array of uint8 with shape \(3, 4, 5\), expected uint8 \[height, width\]"),
        (np.zeros((4, 4, 3), np.float32), "image 0: array of float32"),
        (np.zeros((0, 4, 3), np.uint8), "expected at least one pixel"),
        (torch.zeros(4, 4, 3, requires_grad=True), "image 0: array of float32"),
        (None, "image 0: got NoneType, expected a path, a Pillow image or a uint8 array"),  # of cv2.imread
        ([None], "image 0: got NoneType"),
        (b"\xff\xd8", "image 0: got bytes"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(model, image, message):
    with pytest.raises(UserError, match=message):
        model.predict(image)


def test_an_array_that_is_no_image_is_named_by_its_place_in_the_call(model):
    images = [np.zeros((4, 4, 3), np.uint8)] * 5
    images[3] = images[4] = np.zeros((4, 4, 7), np.uint8)
    for batch_size, words in ((64, "image 3: array .*; image 4: array"), (2, "image 3: array")):
        with pytest.raises(UserError, match=words):
            model.predict(images, batch_size=batch_size)


def test_labels_and_names_follow_the_class_map_and_temperatures_the_manifest(tmp_path, saved):
    save_student(tmp_path / "m", class_map=[2, 0, 1, 3])
    add_facts(tmp_path / "m", {"calibration": {"temperatures": {"AVG": 3.0}, "num_fitted": 9}})
    model, plain = fastdeitlt.load(tmp_path / "m", device="cpu"), fastdeitlt.load(saved[0], device="cpu")
    assert model.classes == CLASS_NAMES
    answer, same = model.predict(saved[1][1]), plain.predict(saved[1][1])
    assert torch.equal(answer.logits_K, same.logits_K[[2, 0, 1, 3]])
    assert answer.probability == pytest.approx(float((answer.logits_K / 3).softmax(0).max()))
    assert model.predict(saved[1][1], raw=True).probability == pytest.approx(same.probability)
    model.close(), plain.close()


def test_a_teacher_answers_with_its_own_logits(tmp_path, saved):
    torch.manual_seed(1)
    network = create_teacher("resnet8", 3, "fastdeitlt").eval()
    facts = {"mean": MEAN, "std": STD, "img_size": 24, "crop_pct": 1.0}
    manifest = {"kind": "teacher", "model": {"arch": "resnet8", "num_classes": 3, "img_size": 24}, "preprocess": facts}
    folder = save_model_folder(tmp_path / "t", network.state_dict(), manifest)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "t.pth")
    model = fastdeitlt.load(folder, device="cpu")
    answer = model.predict(saved[1][0])
    with torch.no_grad():
        expected = network(model.transform(saved[1][0])[None])[0]
    torch.testing.assert_close(answer.logits_K, expected)
    assert (model.kind, model.img_size, answer.cls_logits_K, answer.dist_logits_K) == ("teacher", 24, None, None)
    released = fastdeitlt.load(tmp_path / "t.pth", device="cpu", arch="resnet8", num_classes=3, img_size=24)
    with torch.no_grad():
        expected = network(released.transform(saved[1][0])[None])[0]
    torch.testing.assert_close(released.predict(saved[1][0]).logits_K, expected)
    model.close(), released.close()
    for path, options, message in (
        (folder, {"arch": "resnet8", "num_classes": 3}, "arch: got 'resnet8' for folder .*, which states its own"),
        (tmp_path / "t.pth", {"arch": "resnet8"}, "num_classes: got 0, expected the number of classes of .*t.pth"),
        (folder, {"device": "cuda:1"}, "device: got 'cuda:1', expected auto, cpu, cuda"),
    ):
        with pytest.raises(UserError, match=message):
            fastdeitlt.load(path, **options)


def test_fit_trains_evaluate_scores_and_the_run_tells(tmp_path):
    cfg = tiny_run(tmp_path)
    short = {"train": {"epochs": 1}, "loss": {"drw_epoch": -1}}
    run = fastdeitlt.fit(cfg, name="fitted", **{"optim.warmup_epochs": 0}, **short)
    assert run.folder == tmp_path / "fitted" and run.report.exists()
    assert (run.config.train.epochs, run.config.optim.warmup_epochs) == (1, 0)
    result = fastdeitlt.evaluate(run.model)
    assert result.to_json() == run.result.to_json() == evaluate_verb(run.folder).to_json()
    elsewhere = fastdeitlt.evaluate(run.folder, run.config, "val", **{"evaluate.batch_size": 3})
    assert sum(elsewhere.support_K) == len((tmp_path / "val.txt").read_text().splitlines())
    assert fastdeitlt.fit(cfg, name="fitted", **{"optim.warmup_epochs": 0}, **short).folder == run.folder  # finished


def test_fit_teacher_gives_the_folder_that_a_student_takes(tmp_path):
    cfg = tiny_run(tmp_path)
    settings = {"arch": "resnet8", "img_size": 28, "epochs": 1, "drw_epoch": -1, "batch_size": 16, "lr_steps": []}
    run = fastdeitlt.fit_teacher(cfg, name="t", teacher_training=settings)
    assert run.model.kind == "teacher" and run.result.accuracy("TEACHER") >= 0
    assert run.model.classes == fastdeitlt.load(run.folder).classes


def test_fit_passes_settings_of_the_teachers_training_to_the_teacher(monkeypatch):
    calls = []
    monkeypatch.setattr("fastdeitlt.tools.demo.train_both", lambda *pair: calls.extend(pair[:2]) or "runs/a")
    fastdeitlt.fit("quickstart", with_teacher="teacher/quickstart", teacher_training={"lr": 0.5}, name="a")
    student, teacher = calls
    assert (student.name, student.teacher_training.lr, teacher.teacher_training.lr) == ("a", 0.1, 0.5)


def test_data_of_a_model_without_a_run_must_be_given(saved, tmp_path):
    names = ["cat", "dog", "eel", "fish"]
    save_student(tmp_path / "model", class_names=names)
    model = fastdeitlt.load(tmp_path / "model", device="cpu")
    with pytest.raises(UserError, match=r"data: .* is not in a run folder, expected"):
        fastdeitlt.evaluate(model)
    for split in ("train", "test"):
        for number, path in enumerate(saved[1]):
            target = tmp_path / "images" / split / names[number % 4] / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    result = fastdeitlt.evaluate(model, tmp_path / "images")
    decided = [answer.label for answer in model.predict(saved[1])]
    right = sum(label == number % 4 for number, label in enumerate(decided))
    assert result.support_K == [2, 1, 1, 1] and result.accuracy("AVG") == pytest.approx(100 * right / 5)
    model.close()
    shutil.rmtree(tmp_path / "images" / "test")
    with pytest.raises(UserError, match=r"split: got 'test', expected a split of images \(train\)"):
        fastdeitlt.evaluate(model, tmp_path / "images")


def test_all_images_of_another_flat_folder_and_the_held_out_ones_of_its_own(tmp_path, caplog, monkeypatch):
    """After a training image was removed, the images held out today may be others: a warning."""
    names = ["cat", "dog", "eel", "fish"]
    class_folders(tmp_path / "images", dict.fromkeys(names, 10))
    cfg = config.build({"data.dataset": "folder", "data.root": str(tmp_path / "images"), "train.device": "cpu"})
    train = open_sets(cfg.data).train
    facts = {"class_names": names, "class_counts": train.counts, "dataset": "images", "data_sha256": fingerprint(train)}
    save_student(tmp_path / "alone", **facts)
    assert fastdeitlt.evaluate(tmp_path / "alone", tmp_path / "images").support_K == [10] * 4
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fastdeitlt.evaluate("~/alone", "~/images").support_K == [10] * 4
    run = tmp_path / "run"
    save_student(run / "checkpoints" / "best", **facts)
    (run / "config.yaml").write_text(config.dump(cfg))
    (run / "results.json").write_text("{}")
    shutil.copytree(tmp_path / "images", tmp_path / "moved")
    for place in ("images", "moved"):
        assert fastdeitlt.evaluate(run / "checkpoints" / "best", tmp_path / place).support_K == [2] * 4
    (tmp_path / "moved" / "dog" / "0.png").unlink()
    assert sum(fastdeitlt.evaluate(run / "checkpoints" / "best", tmp_path / "moved").support_K) == 39
    assert "trained on other images" not in caplog.text
    (tmp_path / "images" / "cat" / "0.png").unlink()
    assert fastdeitlt.evaluate(run / "checkpoints" / "best").support_K == [2] * 4
    assert "model: trained on other images than today's training split" in caplog.text


def test_settings_are_checked_as_on_the_command_line(monkeypatch):
    for name in ("train.train", "train_teacher.train_teacher", "tools.demo.train_both"):
        monkeypatch.setattr(f"fastdeitlt.{name}", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"unknown config name 'train\.epoch'; did you mean train\.epochs"):
        fastdeitlt.fit("quickstart", train={"epoch": 3})
    with pytest.raises(UserError, match=r"teacher_training\.epochs: no effect on a student, expected with"):
        fastdeitlt.fit("quickstart", teacher_training={"epochs": 1})
    with pytest.raises(UserError, match=r"teacher\.path: got 'runs/a' with --with-teacher"):
        fastdeitlt.fit("quickstart", with_teacher="teacher/quickstart", teacher={"path": "runs/a"})
    with pytest.raises(UserError, match=r"optim\.lr: no effect on a teacher\. Use teacher_training\.lr\."):
        fastdeitlt.fit_teacher("teacher/quickstart", optim={"lr": 0.5})
    assert config.load(config.Config(), {"name": "a", "train": {"epochs": 2}}).origins["train.epochs"] == "override"
