"""Exports: other programs read them, give the same logits, and know the classes and how to prepare images."""

import json
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from image_files import picture
from PIL import Image
from safetensors.torch import load_file, save_file
from small_model import CLASS_NAMES, MANIFEST, NAME, SIZE, save_images, save_student, save_teacher

import fastdeitlt.tools.export
from fastdeitlt.cli import main
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation.metrics import score, score_heads
from fastdeitlt.models import create_student
from fastdeitlt.models.saved import open_saved
from fastdeitlt.store.checkpoint import add_facts
from fastdeitlt.tools.export import FACTS, export, facts, timm_architecture
from fastdeitlt.tools.predict import predict


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder / "model", save_student(folder / "model", class_map=[2, 0, 3, 1]), folder


@pytest.fixture(scope="module")
def timm_folder(saved):
    return export(saved[0], saved[2] / "timm", "timm")


def images(batch_size):
    return torch.randn(batch_size, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch_size))


def test_an_export_is_not_taken_for_a_run(timm_folder, tmp_path, capsys):
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "image.png")
    for path in (timm_folder, tmp_path / "model.onnx"):
        for verb in (["eval", str(path)], ["predict", str(path), str(tmp_path / "image.png")]):
            assert main(verb) == 2
            assert "Use the run it was exported from" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["timm", "onnx", "pt2"])
def test_a_full_disk_is_noticed_before_anything_is_written(saved, tmp_path, monkeypatch, format):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match=r"1 MiB free, .* MiB. Free space"):
        export(saved[0], tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def test_all_files_of_a_timm_folder_may_be_read_by_the_same_people(timm_folder):
    assert len({file.stat().st_mode for file in timm_folder.iterdir()}) == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_timm_loads_the_folder_and_gives_bit_equal_logits(saved, timm_folder, batch_size):
    student = saved[1]
    loaded = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    assert student.last_block_shortcut
    with torch.no_grad():
        assert torch.equal(loaded(images(batch_size)), student(images(batch_size)))


def test_another_attention_of_timm_is_rounding_and_no_reason_to_refuse(saved, tmp_path):
    timm.layers.set_fused_attn(False)  # as TIMM_FUSED_ATTN=0
    try:
        folder = export(saved[0], tmp_path / "timm", "timm")
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    finally:
        timm.layers.set_fused_attn(True)
    with torch.no_grad():
        got, expected = loaded(images(3)), saved[1](images(3))
    assert not loaded.blocks[0].attn.fused_attn and torch.allclose(got, expected, atol=1e-4)


def test_timm_prepares_images_as_predict_does_and_names_the_same_class(saved, timm_folder, tmp_path):
    from PIL import Image

    loaded = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded), is_training=False)
    config = json.loads((timm_folder / "config.json").read_text())
    names = config["label_names"]
    assert config["class_map"] == [2, 0, 3, 1]
    for path in save_images(tmp_path / "images", [(40, 40), (57, 33), (200, 150)]):
        row = predict(saved[0], [path], top_k=4, device="cpu")[0]
        with torch.no_grad():
            probs = loaded(transform(Image.open(path).convert("RGB"))[None]).softmax(1)[0]
        assert [names[k] for k in probs.argsort(descending=True)] == [choice.name for choice in row.top]
        assert probs.max().item() == pytest.approx(row.top[0].probability, abs=1e-4)


@pytest.mark.parametrize(("exif", "words"), [("ignore", "was ignored in training"), ("apply", "exif_transpose(image)")])
def test_exports_state_what_is_done_with_orientations(tmp_path, exif, words):
    save_student(tmp_path / "model", preprocess=MANIFEST["preprocess"] | {"exif": exif})
    folder = export(tmp_path / "model", tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["exif"] == exif
    assert words in (folder / "README.md").read_text()
    assert facts(open_saved(tmp_path / "model"))["exif"] == exif


def test_the_model_card_tells_data_results_and_what_is_not_known(tmp_path):
    run = tmp_path / "run"
    save_student(run / "checkpoints" / "best", selected={"step": 9})
    save_student(run / "checkpoints" / "before-drw", best={"step": 5, "epoch": 0, "weights": "model"})
    (run / "config.yaml").write_text("name: run\n")
    labels = torch.tensor([0, 1, 2, 3])
    result = score(torch.eye(4), torch.eye(4), labels, [500, 60, 30, 4])
    (run / "results.json").write_text(json.dumps({"test": result.to_json()}))
    card = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "594 images of 4 classes, 500 in the largest and 4 in the smallest (imbalance 125)" in card
    assert "| threshold split | AVG | 100.0 | 100.0 | 100.0 | 100.0 |" in card
    assert "Not stated. State the licence of these weights" in card and f"(`{NAME}`; in timm " in card
    assert not {"license", "tag"} & json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"].keys()
    card = (export(run / "checkpoints" / "before-drw", tmp_path / "out3") / "README.md").read_text()
    assert "the model was not tested" in card and "100.0" not in card  # the scores are those of best
    alone = tmp_path / "alone"
    save_student(alone, class_counts=None)
    card = (export(alone, tmp_path / "out2") / "README.md").read_text()
    assert "the number of images is not in the model folder" in card and "the model was not tested" in card


def test_the_card_of_a_teacher_has_the_scores_of_its_one_head(tmp_path):
    save_teacher(tmp_path / "checkpoints" / "best", "resnet18", loss="ce")
    add_facts(tmp_path / "checkpoints" / "best", {"selected": {"step": 9}})
    (tmp_path / "config.yaml").write_text("name: teacher\n")
    result = score_heads({"TEACHER": torch.eye(4)}, torch.arange(4), [500, 60, 30, 4])
    (tmp_path / "results.json").write_text(json.dumps({"test": result.to_json()}))
    card = (export(tmp_path, tmp_path / "out") / "README.md").read_text()
    assert "| threshold split | TEACHER | 100.0 |" in card
    assert "Expected calibration error of TEACHER on test images" in card and "AVG" not in card


def test_temperatures_travel_beside_the_logits_and_are_not_in_them(tmp_path):
    fitted = {"AVG": 2.5, "CLS": 4.0, "DIST": 0.5}
    student = save_student(tmp_path / "model", calibration={"temperatures": fitted, "num_fitted": 40})
    folder = export(tmp_path / "model", tmp_path / "timm", "timm")
    told = {"avg": 2.5, "cls": 4.0, "dist": 0.5}
    assert json.loads((folder / "config.json").read_text())["temperatures"] == told
    assert "AVG 2.500, CLS 4.000, DIST 0.500" in (folder / "README.md").read_text()
    extra = {FACTS: ""}
    module = torch.export.load(export(tmp_path / "model", tmp_path / "m.pt2", "pt2"), extra_files=extra).module()
    assert json.loads(extra[FACTS])["temperatures"] == told
    with torch.no_grad():
        assert torch.allclose(module(images(2))[0], student(images(2)), atol=1e-5)


def test_onnx_has_a_free_batch_three_outputs_and_the_facts(saved):
    path = export(saved[0], saved[2] / "model.onnx", "onnx")
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["avg", "cls", "dist"]
    assert session.get_inputs()[0].shape == ["batch", 3, SIZE, SIZE]
    assert {output.shape[0] for output in session.get_outputs()} == {"batch"}
    for batch_size in (1, 7):
        got = session.run(None, {"images": images(batch_size).numpy()})
        with torch.no_grad():
            cls_logits, dist_logits = saved[1].forward_heads(images(batch_size))
        expected = ((cls_logits + dist_logits) / 2, cls_logits, dist_logits)
        assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(got, expected, strict=True))
    told = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert told["class_names"] == [CLASS_NAMES[label] for label in (1, 3, 0, 2)]  # by class of the model
    assert told["temperatures"] is None  # the run fitted none
    assert told["class_map"] == [2, 0, 3, 1] and told["crop_pct"] == 0.8 and told["mean"] == [0.5, 0.4, 0.3]


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_the_program_of_the_docs_answers_as_predict_does(tmp_path, monkeypatch, capsys, exif):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n([^`]*onnxruntime[^`]*)```", page)
    Path("program.py").write_text(program)
    calibration = {"temperatures": {"AVG": 2.5, "CLS": 1.0, "DIST": 1.0}, "num_fitted": 40}
    preprocess = MANIFEST["preprocess"] | {"exif": exif}
    save_student(tmp_path / "m", preprocess=preprocess, class_map=[2, 0, 3, 1], calibration=calibration)
    export("m", "model.onnx", "onnx")
    turned = Image.Exif()
    turned[0x0112] = 6
    for height, width, mode in ((40, 61, "RGB"), (333, 47, "CMYK"), (5, 9, "L")):
        picture(height, width).convert(mode).save("photo.jpg", exif=turned)
        runpy.run_path("program.py")
        name, probability = capsys.readouterr().out.rsplit(maxsplit=1)
        choice = predict("m", "photo.jpg", device="cpu")[0].top[0]
        assert name == choice.name and float(probability) == pytest.approx(choice.probability, abs=1e-4)


def test_pt2_loads_without_this_package_s_classes_and_has_the_facts(saved):
    path = export(saved[0], saved[2] / "model.pt2", "pt2")
    extra = {FACTS: ""}
    module = torch.export.load(str(path), extra_files=extra).module()
    with torch.no_grad():
        for batch_size in (1, 7):
            cls_logits, dist_logits = saved[1].forward_heads(images(batch_size))
            expected = ((cls_logits + dist_logits) / 2, cls_logits, dist_logits)
            got = module(images(batch_size))
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))
    assert json.loads(extra[FACTS])["std"] == [0.25, 0.2, 0.3]


@pytest.mark.parametrize(
    ("name", "depth", "arguments"),
    [
        ("deit_tiny_distilled_patch16_224", None, {}),
        ("deit_base_distilled_patch16_384", 1, {"img_size": 384, "depth": 1}),
        ("deit_small_distilled_patch2_32", 1, {"img_size": 32, "patch_size": 2, "depth": 1}),
        ("deit_large_distilled_patch16_224", 1, {"embed_dim": 1024, "depth": 1, "num_heads": 16}),
    ],
)
def test_every_student_has_a_timm_architecture_with_the_same_parameters(name, depth, arguments):
    student = create_student(name, 5, depth=depth)
    architecture, model_args = timm_architecture(student)
    twin = timm.create_model(architecture, num_classes=5, **model_args)
    assert model_args == arguments
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (student, twin)]
    assert shapes[0] == shapes[1]


def test_an_export_that_gives_other_logits_is_not_kept(saved, tmp_path, monkeypatch):
    original = fastdeitlt.tools.export.save_for_hf

    def damage(model, folder, **options):
        original(model, folder, **options)
        state = load_file(f"{folder}/model.safetensors")
        save_file(state | {"head.bias": state["head.bias"] + 1e-3}, f"{folder}/model.safetensors")

    monkeypatch.setattr(fastdeitlt.tools.export, "save_for_hf", damage)
    with pytest.raises(UserError, match="nothing was written"):
        export(saved[0], tmp_path / "out", "timm")
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_named(saved, tmp_path):
    with pytest.raises(UserError, match="got format 'torchscript', expected one of timm, onnx, pt2"):
        export(saved[0], tmp_path / "out", "torchscript")
    with pytest.raises(UserError, match="exists, expected a new name"):
        export(saved[0], tmp_path)
    with pytest.raises(UserError, match="manifest"):
        export(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_teacher_is_exported_with_one_output_at_its_scale(tmp_path, format):
    network = save_teacher(tmp_path / "teacher")
    out = export(tmp_path / "teacher", tmp_path / f"teacher.{format}", format)
    with torch.no_grad():
        expected = 30 * network(images(3))
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == ["logits"]
        got = torch.from_numpy(session.run(None, {"images": images(3).numpy()})[0])
    else:
        extra = {FACTS: ""}
        got = torch.export.load(out, extra_files=extra).module()(images(3))[0]
        assert json.loads(extra[FACTS])["outputs"] == ["logits"]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_timm_gives_the_logits_of_an_ldam_teacher_at_its_scale(tmp_path):
    network = save_teacher(tmp_path / "teacher", "resnet18", normed_head=False)
    out = export(tmp_path / "teacher", tmp_path / "timm", "timm")
    with torch.no_grad():
        got = timm.create_model(f"local-dir:{out}", pretrained=True).eval()(images(3))
        torch.testing.assert_close(got, 30 * network(images(3)), rtol=1e-4, atol=1e-3)


def test_timm_takes_a_teacher_that_it_has_and_no_other(tmp_path):
    network = save_teacher(tmp_path / "plain", "resnet18", loss="ce")
    out = export(tmp_path / "plain", tmp_path / "timm", "timm")
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(3)), network(images(3)))
    assert "resnet18" in (out / "README.md").read_text() and "loss ce" in (out / "README.md").read_text()
    for arch, loss in (("resnet18", "ldam"), ("resnet8", "ce")):
        save_teacher(tmp_path / f"{arch}-{loss}", arch, loss=loss)
        with pytest.raises(UserError, match="expected onnx or pt2"):
            export(tmp_path / f"{arch}-{loss}", tmp_path / "out", "timm")
