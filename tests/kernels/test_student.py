"""The student with its kernels on against the student in torch: forward, backward, golden vectors, one graph."""

import golden
import pytest
import torch

from fastdeitlt import config
from fastdeitlt.core.joint import JointForward, compiled
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.models.fold import fold_batchnorm
from fastdeitlt.models.teacher import Teacher

TRITON = {"attention": "triton", "add_layernorm": "triton", "bias_gelu": "triton"}
TORCH = {"attention": "sdpa", "add_layernorm": "torch", "bias_gelu": "torch"}
GPU = torch.cuda.is_available()
TOLERANCE = 4e-2 if GPU else 2e-5
"""Largest error as a share of the largest value: bfloat16 on a GPU, where attention takes no float32."""


def logits_and_gradients(model, images, compile=lambda model: model):
    torch.manual_seed(3)
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=GPU):
        logits = torch.stack(compile(model.train())(images)).float()
    (logits.square() * torch.arange(1, logits.numel() + 1, device=logits.device).view(logits.shape)).mean().backward()
    return {"logits": logits.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name] - value).abs().max() / value.abs().max().clamp_min(1e-12)
        assert error <= TOLERANCE, f"{name}: {error}"


def student(device, **options):
    torch.manual_seed(0)
    return create_student("deit_tiny_distilled_patch8_32", 7, depth=2, **options).to(device)


@pytest.mark.parametrize("law", ["bernoulli", "count"])
@pytest.mark.parametrize("shortcut", [True, False], ids=["two_rows_last", "all_rows"])
def test_forward_and_backward_equal_torchs(law, shortcut, device):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"drop_path": 0.6, "drop_path_law": law, "last_block_shortcut": shortcut}
    expected = logits_and_gradients(student(device, **TORCH, **options), images)
    assert_same(logits_and_gradients(student(device, **TRITON, **options), images), expected)


def test_golden_logits_and_gradient_norms_through_add_layernorm(device):
    expected = golden.load("student_forward")
    model = create_student("deit_base_distilled_patch16_224", 17, depth=2, drop_path=0.0, add_layernorm="triton")
    golden.fill(model, expected["seed"])
    images = golden.images(expected["seed"], (2, 3, 224, 224)).to(device)
    model.to(device)
    with torch.autocast("cuda", torch.bfloat16, enabled=GPU):
        cls_logits, dist_logits = (logits.float() for logits in model(images))
    tolerance = 6e-2 if GPU else 2e-4
    for logits, values in ((cls_logits, expected["cls"]), (dist_logits, expected["dist"])):
        torch.testing.assert_close(logits.cpu(), torch.tensor(values), rtol=tolerance, atol=tolerance / 100)
    (cls_logits.square().mean() + dist_logits.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(expected["grad_norms"][name], rel=tolerance), name


def test_the_compiled_student_is_one_graph_and_equal(device):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    model = student(device, **TRITON, drop_path=0.5, drop_path_law="count")
    expected = logits_and_gradients(model, images)
    expected = {name: value.clone() for name, value in expected.items()}
    torch._dynamo.reset()
    compiled = logits_and_gradients(
        model, images, lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")
    )
    assert_same(compiled, expected)
    torch._dynamo.reset()


def test_in_eval_mode_features_and_logits_equal_torchs(device):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    ours, torchs = (student(device, **options).eval() for options in (TRITON, TORCH))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=GPU):
        got, expected = ({"f": m.forward_features(images).float(), "l": m(images).float()} for m in (ours, torchs))
    assert_same(got, expected)


def losses_and_gradients(cfg, device, run):
    """Three losses and every gradient of a mixed batch."""
    torch.manual_seed(0)
    student = create_student(num_classes=7, **cfg.student.architecture).to(device).train()
    network = fold_batchnorm(create_teacher("resnet8", 7).eval()).to(memory_format=torch.channels_last)
    joint = JointForward(student, Teacher(network, 7).to(device), [5] * 7, cfg, device)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    labels, weights = torch.arange(4, device=device), torch.rand(7, generator=generator).to(device) + 0.5
    lam = torch.full((), 0.3, device=device)
    losses = run(joint)(images, labels, labels.flip(0), lam, weights, None)
    losses.loss.backward()
    return {"losses": torch.stack(losses).detach()} | {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize("kernels", [{}, TRITON], ids=["auto", "kernels"])
def test_the_compiled_step_as_shipped_equals_eager_float32(kernels, device, monkeypatch):
    """On a GPU by inductor in bfloat16; on a CPU, whose compiler takes long, the same graph run by torch."""
    settings = {"student.name": "deit_tiny_distilled_patch8_32", "student.depth": 1, "student.drop_path": 0.0}
    shipped = config.build(settings | {f"student.{op}": impl for op, impl in kernels.items()})
    exact = config.build(settings | {f"student.{op}": impl for op, impl in TORCH.items()} | {"train.precision": "fp32"})
    if not GPU:
        shipped = shipped.model_copy(update={"train": exact.train})
        compile = torch.compile

        def without_inductor(module, options, **how):
            return compile(module, backend="aot_eager", **how)

        monkeypatch.setattr(torch, "compile", without_inductor)
    torch._dynamo.reset()
    got = losses_and_gradients(shipped, device, compiled)
    expected = losses_and_gradients(exact, device, lambda joint: joint)
    torch._dynamo.reset()
    for name in [key for key in got if key.endswith("qkv.bias")]:  # the keys' third is rounding alone
        for found in (got, expected):
            found[name] = found[name].view(3, -1)[[0, 2]]
    assert_same(got, expected)
