import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastdeitlt.checkpoint import save_model_folder
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student
from fastdeitlt.models.convert import load_student_checkpoint, load_student_state, official_student, resample_pos_embed
from fastdeitlt.models.vit import DistilledViT, attend, flops_per_image, num_parameters

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "student_forward.json").read_text())
TINY32 = "deit_tiny_distilled_patch8_32"


def golden_fill(model: nn.Module, seed: int) -> None:
    for j, (_, tensor) in enumerate(sorted(model.state_dict().items())):
        values = np.random.default_rng([seed, j]).standard_normal(tuple(tensor.shape)).astype(np.float32) * 0.05
        tensor.copy_(torch.from_numpy(values))


def golden_images(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, 999]).standard_normal(shape).astype(np.float32))


def small(drop_path: float = 0.0, **options: object) -> DistilledViT:
    torch.manual_seed(0)
    return create_student(TINY32, 7, depth=3, drop_path=drop_path, **options)


def logits_and_gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Train-mode logits of both heads [2, B, K] and all gradients of a loss that reads both."""
    torch.manual_seed(5)
    model.zero_grad()
    logits = torch.stack(model.train()(images))
    (logits.square() * torch.arange(1, logits.numel() + 1).view(logits.shape)).mean().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (got[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-12)
        assert error < bound, f"{name}: {error}"


@pytest.mark.parametrize("last_block_shortcut", [True, False])
def test_golden_logits_and_gradient_norms(last_block_shortcut: bool) -> None:
    model = create_student(
        "deit_base_distilled_patch16_224", 17, depth=2, drop_path=0.0, last_block_shortcut=last_block_shortcut
    )
    assert sorted(model.state_dict()) == GOLDEN["keys"]
    with torch.no_grad():
        golden_fill(model, GOLDEN["seed"])
    cls_logits, dist_logits = model(golden_images(GOLDEN["seed"], (2, 3, 224, 224)))
    torch.testing.assert_close(cls_logits, torch.tensor(GOLDEN["cls"]), rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(dist_logits, torch.tensor(GOLDEN["dist"]), rtol=2e-4, atol=1e-6)
    (cls_logits.square().mean() + dist_logits.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(GOLDEN["grad_norms"][name], rel=2e-4), name


@pytest.mark.parametrize(
    ("size", "img_size", "depth", "patch"),
    [("tiny", 224, 12, 16), ("small", 80, 4, 16), ("base", 48, 3, 16), ("tiny", 32, 2, 4)],
)
def test_timm_gives_the_same_logits_and_gradients(size: str, img_size: int, depth: int, patch: int) -> None:
    ours = create_student(f"deit_{size}_distilled_patch{patch}_{img_size}", 11, drop_path=0.3, depth=depth)
    oracle = timm.create_model(
        f"deit_{size}_distilled_patch16_224",
        img_size=img_size,
        patch_size=patch,
        depth=depth,
        num_classes=11,
        drop_path_rate=0.3,
    )
    oracle.set_distilled_training(True)
    oracle.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(3, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))
    logits, gradients = logits_and_gradients(ours, images)
    expected_logits, expected_gradients = logits_and_gradients(oracle, images)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=2e-6)
    assert_same_gradients(gradients, expected_gradients, 2e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), oracle.eval()(images), rtol=1e-5, atol=2e-6)


def test_last_block_shortcut_is_exact_with_drop_path() -> None:
    """In float64 any row that the shortcut forgot would show at far more than 1e-12."""
    short, full = small(0.5).double(), small(0.5, last_block_shortcut=False).double()
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    logits, gradients = logits_and_gradients(short, images)
    expected_logits, expected_gradients = logits_and_gradients(full, images)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-12, atol=1e-13)
    assert_same_gradients(gradients, expected_gradients, 1e-11)


def test_shortcut_of_a_single_block() -> None:
    model = create_student(TINY32, 3, depth=1).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        short = model(images)
        model.last_block_shortcut = False
        torch.testing.assert_close(short, model(images))


def test_eval_is_the_mean_of_both_heads() -> None:
    model, images = small().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        cls_logits, dist_logits = model.forward_heads(images)
        assert torch.equal(model(images), (cls_logits + dist_logits) / 2)
        tokens = model.forward_features(images)
    assert tokens.shape == (2, 18, 192)
    torch.testing.assert_close(model.head(tokens[:, 0]), cls_logits)
    torch.testing.assert_close(model.head_dist(tokens[:, 1]), dist_logits)


def test_train_step_is_one_graph() -> None:
    model, images = small(0.4), torch.randn(4, 3, 32, 32)
    assert torch._dynamo.explain(model)(images).graph_break_count == 0
    torch._dynamo.reset()
    expected = logits_and_gradients(model, images)
    got = logits_and_gradients(torch.compile(model, fullgraph=True, backend="eager"), images)
    torch.testing.assert_close(got[0], expected[0])
    torch._dynamo.reset()


def test_attention_impl_replaces_attention() -> None:
    calls = []

    def spy(qkv: Tensor) -> Tensor:
        calls.append(tuple(qkv.shape))
        return attend(qkv)

    model, images = small(attention_impl=spy).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), small().eval()(images))
    assert calls == [(2, 18, 3, 3, 64)] * 2


def test_initial_weights_follow_timm() -> None:
    torch.manual_seed(0)
    model = create_student("deit_small_distilled_patch16_224", 10, depth=1)
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.cls_token.abs().max().item() < 1e-5
    assert model.dist_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert all(
        not p.any() for name, p in model.named_parameters() if name.endswith("bias") and "patch_embed" not in name
    )
    bound = 1 / math.sqrt(3 * 16 * 16)
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_size_of_the_name_unless_another_is_given() -> None:
    assert create_student("deit_tiny_distilled_patch16_384", 2, depth=1).img_size == 384
    assert create_student("deit_tiny_distilled_patch16_224", 2, 0, depth=1).img_size == 224
    model = create_student("deit_tiny_distilled_patch2_224", 2, 32, depth=0)
    assert (model.img_size, model.pos_embed.shape[1], len(model.blocks)) == (32, 258, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deit_bas_distilled_patch16_224", 10), "did you mean deit_base_distilled_patch16_224"),
        (("deit_base_distilled_patch14_224", 10), "unknown name"),
        (("vit_base_patch16_224", 10), "expected deit_"),
        (("deit_tiny_distilled_patch16_224", 10, 100), "100 does not divide into patches of 16; use 96"),
        (("deit_tiny_distilled_patch16_224", 10, 8), "use 16"),
        (("deit_tiny_distilled_patch16_224", 0), "got 0 classes"),
        (("deit_tiny_distilled_patch16_224", 10, 224, 1.0), "drop_path 1.0"),
        (("deit_tiny_distilled_patch16_224", 10, 224, 0.1, -1), "depth -1"),
    ],
)
def test_bad_students_are_refused_by_name(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_student(*arguments)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="expected sides of 32 pixels"):
        small()(torch.zeros(2, 3, 64, 64))


def test_flops_are_those_of_the_performance_notes() -> None:
    model = create_student("deit_base_distilled_patch16_224", 1000)
    assert flops_per_image(model) / 1e9 == pytest.approx(35.31, abs=0.01)
    assert 1 - flops_per_image(model, executed=True) / flops_per_image(model) == pytest.approx(0.07, abs=0.002)
    assert num_parameters(create_student("deit_base_distilled_patch16_224", 10)) / 1e6 == pytest.approx(85.8, abs=0.05)


@pytest.mark.parametrize("last_block_shortcut", [True, False])
def test_flops_are_what_torch_counts(last_block_shortcut: bool) -> None:
    def explicit(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)

    model = small(last_block_shortcut=last_block_shortcut, attention_impl=explicit).eval()
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(torch.zeros(1, 3, 32, 32))
    assert flops_per_image(model, executed=True) == counter.get_total_flops()


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
    with pytest.raises(UserError, match="has 7 classes, expected 5"):
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
    averaged, _ = load_student_checkpoint(tmp_path / "best.pth", "ema")
    assert torch.equal(averaged.norm.bias, model.norm.bias + 1)


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
    with pytest.raises(UserError, match="does not match its sha256"):
        load_student_checkpoint(folder)


def test_teacher_folder_is_no_student(tmp_path: Path) -> None:
    facts = {"kind": "teacher", "model": {"arch": "resnet8", "num_classes": 3}}
    folder = save_model_folder(tmp_path / "t", {"a": torch.zeros(1)}, facts)
    with pytest.raises(UserError, match="got a teacher, expected a student"):
        load_student_checkpoint(folder)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_student_checkpoint_never_runs(tmp_path: Path, zipped: bool) -> None:
    canary = tmp_path / "canary"
    args = argparse.Namespace(lr=Canary(canary))
    content = {**official_student(small()), "args": args}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"refused, it holds (posix|nt)\.system"):
        load_student_checkpoint(tmp_path / "evil.pth")
    assert not canary.exists()


def test_unreadable_students_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_student_checkpoint(tmp_path / "absent.pth")
    torch.save(official_student(small()), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        load_student_checkpoint(tmp_path / "cut.pth")
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 100)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="expected a distilled ViT"):
        load_student_checkpoint(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no state_dict"):
        load_student_checkpoint(tmp_path / "list.pth")
    with pytest.raises(UserError, match="expected model or ema"):
        load_student_checkpoint(tmp_path / "list.pth", "best")
