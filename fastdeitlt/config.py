"""The configuration: one frozen schema, every field documented; YAML files, dotted overrides, near names for typos.

A value comes, in rising order, from the schema's default, from the YAML file, from an override ``section.field=value``.
``origins`` keeps which, so that ``fastdeitlt config show`` can say where each value came from.
"""

import difflib
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fastdeitlt.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INT64_MAX, FLOAT_MAX = 2**63 - 1, 1e30
"""The second leaves room for products below the largest float32."""


class Section(BaseModel):
    """A frozen group of fields that refuses unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _fits(self) -> "Section":
        """Refuse numbers that 64-bit integers and float32 tensors do not hold."""
        for name, value in self:
            for number in _numbers(value):
                if abs(number) > (INT64_MAX if isinstance(number, int) else FLOAT_MAX):
                    got = _SHORT.repr(number)
                    raise ValueError(f"{name}: got {got}, expected at most {INT64_MAX} (whole) or {FLOAT_MAX:g}")
        return self


def _numbers(value: object) -> list[int | float]:
    if isinstance(value, tuple):
        return [number for part in value for number in _numbers(part)]
    return [value] if isinstance(value, int | float) else []


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"expected a range (low, high); use [{bounds[1]}, {bounds[0]}]")
    return bounds


Positive = Annotated[float, Field(gt=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Range = Annotated[tuple[Positive, Positive], AfterValidator(_rising)]
PerChannel = tuple[Positive, Positive, Positive]


class DataConfig(Section):
    """Which images."""

    dataset: Literal[
        "fashion_mnist_lt", "cifar10_lt", "cifar100_lt", "imagenet_lt", "inat18", "places_lt", "list", "folder"
    ] = "fashion_mnist_lt"
    """Data set. `fashion_mnist_lt` is embedded; `list` takes train_list/val_list/test_list; `folder` takes
    root/{train,val,test}/<class>/<image>, or root/<class>/<image>, which it splits by class."""
    root: str = ""
    """Folder that holds the images; lists may not leave it. Empty: the embedded set."""
    train_list: str = ""
    """List file (txt, csv, json) of the training images. Empty: the data set's usual name under root."""
    val_list: str = ""
    """List file of the validation images. Empty: the usual name, or none if that does not exist."""
    test_list: str = ""
    """List file of the test images. Empty: the usual name, or none if that does not exist."""
    imbalance_factor: float = Field(0.01, gt=0, le=1)
    """CIFAR only: smallest over largest class size (0.01 is rho = 100). 1 = balanced."""
    imbalance_kind: Literal["exp", "step"] = "exp"
    """CIFAR only: exponential decay over classes, or half the classes cut."""
    val_holdout: float | None = Field(None, ge=0, lt=0.5)
    """Share of each class of the training images set aside for validation where there is no validation set. 0 = none;
    null: 0.1 of a folder without split folders, else none."""
    test_holdout: float | None = Field(None, ge=0, lt=0.5)
    """Share of each class of the training images set aside for testing where there is no test set. 0 = none;
    null: 0.2 of a folder without split folders, else none."""
    sampling: Literal["instance", "class_balanced", "sqrt", "progressive"] = "instance"
    """How often an epoch shows each class (arXiv 1910.09217): instance = every image once; sqrt = by the root of a
    class's size; class_balanced = all classes alike; progressive = from by size to all alike over the epochs. Class
    priors and weights of the losses stay those of the images."""
    residency: Literal["auto", "stream", "host", "device"] = "auto"
    """Where the training images live: decoded anew each time (stream), decoded once in host or device memory."""
    stored_short_side: int = Field(0, ge=0)
    """Resident sets: short side in pixels at which images are stored. 0 = full size."""
    on_error: Literal["raise", "skip"] = "raise"
    """An image that cannot be read in training: stop with its name, or replace it by one of its class and count it."""
    exif: Literal["ignore", "apply"] = "ignore"
    """Orientation that EXIF or TIFF states: leave images as they are stored, as timm and the official code do (ignore),
    or turn them upright (apply). The model folder records it; eval, predict and export obey it."""
    num_threads: int = Field(0, ge=0)
    """Decoding threads a rank. 0 = the cores divided by the local ranks."""
    jpeg_engine_share: float = Field(0.65, ge=0, le=1)
    """Share of a GPU's JPEG files that its hardware engine decodes, if it has one (A100, H100, ...). 0 = none."""

    @property
    def title(self) -> str:
        """What people call the data set: its name, or that of the folder of their own images."""
        own = self.dataset in ("folder", "list")
        return (own and Path(self.root).expanduser().resolve().name) or self.dataset


class AugmentConfig(Section):
    """Strong augmentation of one image (timm's DeiT recipe is the default; research: mission section 6)."""

    recipe: Literal["deit", "pad_crop", "autoaugment_cutout", "crop_jitter", "none"] = "deit"
    """deit: RandomResizedCrop, flip, RandAugment, erasing. pad_crop: pad, crop, flip (CIFAR CNNs). autoaugment_cutout:
    pad_crop + AutoAugment + Cutout (PaCo). crop_jitter: RandomResizedCrop, flip, ColorJitter(.4). none: resize only."""
    crop_scale: Range = (0.08, 1.0)
    """RandomResizedCrop: range of the crop's share of the image area."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """RandomResizedCrop: range of the crop's aspect ratio."""
    pad: int = Field(4, ge=0)
    """pad_crop: pixels padded on each side. 0 = no crop."""
    flip_prob: float = Field(0.5, ge=0, le=1)
    """Chance of a horizontal flip."""
    rand_ops: int = Field(2, ge=0, le=2)
    """RandAugment operations an image (rand-m9-mstd0.5-inc1). 0 = off."""
    rand_prob: float = Field(0.5, ge=0, le=1)
    """Chance that each drawn operation is applied."""
    rand_magnitude: float = Field(9.0, ge=0, le=10)
    """Mean level of an operation, 0..10."""
    rand_std: float = Field(0.5, ge=0)
    """Standard deviation of the level."""
    erase_prob: float = Field(0.25, ge=0, le=1)
    """Random erasing (per-pixel noise): chance. 0 = off."""
    repeats: int = Field(3, ge=1)
    """Repeated augmentation: copies of an image in an epoch. 1 = off."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Channel means that normalise the student's input (images in 0..1)."""
    std: PerChannel = IMAGENET_STD
    """Channel standard deviations that normalise the student's input."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of training augmentation: Triton kernels, or torch operations. auto: the kernels on a GPU for the
    recipes deit and none, if their first batch agrees with torch's."""


class MixupConfig(Section):
    """Mixup and CutMix of a batch with its mirror image (timm's batch mode)."""

    mixup_alpha: float = Field(0.8, ge=0)
    """Beta parameter of Mixup. 0 = no Mixup."""
    cutmix_alpha: float = Field(1.0, ge=0)
    """Beta parameter of CutMix. 0 = no CutMix."""
    prob: float = Field(1.0, ge=0, le=1)
    """Chance that a batch is mixed at all."""
    switch_prob: float = Field(0.5, ge=0, le=1)
    """Chance of CutMix rather than Mixup when both are on."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing of the CLS target while mixing is on. 0 = off."""
    off_in_drw: bool = False
    """Turn mixing and smoothing off once re-weighting starts (the reference does so on CIFAR)."""

    @property
    def on(self) -> bool:
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


class StudentConfig(Section):
    """The distilled Vision Transformer."""

    name: str = "deit_base_distilled_patch16_224"
    """deit_{tiny,small,base,large}_distilled_patch{2,4,8,16}_<size>."""
    img_size: int = Field(0, ge=0)
    """Input height and width in pixels. 0 = the size in the name."""
    init: str = ""
    """Weights to start from: a run or model folder, or a .pth or .safetensors file of a plain or distilled ViT under
    timm's names. Other image sizes, patches, depths and classes are adapted. Empty: random weights."""
    depth: int = Field(0, ge=0)
    """Number of blocks. 0 = the architecture's 12 (large: 24)."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the last block; earlier blocks rise linearly from 0. 0 = off."""
    attention: Literal["auto", "triton", "sdpa", "flash", "cudnn", "efficient", "math", "fa3", "fa4"] = "auto"
    """Implementation of attention: Triton kernel, torch SDPA (sdpa: the backend that torch prefers), one SDPA backend,
    or FlashAttention 3 or 4 where installed. auto: the fastest measured on this GPU, else flash (efficient in fp32)."""
    add_layernorm: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of residual add and LayerNorm: Triton kernel in one pass, or torch. auto: the faster one measured
    on this GPU, else torch."""
    bias_gelu: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of bias and GELU in the MLP: Triton kernel, whose backward sums the bias gradient in the same
    pass, or torch. auto: as add_layernorm."""
    drop_path_law: Literal["bernoulli", "count"] = "bernoulli"
    """bernoulli: each sample drops a branch on its own, which is computed and multiplied by 0 (timm, the recipes).
    count: a fixed number of the batch's samples, drawn for each branch, is not computed: less work, dependent draws."""

    @property
    def architecture(self) -> dict[str, Any]:
        """Arguments of ``create_student``."""
        return self.model_dump(exclude={"init"})


class TeacherConfig(Section):
    """The frozen CNN whose hard decisions the DIST token learns."""

    path: str = ""
    """Model folder or released checkpoint of the teacher. Empty: no distillation (a plain ViT)."""
    arch: str = "resnet32"
    """resnet<6n+2> (CIFAR, option A), resnet50, or any timm CNN name. A model folder's own wins."""
    style: Literal["auto", "official_paco", "official_ldam", "timm", "fastdeitlt"] = "auto"
    """Whose state-dict keys the checkpoint has."""
    img_size: int = Field(0, ge=0)
    """Input size of the teacher in pixels, to which the mixed student images are resized. 0 = the size that its model
    folder states, else the student's."""
    normalise: Literal["auto", "student", "teacher"] = "auto"
    """Mean and std of the teacher's input. auto: those that its model folder states, else the student's, which the
    official code uses. teacher: those of its folder, else teacher.mean and teacher.std."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Channel means of a teacher without a model folder (used by normalise=teacher)."""
    std: PerChannel = IMAGENET_STD
    """Channel standard deviations of a teacher without a model folder (used by normalise=teacher)."""
    resize_antialias: bool = False
    """Antialias the resize to the teacher's size. Off is the official environment (torchvision 0.15)."""
    map_classes: bool = False
    """The teacher's classes are ordered by falling class size, as in released LDAM teachers of ImageNet-LT and iNat.
    Classes of equal size are matched with its decisions. A model folder's own order wins."""
    check: bool = True
    """Before the first step, refuse a teacher whose balanced accuracy on clean training images is near chance or far
    below the one that its folder states, or whose classes are exchanged."""


class LossConfig(Section):
    """L = (1 - alpha) CE(CLS, y) + alpha L_DRW(DIST, teacher) (paper section 3)."""

    distillation: Literal["hard", "soft"] = "hard"
    """The teacher's argmax, or its softened distribution (of a cosine head at the scale that it was trained with)."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Weight of the DIST term."""
    tau: float = Field(1.0, gt=0)
    """Temperature of soft distillation."""
    base: Literal["ce", "bce", "balanced_softmax", "logit_adjustment"] = "ce"
    """Loss of the CLS head."""
    drw_epoch: int = Field(-1, ge=-1)
    """First epoch (from 0) with effective-number weights on the DIST loss. -1 = never."""
    drw_beta: float = Field(0.9999, ge=0, lt=1)
    """Beta of the effective number of samples (Cui et al. 2019)."""
    normalise: Literal["rank", "global"] = "rank"
    """What the weighted mean of the DIST loss is divided by: the sum of weights of the (virtual) rank's micro-batch,
    as the reference does, or the mean of that sum over all ranks, so that the mean is one over the whole micro-step."""
    reweight_cls: bool = False
    """Weight the CLS loss too once re-weighting starts (official --weighted-baseloss)."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """Who computes the loss: our kernel, or torch. auto: the faster one measured on this GPU, else torch."""


class OptimConfig(Section):
    """AdamW or LAMB, cosine schedule, EMA."""

    lr: float = Field(5e-4, gt=0)
    """Base learning rate for a batch of 512 images."""
    lr_scale: Literal["official", "effective", "none"] = "official"
    """official: lr * batch_size * ranks / 512 (ignores accumulation, as the reference). effective: with accumulation.
    none: lr as it stands."""
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    """AdamW momenta."""
    eps: float = Field(1e-8, gt=0)
    """AdamW epsilon."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay of matrices; biases, norms, tokens and position embeddings have none."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate from each layer to the one below it, for fine-tuning. 1 = all layers learn alike."""
    clip_norm: float = Field(0.0, ge=0)
    """Global gradient norm above which gradients are scaled down. 0 = off."""
    algorithm: Literal["adamw", "lamb"] = "adamw"
    """adamw: the recipes'. lamb: for very large batches (You et al. 2020); needs apex."""
    backend: Literal["auto", "fastdeitlt", "torch", "apex", "deepspeed"] = "auto"
    """Who takes the step. torch: its fused AdamW. fastdeitlt: our kernel over one flat buffer, with the moving average
    in the same pass. apex: NVIDIA's FusedAdam or FusedLAMB, built from source. deepspeed: its FusedAdam, which it
    compiles. The last two need a GPU. auto: torch, or fastdeitlt where `fastdeitlt tune` found the training step faster
    with it on this GPU; for lamb apex."""
    warmup_epochs: float = Field(5, ge=0)
    """Epochs of linear warm-up."""
    warmup_lr: float = Field(1e-6, ge=0)
    """Learning rate at the start of warm-up (not scaled)."""
    min_lr: float = Field(1e-5, ge=0)
    """Learning rate at the end of the cosine (not scaled)."""
    ema_decay: float = Field(0.99996, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, an optimizer step. 0 = no EMA."""


class TrainConfig(Section):
    """The loop."""

    epochs: int = Field(1200, ge=1)
    """Passes over the sampler's epoch (N images, about N / repeats distinct ones)."""
    batch_size: int = Field(128, ge=1)
    """Images in a micro-batch of one (virtual) rank."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches of a (virtual) rank in one optimizer step."""
    virtual_ranks: int = Field(0, ge=0)
    """Data-parallel ranks the recipe is written for; fewer real ones take their batches in turn and give the same
    steps. 0 = the real number."""
    seed: int = Field(0, ge=0)
    """Seed of weights, augmentation, mixing and drop path."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the step runs."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Autocast type of the step. fp32: on a GPU convolutions stay TF32, torch's default."""
    compile: bool = True
    """Compile student, teacher and loss as one graph."""
    autotune: bool = False
    """Let the compiler time alternatives for each matrix product and convolution at the start, which takes minutes: on
    a GPU also Triton's, into which it fuses what follows. A resumed run may take others: its last bits then differ."""
    engine: Literal["auto", "plain", "deepspeed"] = "auto"
    """Backward, accumulation and step: plain at one rank, DeepSpeed at more."""
    zero_stage: int = Field(1, ge=0, le=3)
    """What DeepSpeed shards over ranks: 0 nothing, 1 moments, 2 and gradients, 3 and weights (needs compile=false)."""
    offload: bool = False
    """Keep the moments, and step, in host memory (DeepSpeed, zero_stage 1 to 3): saves device memory, costs time."""
    measure_kernels: bool = True
    """At the first start on a GPU, time each kernel that is set to auto beside torch's (about 30 s, estimated). The
    result is kept for this GPU, torch, Triton and shape. false: use what was measured before, or torch's."""
    timeout_s: int = Field(600, ge=1)
    """Seconds a rank waits for the others before it gives up."""
    log_every: int = Field(10, ge=1)
    """Optimizer steps between log lines; the only host syncs of the loop."""
    save_every_epochs: int = Field(1, ge=0)
    """Epochs between checkpoints; each evaluation has one besides. 0 = off."""
    save_every_steps: int = Field(0, ge=0)
    """Optimizer steps between checkpoints within an epoch. 0 = off."""
    keep: int = Field(2, ge=2)
    """Newest checkpoints kept. The one before re-weighting starts is kept besides, as checkpoints/before-drw."""
    patience: int = Field(0, ge=0)
    """Stop after so many evaluations in a row without a better accuracy on the selection set; those before re-weighting
    begins do not count. 0 = train all epochs."""
    nonfinite_skips: int = Field(0, ge=0)
    """Optimizer steps in a row that are left out because their gradient is not finite, before the run stops. 0 = stop
    at the first; the weights stay as they were before it either way."""

    @property
    def compiler_options(self) -> dict[str, Any]:
        """What ``torch.compile`` is told for every graph of the run."""
        return {"max_autotune": self.autotune}


class EvaluateConfig(Section):
    """Evaluation and model selection."""

    every: int = Field(10, ge=1)
    """Epochs between evaluations; the last epoch is always evaluated."""
    batch_size: int = Field(256, ge=1)
    """Images in an evaluation batch."""
    crop_pct: float = Field(0.875, gt=0, le=1)
    """Centre crop: input size over resized short side (224 / 256)."""
    select_on: Literal["val", "last", "test"] = "val"
    """Which set chooses the best checkpoint: validation; none (the last one); or test, as published numbers do."""
    select_by: Literal["balanced", "micro"] = "balanced"
    """Accuracy that chooses the best checkpoint. balanced: mean of the class accuracies. micro: over all images, most
    of which show head classes in a long-tailed hold-out."""
    weights: Literal["model", "ema", "both"] = "both"
    """Which weights are evaluated; the better on the selection set is reported when both."""
    analyze_images: int = Field(1024, ge=0)
    """After training, look into student and teacher on up to so many images each, for the report (`analyze`; sharpness
    is left to the verb). 0 = leave it out."""
    baseline_head: float = Field(0.0, ge=0, le=100)
    """Accuracy in % on head classes (official split) of a run to compare with, such as a plain ViT's: training warns
    when AVG falls 10 points below. 0 = this run's own best before re-weighting."""


class TeacherTrainingConfig(Section):
    """`train-teacher`: the flat CNN and its SAM optimizer."""

    arch: str = "resnet32"
    """resnet<6n+2> (CIFAR, option A), resnet50, or any timm CNN name."""
    img_size: int = Field(32, ge=8)
    """Input height and width in pixels."""
    loss: Literal["ce", "focal", "ldam", "vs", "balanced_softmax", "logit_adjustment", "paco"] = "ce"
    """Loss."""
    normed_head: bool = False
    """Cosine classifier; with ldam alone, whose scale s it needs."""
    ldam_max_margin: float = Field(0.5, ge=0)
    """LDAM: largest margin."""
    ldam_scale: float = Field(30.0, gt=0)
    """LDAM: logit scale s."""
    focal_gamma: float = Field(1.0, ge=0)
    """Class-balanced focal loss: gamma."""
    vs_tau: float = Field(1.0, ge=0)
    """VS loss: additive adjustment."""
    vs_gamma: float = Field(0.15, ge=0)
    """VS loss: multiplicative adjustment."""
    adjustment_tau: float = Field(1.0, ge=0)
    """Logit adjustment: tau."""
    paco_alpha: float = Field(0.01, ge=0)
    """PaCo: weight of same-class samples."""
    paco_beta: float = Field(1.0, gt=0)
    """PaCo: weight of the own class centre."""
    paco_gamma: float = Field(1.0, ge=0)
    """PaCo: weight of the features in the denominator."""
    paco_temperature: float = Field(0.05, gt=0)
    """PaCo: temperature T."""
    paco_queue: int = Field(1024, ge=1)
    """PaCo: length of the queue K."""
    paco_dim: int = Field(32, ge=1)
    """PaCo: width of the projected features."""
    paco_momentum: float = Field(0.999, ge=0, lt=1)
    """PaCo: momentum of the key encoder."""
    paco_view: Literal["same", "simclr", "simclr_weak"] = "simclr"
    """PaCo: augmentation of the keys. same: the queries'. simclr: RandomResizedCrop (.2 to 1), flip, colour jitter with
    hue in 80 %, gray in 20 %, blur in 50 % (CIFAR). simclr_weak: jitter without hue, whole crop range (ImageNet)."""
    sam: Literal["none", "sam", "asam"] = "sam"
    """Sharpness-aware minimisation: none, plain, adaptive."""
    sam_rho: float = Field(0.05, ge=0)
    """Radius of the perturbation."""
    sam_schedule: Literal["constant", "linear", "step"] = "constant"
    """How rho changes over epochs: constant; linear, rising to sam_rho in the last; step through sam_rho_steps."""
    sam_rho_steps: tuple[tuple[int, float], ...] = ()
    """step: (first epoch, rho) pairs."""
    sam_scope: Literal["global", "rank"] = "global"
    """Several ranks: the perturbation climbs the gradient of the whole batch, or each rank its own part's (as the SAM
    paper on several accelerators: no exchange in the first pass, and a smaller batch to be flat for)."""
    sam_bn_twice: bool = False
    """Update batch-norm statistics in both passes, as the reference does."""
    lr: float = Field(0.1, gt=0)
    """Peak learning rate of SGD."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD momentum."""
    weight_decay: float = Field(2e-4, ge=0)
    """L2 penalty of all weights."""
    schedule: Literal["step", "cosine"] = "step"
    """Learning rate over epochs."""
    lr_steps: tuple[tuple[int, float], ...] = ((160, 0.01), (180, 0.0001))
    """step: (first epoch, factor on lr) pairs."""
    warmup_epochs: int = Field(5, ge=0)
    """Epochs of linear warm-up."""
    drw_epoch: int = Field(-1, ge=-1)
    """First epoch (from 0) with effective-number class weights. -1 = never."""
    drw_beta: float = Field(0.9999, ge=0, lt=1)
    """Beta of the effective number of samples (Cui et al. 2019)."""
    epochs: int = Field(200, ge=1)
    """Passes over the training set."""
    batch_size: int = Field(128, ge=1)
    """Images in an optimizer step, over all ranks and micro-batches."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches that a rank's part of a batch goes through the network in, to save memory. Batch norm sees one at a
    time."""
    clip_norm: float = Field(0.0, ge=0)
    """Global gradient norm above which gradients are scaled down. 0 = off."""

    @model_validator(mode="after")
    def _check(self) -> "TeacherTrainingConfig":
        if self.drw_epoch >= self.epochs:
            raise ValueError(
                f"drw_epoch: got {self.drw_epoch}, expected less than epochs={self.epochs}; re-weighting "
                "would never start (use -1 to turn it off)"
            )
        if self.normed_head and self.loss != "ldam":
            raise ValueError(
                f"normed_head: got true with loss={self.loss}, expected false because cosines lie in -1..1 and ldam "
                "alone scales them; add teacher_training.normed_head=false"
            )
        if self.sam_schedule == "step" and not self.sam_rho_steps:
            raise ValueError("sam_rho_steps: got none, expected (first epoch, rho) pairs with sam_schedule=step")
        if self.loss == "paco" and self.paco_queue % self.batch_size:
            raise ValueError(
                f"paco_queue: got {self.paco_queue}, expected a multiple of batch_size={self.batch_size}, because a "
                "batch replaces a whole part of the queue"
            )
        return self


class Config(Section):
    """A run: what is trained, on what, how."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the run under runs_dir: letters, digits, dot, dash, underscore."""
    runs_dir: str = "runs"
    """Folder that holds run folders."""
    published: dict[str, float] = Field(default_factory=dict)
    """Published accuracies in per cent to set beside ours in the report (all, head, mid, tail)."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    mixup: MixupConfig = MixupConfig()
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    teacher_training: TeacherTrainingConfig = TeacherTrainingConfig()
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def origins(self) -> dict[str, str]:
        """Dotted field name -> where its value came from (`default`, the file's name, `override`)."""
        return self._origins

    @property
    def is_teachers(self) -> bool:
        """Whether the recipe is for `train-teacher`: it changes ``teacher_training`` and nothing of the student."""
        kept = (self.student, self.teacher, self.loss) == (StudentConfig(), TeacherConfig(), LossConfig())
        return kept and self.teacher_training != TeacherTrainingConfig()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.mixup.on and self.train.batch_size % 2:
            raise ValueError(
                f"train.batch_size: got {self.train.batch_size}, expected an even number because a mixed batch pairs "
                f"images; use {self.train.batch_size - 1 or 2} or {self.train.batch_size + 1}, or mixup.prob=0"
            )
        if self.train.autotune and not self.train.compile:
            raise ValueError("train.autotune: got true with train.compile=false, expected false: nothing is compiled")
        if self.loss.drw_epoch >= self.train.epochs:
            raise ValueError(
                f"loss.drw_epoch: got {self.loss.drw_epoch}, expected less than train.epochs={self.train.epochs}; "
                "re-weighting would never start (use -1 to turn it off)"
            )
        return self


def _field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            names += _field_names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _field(name: str) -> FieldInfo:
    section, _, field = name.rpartition(".")
    model: Any = Config.model_fields[section].annotation if section else Config
    return model.model_fields[field]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
FIELDS = tuple(_field_names(Config))
SECTIONS = tuple(dict.fromkeys(name.partition(".")[0] for name in FIELDS if "." in name))
TEXTS = frozenset(name for name in FIELDS if _field(name).annotation is str)


def near(name: str, known: list[str] | tuple[str, ...]) -> str:
    """The tail of an error message that offers the nearest known names, or nothing."""
    leaf = {k.rsplit(".", 1)[-1]: k for k in known}
    found = difflib.get_close_matches(name, known, 2, 0.6)
    found = found or [leaf[n] for n in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaf), 2, 0.6)]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        is_section = name in Config.model_fields and any(f.startswith(f"{name}.") for f in FIELDS)
        if is_section and isinstance(value, dict | None):
            flat |= _flatten(value or {}, f"{name}.")
        else:
            flat[name] = value
    return flat


class _Loader(yaml.SafeLoader):
    """YAML, but a name that is given twice in one mapping is an error, and 5e-4 a number, which YAML 1.1 calls text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = getattr(key, "value", None)
            if isinstance(name, str) and name != "<<":  # "<<" takes over another mapping, which the names here win over
                if name in seen:
                    raise UserError(f"{name} is given twice (line {key.start_mark.line + 1}); remove one")
                seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that ``_Loader`` would read as numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"+-0123456789"]
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; empty if the file is.

    Raises:
        UserError: the file cannot be read, is not YAML, gives a name twice, or holds something else.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path}: cannot be read ({error}); give a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"config file {path}: not valid YAML ({_yaml_fault(error)})") from None
    except RecursionError:
        raise UserError(f"config file {path}: nested too deeply; a config has two levels") from None
    except UserError as error:
        raise UserError(f"config file {path}: {error}") from None
    except (ValueError, ArithmeticError) as error:  # an integer of thousands of digits, the 99th of a month
        raise UserError(f"config file {path}: not a number or date ({str(error).partition(';')[0]})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config file {path}: got a {type(tree).__name__}, expected sections of 'name: value'")
    return {str(key): value for key, value in tree.items()}


def _yaml_fault(error: yaml.YAMLError) -> str:
    """Return what is wrong with a file and where: line and column as editors count them."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if not problem or not mark:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def recipes() -> dict[str, Path]:
    """Return the shipped recipes by name, such as ``teacher/cifar10_lt_r100``."""
    shipped = Path(__file__).parent / "configs"
    if not shipped.is_dir():
        shipped = Path(__file__).parent.parent / "configs"
    return {str(p.relative_to(shipped).with_suffix("")): p for p in sorted(shipped.rglob("*.yaml"))}


def find(path: str) -> Path:
    """A config file by path, or a shipped recipe by name (``quickstart``, ``teacher/cifar10_lt_r100``).

    Raises:
        UserError: neither exists; names the nearest recipe.
    """
    if Path(path).is_file():
        return Path(path)
    name, shipped = path.removesuffix(".yaml"), recipes()
    if name in shipped:
        return shipped[name]
    raise UserError(f"config {path}: no such file or recipe{near(name, list(shipped))}; list: fastdeitlt config list")


def load(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, or a shipped recipe by name, and apply ``section.field=value`` overrides in order.

    Raises:
        UserError: no such file; not YAML; an unknown name (the nearest is named); a value of the wrong type or range.
    """
    file = find(path)
    flat = _flatten(read_yaml(file))
    origins = dict.fromkeys(flat, file.name)
    wanted = parse_overrides(overrides)
    return build(flat | wanted, origins | dict.fromkeys(wanted, "override"))


def parse_overrides(overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Dotted name -> value of ``section.field=value`` texts; names are checked by ``build``.

    Raises:
        UserError: no equals sign, or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"override {override!r}: expected section.field=value")
        if name in TEXTS and text.strip()[:1] not in ("'", '"'):
            values[name] = text.strip()  # as typed: a run may be called nan or 2026
            continue
        try:
            values[name] = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise UserError(f"override {override!r}: the value is not valid YAML; quote it") from None
        except RecursionError:
            raise UserError(f"override {override[:40]!r}...: nested too deeply") from None
        except UserError:
            raise
        except (ValueError, ArithmeticError) as error:
            raise UserError(
                f"override {override[:40]!r}: not a number or date ({str(error).partition(';')[0]})"
            ) from None
    return values


def build(flat: dict[str, Any], origins: dict[str, str] | None = None) -> Config:
    """A validated Config from dotted names.

    Raises:
        UserError: see ``load``.
    """
    origins = origins or {}
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        where = f" (in {origins[name]})" if origins.get(name, "override") != "override" else ""
        if name in SECTIONS:
            got = _SHORT.repr(value)
            setting = next(field for field in FIELDS if field.startswith(f"{name}."))
            raise UserError(f"{name}: got {got}{where}, expected a section of settings, such as {setting}={got}")
        if name not in FIELDS:
            raise UserError(f"unknown config name {name!r}{where}{near(name, FIELDS)}")
        section, _, field = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[field] = value
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        if first["type"] in ("missing", "tuple_type", "too_long"):
            name = next(field for field in FIELDS if f"{name}.".startswith(f"{field}."))
            default = _field(name).default
            example = yaml.safe_dump([*default] or [[0, 0.05]], default_flow_style=True).strip()
            raise UserError(f"{name}: got {_SHORT.repr(flat[name])}, expected a list like {example}") from None
        if first["type"] == "string_pattern_mismatch":
            message = "expected letters, digits, dots, dashes and underscores, beginning with a letter or digit"
        if first["type"] == "value_error" and not isinstance(first["input"], tuple | list):
            # of a whole section, whose message names the field and what it got
            raise UserError(f"{name}.{message}" if name else message) from None
        raise UserError(f"{name}: got {_SHORT.repr(first['input'])}, {message}") from None
    config._origins.update({name: origins.get(name, "default") for name in FIELDS})
    return config


def flatten(config: Config) -> dict[str, Any]:
    """Dotted field name -> value, in schema order."""
    return _flatten(config.model_dump(mode="json"))


def merge(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return a configuration with other settings, by dotted name or as a mapping of a section's.

    Raises:
        UserError: see ``load``.
    """
    given = _flatten(dict(settings))
    return build(flatten(config) | given, config.origins | dict.fromkeys(given, "override"))


def dump(config: Config) -> str:
    """The resolved configuration as YAML that ``load`` reads back to an equal Config."""
    return dump_values(flatten(config))


def dump_values(values: dict[str, Any]) -> str:
    """Return settings by dotted name as YAML that ``load`` reads."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[field] = value
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def describe(name: str) -> str:
    """The documentation of a dotted field name, on one line."""
    return " ".join((_field(name).description or "").split())
