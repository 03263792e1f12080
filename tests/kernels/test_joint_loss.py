"""The joint loss kernel against the float32 reference and golden vectors, losses and both gradients."""

import golden
import hypothesis
import pytest
import torch
from fastdeitlt.kernels.joint_loss import gathered, joint_loss, reference
from hypothesis import strategies as st

from fastdeitlt.core.loss import joint_loss as public_joint_loss
from fastdeitlt.data.sets.counts import drw_weights
from fastdeitlt.errors import UserError

GPU = torch.cuda.is_available()
TOLERANCES = {torch.float32: (1e-5, 3e-6 if GPU else 1e-6), torch.float16: (1e-5, 2e-3), torch.bfloat16: (1e-5, 1e-2)}
"""Type -> relative error of the losses (float32 inside), error of a gradient as a share of the largest."""
LOSS_ATOL, SMALLEST_GRADIENT = (3e-6, 1e-1) if GPU else (1e-7, 1e-3)
"""A GPU's exponential and logarithm are right to 2^-22 of 1: what cancels to less keeps that error."""

VARIANTS = {
    "plain": {},
    "mixed": {"mix": True, "smoothing": 0.1},
    "drw": {"mix": True, "smoothing": 0.1, "weights": True, "class_map": True},
    "cls_weights": {"mix": True, "smoothing": 0.1, "cls_weights": True},
    "prior": {"log_prior": True, "smoothing": 0.1},
    "normaliser": {"weights": True, "normaliser": True, "alpha": 0.3},
    "hard_ignores_tau": {"weights": True, "tau": 3.0},
    "soft": {"soft": True, "tau": 3.0},
    "soft_mapped": {"soft": True, "tau": 0.7, "weights": True, "class_map": True},
    "bce": {"mix": True, "smoothing": 0.1, "bce": True},
    "bce_weights": {"bce": True, "cls_weights": True},
}


def example(batch, num_classes, device, dtype=torch.float32, seed=0, teacher_classes=None, scale=2.0, **variant):
    """Positional and keyword arguments of the op."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    def vector():
        return (torch.rand(num_classes, generator=generator) + 0.1).to(device)

    def classes():
        return torch.randint(0, num_classes, (batch,), generator=generator).to(device)

    teacher_classes = teacher_classes or num_classes
    arguments = [normal(batch, num_classes), normal(batch, num_classes), classes(), normal(batch, teacher_classes)]
    options = {k: v for k, v in variant.items() if k in ("smoothing", "tau", "alpha", "soft", "bce")}
    if variant.get("mix"):
        options |= {"partner": classes(), "lam": torch.tensor(0.37, device=device)}
    for name in ("weights", "cls_weights", "log_prior"):
        if variant.get(name):
            options[name] = vector()
    if variant.get("class_map"):
        options["class_map"] = (torch.randperm(teacher_classes, generator=generator) % num_classes).to(device)
    if variant.get("normaliser"):
        options["normaliser"] = torch.tensor(1.7, device=device)
    return arguments, options


def with_gradients(loss, arguments, options, upstream=(1.0, 0.0, 0.0)):
    cls_logits, dist_logits, labels, teacher_logits = arguments
    heads = [logits.detach().clone().requires_grad_() for logits in (cls_logits, dist_logits)]
    losses = loss(*heads, labels, teacher_logits, **options)
    used = [value * factor for value, factor in zip(losses, upstream, strict=True) if factor]
    return losses, torch.autograd.grad(sum(used), heads, allow_unused=True, materialize_grads=True)


def assert_matches(arguments, options, upstream=(1.0, 0.0, 0.0)):
    losses, gradients = with_gradients(joint_loss, arguments, options, upstream)
    wide = [x.float() if x.is_floating_point() else x for x in arguments]
    expected_losses, expected_gradients = with_gradients(reference, wide, options, upstream)
    loss_error, gradient_error = TOLERANCES[arguments[0].dtype]
    torch.testing.assert_close(losses, expected_losses, rtol=loss_error, atol=LOSS_ATOL)
    for got, expected in zip(gradients, expected_gradients, strict=True):
        assert got.dtype == arguments[0].dtype
        largest = expected.abs().max().item()
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=gradient_error * max(largest, SMALLEST_GRADIENT))


@golden.JOINT_LOSSES
def test_golden_vectors_through_the_kernel(case, device):
    golden.assert_joint_loss(case, "triton", device, LOSS_ATOL)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_variant_and_type_matches_the_reference(variant, dtype, device):
    assert_matches(*example(5, 37, device, dtype, **VARIANTS[variant]))


@pytest.mark.parametrize("batch, num_classes", [(1, 1), (1, 2), (3, 63), (6, 1000), (2, 8142), (2, 9001)])
def test_odd_sizes_and_rows_longer_than_a_block_match_the_reference(batch, num_classes, device):
    assert_matches(*example(batch, num_classes, device, **VARIANTS["drw"]))


def test_batches_longer_than_a_reduction_block_match_the_reference(device, monkeypatch):
    monkeypatch.setitem(joint_loss.__globals__, "REDUCE_BLOCK", 4)
    assert_matches(*example(9, 5, device, **VARIANTS["drw"]))


@pytest.mark.parametrize("variant", ["soft_mapped", "bce"])
def test_long_rows_match_the_reference_in_the_other_variants(variant, device):
    assert_matches(*example(2, 9001, device, **VARIANTS[variant]))


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.integers(1, 9), st.integers(1, 70), st.sampled_from(sorted(VARIANTS)), st.integers(0, 99))
def test_any_shape_and_variant_matches_the_reference(batch, num_classes, variant, seed):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert_matches(*example(batch, num_classes, device, seed=seed, **VARIANTS[variant]))


@pytest.mark.parametrize("teacher_classes", [7, 100])
def test_a_teacher_with_other_classes_is_mapped(teacher_classes, device):
    assert_matches(*example(4, 20, device, teacher_classes=teacher_classes, class_map=True, weights=True))


@pytest.mark.parametrize("upstream", [(0.0, 2.0, 0.0), (0.0, 0.0, 3.0), (0.5, -1.0, 2.0)])
def test_each_loss_is_differentiable_with_its_upstream_gradient(upstream, device):
    assert_matches(*example(4, 11, device, **VARIANTS["drw"]), upstream)


def test_heads_that_are_columns_of_one_matrix_are_read_in_place(device):
    (cls_logits, dist_logits, *rest), options = example(4, 24, device, **VARIANTS["drw"])
    both = torch.cat([cls_logits, dist_logits], 1)
    views = [both[:, :24], both[:, 24:], *rest]
    torch.testing.assert_close(joint_loss(*views, **options), joint_loss(cls_logits, dist_logits, *rest, **options))


@pytest.mark.parametrize("variant", ["mixed", "soft", "bce"])
def test_logits_of_ten_thousand_give_finite_exact_losses(variant, device):
    assert_matches(*example(4, 50, device, scale=1e4, **VARIANTS[variant]))


def test_minus_infinity_on_other_classes_costs_nothing(device):
    (cls_logits, dist_logits, labels, teacher), options = example(3, 12, device)
    for logits, keep in ((cls_logits, labels), (dist_logits, teacher.argmax(1))):
        kept = logits.gather(1, keep[:, None])
        logits[:, ::2] = -torch.inf
        logits.scatter_(1, keep[:, None], kept)
    assert_matches([cls_logits, dist_logits, labels, teacher], options)


def test_classes_whose_teacher_logits_are_all_minus_infinity_choose_the_first(device):
    (cls_logits, dist_logits, labels, teacher), options = example(2, 12, device, weights=True)
    teacher[0] = -torch.inf
    assert_matches([cls_logits, dist_logits, labels, teacher], options)


@pytest.mark.parametrize("base", ["ce", "bce", "balanced_softmax", "logit_adjustment"])
def test_classes_without_images_change_nothing_for_the_others(base, device):
    """Their DRW weight is 0 and their prior tiny; a teacher that chooses one adds nothing to the DIST loss."""
    counts = [50, 0, 20, 0, 3, 1]
    arguments, _ = example(6, 6, device)
    arguments[3][0] = torch.tensor([0.0, 9.0, 0.0, 0.0, 0.0, 0.0])
    options = {"base": base, "weights": drw_weights(counts, 0.999).to(device)}
    if base in ("balanced_softmax", "logit_adjustment"):
        options["counts"] = torch.tensor(counts, device=device)
    got, expected = (
        with_gradients(public_joint_loss, arguments, options | {"impl": impl}) for impl in ("triton", "torch")
    )
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not got[1][1][0].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("own", [True, False], ids=["batch's own sum", "normaliser"])
def test_a_term_whose_weights_are_all_zero_is_zero(own, smoothing, device):
    arguments, options = example(4, 12, device)
    weights = torch.ones(12, device=device)
    weights[torch.cat((arguments[2], arguments[3].argmax(1)))] = 0
    options |= {"weights": weights, "cls_weights": weights, "smoothing": smoothing}
    if not own:
        options["normaliser"] = torch.zeros((), device=device)
    for loss in (joint_loss, reference):
        losses, gradients = with_gradients(loss, arguments, options)
        assert not any(value.any() for value in (*losses, *gradients))


def test_tied_teacher_logits_choose_the_first(device):
    arguments, options = example(2, 9000, device, weights=True)
    arguments[3] = torch.zeros_like(arguments[3])
    arguments[3][0, [77, 5000]] = 1.0
    assert_matches(arguments, options)


@pytest.mark.parametrize("bad", [-1, 12, 2**40])
def test_a_label_out_of_range_gives_nan_not_a_neighbour(bad, device):
    arguments, options = example(3, 12, device)
    arguments[2][1] = bad
    losses = joint_loss(*arguments, **options)
    assert losses.cls_loss.isnan() and losses.dist_loss.isfinite()


def test_rows_beyond_two_to_the_31_elements_are_addressed(device):
    stride = 2**30
    store = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=device)
    (cls_logits, dist_logits, *rest), options = example(3, 10, device, torch.bfloat16)
    far = store.as_strided((3, 10), (stride, 1))
    far.copy_(cls_logits)
    expected = joint_loss(cls_logits, dist_logits, *rest, **options)
    torch.testing.assert_close(joint_loss(far, dist_logits, *rest, **options), expected, rtol=0, atol=0)


def test_two_runs_give_the_same_bits(device):
    arguments, options = example(9, 130, device, torch.bfloat16, **VARIANTS["drw"])
    first, second = (with_gradients(joint_loss, arguments, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True))


@pytest.mark.parametrize("variant", ["plain", "drw", "soft_mapped"])
def test_ops_are_registered_correctly(variant, device):
    arguments, options = example(3, 10, device, **VARIANTS[variant])
    cls_logits, dist_logits, labels, teacher = arguments
    target, spec = gathered(labels, options)
    inputs = [cls_logits, dist_logits, teacher, *target, *spec]
    heads = [logits.requires_grad_() for logits in (cls_logits, dist_logits)]
    torch.library.opcheck(torch.ops.fastdeitlt.joint_loss, (*heads, *inputs[2:]))
    outputs = torch.ops.fastdeitlt.joint_loss(*(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs))
    one = torch.ones((), device=device)
    backward = (one, None, one, *outputs[3:], *(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs))
    torch.library.opcheck(torch.ops.fastdeitlt.joint_loss_backward, backward)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"cls_logits": lambda x: x.double()},
            "cls_logits: got dtype float64, expected float32 or float16 or bfloat16",
        ),
        ({"cls_logits": lambda x: x.T.contiguous().T}, r"cls_logits: got strides \(1, 4\), expected 1 in the last"),
        ({"dist_logits": lambda x: x[:, :5]}, r"dist_logits: got shape \(4, 5\), expected \(4, 6\)"),
        ({"dist_logits": lambda x: x.half()}, "dist_logits: got dtype float16, expected float32"),
        ({"labels": lambda x: x.int()}, "labels: got dtype int32, expected int64"),
        ({"labels": lambda x: x[:3]}, r"labels: got shape \(3,\), expected \(4,\)"),
        ({"teacher_logits": lambda x: x.to("meta")}, "teacher_logits: got device meta, expected"),
    ],
)
def test_arguments_the_kernel_cannot_take_are_named_before_any_launch(change, message, device):
    (cls_logits, dist_logits, labels, teacher), options = example(4, 6, device)
    named = {"cls_logits": cls_logits, "dist_logits": dist_logits, "labels": labels, "teacher_logits": teacher}
    named |= {name: alter(named[name]) for name, alter in change.items()}
    with pytest.raises(UserError, match=message):
        joint_loss(**named, **options)
