"""Losses of the teachers against the references' numbers and against their formulas in float64."""

from functools import partial

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdeitlt.config import TeacherTrainingConfig
from fastdeitlt.data.sets.counts import drw_weights
from fastdeitlt.teachers import (
    balanced_softmax_loss,
    cb_focal_loss,
    ldam_loss,
    logit_adjustment_loss,
    paco_loss,
    vs_loss,
)
from fastdeitlt.teachers.losses import build_loss, ldam_margins

COUNTS = [500, 120, 33, 12, 7, 2, 1]
EQUAL = [9] * 7
LOSSES = ("ce", "focal", "ldam", "vs", "balanced_softmax", "logit_adjustment")


def batch(size: int = 5, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(size, classes, generator=generator).requires_grad_()
    return logits, torch.randint(classes, (size,), generator=generator)


@pytest.mark.parametrize("case", golden.load("ldam"))
def test_ldam_gives_the_reference_loss_and_gradient(case: dict) -> None:
    arrays = golden.arrays("ldam", case)
    logits = arrays["logits"].requires_grad_()
    weights = drw_weights(arrays["counts"].tolist(), case["beta"]) if case["drw"] else None
    loss = ldam_loss(logits, arrays["labels"], arrays["counts"], case["max_m"], case["s"], weights)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    torch.testing.assert_close(logits.grad, arrays["grad"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", golden.load("paco"))
def test_paco_gives_the_reference_loss_and_gradients(case: dict) -> None:
    arrays = golden.arrays("paco", case)
    features, sup_logits = (arrays[name].requires_grad_() for name in ("features", "sup_logits"))
    constants = [case[name] for name in ("alpha", "beta", "gamma", "temperature", "K")]
    loss = paco_loss(features, arrays["labels"], sup_logits, arrays["counts"], *constants)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    torch.testing.assert_close(features.grad, arrays["dfeatures"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sup_logits.grad, arrays["dlogits"], rtol=1e-5, atol=1e-6)


def test_autocast_changes_neither_loss_nor_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(18, 32, generator=generator)).requires_grad_()
    logits, labels = batch()
    paco = partial(paco_loss, features, torch.arange(18) % 7, logits, COUNTS, 0.05, 1.0, 1.0, 0.05, 8)
    losses = [build_loss(TeacherTrainingConfig(loss=loss), COUNTS, torch.device("cpu")) for loss in LOSSES]
    others = [(partial(loss, logits, labels, None), [logits]) for loss in losses]
    for compute, inputs in [(paco, [features, logits]), *others]:
        plain = compute()
        with torch.autocast("cpu", torch.bfloat16):
            cast = compute()
        assert torch.equal(cast, plain)
        for got, expected in zip(*(torch.autograd.grad(loss, inputs) for loss in (cast, plain)), strict=True):
            assert torch.equal(got, expected)


def test_ldam_margins_of_cifar10_lt() -> None:
    margins = ldam_margins([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
    expected = [0.158, 0.180, 0.204, 0.232, 0.264, 0.300, 0.341, 0.387, 0.441, 0.5]
    assert margins.tolist() == pytest.approx(expected, abs=6e-4)


def test_losses_are_cross_entropy_when_nothing_is_to_balance() -> None:
    logits, labels = batch()
    expected = F.cross_entropy(logits, labels)
    for loss in (
        ldam_loss(logits, labels, COUNTS, max_m=0.0, s=1.0),
        cb_focal_loss(logits, labels, gamma=0.0),
        vs_loss(logits, labels, EQUAL),
        logit_adjustment_loss(logits, labels, COUNTS, tau=0.0),
        balanced_softmax_loss(logits, labels, EQUAL),
    ):
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("size", [1, 5])
def test_vs_loss_follows_its_equation(size: int) -> None:
    logits, labels = batch(size)
    x, n, weights = logits.detach().double().numpy(), np.array(COUNTS, float), np.linspace(0.2, 2, 7)
    adjusted = x * (n / n.max()) ** 0.3 + 1.2 * np.log(n / n.sum())
    nll = np.log(np.exp(adjusted).sum(1)) - adjusted[np.arange(size), labels]
    expected = (nll * weights[labels]).sum() / weights[labels].sum()
    assert vs_loss(logits, labels, COUNTS, 1.2, 0.3, torch.tensor(weights).float()).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_focal_loss_follows_its_equation() -> None:
    logits, labels = batch()
    x, weights = logits.detach().double().numpy(), np.linspace(0.2, 2, 7)
    p = (np.exp(x) / np.exp(x).sum(1, keepdims=True))[np.arange(5), labels]
    expected = (weights[labels] * (1 - p) ** 2.0 * -np.log(p)).mean()
    loss = cb_focal_loss(logits, labels, 2.0, torch.tensor(weights).float())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_balanced_softmax_is_logit_adjustment_of_one() -> None:
    logits, labels = batch()
    torch.testing.assert_close(
        balanced_softmax_loss(logits, labels, COUNTS), logit_adjustment_loss(logits, labels, COUNTS)
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_class_without_images_and_low_precision_stay_finite(loss: str, dtype: torch.dtype) -> None:
    cfg = TeacherTrainingConfig(loss=loss)
    logits, labels = batch()
    low = (40 * logits).to(dtype)
    compute = build_loss(cfg, [*COUNTS[:-1], 0], torch.device("cpu"))
    weights = torch.rand(7) + 0.1
    value = compute(low, labels, weights)
    value.backward()
    assert value.dtype == torch.float32
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    torch.testing.assert_close(value, compute(low.float(), labels, weights))


def test_focal_gradient_is_finite_where_the_model_is_certain() -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    cb_focal_loss(logits, torch.tensor([0]), gamma=0.5).backward()
    assert torch.equal(logits.grad, torch.zeros(1, 2))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_counts_may_be_a_list_an_array_or_a_tensor(kind: type) -> None:
    logits, labels = batch()
    torch.testing.assert_close(ldam_loss(logits, labels, kind(COUNTS)), ldam_loss(logits, labels, COUNTS))


def test_the_rarest_class_gains_from_each_balanced_loss() -> None:
    """With flat logits, a balanced loss pulls the rarest class's logit up harder than plain cross-entropy."""
    labels = torch.tensor([6])
    gradients = {}
    for loss in ("ce", "vs", "balanced_softmax", "logit_adjustment"):
        logits = torch.zeros(1, 7, requires_grad=True)
        build_loss(TeacherTrainingConfig(loss=loss), COUNTS, torch.device("cpu"))(logits, labels, None).backward()
        gradients[loss] = -logits.grad[0, 6].item()
    # vector scaling multiplies the rarest logit by a small factor, which the paper compensates by training longer
    assert gradients["balanced_softmax"] == pytest.approx(gradients["logit_adjustment"], rel=1e-5)
    assert gradients["balanced_softmax"] > gradients["ce"] > gradients["vs"]


def test_no_loss_waits_for_the_device() -> None:
    """Fake tensors have no values, so anything that reads one on the host raises."""
    with FakeTensorMode():
        counts = torch.tensor(COUNTS)
        logits, labels, weights = torch.randn(5, 7, requires_grad=True), torch.zeros(5).long(), torch.ones(7)
        for loss in (
            ldam_loss(logits, labels, counts, weights=weights),
            cb_focal_loss(logits, labels, 1.0, weights),
            vs_loss(logits, labels, counts, weights=weights),
            balanced_softmax_loss(logits, labels, counts, weights),
            logit_adjustment_loss(logits, labels, counts, weights=weights),
            paco_loss(torch.randn(18, 4), torch.zeros(18).long(), logits, counts, 0.05, 1.0, 1.0, 0.2, 8),
        ):
            loss.backward()
