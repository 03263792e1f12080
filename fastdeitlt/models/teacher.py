"""Teacher: a frozen flat CNN whose hard decisions on the student's images are the targets of the DIST head.

Builds and loads the CNNs of the official recipes (ResNet-32 of LDAM and PaCo, ResNet-50 inside PaCo's wrapper) and any
CNN of timm, under the released checkpoints' keys.
"""
# B batch, C channels, H height, W width, F features, K classes

import copy
import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeitlt.config import TeacherConfig, near
from fastdeitlt.data.sets.class_names import match_names
from fastdeitlt.errors import UserError, counted, is_memory_full
from fastdeitlt.models.classifier import Classifier, NormedLinear, with_classifier
from fastdeitlt.models.epilogue import fuse_epilogues
from fastdeitlt.models.fold import fold_batchnorm
from fastdeitlt.models.resnet_cifar import ResNetCifar
from fastdeitlt.models.state import State, load_exact, read_safetensors, read_torch, tensors
from fastdeitlt.store.checkpoint import read_folder
from fastdeitlt.store.manifest import Manifest, Preprocess

log = logging.getLogger("fastdeitlt")
LDAM_SCALE = 30.0
"""Scale s of LDAM's logits without a recipe."""
STYLES = ("official_paco", "official_ldam", "timm", "fastdeitlt")


class Paco(nn.Module):
    """PaCo's training wrapper under its released keys: query and key encoder, two linear heads, the queue.

    Each encoder's ``fc`` is the projection of the contrastive loss. ``forward`` computes the logits [B, K] from
    encoder_q, up to its pooling, and ``linear`` only.

    Source: PaCo (arXiv 2107.12028), MoCo builder of its code.
    """

    queue: Tensor
    queue_l: Tensor
    queue_ptr: Tensor

    def __init__(self, arch: str, num_classes: int, dim: int, queue_size: int) -> None:
        super().__init__()
        self.encoder_q: Any = _network(arch, 1)
        head, width = head_name(self.encoder_q), self.encoder_q.num_features
        if head not in ("linear", "fc"):
            raise UserError(f"teacher {arch}: got style official_paco, expected a ResNet such as resnet32 or resnet50")
        delattr(self.encoder_q, head)
        projection = (nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, dim))
        self.encoder_q.fc = nn.Sequential(*projection)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.linear = Classifier(width, num_classes)
        self.linear_k = copy.deepcopy(self.linear).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=0))
        self.register_buffer("queue_l", torch.randint(0, num_classes, (queue_size,)))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features = self.encoder_q.forward_features(images_BCHW)
        return self.linear(self.encoder_q.forward_head(features, pre_logits=True))


def _network(arch: str, num_classes: int) -> Any:
    """Build timm's bare CNN ``arch``, else our CIFAR ResNet for resnet<6n+2>."""
    match = re.fullmatch(r"resnet(\d{1,4})", arch)
    if timm.is_model(arch):
        options: Any = {"zero_init_last": False} if match else {}  # as in torchvision, which the references train
        network = timm.create_model(arch, pretrained=False, num_classes=num_classes, **options)
        name = head_name(network)  # several for distilled networks, none for encoders
        if name not in dict(network.named_modules()):
            raise UserError(f"teacher {arch}: got classifier {name}, expected a single one. Use another architecture.")
        head = network.get_submodule(name)
        if isinstance(head, nn.Linear) or (isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1)):
            network.set_submodule(name, with_classifier(head))
        return network
    if match and int(match[1]) >= 8 and int(match[1]) % 6 == 2:
        return ResNetCifar(int(match[1]), num_classes)
    known = ["resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", *timm.list_models()]
    raise UserError(f"teacher {arch!r}: unknown architecture, expected resnet<6n+2> or a timm model{near(arch, known)}")


def head_name(network: Any) -> str:
    """Return the state-dict prefix of a bare CNN's classifier, such as ``head.fc``."""
    return "linear" if isinstance(network, ResNetCifar) else network.default_cfg["classifier"]


def _norm_head(network: Any, num_classes: int) -> None:
    """Replace the linear classifier by a cosine classifier."""
    name = head_name(network)
    head = network.get_submodule(name)
    if not isinstance(head, nn.Linear):
        kind = type(network).__name__
        raise UserError(
            f"teacher {kind}: got a {type(head).__name__} as classifier, expected a linear one to replace by a cosine "
            "classifier. Use teacher_training.normed_head=false, or another teacher_training.arch."
        )
    network.set_submodule(name, NormedLinear(head.in_features, num_classes))


def check_size(network: nn.Module, img_size: int, setting: str) -> None:
    """Refuse an image size that a network in eval mode does not accept.

    Raises:
        UserError: the network fails on an image of that size, the value of ``setting``.
    """
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, img_size, img_size, device=next(network.parameters()).device))
    except (RuntimeError, AssertionError, ValueError) as error:
        if is_memory_full(error):
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{setting}: got {img_size}, which the network does not accept ({reason}). Use another size."
        ) from None


def create_teacher(
    arch: str, num_classes: int, style: str = "fastdeitlt", normed_head: bool | None = None
) -> nn.Module:
    """Create a CNN (images_BCHW to logits_BK) with new weights and ``style``'s keys.

    Args:
        arch: resnet<6n+2> (CIFAR, option A), resnet50, or any CNN name of timm.
        style: layout of the keys: official_paco (encoder_q, encoder_k, linear, linear_k, queue), official_ldam (a
            cosine head), timm, fastdeitlt.
        normed_head: whether to use a cosine classifier. None: the style's default.

    Raises:
        UserError: unknown architecture or style; no class.
    """
    if style not in STYLES:
        raise UserError(f"teacher style {style!r}: unknown, expected one of {', '.join(STYLES)}{near(style, STYLES)}")
    if num_classes < 1:
        raise UserError(f"teacher {arch}: got {num_classes} classes, expected at least 1")
    if style == "official_paco":
        small = not timm.is_model(arch)
        return Paco(arch, num_classes, dim=32 if small else 128, queue_size=1024 if small else 8192)
    network = _network(arch, num_classes)
    if style == "official_ldam" if normed_head is None else normed_head:
        _norm_head(network, num_classes)
    return network


@dataclass(frozen=True)
class TeacherInput:
    """Preprocessing of a teacher's images."""

    img_size: int
    """Side in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    antialias: bool = False
    """Antialias the resize from the student's size."""


class Teacher(nn.Module):
    """Frozen network in eval mode, with the conversion of the student's input to its own.

    Args:
        network: maps images_BCHW to logits_BK.
        class_map: the student's class of each class of the teacher, applied in the loss; None = the same.
        img_size: side in pixels to which images are resized (bicubic, a = -0.75, as torchvision's Resize on tensors).
            0 = no resize.
        scale_C, shift_C: affine change of normalisation, applied after the resize. None = the student's normalisation.
        antialias: whether the resize is antialiased.
        logit_scale: factor on the logits before a softmax (see ``logit_scale``); the argmax needs none.

    Source: the official code's DistillationLoss, which resizes the mixed, ImageNet-normalised student tensor.
    """

    manifest: Manifest | None = None
    """Facts of the model folder; None for a released checkpoint."""
    class_map: Tensor | None
    scale_1C11: Tensor | None
    shift_1C11: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        class_map: Sequence[int] | Tensor | None = None,
        *,
        img_size: int = 0,
        scale_C: Tensor | None = None,
        shift_C: Tensor | None = None,
        antialias: bool = False,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.network, self.logit_scale = network, logit_scale
        self.num_classes, self.img_size, self.antialias = num_classes, img_size, antialias
        self.register_buffer("class_map", None if class_map is None else check_class_map(class_map, num_classes), False)
        self.register_buffer("scale_1C11", None if scale_C is None else scale_C.view(1, -1, 1, 1), False)
        self.register_buffer("shift_1C11", None if shift_C is None else shift_C.view(1, -1, 1, 1), False)
        self.requires_grad_(False).eval()

    def fed(self, own: TeacherInput, student_mean: Sequence[float], student_std: Sequence[float]) -> "Teacher":
        """Return the network with input ``own``, from the student's normalised images."""
        scale_C = shift_C = None
        if (tuple(own.mean), tuple(own.std)) != (tuple(student_mean), tuple(student_std)):
            mean_C, std_C = torch.tensor(own.mean), torch.tensor(own.std)
            scale_C = torch.tensor(student_std) / std_C
            shift_C = (torch.tensor(student_mean) - mean_C) / std_C
        teacher = Teacher(
            self.network,
            self.num_classes,
            self.class_map,
            img_size=own.img_size,
            scale_C=scale_C,
            shift_C=shift_C,
            antialias=own.antialias,
            logit_scale=self.logit_scale,
        )
        teacher.manifest = self.manifest
        return teacher.to(next(self.network.parameters()).device)

    def alone(self, of_student: Preprocess) -> tuple["Teacher", Preprocess]:
        """Return the teacher for the preprocessing that its folder states, and that one.

        Without a folder, itself and the student's.
        """
        stated = self.manifest.preprocess if self.manifest else None
        if stated is None:
            return self, of_student
        own = teacher_input(TeacherConfig(), self.manifest, stated.mean, stated.std, of_student.img_size)
        return self.fed(own, own.mean, own.std), stated.model_copy(update={"img_size": own.img_size})

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, whatever the mode of a parent module."""
        return super().train(False)

    def sha256(self) -> str:
        """Return a hash of the weights."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def for_autocast(self, dtype: torch.dtype) -> "Teacher":
        """Return a copy with autocast's weights in ``dtype``, and with equal logits."""
        teacher = copy.deepcopy(self)
        for module in teacher.modules():
            if type(module) in (nn.Conv2d, nn.Linear):  # a subclass may use its weights in float32 first
                module.to(dtype)
        return teacher

    def with_fused_epilogues(self) -> "Teacher":
        """Return a copy with bias, shortcut and ReLU fused into its convolutions."""
        teacher = copy.deepcopy(self)
        teacher.network = fuse_epilogues(teacher.network)
        return teacher

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Compute logits_BK without gradient."""
        with torch.no_grad():
            size = (self.img_size, self.img_size)
            if self.img_size and images_BCHW.shape[-2:] != size:
                images_BCHW = F.interpolate(images_BCHW, size=size, mode="bicubic", antialias=self.antialias)
            if self.scale_1C11 is not None and self.shift_1C11 is not None:
                images_BCHW = images_BCHW * self.scale_1C11 + self.shift_1C11
            return self.network(images_BCHW)


def load_teacher(
    path: str | Path,
    arch: str,
    num_classes: int,
    style: str = "auto",
    class_map: Sequence[int] | Tensor | None = None,
) -> Teacher:
    """Load a frozen teacher from a released checkpoint or a model folder.

    Args:
        path: .pth, .pth.tar or .pt (tensors only), .safetensors, or a model or run folder, which overrides ``arch``.
        style: auto infers it from the keys.
        class_map: the student's class of each class of the teacher. None: the model folder's, else the same.

    Raises:
        UserError: no such file, a file that is damaged or contains code, keys of another architecture or style, another
            class count, a class map that is not a permutation.
    """
    state, manifest = _read(Path(path))
    network = _network_with(state, manifest.model.arch if manifest else arch, num_classes, style, f"teacher {path}")
    if class_map is None and manifest:
        class_map = _order_of(manifest)
    scale = logit_scale(network, manifest.recipe if manifest else None)
    return Teacher(network, num_classes, class_map, logit_scale=scale)


def logit_scale(network: nn.Module, recipe: dict[str, Any] | None) -> float:
    """Return the factor on the logits in the training loss: LDAM's s, else 1.

    Without a recipe a cosine head is assumed to be LDAM's: its logits are in -1..1.
    """
    if recipe:
        return float(recipe.get("ldam_scale", LDAM_SCALE)) if recipe.get("loss") == "ldam" else 1.0
    return LDAM_SCALE if any(isinstance(module, NormedLinear) for module in network.modules()) else 1.0


def _read(path: Path) -> tuple[State, Manifest | None]:
    if path.is_dir():
        return read_folder(path, "teacher")
    if not path.is_file():
        raise UserError(f"teacher {path}: no such file or folder, expected a checkpoint, a model folder or a run")
    if path.suffix == ".safetensors":
        return tensors(read_safetensors(path), path), None
    return tensors(read_torch(path), path, ("model", "state_dict")), None


def _network_with(state: State, arch: str, num_classes: int, style: str, what: str) -> nn.Module:
    """Build the bare network with weights from ``state``, maybe PaCo's wrapper's."""
    if style not in ("auto", *STYLES):
        raise UserError(f"teacher style {style!r}: unknown, expected auto, {', '.join(STYLES)}{near(style, STYLES)}")
    network = _network(arch, num_classes)
    head = head_name(network)
    is_paco = any(key.startswith("encoder_q.") for key in state)
    if style != "auto" and is_paco != (style == "official_paco"):
        raise UserError(
            f"{what}: got style {style}, but its keys are {'' if is_paco else 'not '}those of official_paco. Use auto."
        )
    if is_paco:
        encoder = {
            key.removeprefix("encoder_q."): value for key, value in state.items() if key.startswith("encoder_q.")
        }
        linear = {f"{head}.{kind}": state[f"linear.{kind}"] for kind in ("weight", "bias") if f"linear.{kind}" in state}
        state = {key: value for key, value in encoder.items() if not key.startswith("fc.")} | linear
    weight = state.get(f"{head}.weight")
    if weight is None:
        raise UserError(f"{what}: no {head}.weight, expected the keys of {arch}")
    normed = f"{head}.bias" not in state
    if normed:
        _norm_head(network, num_classes)
    got = weight.shape[-1 if normed else 0] if weight.ndim else 0
    if got != num_classes:
        raise UserError(f"{what}: got {counted(got, 'class')}, expected {num_classes}. Use a teacher of this data set.")
    load_exact(network, state, what)
    return network


def open_teacher(
    cfg: TeacherConfig,
    student_mean: Sequence[float],
    student_std: Sequence[float],
    student_img_size: int,
    num_classes: int,
    class_map: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
) -> Teacher:
    """Open a configuration's teacher, folded for inference.

    Its input is the student's normalised images. A model folder's architecture and class order override ``cfg``; its
    classes are matched with the student's by name if both have names. Its preprocessing is ``teacher_input``.

    Args:
        student_img_size: side in pixels of the student's images.
        class_map: the student's class of each class of a released teacher; used if ``cfg.map_classes``.
        class_names: the student's class names [K]; None: unknown.

    Raises:
        UserError: see ``load_teacher`` and ``check_size``; ``cfg.map_classes`` without a class map; class names that
            differ.
    """
    state, manifest = _read(Path(cfg.path))
    arch = manifest.model.arch if manifest else cfg.arch
    network = _network_with(state, arch, num_classes, cfg.style, f"teacher {cfg.path}")
    if cfg.map_classes and class_map is None:
        raise UserError(
            "teacher.map_classes: got true, expected false because this data set has no class map. Use false."
        )
    order: Sequence[int] | Tensor | None = class_map if cfg.map_classes else None
    if manifest:
        order = _order_of(manifest, class_names, f"teacher {cfg.path}")
    teacher = Teacher(
        fold_batchnorm(network).to(memory_format=torch.channels_last),
        num_classes,
        order,
        logit_scale=logit_scale(network, manifest.recipe if manifest else None),
    )
    teacher.manifest = manifest
    own = teacher_input(cfg, manifest, student_mean, student_std, student_img_size)
    check_size(teacher.network, own.img_size, "teacher.img_size")
    return teacher.fed(own, student_mean, student_std)


def teacher_input(
    cfg: TeacherConfig,
    manifest: Manifest | None,
    student_mean: Sequence[float],
    student_std: Sequence[float],
    student_img_size: int,
) -> TeacherInput:
    """Return the preprocessing of a configuration's teacher.

    Size: ``cfg``'s, else the model folder's, else the student's. Mean and std: see ``cfg.normalise``.
    """
    stated = manifest.preprocess if manifest else None
    mean, std = tuple(student_mean), tuple(student_std)
    if cfg.normalise != "student":
        if stated:
            mean, std = stated.mean, stated.std
        elif cfg.normalise == "teacher":
            mean, std = cfg.mean, cfg.std
    own_size = (stated.img_size if stated else 0) or (manifest.model.img_size if manifest else 0)
    return TeacherInput(cfg.img_size or own_size or student_img_size, mean, std, cfg.resize_antialias)


def _order_of(manifest: Manifest, class_names: Sequence[str] | None = None, what: str = "teacher") -> Tensor | None:
    """Return the data set's label of each class of a teacher; None = the same.

    Args:
        class_names: names of the data set's classes; equal names are then the same class.
        what: name of the teacher in errors.
    """
    labels_K = torch.arange(manifest.model.num_classes)
    if manifest.class_map is not None:
        labels_K = check_class_map(manifest.class_map, manifest.model.num_classes).argsort()
    if class_names and manifest.class_names and len(manifest.class_names) == len(labels_K):
        by_name = match_names(class_names, manifest.class_names, "training images", what)
        if by_name != list(range(len(by_name))):
            log.info("%s: classes are in another order than in the data, matched by name", what)
            labels_K = torch.tensor(by_name).argsort()[labels_K]
    return None if torch.equal(labels_K, torch.arange(len(labels_K))) else labels_K


def check_class_map(class_map: Sequence[int] | Tensor, num_classes: int) -> Tensor:
    """Return a class map as int64 [K] after checking that it is a permutation.

    Raises:
        UserError: wrong length, or a class that is missing or twice.
    """
    map_K = torch.as_tensor(class_map, dtype=torch.long).flatten()
    if not torch.equal(map_K.sort().values, torch.arange(num_classes, device=map_K.device)):
        raise UserError(
            f"class map: got {counted(len(map_K), 'class')}, {len(map_K.unique())} of them distinct, expected each of "
            f"0..{num_classes - 1} once"
        )
    return map_K
