"""The student against golden vectors, timm and itself."""

import math

import golden
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student
from fastdeitlt.models.residual import BranchSamples, draw_samples
from fastdeitlt.models.vit import DistilledViT, flops_per_image, num_parameters

GOLDEN = golden.load("student_forward")
TINY32 = "deit_tiny_distilled_patch8_32"


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
    golden.fill(model, GOLDEN["seed"])
    cls_logits, dist_logits = model(golden.images(GOLDEN["seed"], (2, 3, 224, 224)))
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
    model = create_student(TINY32, 3, depth=1, drop_path=0.0).train()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        short = model(images)
        model.last_block_shortcut = False
        torch.testing.assert_close(short, model(images))


@pytest.mark.parametrize(("batch", "drop", "num_kept"), [(10, 0.25, 8), (10, 0.01, 10), (3, 0.9, 1), (1, 0.5, 1)])
def test_law_count_keeps_that_many_samples_each_as_often_and_the_mean(batch: int, drop: float, num_kept: int) -> None:
    torch.manual_seed(0)
    x, times, sums = torch.zeros(batch, 1, 1), torch.zeros(batch), torch.zeros(batch)
    for _ in range(2000):
        kept = draw_samples(x, drop, "count")
        samples = torch.arange(batch) if kept is None else kept.samples_S
        assert len(samples) == num_kept == len(samples.unique()) and (kept is None) == (num_kept == batch)
        times[samples] += 1
        sums[samples] += 1.0 if kept is None else kept.scale_B11[0, 0, 0]
    bound = 5 * (num_kept / batch * (1 - num_kept / batch) / 2000) ** 0.5
    torch.testing.assert_close(times / 2000, torch.full((batch,), num_kept / batch), rtol=0, atol=bound)
    torch.testing.assert_close(sums / 2000, torch.ones(batch), rtol=0, atol=bound * batch / num_kept + 1e-5)


def test_law_bernoulli_drops_each_sample_on_its_own() -> None:
    torch.manual_seed(0)
    kept = draw_samples(torch.zeros(20_000, 1, 1), 0.3, "bernoulli")
    assert kept.samples_S is None and kept.scale_B11.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (kept.scale_B11 > 0).float().mean().item() == pytest.approx(0.7, abs=0.02)
    assert draw_samples(torch.zeros(4, 1, 1), 0.0, "bernoulli") is None


@pytest.mark.parametrize("last_block_shortcut", [True, False])
def test_samples_left_out_give_what_samples_multiplied_by_zero_give(
    last_block_shortcut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(0.7, drop_path_law="count", last_block_shortcut=last_block_shortcut).double()
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    logits, gradients = logits_and_gradients(model, images)

    def computed(x: Tensor, drop: float, law: str) -> BranchSamples | None:
        kept = draw_samples(x, drop, law)
        if kept is None:
            return None
        mask = torch.zeros_like(kept.scale_B11).index_fill(0, kept.samples_S, 1)
        return BranchSamples(kept.scale_B11 * mask)

    monkeypatch.setattr("fastdeitlt.models.vit.draw_samples", computed)
    expected_logits, expected_gradients = logits_and_gradients(model, images)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-12, atol=1e-13)
    assert_same_gradients(gradients, expected_gradients, 1e-11)


def test_law_count_does_the_work_of_the_kept_samples_alone() -> None:
    images, flops = torch.zeros(10, 3, 32, 32), {}
    for law in ("bernoulli", "count"):
        model = small(0.4, drop_path_law=law, last_block_shortcut=False).train()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images)
        flops[law] = counter.get_total_flops()
    # blocks drop 0, 2 and 4 of ten samples; patches and heads keep all
    fixed = 10 * (2 * 16 * 3 * 64 * 192 + 2 * 2 * 192 * 7)
    assert flops["count"] - fixed == pytest.approx((flops["bernoulli"] - fixed) * (10 + 8 + 6) / 30)


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


def test_the_attention_kernels_operator_gives_the_same_model() -> None:
    images = torch.randn(3, 3, 32, 32)
    expected, got = (logits_and_gradients(small(attention=name), images) for name in ("sdpa", "triton"))
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
    assert_same_gradients(got[1], expected[1], 1e-5)


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
        (("deit_tiny_distilled_patch16_224", 10, 100), "100 does not divide into patches of 16. Use 96"),
        (("deit_tiny_distilled_patch16_224", 10, 8), "Use 16"),
        (("deit_tiny_distilled_patch16_224", 0), "got 0 classes"),
        (("deit_tiny_distilled_patch16_224", 10, 224, 1.0), "drop_path 1.0"),
        (("deit_tiny_distilled_patch16_224", 10, 224, 0.1, -1), "depth -1"),
    ],
)
def test_bad_students_are_refused_by_name(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_student(*arguments)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"add_layernorm": "trition"}, "expected one of auto, torch, triton; did you mean triton"),
        ({"attention": "tritn"}, "did you mean triton"),
        ({"bias_gelu": "gelu"}, "expected one of auto, torch, triton"),
        ({"drop_path_law": "batch"}, "expected one of bernoulli, count"),
    ],
)
def test_unknown_options_are_refused_by_name(option: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**option)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="expected sides of 32 pixels"):
        small()(torch.zeros(2, 3, 64, 64))


def test_flops_are_those_of_the_performance_notes() -> None:
    with torch.device("meta"):
        model = create_student("deit_base_distilled_patch16_224", 1000)
        cifar = create_student("deit_base_distilled_patch16_224", 10)
    assert flops_per_image(model) / 1e9 == pytest.approx(35.31, abs=0.01)
    assert num_parameters(cifar) / 1e6 == pytest.approx(85.8, abs=0.05)


def test_flops_are_what_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)

    monkeypatch.setattr("fastdeitlt.models.layers._softmax_attention", explicit)
    model = small(last_block_shortcut=False, attention="sdpa").train()
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(torch.zeros(1, 3, 32, 32))
    assert flops_per_image(model) == counter.get_total_flops()
