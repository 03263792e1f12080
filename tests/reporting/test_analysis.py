"""Analysis of a student: weights equal to timm's, the definitions' known values, pictures of the right maps."""

import base64
import gc
import importlib
import io
import json
import shutil
import weakref

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_model import MANIFEST, SIZE, save_images, save_student
from tiny_run import tiny_run

from fastdeitlt import config
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation.per_image import data_uri
from fastdeitlt.models import create_student
from fastdeitlt.models.saved import open_saved
from fastdeitlt.reporting.analysis import attention, look_into, main, overlay, sections, teacher, write
from fastdeitlt.reporting.analysis.features import patch_similarity, watch_tokens
from fastdeitlt.reporting.analysis.student import diagnose, look, section
from fastdeitlt.train import train

NUM_TOKENS = 2 + 16  # 4 x 4 patches of 8 px


def student_and_images(batch=3):
    torch.manual_seed(0)
    student = create_student("deit_tiny_distilled_patch8_32", 4, depth=2).eval()
    for weight in (p for p in student.parameters() if p.ndim > 1):
        torch.nn.init.normal_(weight, std=0.2)
    return student, torch.randn(batch, 3, SIZE, SIZE)


def test_the_weights_are_those_of_timm_and_give_the_student_s_own_attention():
    student, images_BCHW = student_and_images()
    twin = timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=4, img_size=SIZE, patch_size=8, depth=2
    ).eval()
    twin.load_state_dict(student.state_dict())
    theirs = []
    for block in twin.blocks:
        block.attn.fused_attn = False  # then timm holds the weights, and passes them through attn_drop
        block.attn.attn_drop.register_forward_hook(lambda _m, _i, weights: theirs.append(weights))
    with torch.inference_mode(), attention.attention_weights(student) as ours:
        twin(images_BCHW)
        student.forward_features(images_BCHW)
    assert len(ours) == 2 and ours[0].shape == (3, 3, NUM_TOKENS, NUM_TOKENS)
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, its, atol=1e-5)


def test_hooks_go_and_each_pass_starts_anew():
    student, images_BCHW = student_and_images()
    with attention.attention_weights(student) as weights, watch_tokens(student):
        student.forward_features(images_BCHW)
        student.forward_features(images_BCHW[:1])
        assert len(weights) == 2 and len(weights[0]) == 1
    student.forward_features(images_BCHW)
    assert len(weights[0]) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


def test_even_attention_on_14_by_14_patches_of_16_px_has_116_5_px():
    weights = torch.full((1, 2, 198, 198), 1 / 198)
    distance = attention.mean_distance(weights, patch=16)
    assert distance.shape == (1, 2) and distance[0, 0].item() == pytest.approx(116.5, abs=0.05)
    weights[..., :2] = 0.49  # whatever goes to CLS and DIST does not count
    assert attention.mean_distance(weights, 16)[0, 0].item() == pytest.approx(116.5, abs=0.05)


def test_the_distance_of_attention_to_oneself_or_to_a_neighbour():
    own = torch.eye(6).expand(1, 1, 6, 6)
    assert attention.mean_distance(own, 16).item() == 0
    weights = torch.zeros(1, 1, 6, 6)
    for query, key in ((2, 3), (3, 2), (4, 5), (5, 4)):  # the patch beside it, on a 2 x 2 grid
        weights[..., query, key] = 1
    assert attention.mean_distance(weights, 16).item() == pytest.approx(16)
    distances = attention.patch_distances(2, 16)
    assert distances[0].tolist() == pytest.approx([0, 16, 16, 16 * 2**0.5]) and torch.equal(distances, distances.T)


def test_rollout_is_the_product_of_half_attention_and_half_identity():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(2, 3, 6, 6, generator=generator).softmax(-1) for _ in range(3)]
    flow = torch.eye(6).expand(2, 6, 6)
    for block in weights:  # the paper's recursion, from the first block up
        flow = (block.mean(1) / 2 + torch.eye(6) / 2) @ flow
    expected = flow[:, :2, 2:] / flow[:, :2, 2:].sum(-1, keepdim=True)
    assert torch.allclose(attention.rollout(weights), expected, atol=1e-6)


def test_the_map_of_a_token_that_looks_at_one_patch():
    weights = torch.zeros(1, 2, 6, 6)
    weights[:, :, 0, 4] = weights[:, :, 1, 2] = 1  # CLS to the third patch, DIST to the first
    weights[:, :, range(2, 6), range(2, 6)] = 1
    for maps in (attention.rollout([weights]), attention.last_maps([weights])):
        assert maps.argmax(-1).tolist() == [[2, 0]] and maps.sum(-1).tolist() == [[1, 1]]
        assert attention.spread(maps).abs().max() < 1e-6
    assert attention.spread(torch.full((1, 2, 16), 1 / 16)).tolist() == [[pytest.approx(1), pytest.approx(1)]]


def test_tokens_are_those_of_the_residual_stream():
    student, images_BCHW = student_and_images()
    with torch.inference_mode(), watch_tokens(student) as tokens:
        output_BND = student.forward_features(images_BCHW)
        assert torch.allclose(student.norm(tokens.prefix[-1][0]), output_BND[:, :2], atol=1e-4)
    ranks = tokens.ranks()
    assert set(ranks) == {"CLS", "DIST"} and all(
        len(r) == 2 and max(r) <= 3 for c in ranks.values() for r in c.values()
    )
    x_B2D = tokens.prefix[0][0].numpy()
    by_hand = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in x_B2D]
    assert tokens.cosines()[0] == pytest.approx(np.mean(by_hand), abs=1e-5)


def test_patch_similarity_is_the_mean_over_pairs():
    x_BPD = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    cosines = torch.nn.functional.cosine_similarity(x_BPD[:, :, None], x_BPD[:, None], dim=-1)
    expected = cosines[:, ~torch.eye(5, dtype=torch.bool)].mean(1)
    assert torch.allclose(patch_similarity(x_BPD), expected, atol=1e-6)
    assert patch_similarity(torch.ones(1, 4, 3)).item() == pytest.approx(1)
    assert patch_similarity(torch.ones(1, 1, 3)).isnan().all()


def test_a_picture_is_hot_where_the_map_is():
    map_PP = np.zeros((4, 4), dtype=np.float32)
    map_PP[3, 0] = 1
    image_HWC = np.full((32, 32, 3), 128, dtype=np.uint8)
    picture = overlay.overlay(image_HWC, map_PP).astype(int)
    assert picture.shape == (overlay.TILE, overlay.TILE, 3)
    assert picture[-16:, :16].sum() > 1.5 * picture[:16, -16:].sum()
    even = overlay.overlay(image_HWC, np.full((4, 4), 0.25, dtype=np.float32))
    assert even.std() == 0 or even.reshape(-1, 3).std(0).max() == 0
    strip = overlay.strip(image_HWC, [map_PP, map_PP])
    assert strip.size == (3 * overlay.TILE + 2 * overlay.GAP, overlay.TILE)
    data = base64.b64decode(data_uri(strip, "PNG").removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(strip))


class Source:
    """Images whose colour is their number."""

    unreadable = frozenset()

    def crops(self, requests):
        for request in requests:
            assert request.size == SIZE and request.draws is None
            generator = torch.Generator().manual_seed(int(request.sample_B[0]))
            noise = torch.randint(0, 255, (len(request.sample_B), SIZE, SIZE, 3), generator=generator)
            yield request, noise.to(torch.uint8)


def test_look_measures_a_student_and_its_section_shows_it(tmp_path):
    save_student(tmp_path / "model", class_map=[2, 0, 3, 1])
    saved = open_saved(tmp_path / "model")
    labels_N = np.arange(50, dtype=np.int64) % 4
    images = LongTailSet([f"{i}.png" for i in range(50)], labels_N, np.bincount(labels_N).tolist())
    facts = {"set": "test"} | look(saved, Source(), images, [500, 60, 30, 4], "list", num_images=20)
    assert facts["images"] == 20 and np.shape(facts["distance"]) == (2, 3)
    assert facts["uniform_distance"] == pytest.approx(8 * np.mean([
        np.hypot(a // 4 - b // 4, a % 4 - b % 4) for a in range(16) for b in range(16)
    ]))  # fmt: skip
    assert facts["maps"]["all"]["images"] == 20 and {"head", "mid", "tail"} < set(facts["maps"])
    shown = [(item["group"], item["class"]) for item in facts["gallery"]]
    assert shown == [("head", "<b>cat</b>"), ("mid", "dog, small"), ("mid", "[red]eel[/red]"), ("tail", "fish")]
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    kinds = [block.kind for block in section(facts).blocks]
    assert kinds == ["gallery", "figure", "figure", "figure", "table", "fold"]
    write("student", facts, tmp_path)
    assert [path.name for path in sorted((tmp_path / "analysis" / "attention").iterdir())][-1] == "03-tail.png"
    assert [part.title for part in sections(tmp_path)] == ["Attention and features"]


def test_images_are_turned_as_the_model_states(tmp_path):
    settings = ["data.dataset=folder", "train.device=cpu"]
    facts = {}
    for exif, turned in (("apply", "with_tag"), ("ignore", "in_pixels")):
        for label, path in enumerate(save_images(tmp_path / "images", [(40, 60)] * 4)):
            image, tag = Image.open(path).convert("RGB"), Image.Exif()
            tag[0x0112] = 6
            folder = tmp_path / turned / "test" / f"class{label}"
            folder.mkdir(parents=True)
            if exif == "apply":
                image.save(folder / "0.png", exif=tag)
            else:
                image.transpose(Image.Transpose.ROTATE_270).save(folder / "0.png")
        names = [f"class{label}" for label in range(4)]
        save_student(tmp_path / exif, class_names=names, preprocess=MANIFEST["preprocess"] | {"exif": exif})
        facts[exif] = diagnose(str(tmp_path / exif), [*settings, f"data.root={tmp_path / turned}"], images=4)
    assert facts["apply"] == facts["ignore"]


def test_the_verb_names_what_does_not_fit(tmp_path):
    save_student(tmp_path / "four")
    with pytest.raises(UserError, match=r"txt: classes differ by name, got 'T-shirt/top', .* and 7 more, not in model"):
        main("student", [str(tmp_path / "four")], [], images=10, json=None)
    with pytest.raises(UserError, match="--images: got 0, expected at least 1"):
        main("student", [str(tmp_path / "four")], [], images=0, json=None)


@pytest.fixture(scope="module")
def made():
    """Weak references to what the training of ``trained`` made, by name."""
    return {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, made):
    """The run folder of the smallest training there is."""
    spine, parts = (importlib.import_module(f"fastdeitlt.{name}") for name in ("train", "core.assemble"))

    def watched(module, name):
        make = getattr(module, name)

        def make_and_note(*args, **kwargs):
            made[name] = weakref.ref(thing := make(*args, **kwargs))
            return thing

        return make_and_note

    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_student", "build_engine", "open_source", "Ema"):
            patch.setattr(parts, name, watched(parts, name))
        for name in ("settled_teacher", "Selector", "Meter", "Run"):
            patch.setattr(spine, name, watched(spine, name))
        cfg = tiny_run(tmp_path_factory.mktemp("trained"))
        return train(config.build(config.flatten(cfg) | {"evaluate.analyze_images": 1024}))


def test_a_process_that_trains_many_runs_keeps_none_of_them(trained, made):
    gc.collect()
    assert len(made) == 8 and {name for name, thing in made.items() if thing() is not None} == set()


def test_training_leaves_a_report_with_attention_and_teacher_and_fitted_temperatures(trained):
    page = (trained / "report.html").read_text()
    for title in ("Attention and features", "Teacher", "Feature rank", "Accuracy against confidence, uncalibrated"):
        assert f">{title}<" in page
    assert page.count("data:image/png;base64,") > 2
    facts = json.loads((trained / "analysis" / "teacher.json").read_text())
    assert set(facts) >= {"clean", "augmented", "mixed", "mixed_resized", "feature_rank"} and "sharpness" not in facts
    assert f"analyze teacher {trained}" in page and f"analyze student {trained}" not in page
    fitted = open_saved(trained).calibration
    weights = json.loads((trained / "results.json").read_text())["posthoc"]["weights"]
    assert fitted.temperatures == {head: 1 / weights[f"{head}, temperature"][0] for head in ("AVG", "CLS", "DIST")}


def test_classes_of_one_name_have_a_row_each():
    facts = {"class_names": ["eel", "eel"], "hard_targets": {"labels": [3, 1], "targets": [2, 2]}}
    assert teacher._target_table(facts).rows == [["eel", "75.0", "50.0", "0.7"], ["eel", "25.0", "50.0", "2.0"]]


def test_an_analysis_that_fails_is_told_and_spoils_nothing(trained, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "analysis")
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace("/teacher\n", "/absent\n"))
    look_into(run, 8)
    assert [record.levelname for record in caplog.records if "analyze teacher" in record.message] == ["WARNING"]
    assert "absent" in caplog.text and "Traceback" not in caplog.text
    assert [path.name for path in (run / "analysis").glob("*.json")] == ["student.json"]
    (run / "config.yaml").write_text(settings)
    shutil.rmtree(run / "analysis")
    look_into(run, 0)
    assert not (run / "analysis").exists()
    look_into(run, 8)
    facts = {name: json.loads((run / "analysis" / f"{name}.json").read_text()) for name in ("student", "teacher")}
    assert {name: f["images"] for name, f in facts.items()} == {"student": 8, "teacher": 8}


def test_the_numbers_of_several_students_are_in_one_file(trained, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    main("student", [str(trained), str(again)], [], images=4, json=tmp_path / "all.json")
    facts = json.loads((tmp_path / "all.json").read_text())
    assert list(facts) == [str(trained), str(again)] and all(one["images"] == 4 for one in facts.values())


def test_only_the_best_weights_of_a_run_are_analysed_into_its_report(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    shutil.rmtree(run / "analysis")
    main("student", [str(run / "checkpoints" / "before-drw")], [], images=4, json=tmp_path / "before.json")
    assert not (run / "analysis").exists() and (tmp_path / "before.json").is_file()
    main("student", [str(run / "checkpoints" / "best")], [], images=4, json=None)
    assert (run / "analysis" / "student.json").is_file()
