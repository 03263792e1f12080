"""Checkpoints in and out."""

import argparse
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed

from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student
from fastdeitlt.models.convert import (
    load_student_checkpoint,
    load_student_state,
    resample_pos_embed,
)
from fastdeitlt.models.vit import DistilledViT
from fastdeitlt.store.checkpoint import save_model_folder

TINY32 = "deit_tiny_distilled_patch8_32"


def official_student(model: DistilledViT) -> dict:
    """A student as the official code saves it."""
    return {"model": model.state_dict()}


def small() -> DistilledViT:
    torch.manual_seed(0)
    return create_student(TINY32, 7, depth=3)


@pytest.mark.parametrize("side", [7, 24])
def test_position_embeddings_are_resampled_as_timm_does(side: int) -> None:
    pos_embed = torch.randn(1, 2 + 14 * 14, 8)
    expected = resample_abs_pos_embed(pos_embed, [side, side], num_prefix_tokens=2)
    assert torch.equal(resample_pos_embed(pos_embed, 2 + side * side), expected)


def test_weights_of_another_image_size_load() -> None:
    source, target = create_student(TINY32, 7, depth=2), create_student(TINY32, 7, 64, depth=2)
    load_student_state(target, source.state_dict())
    assert torch.equal(target.pos_embed[:, :2], source.pos_embed[:, :2])
    assert torch.equal(target.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)


def test_states_that_do_not_fit_are_named() -> None:
    model, state = small(), small().state_dict()
    with pytest.raises(UserError, match="got 7 classes, expected 5"):
        load_student_state(create_student(TINY32, 5, depth=3), state)
    with pytest.raises(UserError, match=r"no dist_token .* expected a distilled ViT"):
        load_student_state(model, {key: value for key, value in state.items() if key != "dist_token"})
    with pytest.raises(UserError, match=r"1 missing: norm\.bias; 1 unexpected: extra"):
        load_student_state(model, {k: v for k, v in state.items() if k != "norm.bias"} | {"extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"norm\.bias \[3\] instead of \[192\]"):
        load_student_state(model, state | {"norm.bias": torch.zeros(3)})
    with pytest.raises(UserError, match="20 tokens, expected CLS, DIST and a square grid"):
        load_student_state(model, state | {"pos_embed": torch.zeros(1, 20, 192)})


def test_official_checkpoint_loads_with_its_class_map(tmp_path: Path) -> None:
    model = small().eval()
    ema = {f"module.{key}": value + 1 for key, value in model.state_dict().items()}
    args = argparse.Namespace(class_map=[2, 0, 1, 3, 4, 6, 5], lr=5e-4, cls_num_list=[np.int64(9)])
    content = {
        **official_student(model),
        "model_ema": ema,
        "args": args,
        "epoch": 1199,
        "head_acc_avg": np.float64(94.5),
    }
    torch.save(content, tmp_path / "best.pth")
    loaded, info = load_student_checkpoint(tmp_path / "best.pth")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert info["model"] == {"name": TINY32, "num_classes": 7, "img_size": 32, "depth": 3}
    assert info["class_map"] == [2, 0, 1, 3, 4, 6, 5]
    assert (info["epoch"], info["head_acc_avg"], info["args"]["lr"]) == (1199, 94.5, 5e-4)


def test_scalars_pickled_by_numpy_1_load(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    content = {**official_student(small()), "best_acc_avg": np.float64(1.5)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_student_checkpoint(path)[1]["best_acc_avg"] == 1.5


def test_model_folder_loads_and_its_hash_is_checked(tmp_path: Path) -> None:
    model = small().eval()
    facts = {
        "kind": "student",
        "model": {"name": TINY32, "num_classes": 7, "img_size": 32},
        "class_map": [0, 1, 2, 3, 4, 6, 5],
    }
    folder = save_model_folder(tmp_path / "best", model.state_dict(), facts)
    loaded, info = load_student_checkpoint(folder)
    assert info["class_map"] == facts["class_map"]
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(UserError, match=r"is damaged \(wrong sha256\)"):
        load_student_checkpoint(folder)


def test_teacher_folder_is_no_student(tmp_path: Path) -> None:
    facts = {"kind": "teacher", "model": {"arch": "resnet8", "num_classes": 3, "img_size": 16}}
    folder = save_model_folder(tmp_path / "t", {"a": torch.zeros(1)}, facts)
    with pytest.raises(UserError, match="got a teacher, expected a student"):
        load_student_checkpoint(folder)


def test_a_file_that_unpacks_to_more_than_it_holds_is_refused_unread(tmp_path: Path) -> None:
    torch.save(official_student(small()), tmp_path / "good.pth")
    with (
        zipfile.ZipFile(tmp_path / "good.pth") as good,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in good.namelist():
            bomb.writestr(name, bytes(2**20))
    load_student_checkpoint(tmp_path / "good.pth")
    with pytest.raises(UserError, match=r"got [0-9,]+ bytes that unpack to [0-9,]+"):
        load_student_checkpoint(tmp_path / "bomb.pth")


def test_unreadable_students_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_student_checkpoint(tmp_path / "absent.pth")
    torch.save(official_student(small()), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        load_student_checkpoint(tmp_path / "cut.pth")
    (tmp_path / "photo.jpg").write_text("hello")
    with pytest.raises(UserError, match="not torch's pickle"):
        load_student_checkpoint(tmp_path / "photo.jpg")
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 100)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="expected a distilled ViT"):
        load_student_checkpoint(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no state_dict"):
        load_student_checkpoint(tmp_path / "list.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_flipped_bytes_of_a_pickle_raise_nothing_else(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(3)}}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pth").read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(150):
        changed = bytearray(content)
        for place in draw.integers(0, len(content), 3):
            changed[place] = draw.integers(0, 256)
        (tmp_path / "a.pth").write_bytes(changed)
        with pytest.raises(UserError):
            load_student_checkpoint(tmp_path / "a.pth")
