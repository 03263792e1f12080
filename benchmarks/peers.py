"""Whole training steps on the same workload: timm's distillation task, the official loop, ours lever by lever.

A contestant is built from a ``Workload``; its ``step(batch)`` computes new weights and a new moving average from images
on the device, in the type and layout that its loader yields, and returns the loss. All start from the same weights;
``check_equal`` runs some steps of each and compares losses, to verify forward, backward and optimizer before timing.
"""

# B images in a batch, C channels, H height, W width, K classes

import copy
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeitlt import config, distributed
from fastdeitlt.core.assemble import Data, assemble
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.optim import parameter_groups
from fastdeitlt.data.sampler import plan_of
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.models.fold import fold_batchnorm
from fastdeitlt.models.teacher import Teacher

RATE, DECAY, EMA_DECAY, SMOOTHING = 1e-4, 0.05, 0.99996, 0.1
Step = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Workload:
    """Workload of all contestants.

    Args:
        student: our model name; timm's model has the same size, patch and heads.
        img_size: side in pixels.
        num_classes: K.
        batch_size: B.
        teacher: arch of ``create_teacher``.
        precision: bf16 (autocast) or fp32.
        device: device of the step.
    """

    student: str
    img_size: int
    num_classes: int
    batch_size: int
    teacher: str
    precision: str
    device: torch.device

    @property
    def facts(self) -> dict[str, str | int]:
        """Entries of the rows of a measurement."""
        facts = {"student": self.student, "teacher": self.teacher, "precision": self.precision}
        return facts | {"batch": self.batch_size}

    @functools.cached_property
    def weights(self) -> dict[str, Tensor]:
        """Initial weights of every student."""
        torch.manual_seed(0)
        return create_student(self.student, self.num_classes, self.img_size, drop_path=0.0).state_dict()

    @functools.cached_property
    def network(self) -> nn.Module:
        """CNN of the teacher, with random batch-norm statistics."""
        torch.manual_seed(1)
        network = create_teacher(self.teacher, self.num_classes)
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                buffer.normal_(std=0.1)
        return network.eval().requires_grad_(False)

    def batch(self, seed: int, contestant: str) -> Batch:
        """Return a mixed batch of noise.

        Ours is channels-last, and bfloat16 where the augmentation kernel runs.
        """
        generator = torch.Generator().manual_seed(seed)
        size = (self.batch_size, 3, self.img_size, self.img_size)
        images_BCHW = torch.randn(size, generator=generator).to(self.device)
        if is_ours(contestant):
            is_low = self.device.type == "cuda" and self.precision == "bf16"
            dtype = torch.bfloat16 if is_low else torch.float32
            images_BCHW = images_BCHW.to(dtype, memory_format=torch.channels_last)
        labels_B = torch.randint(self.num_classes, (self.batch_size,), generator=generator).to(self.device)
        return Batch(images_BCHW, labels_B, labels_B.flip(0), torch.tensor(0.3, device=self.device))

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def is_ours(contestant: str) -> bool:
    """Return whether a contestant's step is fastdeitlt's."""
    return contestant != "official loop" and not contestant.startswith("timm")


def best_attention(device: torch.device) -> AbstractContextManager[None]:
    """Force cuDNN's or Flash attention on a GPU.

    Torch does not choose cuDNN's itself.
    """
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)


def timm_student(work: Workload) -> nn.Module:
    """Create timm's distilled DeiT with the workload's weights."""
    import timm

    size, patch = work.student.split("_")[1], int(work.student.split("_patch")[1].split("_")[0])
    options = {"img_size": work.img_size, "patch_size": patch, "num_classes": work.num_classes}
    student = timm.create_model(f"deit_{size}_distilled_patch16_224", **options)
    student.load_state_dict(work.weights)
    return student.to(work.device).train()


def dense_target(batch: Batch, num_classes: int) -> Tensor:
    """Return the dense target of a batch, as timm's Mixup builds it in every step."""
    from timm.data.mixup import one_hot

    off, on = SMOOTHING / num_classes, 1 - SMOOTHING + SMOOTHING / num_classes
    assert batch.partner_B is not None and batch.lam is not None
    own, other = (one_hot(labels_B, num_classes, on, off) for labels_B in (batch.labels_B, batch.partner_B))
    return own * batch.lam + other * (1 - batch.lam)


def distillation_task(student: nn.Module, teacher: nn.Module, device: torch.device) -> nn.Module:
    """Build timm's task of the joint loss: half each for labels and teacher."""
    from timm.loss import SoftTargetCrossEntropy
    from timm.task import TokenDistillationTask

    return TokenDistillationTask(
        student, teacher, criterion=SoftTargetCrossEntropy(), distill_type="hard", task_loss_weight=0.5, device=device,
        verbose=False,
    ).train()  # fmt: skip


def timm_task(work: Workload, compiled: bool) -> Step:
    """Return ``timm_update`` with the batch's dense target."""
    update = timm_update(work, compiled)
    return lambda batch: update(batch.images_BCHW, dense_target(batch, work.num_classes))


def timm_update(work: Workload, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Build timm 1.0's TokenDistillationTask.

    With fused AdamW, its moving average and the best attention backend.

    Returns:
        Function of images_BCHW and dense target_BK that returns the loss.
    """
    teacher = copy.deepcopy(work.network).to(work.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    task = distillation_task(timm_student(work), teacher, work.device)
    task.setup_ema(decay=EMA_DECAY)
    groups = parameter_groups(task.trainable_module, DECAY)
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(RATE, device=work.device), fused=True)
    if compiled:
        task.compile()

    def update(images_BCHW: Tensor, target_BK: Tensor) -> Tensor:
        with best_attention(work.device), work.autocast():
            loss = task(images_BCHW, target_BK)["loss"]
        with best_attention(work.device):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
        return loss.detach()

    return update


def official_loop(work: Workload) -> Step:
    """Build the published code's step, rewritten.

    Source: val-iisc/DeiT-LT engine.py, losses.py.

    Eager, autocast, the teacher's decision mapped through numpy on the host, an unused gradient norm, four ``item()``,
    a synchronize, and an average parameter by parameter; torch's attention in place of xformers'.
    """
    student, teacher = timm_student(work), copy.deepcopy(work.network).to(work.device)
    student.set_distilled_training(True)  # type: ignore[operator]
    average = copy.deepcopy(student).eval()
    optimizer = torch.optim.AdamW(parameter_groups(student, DECAY), lr=RATE)
    class_map = np.arange(work.num_classes)
    weights_K = torch.ones(work.num_classes, device=work.device)

    def step(batch: Batch) -> Tensor:
        target_BK = dense_target(batch, work.num_classes)
        with work.autocast():
            cls_logits_BK, dist_logits_BK = student(batch.images_BCHW)
            with torch.no_grad():
                teacher_logits_BK = teacher(batch.images_BCHW)
            cls_loss = torch.sum(-target_BK * F.log_softmax(cls_logits_BK, dim=-1), dim=-1).mean()
            decision_B = class_map[teacher_logits_BK.argmax(1).detach().cpu().numpy()]
            decision_B = torch.from_numpy(decision_B).to(work.device)
            dist_loss = F.cross_entropy(dist_logits_BK, decision_B, weight=weights_K)
            loss = 0.5 * cls_loss + 0.5 * dist_loss
            similarity = F.cosine_similarity(cls_logits_BK, dist_logits_BK).mean()
        for value in (loss, cls_loss, dist_loss, similarity):
            value.item()
        optimizer.zero_grad()
        loss.backward()
        torch.norm(torch.stack([torch.norm(p.grad) for p in student.parameters() if p.grad is not None]))
        optimizer.step()
        if work.device.type == "cuda":
            torch.cuda.synchronize()
        with torch.no_grad():
            live = student.state_dict()
            for name, held in average.state_dict().items():
                held.copy_(held * EMA_DECAY + (1 - EMA_DECAY) * live[name])
        return loss.detach()

    return step


def ours(work: Workload, *, shortcut: bool = True, **settings: object) -> Step:
    """Build fastdeitlt's step.

    Args:
        shortcut: whether the last block computes only the CLS and DIST rows.
        settings: config fields, section and name joined by two underscores (``train__compile=False``).
    """
    values = {name.replace("__", "."): value for name, value in settings.items()}
    recipe = {
        "train.precision": work.precision, "train.batch_size": work.batch_size, "optim.ema_decay": EMA_DECAY,
        "optim.weight_decay": DECAY, "mixup.smoothing": SMOOTHING, "train.engine": "plain",
        "train.device": work.device.type, "student.name": work.student, "student.img_size": work.img_size,
        "student.drop_path": 0.0, "augment.repeats": 1,
    }  # fmt: skip
    cfg = config.build(recipe | values)
    student = create_student(
        num_classes=work.num_classes, **cfg.student.architecture, last_block_shortcut=shortcut
    )  # fmt: skip
    student.load_state_dict(work.weights)
    student = student.to(work.device).train()
    network = fold_batchnorm(copy.deepcopy(work.network)).to(memory_format=torch.channels_last)
    teacher = Teacher(network, work.num_classes).to(work.device)
    if cfg.train.engine == "deepspeed":
        distributed.start_alone(work.device)
    data = Data([1] * work.num_classes, plan_of(cfg, work.batch_size))
    parts = assemble(cfg, data, work.device, lambda size: teacher, student)
    take_step, phase = parts.step(), parts.phase(0)
    return lambda batch: take_step(iter([batch]), 1, phase, RATE).losses[0].loss


TORCH = {"student__attention": "sdpa", "student__add_layernorm": "torch", "student__bias_gelu": "torch",
         "loss__impl": "torch"}  # fmt: skip
TRITON = dict.fromkeys(TORCH, "triton")
LEVERS: dict[str, Callable[[Workload], Step]] = {
    "official loop": official_loop,
    "timm, eager": lambda work: timm_task(work, compiled=False),
    "timm, compiled": lambda work: timm_task(work, compiled=True),
    "ours, eager, whole last block": lambda work: ours(work, shortcut=False, train__compile=False, **TORCH),
    "+ last-block shortcut": lambda work: ours(work, train__compile=False, **TORCH),
    "+ compile": lambda work: ours(work, **TORCH),
    "+ flat AdamW with average": lambda work: ours(work, optim__backend="fastdeitlt", **TORCH),
    "+ kernels": lambda work: ours(work, optim__backend="fastdeitlt", **TRITON),
    "as shipped (auto)": lambda work: ours(work),
    "as shipped, fused teacher": lambda work: ours(work, teacher__fuse_epilogues=True, teacher__cudnn_benchmark=True),
    "as shipped, fp8": lambda work: ours(work, train__precision="fp8"),
    "as shipped, autotuned": lambda work: ours(work, train__autotune=True),
    "as shipped, DeepSpeed": lambda work: ours(work, train__engine="deepspeed", train__zero_stage=1),
}
"""Contestants in the order of the waterfall; those in ``GPU_ONLY`` need a GPU or gain nothing without one."""
ONE_OFF: dict[str, Callable[[Workload], Step]] = {
    f"kernels, {setting.partition('__')[2].replace('impl', 'joint_loss')} by torch": functools.partial(
        ours, optim__backend="fastdeitlt", **TRITON | {setting: TORCH[setting]}
    )
    for setting in TORCH
}
"""Contestants with all kernels but one, on request, to measure each kernel in the whole step."""
GPU_ONLY = frozenset({"+ kernels", "as shipped, fused teacher", "as shipped, fp8", "as shipped, autotuned", *ONE_OFF})
BASELINE = "timm, compiled"
FP8_TOLERANCE = 1e-1
"""A CPU's float8 products moved the losses of three steps by up to 2.3 % (16 images, 12 blocks)."""


def one_line(error: Exception) -> str:
    """Return an error's type and message, shortened."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def check_equal(steps: Mapping[str, Step], work: Workload) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Run the same three steps with every contestant and compare their losses.

    Returns:
        Losses of the contestants that agree with the first; the others' reasons.
    """
    allowed = 1e-4 if work.precision == "fp32" else 2e-2
    losses: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    for name, step in steps.items():
        try:
            got = [float(step(work.batch(i, name))) for i in range(3)]
        except Exception as error:  # noqa: BLE001 - whatever one raises, the others are measured
            reasons[name] = one_line(error)
            continue
        first, expected = next(iter(losses.items()), (name, got))
        if np.allclose(got, expected, rtol=FP8_TOLERANCE if "fp8" in name else allowed, atol=0):
            losses[name] = got
        else:
            reasons[name] = f"got losses {got}, expected {expected} as {first}"
    return losses, reasons
