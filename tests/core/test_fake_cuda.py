"""The steps of student and teacher, their data in torch operations and evaluation, on CUDA tensors without a GPU.

Nothing is computed: this holds that every tensor is where it must be, that the host never waits within a step, and that
the student's step is one graph for the compiler.
What it cannot hold is in fake_cuda.py; scores are taken on the CPU and need values.
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, HostWaitError, fake_cuda, outside, run_backward
from fastdeitlt.kernels import _measured
from fastdeitlt.kernels._measured import capability, gpu_name, rows_of
from functorch.compile import make_boxed_func
from image_files import decoded_set
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdeitlt import config
from fastdeitlt.core.assemble import Data, assemble
from fastdeitlt.core.batches import Batch, train_batches
from fastdeitlt.core.joint import JointForward
from fastdeitlt.data import mixup
from fastdeitlt.data.augment import transform as augment
from fastdeitlt.data.augment import warps
from fastdeitlt.data.mixup import MixDraw
from fastdeitlt.data.pixels.cache import pack
from fastdeitlt.data.pixels.resident import Resident
from fastdeitlt.data.sampler import MicroBatch, Plan
from fastdeitlt.data.teacher_plan import TeacherPlan
from fastdeitlt.errors import UserError
from fastdeitlt.evaluation import metrics
from fastdeitlt.evaluation.evaluate import OneHead, WithCosine, collect_logits
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.models.fold import fold_batchnorm
from fastdeitlt.models.teacher import Paco, Teacher
from fastdeitlt.store.manifest import Preprocess
from fastdeitlt.teachers import diagnose
from fastdeitlt.teachers.step import Step, build_objective, build_optimizer
from fastdeitlt.teachers.views import Part, StepBatch, teacher_batches

B, K, SIZE = 4, 10, 32
COUNTS = [50] * 6 + [5] * 4
SMALL = {
    "student.name": "deit_tiny_distilled_patch16_32",
    "student.depth": 1,
    "student.drop_path": 0.5,
    "student.attention": "sdpa",
    "student.add_layernorm": "torch",
    "student.bias_gelu": "torch",
    "loss.impl": "torch",
    "loss.reweight_cls": True,
    "optim.backend": "torch",
    "optim.clip_norm": 1.0,
    "optim.ema_decay": 0.9,
    "train.compile": False,
    "train.batch_size": B,
    "train.accumulate": 2,
    "train.engine": "plain",
    "train.measure_kernels": False,
}
KERNELS = {
    "student.attention": "triton",
    "student.add_layernorm": "triton",
    "student.bias_gelu": "triton",
    "loss.impl": "triton",
}
COUNT = {"student.drop_path_law": "count"}
STUDENTS = {
    "torch": {"student.depth": 2},
    "kernels": KERNELS | {"student.depth": 2},
    "flat AdamW": KERNELS | {"optim.backend": "fastdeitlt"},
    "drop path by count": COUNT,
    "drop path by count, kernels": COUNT | KERNELS,
    "float32": {"train.precision": "fp32"},
    "float8": {"train.precision": "fp8", "student.depth": 2},
    "float8, kernels": KERNELS | {"train.precision": "fp8"},
    "no clipping, no average": {"optim.clip_norm": 0.0, "optim.ema_decay": 0.0},
    "soft distillation": {"loss.distillation": "soft", "loss.tau": 2.0},
    "bce": {"loss.base": "bce"},
    "balanced softmax, kernels": KERNELS | {"loss.base": "balanced_softmax"},
    "mean over all ranks": {"loss.normalise": "global", "loss.reweight_cls": False},
}
TWICE = ("torch", "flat AdamW")
"""Names whose second step, which finds the optimizer's state there, is taken too."""


@pytest.fixture(autouse=True)
def no_fake_tensor_is_kept():
    """Constants are kept by device, and so is its name; a fake one would meet the next test."""
    yield
    for kept in (augment.affine, augment.normal_table, warps._fill, warps._pulse, gpu_name, capability, rows_of):
        kept.cache_clear()


def images(batch=B, size=SIZE, dtype=torch.bfloat16):
    return torch.randn(batch, 3, size, size, device=CUDA, dtype=dtype).contiguous(memory_format=torch.channels_last)


def mixed_batch(cfg):
    """As the fused kernel gives it."""
    labels_B = torch.arange(B, device=CUDA)
    dtype = torch.float32 if cfg.train.precision == "fp32" else torch.bfloat16
    return Batch(images(dtype=dtype), labels_B, labels_B.flip(0), torch.full((), 0.3, device=CUDA))


def small_student(cfg):
    return create_student(num_classes=K, **cfg.student.architecture)


def small_teacher(**options):
    network = fold_batchnorm(create_teacher("resnet8", K)).to(memory_format=torch.channels_last)
    return Teacher(network, K, **options)


def take_steps(cuda, cfg, student, teacher, steps=1, spoil=lambda batch: None):
    """Optimizer steps of ``train`` with re-weighting, seeds, accumulation, clipping, NaN guard and average."""
    student.to(CUDA).train()
    data = Data(COUNTS, Plan(64, B, cfg.train.accumulate, 1, 1))
    parts = assemble(cfg, data, CUDA, lambda size: teacher and teacher.to(CUDA), student)
    batch = replace(mixed_batch(cfg), place=MicroBatch(0, 0, 0, np.arange(B), np.zeros(B, int)))
    seen = []

    @contextmanager
    def watched(stage):
        seen.append(stage)
        if stage == "optimizer":
            grads = [p.grad for p in student.parameters()]
            assert all(grad.device == CUDA and grad.dtype == torch.float32 for grad in grads)
        if stage == "forward":
            spoil(batch)
        yield

    step, phase = parts.step(watched), parts.phase(max(cfg.loss.drw_epoch, 0))
    with cuda.step():
        for _ in range(steps):
            taken = step(repeat(batch), cfg.train.accumulate, phase, 1e-3)
    assert [t.device for t in (*taken.losses[-1], taken.norm)] == [CUDA] * 4
    assert all(p.grad is None for p in student.parameters())
    assert {t.device for t in parts.engine.optimizer_tensors().values()} == {CUDA}
    micro = ["data", "forward", "backward"] * cfg.train.accumulate
    assert seen == (micro + ["optimizer"] + ["average"] * bool(parts.ema)) * steps


@pytest.mark.parametrize("name", STUDENTS)
def test_a_students_step_stays_on_the_gpu(name):
    cfg = config.build(SMALL | STUDENTS[name])
    student, teacher = small_student(cfg), small_teacher()
    with fake_cuda() as cuda:
        take_steps(cuda, cfg, student, teacher, steps=2 if name in TWICE else 1)


def test_a_teacher_of_another_size_normalisation_and_order_stays_on_the_gpu():
    cfg = config.build(SMALL)
    change = {"scale_C": torch.ones(3), "shift_C": torch.zeros(3)}
    for antialias in (False, True):
        teacher = small_teacher(class_map=torch.arange(K).flip(0), img_size=28, antialias=antialias, **change)
        student = small_student(cfg)
        with fake_cuda() as cuda:
            take_steps(cuda, cfg, student, teacher)


def test_the_teacher_works_channels_last():
    """As its images and weights are; otherwise cuDNN would turn each layer's input round and back."""
    teacher, seen = small_teacher(img_size=28), []
    with fake_cuda(), torch.autocast("cuda", torch.bfloat16):
        for module in teacher.to(CUDA).modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda conv, inputs, out: seen.append(out))
        teacher(images())
    assert len(seen) == 7 and all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)


def test_without_a_teacher_the_step_stays_on_the_gpu():
    cfg = config.build(SMALL | {"loss.base": "logit_adjustment"})
    student = small_student(cfg)
    with fake_cuda() as cuda:
        take_steps(cuda, cfg, student, None)


@pytest.fixture
def compiled_once(monkeypatch):
    """``torch.compile`` up to the graphs of forward and backward, which stand for a GPU's code; counts the graphs."""
    torch._dynamo.reset()
    counter, compile = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, options=None, **how: compile(module, backend=counter, **how))
    yield
    torch._dynamo.reset()
    assert counter.frame_count == 1


@pytest.mark.parametrize("settings", [KERNELS, dict.fromkeys(KERNELS, "auto") | COUNT], ids=["kernels", "auto"])
def test_the_compiled_step_is_one_graph_on_the_gpu(settings, compiled_once, monkeypatch):
    cfg = config.build(SMALL | settings | {"train.compile": True})
    with monkeypatch.context() as there:
        there.setattr(torch.cuda, "is_available", lambda: True)
        there.setattr(torch.cuda, "current_device", lambda: 0)
        student, teacher = small_student(cfg), small_teacher(img_size=28)
    with fake_cuda() as cuda:
        take_steps(cuda, cfg, student, teacher, steps=2)


def test_auto_takes_what_was_measured_only_where_the_student_is(monkeypatch):
    """A student on the CPU of a GPU that was tuned computes, and is exported, with torch's operations alone."""
    won = SimpleNamespace(impl="triton", gpu="some GPU")
    rows = SimpleNamespace(get=lambda key: won if key[0] == "fastest" else None)
    monkeypatch.setattr(_measured, "rows_of", lambda index: rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    student = small_student(config.build(SMALL | dict.fromkeys(KERNELS, "auto"))).eval()

    def ours(images_BCHW):
        seen = set()

        class Seen(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.add(func.name() if func.namespace == "fastdeitlt" else None)
                return func(*args, **(kwargs or {}))

        with torch.no_grad(), Seen():
            student(images_BCHW)
        return seen - {None}

    assert ours(torch.randn(B, 3, SIZE, SIZE)) == set()
    with fake_cuda():
        student.to(CUDA)
        with torch.autocast("cuda", torch.bfloat16):
            assert ours(images()) == {"fastdeitlt::attention", "fastdeitlt::add_layernorm", "fastdeitlt::bias_gelu"}


VIEWS = {"getitem", "view", "_unsafe_view", "t", "detach", "alias", "unbind", "slice", "select", "new_empty"}


def passes_over_tokens(depth):
    """How often the graphs of forward and backward run each operation on all tokens; views cost nothing."""
    cfg = config.build(SMALL | KERNELS | {"student.depth": depth})
    student, teacher, graphs = small_student(cfg), small_teacher(), []
    num_tokens = student.pos_embed.shape[1]

    def keep(module, inputs):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    def of_all_tokens(node):
        values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
        shapes = [tuple(v.shape) for value in values for v in tree_leaves(value) if isinstance(v, torch.Tensor)]
        return any(shape[:2] == (B, num_tokens) or B * num_tokens in shape for shape in shapes)

    torch._dynamo.reset()
    with fake_cuda():
        joint = JointForward(student.to(CUDA).train(), teacher.to(CUDA), COUNTS, cfg, CUDA)
        forward = torch.compile(joint, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
        weights_K, batch = torch.ones(K, device=CUDA), mixed_batch(cfg)
        losses = forward(batch.images_BCHW, batch.labels_B, batch.partner_B, batch.lam, weights_K, weights_K)
        losses.loss.backward()
    torch._dynamo.reset()
    calls = [[n for n in graph.nodes if n.op == "call_function" and of_all_tokens(n)] for graph in graphs]
    names = [[getattr(n.target, "_opname", n.target.__name__) for n in nodes] for nodes in calls]
    return [Counter(name for name in found if name not in VIEWS) for found in names]


def test_a_block_with_the_kernels_copies_and_converts_no_activation():
    """What a block more adds to the graphs: products and the kernels."""
    forward, backward = (more - fewer for more, fewer in zip(*map(passes_over_tokens, (4, 3)), strict=True))
    assert forward == {"mm": 3, "addmm": 1, "attention": 1, "bias_gelu": 1, "add_layernorm": 2}
    ours = {"attention_backward": 1, "bias_gelu_backward": 1, "add_layernorm_backward": 2}
    assert backward == {"mm": 8} | ours


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda batch: batch.lam.item(), "_local_scalar_dense"),
        (lambda batch: batch.labels_B.tolist(), "_local_scalar_dense"),
        (lambda batch: bool(batch.lam > 0), "_local_scalar_dense"),
        (lambda batch: batch.images_BCHW + torch.ones(B, 3, SIZE, SIZE), "same device|different devices"),
        (lambda batch: batch.labels_B.cpu(), "to the host"),
        (lambda batch: torch.tensor(0.3, device=CUDA), "to the device"),
        (lambda batch: torch.ones(1 << 20).to(CUDA, non_blocking=True), "to the device"),
    ],
)
def test_a_step_that_waits_or_mixes_devices_fails(spoil, said):
    cfg = config.build(SMALL)
    student, teacher = small_student(cfg), small_teacher()
    with fake_cuda() as cuda, pytest.raises((RuntimeError, DataDependentOutputException, HostWaitError), match=said):
        take_steps(cuda, cfg, student, teacher, spoil=spoil)


def test_a_pinned_copy_is_no_wait():
    with fake_cuda() as cuda, cuda.step():
        assert torch.ones(1 << 20).pin_memory().to(CUDA, non_blocking=True).device == CUDA


def test_the_backward_pass_in_python_is_torchs():
    """On values: a student with the kernels' ops, whose backward passes are Python's."""
    cfg = config.build(SMALL | KERNELS | {"student.drop_path": 0.0, "student.add_layernorm": "torch"})
    torch.manual_seed(0)
    student = small_student(cfg).train()
    loss = sum(cross_entropy(x, torch.arange(B)) for x in student(torch.randn(B, 3, SIZE, SIZE)))
    loss.backward(retain_graph=True)
    expected = [p.grad for p in student.parameters()]
    student.zero_grad()
    run_backward((loss,), (torch.ones(()),), True, False)
    for parameter, grad in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_the_kernel_for_attention_refuses_float32_on_a_gpu():
    cfg = config.build(SMALL | KERNELS | {"train.precision": "fp32"})
    student, teacher = small_student(cfg), small_teacher()
    with fake_cuda() as cuda, pytest.raises(UserError, match="got float32 on a GPU, expected bfloat16 or float16"):
        take_steps(cuda, cfg, student, teacher)


TEACHERS = [
    *({"loss": loss, "sam": "sam", "clip_norm": 1.0} for loss in ("ce", "focal")),
    {"loss": "ldam", "sam": "sam", "clip_norm": 1.0, "normed_head": True},
    {"loss": "balanced_softmax", "sam": "asam"},
    {"loss": "vs", "sam": "none"},
    {"loss": "logit_adjustment", "sam": "none"},
    {"loss": "paco", "sam": "sam", "batch_size": 7, "paco_queue": 14},
]


@pytest.mark.parametrize("recipe", TEACHERS, ids=lambda recipe: f"{recipe['loss']}-{recipe['sam']}")
def test_a_teachers_step_stays_on_the_gpu(recipe, monkeypatch):
    monkeypatch.setattr("fastdeitlt.teachers.step.Paco", outside(Paco))  # it copies its encoder
    settings = {f"teacher_training.{name}": value for name, value in recipe.items()}
    cfg = config.build({"train.compile": False, "teacher_training.arch": "resnet8"} | settings)
    with fake_cuda() as cuda:
        objective = build_objective(cfg.teacher_training, COUNTS, CUDA)
        take_step = Step(objective, build_optimizer(objective.network, cfg.teacher_training), cfg, CUDA)
        parts = [Part([images(n), images(n)], torch.randint(K, (n,), device=CUDA)) for n in (4, 3)]
        batch = StepBatch(parts, torch.cat([part.labels_B for part in parts]))
        weights_K = None if recipe["loss"] == "paco" else torch.ones(K, device=CUDA)
        with cuda.step():
            for seed in range(2):
                loss = take_step(batch, weights_K, seed)
    assert loss.device == CUDA and loss.shape == ()


@pytest.fixture
def data_in_a_row(monkeypatch):
    """Threads of the data path are not in the fake mode and streams there are none: all in a row, in the caller's."""

    def place(cuda):
        monkeypatch.setattr("fastdeitlt.data.pixels.workers.Workers.map", lambda self, work, xs: (work(x) for x in xs))
        for module in ("core.batches", "data.pixels.resident", "teachers.views"):
            monkeypatch.setattr(f"fastdeitlt.{module}.side_stream", lambda device, user: device)
        for module in ("data.pixels.resident", "data.view_request"):
            monkeypatch.setattr(f"fastdeitlt.{module}.aside", cuda.aside)
        for module in ("core.batches", "teachers.views"):
            monkeypatch.setattr(f"fastdeitlt.{module}.prefetch", lambda items, depth: items)

    return place


def resident_set(where):
    images = decoded_set(24, 40, 2)
    return Resident(images, config.DataConfig(residency=where, num_threads=1), CUDA, pack(images.images_NHWC))


EVERY_OPERATION = {"augment.rand_prob": 1.0, "augment.erase_prob": 1.0, "augment.impl": "torch"}


@pytest.mark.parametrize(
    ("recipe", "where"),
    [("deit", "device"), ("pad_crop", "device"), ("autoaugment_cutout", "device"), ("crop_jitter", "host")],
)
def test_batches_made_by_torch_wait_on_their_own_stream_alone(recipe, where, data_in_a_row):
    cfg = config.build(EVERY_OPERATION | {"augment.recipe": recipe})
    micro = [MicroBatch(0, 0, 0, np.arange(24), np.zeros(24, int))]
    with fake_cuda() as cuda:
        data_in_a_row(cuda)
        source = resident_set(where)
        with cuda.step():
            (batch,) = train_batches(micro, source, decoded_set(24, 40, 2), cfg, mixing=True, size=SIZE)
        source.close()
    assert {t.device for t in (batch.images_BCHW, batch.labels_B, batch.partner_B, batch.lam)} == {CUDA}
    assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("view", ["same", "simclr"])
def test_a_teachers_views_wait_on_their_own_stream_alone(view, data_in_a_row):
    settings = {"teacher_training.loss": "paco", "teacher_training.paco_view": view}
    settings |= {
        "teacher_training.batch_size": 24,
        "teacher_training.paco_queue": 24,
        "teacher_training.img_size": SIZE,
    }
    cfg = config.build(EVERY_OPERATION | settings)
    with fake_cuda() as cuda:
        data_in_a_row(cuda)
        source = resident_set("device")
        with cuda.step():
            (batch,) = teacher_batches(cfg, source, decoded_set(24, 40, 2), TeacherPlan(24, 24, 0, True), 0)
        source.close()
    (part,) = batch.parts
    assert {t.device for t in (*part.views, part.labels_B, batch.labels_B)} == {CUDA} and len(part.views) == 2


@pytest.mark.parametrize("mix", [MixDraw(0.3), MixDraw(0.3, (2, 9, 4, 20))])
def test_mixing_does_not_wait(mix):
    with fake_cuda() as cuda:
        batch = images()
        with cuda.step():
            assert mixup.apply(batch, mix) is batch


def test_images_are_scored_on_the_gpu():
    with fake_cuda():
        columns = metrics._per_image(torch.randn(4, 9, device=CUDA), torch.arange(4, device=CUDA))
    assert len(columns) == 6 and all(column.device == CUDA and column.shape == (4,) for column in columns)


def test_evaluation_waits_once_for_all_batches(data_in_a_row):
    """For the logits, after the last batch. (Sets on the host are resized by Pillow, which needs pixels.)"""
    cfg = config.build(SMALL)
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.2,) * 3, img_size=SIZE, crop_pct=SIZE / 36)
    how = {"preprocess": preprocess, "batch_size": 5, "device": CUDA}
    for model in (WithCosine(small_student(cfg)), OneHead(small_teacher())):
        with fake_cuda() as cuda:
            data_in_a_row(cuda)
            source, model = resident_set("device"), model.to(CUDA)
            augment.affine(preprocess.mean, preprocess.std, CUDA)
            seen, forward = [], model.forward_heads
            model.forward_heads = lambda x, seen=seen, forward=forward: seen.append(len(x)) or forward(x)
            with cuda.step(), pytest.raises(HostWaitError, match="to the host"):
                collect_logits(model, source, decoded_set(24, 40, 2), autocast_dtype=torch.bfloat16, **how)
            assert seen == [5, 5, 5, 5, 4]
            cls_NK, dist_NK, labels_N = collect_logits(model, source, decoded_set(24, 40, 2), **how)
            source.close()
        assert cls_NK.shape == dist_NK.shape == (24, K) and cls_NK.device.type == labels_N.device.type == "cpu"


def test_a_teacher_is_diagnosed_on_batches_of_the_fused_kernel(monkeypatch):
    """Which gives bfloat16; the diagnosis is in float32."""
    cfg = config.build(SMALL)
    monkeypatch.setattr(diagnose, "train_batches", lambda *_, **__: [mixed_batch(cfg)])
    teacher = small_teacher()
    with fake_cuda():
        ((logits_BK, labels_B, *_),) = diagnose._teach(
            teacher.to(CUDA), None, decoded_set(24, 40, 2), cfg, np.arange(B), mixing=True, size=SIZE
        )
    assert logits_BK.dtype is torch.float32 and logits_BK.device == CUDA and labels_B.device.type == "cpu"
