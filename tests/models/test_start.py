"""Starting a student from weights: what timm would load, and adaptions that keep what the weights compute."""

import json
import logging
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_model import NAME, SIZE, save_student
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from tiny_run import tiny_run

from fastdeitlt import config
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student
from fastdeitlt.models.start import shape_of, start_from
from fastdeitlt.run.selection import Selector
from fastdeitlt.store.checkpoint import load_tensors, read_manifest
from fastdeitlt.train import train

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
TIMM = {"deit": "deit_tiny_distilled_patch16_224", "vit": "vit_tiny_patch16_224", "deit3": "deit3_small_patch16_224"}


@pytest.fixture(autouse=True)
def _messages(caplog):
    logging.getLogger("fastdeitlt").propagate = True
    caplog.set_level(logging.INFO, "fastdeitlt")


def student(name=NAME, classes=4, **options):
    torch.manual_seed(9)
    return create_student(name, classes, **options).eval()


def start(model, path, names=None, mean=MEAN, std=STD):
    start_from(model, path, names, mean, std)
    return model


def timm_model(kind, **options):
    torch.manual_seed(3)
    model = timm.create_model(TIMM[kind], num_classes=5, img_size=64, depth=2, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def save(model, path):
    save_file(model.state_dict(), path)
    return path


def images(size=SIZE, number=3):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def heads(model, images_BCHW):
    return torch.stack(model.forward_heads(images_BCHW))


def equal(model, other, images_BCHW, tolerance=0.0):
    torch.testing.assert_close(heads(model, images_BCHW), heads(other, images_BCHW), rtol=0, atol=tolerance)


def test_a_distilled_vit_of_timm_at_another_size_and_patch_starts_as_timm_loads_it(tmp_path, caplog):
    source = timm_model("deit")
    twin = timm.create_model(TIMM["deit"], num_classes=5, img_size=48, patch_size=8, depth=2).eval()
    path = save(source, tmp_path / "w.safetensors")
    timm.models.load_checkpoint(twin, str(path), filter_fn=timm.models.deit.checkpoint_filter_fn)
    model = start(student("deit_tiny_distilled_patch8_48", 5, depth=2), path)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(model(images(48)), twin(images(48)), rtol=1e-4, atol=1e-4)
    assert "patches resampled from 16 to 8 pixels, positions resampled from 4x4 to 6x6, heads of 5 of 5" in caplog.text


def test_positions_and_patches_are_resampled_by_timm(tmp_path):
    source = student("deit_tiny_distilled_patch16_64", 5, depth=1)
    path = save(source, tmp_path / "w.safetensors")
    model = start(student("deit_tiny_distilled_patch4_32", 5, depth=1), path)
    expected = resample_abs_pos_embed(source.pos_embed, [8, 8], num_prefix_tokens=2)
    assert torch.equal(model.pos_embed, expected)
    assert torch.equal(model.patch_embed.proj.weight, resample_patch_embed(source.patch_embed.proj.weight, [4, 4]))


@pytest.mark.parametrize("kind", ["vit", "deit3"])
def test_both_heads_of_a_student_start_as_a_plain_vit(tmp_path, caplog, kind):
    """CLS and DIST are twins of timm's CLS: with a copied token there is one more of it to attend to."""
    source = timm_model(kind)
    path = save(source, tmp_path / "w.safetensors")
    assert shape_of(path) == ({"vit": "tiny", "deit3": "small"}[kind], 16, 2, 64)
    name = {"vit": "deit_tiny_distilled_patch16_64", "deit3": "deit_small_distilled_patch16_64"}[kind]
    model = start(student(name, 5, depth=2), path)
    cls_logits, dist_logits = heads(model, images(64))
    assert torch.equal(cls_logits, dist_logits) and "DIST token copied from CLS" in caplog.text
    with torch.no_grad():
        tokens = source.pos_drop(source._pos_embed(source.patch_embed(images(64))))
        twice = torch.cat((tokens[:, :1], tokens), 1)
        expected = source.head(source.norm(source.blocks(twice))[:, 0])
    torch.testing.assert_close(cls_logits, expected, rtol=1e-4, atol=1e-3)


def test_another_number_of_classes_gets_new_heads(tmp_path, caplog):
    path = save(student(classes=7, depth=1), tmp_path / "w.safetensors")
    fresh = student(classes=4, depth=1)
    before = fresh.head.weight.detach().clone()
    start(fresh, path)
    assert torch.equal(fresh.head.weight, before) and "new heads for 4 classes" in caplog.text


def test_heads_of_a_run_are_matched_by_class_name(tmp_path, caplog):
    source = save_student(tmp_path / "m", class_names=["cat", "dog", "eel", "fish"], class_map=[1, 0, 2, 3])
    model = student(depth=2)
    fresh = model.head.bias.detach().clone()
    start(model, tmp_path / "m", ["eel", "newt", "cat", "dog"])
    for ours, theirs in ((model.head, source.head), (model.head_dist, source.head_dist)):
        assert torch.equal(ours.weight[[0, 2, 3]], theirs.weight[[2, 1, 0]])  # cat is the second row
    assert torch.equal(model.head.bias[1], fresh[1]) and "heads of 3 of 4 classes kept by name" in caplog.text


def test_a_run_of_ones_own_starts_another_with_the_same_decisions(tmp_path):
    source = save_student(tmp_path / "m")
    equal(start(student(depth=2), tmp_path / "m"), source, images())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_file_starts_a_student(tmp_path, caplog, suffix):
    source, path = student(depth=2), tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"model": {f"module.{key}": value for key, value in source.state_dict().items()}}, path)
    else:
        save(source, path)
    torch.manual_seed(77)
    equal(start(create_student(NAME, 4, depth=2).eval(), path), source, images())
    assert "input normalisation not stated, assumed to be augment.mean and augment.std" in caplog.text


def test_a_deeper_student_starts_with_identities_and_a_shallower_with_the_first_blocks(tmp_path, caplog):
    source = save_student(tmp_path / "m", depth=2)
    deeper = start(student(depth=5), tmp_path / "m")
    equal(deeper, source, images(), 1e-4)
    assert "blocks 3 to 5 initialised as identities" in caplog.text
    assert deeper.blocks[4].mlp.fc1.weight.abs().sum() > 0  # and can learn
    shallow = start(student(depth=1), tmp_path / "m")
    assert torch.equal(shallow.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert "the first 1 of 2 blocks" in caplog.text


def test_another_normalisation_of_the_input_is_compensated(tmp_path, caplog):
    source = save_student(tmp_path / "m")
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    model = start(student(depth=2), tmp_path / "m", mean=mean, std=std)
    pixels = torch.rand(4, 3, SIZE, SIZE)

    def logits(network, mean, std):
        mean_C11, std_C11 = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
        return heads(network, (pixels - mean_C11) / std_C11)

    ours, theirs = logits(model, mean, std), logits(source, MEAN, STD)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert "input normalisation compensated" in caplog.text


def test_a_folder_of_timm_states_its_normalisation_and_names(tmp_path, caplog):
    source = student(depth=2)
    save(source, tmp_path / "model.safetensors")
    config = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}, "label_names": ["a", "b", "c", "d"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = start(student(depth=2), tmp_path, ["d", "c", "b", "a"], (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(heads(model, images()), heads(source, images()).flip(-1))
    assert "compensated" not in caplog.text
    start(student(depth=2), tmp_path)
    assert "input normalisation compensated" in caplog.text and "not stated" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("cls_token"), "no cls_token with 3 dimensions, expected a ViT with a CLS token"),
        (lambda s: s.update(fc_norm=torch.zeros(1)), "got key fc_norm, expected a plain or distilled ViT"),
        (lambda s: s.update({"head.bias": torch.zeros(3)}), r"head\.bias has shape \[3\], expected \[4\]"),
        (lambda s: s.pop("blocks.0.norm1.bias"), r"1 missing: blocks\.0\.norm1\.bias"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 20, 192)), "20 tokens, expected CLS, DIST and a square grid"),
        (lambda s: s.update({"blocks.0.ls1.gamma": torch.zeros(3)}), r"unexpected: blocks\.0\.ls1\.gamma"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path, change, message):
    state = student(depth=1).state_dict()
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    model = student(depth=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        start(model, tmp_path / "w.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_width_names_the_student_to_use(tmp_path):
    path = save(student("deit_small_distilled_patch8_32", depth=1), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"got width 384, expected 192. Use student\.name=deit_small_distilled_patch"):
        start(student(depth=1), path)


def test_a_finished_run_starts_a_longer_one_at_a_larger_size(tmp_path, monkeypatch):
    """Its weights are read at the first start alone: a resumed run has its own."""
    short = {"train.epochs": 1, "loss.drw_epoch": -1, "optim.warmup_epochs": 0}
    cfg = config.build(config.flatten(tiny_run(tmp_path)) | short | {"name": "short"})
    source = train(cfg)
    started = load_tensors(source / "checkpoints" / "best")
    larger = {"student.init": str(source), "student.img_size": 48, "optim.layer_decay": 0.8}
    still = {"optim.lr": 1e-9, "optim.min_lr": 1e-9, "train.epochs": 2, "name": "longer"}
    with pytest.raises(UserError, match=r"To train longer, .* name=NEW student\.init=.*short"):
        train(config.build(config.flatten(cfg) | {"train.epochs": 2}))
    cfg = config.build(config.flatten(cfg) | larger | still)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Selector, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        train(cfg)
    shutil.rmtree(source)
    run = train(cfg, "must")
    loaded = load_tensors(run / "checkpoints" / "last")
    for name in ("head_dist.weight", "blocks.0.attn.qkv.weight"):
        torch.testing.assert_close(loaded[name], started[name], rtol=0, atol=1e-6)
    expected = resample_abs_pos_embed(started["pos_embed"], [3, 3], num_prefix_tokens=2)
    torch.testing.assert_close(loaded["pos_embed"], expected, rtol=0, atol=1e-6)
    assert "init" not in read_manifest(run / "checkpoints" / "best")["model"]


@pytest.mark.parametrize("where", ["missing.pth", "empty"])
def test_a_place_without_weights_is_refused(tmp_path, where):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no such file or folder|no manifest\.json, expected"):
        start(student(depth=1), tmp_path / where)
