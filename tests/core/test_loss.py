"""The joint loss against golden vectors of the official code and against torch's own losses."""

import golden
import hypothesis
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import strategies as st

from fastdeitlt import config
from fastdeitlt.core.joint import JointForward
from fastdeitlt.core.loss import joint_loss
from fastdeitlt.data.sets.counts import drw_weights
from fastdeitlt.errors import UserError

B, K = 6, 11


def batch(num_classes=K, seed=0, dtype=torch.float32, teacher_classes=None):
    """cls_logits, dist_logits, labels, teacher_logits."""
    generator = torch.Generator().manual_seed(seed)

    def logits(classes):
        return (torch.randn(B, classes, generator=generator) * 2).to(dtype)

    labels = torch.randint(0, num_classes, (B,), generator=generator)
    return logits(num_classes), logits(num_classes), labels, logits(teacher_classes or num_classes)


def vector(seed=0, num_classes=K):
    return torch.rand(num_classes, generator=torch.Generator().manual_seed(seed)) + 0.1


def dense_target(labels, partner, lam, smoothing, num_classes=K):
    """[B, K] in float64, as timm's Mixup builds it."""
    one_hot = lam * F.one_hot(labels, num_classes).double() + (1 - lam) * F.one_hot(partner, num_classes)
    return one_hot * (1 - smoothing) + smoothing / num_classes


@golden.JOINT_LOSSES
def test_official_losses_and_gradients_are_reproduced(case):
    golden.assert_joint_loss(case, "torch")


@hypothesis.given(st.integers(1, 40), st.floats(0, 1), st.floats(0, 0.5), st.integers(0, 99))
def test_the_mixed_smoothed_loss_is_the_cross_entropy_with_the_dense_target(num_classes, lam, smoothing, seed):
    cls_logits, dist_logits, labels, teacher = batch(num_classes, seed, torch.float64)
    partner = labels.flip(0)
    target = dense_target(labels, partner, lam, smoothing, num_classes)
    losses = joint_loss(cls_logits, dist_logits, labels, teacher, partner=partner, lam=lam, smoothing=smoothing)
    torch.testing.assert_close(losses.cls_loss, F.cross_entropy(cls_logits, target), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(losses.dist_loss, F.cross_entropy(dist_logits, teacher.argmax(1)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_weighs_the_plain_means_by_alpha(alpha):
    losses = joint_loss(*batch(), alpha=alpha)
    torch.testing.assert_close(losses.loss, (1 - alpha) * losses.cls_loss + alpha * losses.dist_loss)


def test_class_weights_of_both_heads_are_torchs_weighted_means():
    cls_logits, dist_logits, labels, teacher = batch()
    losses = joint_loss(
        cls_logits, dist_logits, labels, teacher, smoothing=0.1, weights=vector(1), cls_weights=vector(2)
    )
    expected = F.cross_entropy(cls_logits, labels, weight=vector(2), label_smoothing=0.1)
    torch.testing.assert_close(losses.cls_loss, expected)
    torch.testing.assert_close(losses.dist_loss, F.cross_entropy(dist_logits, teacher.argmax(1), weight=vector(1)))


def test_the_class_map_leads_from_teacher_to_student_classes():
    cls_logits, dist_logits, labels, teacher = batch(teacher_classes=3)
    class_map = torch.tensor([7, 0, 10])
    losses = joint_loss(cls_logits, dist_logits, labels, teacher, class_map=class_map)
    torch.testing.assert_close(losses.dist_loss, F.cross_entropy(dist_logits, class_map[teacher.argmax(1)]))


def test_bce_is_torchs_mean_over_images_and_classes():
    cls_logits, dist_logits, labels, teacher = batch()
    partner, lam = labels.flip(0), 0.3
    losses = joint_loss(
        cls_logits, dist_logits, labels, teacher, partner=partner, lam=lam, smoothing=0.1, base="bce",
        cls_weights=vector(),
    )  # fmt: skip
    target = dense_target(labels, partner, lam, 0.1).float()
    expected = F.binary_cross_entropy_with_logits(cls_logits, target, weight=vector())
    torch.testing.assert_close(losses.cls_loss, expected)


@pytest.mark.parametrize("base", ["balanced_softmax", "logit_adjustment"])
def test_the_prior_of_the_training_counts_is_added_to_the_cls_logits(base):
    cls_logits, dist_logits, labels, teacher = batch()
    counts = torch.arange(K, 0, -1) * 7
    losses = joint_loss(cls_logits, dist_logits, labels, teacher, base=base, counts=counts)
    torch.testing.assert_close(losses.cls_loss, F.cross_entropy(cls_logits + counts.log(), labels))
    torch.testing.assert_close(losses.dist_loss, joint_loss(*batch()).dist_loss)


def test_a_class_without_training_images_keeps_the_loss_finite():
    counts = torch.tensor([10] * (K - 1) + [0])
    losses = joint_loss(*batch(), base="balanced_softmax", counts=counts, smoothing=0.1)
    assert losses.loss.isfinite()


def test_soft_distillation_is_the_official_kl():
    cls_logits, dist_logits, labels, teacher = batch()
    tau = 2.5
    losses = joint_loss(cls_logits, dist_logits, labels, teacher, distillation="soft", tau=tau)
    log_q, log_p = (dist_logits / tau).log_softmax(1), (teacher / tau).log_softmax(1)
    expected = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * tau * tau / dist_logits.numel()
    torch.testing.assert_close(losses.dist_loss, expected)


def test_soft_weights_tilt_the_teacher_and_the_map_reorders_it():
    cls_logits, dist_logits, labels, teacher = batch()
    order = torch.randperm(K, generator=torch.Generator().manual_seed(5))
    options = {"distillation": "soft", "weights": vector()}
    mapped = joint_loss(cls_logits, dist_logits, labels, teacher, class_map=order, **options)
    reordered = torch.empty_like(teacher)
    reordered[:, order] = teacher
    direct = joint_loss(cls_logits, dist_logits, labels, reordered, **options)
    torch.testing.assert_close(mapped.dist_loss, direct.dist_loss)
    probabilities = reordered.softmax(1) * vector()
    probabilities /= probabilities.sum(1, keepdim=True)
    expected = F.kl_div(dist_logits.log_softmax(1), probabilities, reduction="sum") / dist_logits.numel()
    torch.testing.assert_close(direct.dist_loss, expected)


def test_bfloat16_logits_are_computed_in_float32_inside_autocast():
    arguments = batch(dtype=torch.bfloat16)
    expected = joint_loss(*(x.float() if x.is_floating_point() else x for x in arguments), weights=vector())
    with torch.autocast("cpu", torch.bfloat16):
        losses = joint_loss(*arguments, weights=vector())
    assert all(loss.dtype == torch.float32 for loss in losses)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("distillation", ["hard", "soft"])
def test_no_gradient_reaches_the_teacher(distillation):
    cls_logits, dist_logits, labels, teacher = batch()
    teacher.requires_grad_()
    cls_logits.requires_grad_()
    joint_loss(cls_logits, dist_logits, labels, teacher, distillation=distillation).loss.backward()
    assert teacher.grad is None and cls_logits.grad is not None


def test_logits_of_ten_thousand_and_minus_infinity_stay_exact():
    cls_logits, dist_logits, labels, teacher = batch()
    cls_logits = cls_logits * 1e4
    dist_logits[:, ::2] = -torch.inf
    dist_logits.scatter_(1, teacher.argmax(1, keepdim=True), 1.0)
    cls_logits.requires_grad_()
    losses = joint_loss(cls_logits, dist_logits, labels, teacher)
    losses.loss.backward()
    torch.testing.assert_close(losses.cls_loss, F.cross_entropy(cls_logits, labels))
    assert losses.loss.isfinite() and cls_logits.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"distillation": "soft"}, {"base": "bce"}], ids=str)
def test_nothing_is_copied_to_the_host(options):
    """A meta tensor has no values: any host read in forward or backward raises."""
    cls_logits, dist_logits, labels, teacher = (x.to("meta") for x in batch())
    heads = [logits.requires_grad_() for logits in (cls_logits, dist_logits)]
    shared = {"weights": vector().to("meta"), "class_map": torch.arange(K, device="meta"), "smoothing": 0.1}
    lam = torch.empty((), device="meta")
    joint_loss(*heads, labels, teacher, partner=labels, lam=lam, **shared, **options).loss.backward()
    assert heads[0].grad.shape == (B, K)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_compiled_loss_is_one_graph_that_a_new_lam_does_not_recompile(impl):
    cls_logits, dist_logits, labels, teacher = batch()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(joint_loss, fullgraph=True, backend=counter)
    for lam in (0.2, 0.7, 1.0):
        options = {"partner": labels.flip(0), "lam": torch.tensor(lam), "weights": vector(), "impl": impl}
        gradients = []
        for loss in (compiled, joint_loss):
            heads = [logits.clone().requires_grad_() for logits in (cls_logits, dist_logits)]
            loss(*heads, labels, teacher, **options).loss.backward()
            gradients += [head.grad for head in heads]
        torch.testing.assert_close(gradients[:2], gradients[2:])
    assert counter.frame_count == 1


ERRORS = [
    (
        {"cls_logits": torch.zeros(B)},
        r"cls_logits: got torch.float32 \(6,\) on cpu, expected floating \(batch, classes\)",
    ),
    ({"cls_logits": torch.zeros(0, K)}, "not empty"),
    ({"dist_logits": torch.zeros(B, 3)}, r"dist_logits: got .* expected torch.float32 \(6, 11\) on cpu, as cls_logits"),
    ({"dist_logits": torch.zeros(B, K).half()}, r"dist_logits: got .* expected torch.float32 \(6, 11\)"),
    ({"teacher_logits": torch.zeros(2, K)}, r"teacher_logits: got torch.float32 \(2, 11\) on cpu, expected 6 rows"),
    ({"teacher_logits": torch.zeros(B, K, device="meta")}, "expected 6 rows on cpu"),
    ({"teacher_logits": torch.zeros(B, 5)}, "teacher_logits: got 5 classes, expected 11. Use hard distillation with a"),
    ({"labels": torch.zeros(B, K)}, r"labels: got torch.float32 \(6, 11\) on cpu, expected torch.int64 \(6,\)"),
    ({"labels": torch.zeros(B, dtype=torch.int32)}, r"labels: got torch.int32 \(6,\)"),
    ({"lam": 0.3}, "lam: got a value with partner=None"),
    ({"partner": torch.zeros(B, dtype=torch.int64)}, "partner: got a value with lam=None"),
    ({"partner": torch.zeros(B, dtype=torch.int64), "lam": 1.2}, "lam: got 1.2, expected 0 <= lam <= 1"),
    ({"partner": torch.zeros(B, dtype=torch.int64), "lam": torch.ones(1)}, "expected a floating 0-d tensor on cpu"),
    ({"smoothing": 1.0}, "smoothing: got 1.0, expected 0 <= smoothing < 1"),
    ({"alpha": -0.1}, "alpha: got -0.1"),
    ({"tau": 0.0}, "tau: got 0.0"),
    ({"weights": torch.ones(3)}, r"weights: got torch.float32 \(3,\) on cpu, expected torch.float32 \(11,\)"),
    ({"cls_weights": torch.ones(K).double()}, "cls_weights: got torch.float64"),
    ({"class_map": torch.zeros(3, dtype=torch.int64)}, r"class_map: got torch.int64 \(3,\)"),
    ({"distillation": "medium"}, "distillation: got 'medium', expected one of hard, soft"),
    ({"base": "focal"}, "base: got 'focal', expected one of ce, bce, balanced_softmax, logit_adjustment"),
    ({"impl": "cuda"}, "got impl 'cuda', expected one of auto, torch, triton"),
    ({"base": "balanced_softmax"}, "counts: got None with base=balanced_softmax"),
    ({"counts": torch.ones(K)}, "counts: got a tensor with base=ce"),
    ({"normaliser": torch.ones(2)}, r"normaliser: got torch.float32 \(2,\) on cpu, expected torch.float32 \(\)"),
]


@pytest.mark.parametrize("change, message", ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_bad_arguments_are_named_with_what_is_expected(change, message):
    names = ("cls_logits", "dist_logits", "labels", "teacher_logits")
    with pytest.raises(UserError, match=message):
        joint_loss(**{**dict(zip(names, batch(), strict=True)), **change})


class FixedHeads(torch.nn.Module):
    """A student, or a teacher of one head, whose logits are set from outside."""

    class_map = None

    def __init__(self, *logits, logit_scale=1.0):
        super().__init__()
        self.logits, self.logit_scale = logits if len(logits) > 1 else logits[0], logit_scale

    def forward(self, images_BCHW):
        return self.logits


@pytest.mark.parametrize("case", ["rank", "global", "no teacher", "soft"])
def test_a_runs_loss_gives_each_head_its_weights_and_its_share(case):
    generator = torch.Generator().manual_seed(3)
    cls_logits, dist_logits, teacher_logits = torch.randn(3, 6, 4, generator=generator)
    labels, images = torch.tensor([0, 1, 2, 3, 3, 1]), torch.zeros(6, 3, 2, 2)
    dist_weights, cls_weights = torch.tensor([0.2, 0.5, 1.3, 2.0]), torch.tensor([1.6, 0.4, 0.9, 1.1])
    settings = {"loss.alpha": 0.3, "train.precision": "fp32", "train.compile": False}
    settings |= {"global": {"loss.normalise": "global"}, "soft": {"loss.distillation": "soft"}}.get(case, {})
    teacher = None if case == "no teacher" else FixedHeads(teacher_logits, logit_scale=30.0)
    student = FixedHeads(cls_logits, dist_logits)
    joint = JointForward(student, teacher, [4, 3, 2, 1], config.build(settings), torch.device("cpu"))
    found = joint(images, labels, None, None, dist_weights, cls_weights)
    if case == "global":
        found = found.joined(0.3)
    cls_loss = F.cross_entropy(cls_logits, labels, weight=cls_weights)
    decided = labels if case == "no teacher" else teacher_logits.argmax(1)
    dist_loss = F.cross_entropy(dist_logits, decided, weight=dist_weights)
    if case == "soft":
        probabilities = (30 * teacher_logits).softmax(1) * dist_weights
        probabilities /= probabilities.sum(1, keepdim=True)
        dist_loss = F.kl_div(dist_logits.log_softmax(1), probabilities, reduction="sum") / dist_logits.numel()
    torch.testing.assert_close(found.cls_loss, cls_loss)
    torch.testing.assert_close(found.dist_loss, dist_loss)
    torch.testing.assert_close(found.loss, 0.7 * cls_loss + 0.3 * dist_loss)


@pytest.mark.parametrize("normalise", ["rank", "global"])
def test_a_micro_batch_whose_decisions_are_all_for_classes_without_images_adds_no_dist_loss(normalise):
    """Their DRW weights are 0: 0 / 0 would end a sound run."""
    heads = [torch.randn(2, 4, generator=torch.Generator().manual_seed(5)).requires_grad_() for _ in range(2)]
    teacher = FixedHeads(torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 9.0, 1.0, 0.0]]))
    cfg = config.build({"loss.normalise": normalise, "train.precision": "fp32", "train.compile": False})
    joint = JointForward(FixedHeads(*heads), teacher, [4, 0, 2, 1], cfg, torch.device("cpu"))
    labels, weights = torch.tensor([0, 2]), drw_weights([4, 0, 2, 1], 0.99)
    found = joint(torch.zeros(2, 3, 2, 2), labels, None, None, weights, None)
    if normalise == "global":
        found = found.joined(0.5)
    assert found.dist_loss == 0
    torch.testing.assert_close(found.loss, 0.5 * F.cross_entropy(heads[0], labels))
    found.loss.backward()
    assert heads[0].grad.abs().sum() > 0 and not heads[1].grad.any()
