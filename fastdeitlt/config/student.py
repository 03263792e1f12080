"""Configuration sections of student training, from data to evaluation."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fastdeitlt.config.section import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Below1,
    ChannelDeviations,
    ChannelMeans,
    Place,
    Range,
    Section,
)


class DataConfig(Section):
    """Data set and decoding."""

    dataset: Literal[
        "fashion_mnist_lt",
        "fashion_mnist_full_lt",
        "cifar10_lt",
        "cifar100_lt",
        "imagenet_lt",
        "inat18",
        "places_lt",
        "list",
        "folder",
        "shards",
    ] = "fashion_mnist_lt"
    """Data set. `fashion_mnist_lt` is embedded, `fashion_mnist_full_lt` a subset of all 60,000 images; `list` uses
    train_list/val_list/test_list; `folder` reads root/{train,val,test}/<class>/<image>, or root/<class>/<image>, split
    by class; `shards` reads WebDataset tars, zips and Hugging Face parquet files (train-*, val-*, test-*) in root."""
    root: str = ""
    """Folder of the images; listed paths must be inside it. Empty: the embedded set, or Debian's Fashion-MNIST."""
    train_list: str = ""
    """List file (txt, csv, json) of the training images. Empty: the data set's default name under root."""
    val_list: str = ""
    """List file of the validation images. Empty: the default name, if it exists."""
    test_list: str = ""
    """List file of the test images. Empty: the default name, if it exists."""
    imbalance_factor: float = Field(0.01, gt=0, le=1)
    """CIFAR and fashion_mnist_full_lt: smallest over largest class size (0.01 is rho = 100). 1 = balanced."""
    imbalance_kind: Literal["exp", "step"] = "exp"
    """CIFAR and fashion_mnist_full_lt: exponential decay over classes, or half of the classes reduced."""
    val_holdout: float | None = Field(None, ge=0, lt=0.5)
    """Share of each training class held out for validation if there is no validation set. 0 = none; null: 0.1 for a
    root without named splits, else none."""
    test_holdout: float | None = Field(None, ge=0, lt=0.5)
    """Share of each training class held out for testing if there is no test set. 0 = none; null: 0.2 for a root without
    named splits, else none."""
    sampling: Literal["instance", "class_balanced", "sqrt", "progressive"] = "instance"
    """Class shares of an epoch (arXiv 1910.09217): instance = every image once; sqrt = square root of the class size;
    class_balanced = equal; progressive = from proportional to equal over the epochs. Class priors and loss weights are
    not affected."""
    residency: Literal["auto", "stream", "host", "device"] = "auto"
    """Storage of the training images: decoded at each use (stream), or decoded once in host or device memory."""
    stored_short_side: int = Field(0, ge=0)
    """Limit of the stored training images' short side in pixels; such a set is never streamed. 0 = full size."""
    on_error: Literal["raise", "skip"] = "raise"
    """Unreadable training image: stop with its name, or replace it by one of its class and count it."""
    exif: Literal["ignore", "apply"] = "ignore"
    """EXIF orientation: ignored, as in timm and the official code, or applied; a TIFF's own tag is always applied. The
    model folder records it; eval, predict and export use it."""
    num_threads: int = Field(0, ge=0)
    """Data threads per rank, each for whole batches. 0 = the cores divided by the local ranks."""
    jpeg_engine_share: float = Field(0.65, ge=0, le=1)
    """Share of JPEG files decoded by the GPU's hardware engine, if it has one (A100, H100, ...). 0 = none."""

    @property
    def is_own(self) -> bool:
        """Whether the images are the user's, not a published set."""
        return self.dataset in ("folder", "list", "shards")

    @property
    def ignored(self) -> tuple[str, ...]:
        """Settings without effect on this data set."""
        lists, cut = ("train_list", "val_list", "test_list"), ("imbalance_factor", "imbalance_kind")
        if self.dataset in ("cifar10_lt", "cifar100_lt", "fashion_mnist_full_lt"):
            return lists
        return (*lists, *cut) if self.dataset in ("folder", "shards") else cut

    @property
    def title(self) -> str:
        """Display name of the data set: its name, or the folder's name for user data."""
        return (self.is_own and Path(os.path.expanduser(self.root)).resolve().name) or self.dataset


class AugmentConfig(Section):
    """Strong augmentation of single images (default: timm's DeiT recipe)."""

    recipe: Literal["deit", "pad_crop", "autoaugment_cutout", "crop_jitter", "none"] = "deit"
    """deit: RandomResizedCrop, flip, RandAugment, erasing. pad_crop: pad, crop, flip (CIFAR CNNs). autoaugment_cutout:
    pad_crop + AutoAugment + Cutout (PaCo). crop_jitter: RandomResizedCrop, flip, ColorJitter(.4). none: resize only.
    pad_crop, autoaugment_cutout and none use the central square of an image."""
    crop_scale: Range = (0.08, 1.0)
    """RandomResizedCrop: range of the crop's share of the image area."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """RandomResizedCrop: range of the crop's aspect ratio."""
    pad: int = Field(4, ge=0)
    """pad_crop: pixels padded on each side. 0 = no crop."""
    flip_prob: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    rand_ops: int = Field(2, ge=0, le=2)
    """RandAugment operations per image (rand-m9-mstd0.5-inc1). 0 = off."""
    rand_prob: float = Field(0.5, ge=0, le=1)
    """Probability that each drawn operation is applied."""
    rand_magnitude: float = Field(9.0, ge=0, le=10)
    """Mean level of an operation, 0..10."""
    rand_std: float = Field(0.5, ge=0)
    """Standard deviation of the level."""
    erase_prob: float = Field(0.25, ge=0, le=1)
    """Probability of random erasing (per-pixel noise). 0 = off."""
    repeats: int = Field(3, ge=1)
    """Repeated augmentation: copies of an image in an epoch. 1 = off."""
    mean: ChannelMeans = IMAGENET_MEAN
    """Channel means for normalising the student's input, in 0..1 as the images."""
    std: ChannelDeviations = IMAGENET_STD
    """Channel standard deviations for normalising the student's input."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of training augmentation: Triton kernels, or torch operations. auto: the kernels on a GPU for the
    recipes deit and none, if their first batch agrees with torch's."""


class MixupConfig(Section):
    """Mixup and CutMix of a batch with its reverse (timm's batch mode)."""

    mixup_alpha: float = Field(0.8, ge=0)
    """Beta parameter of Mixup. 0 = no Mixup."""
    cutmix_alpha: float = Field(1.0, ge=0)
    """Beta parameter of CutMix. 0 = no CutMix."""
    prob: float = Field(1.0, ge=0, le=1)
    """Probability that a batch is mixed."""
    switch_prob: float = Field(0.5, ge=0, le=1)
    """Probability of CutMix instead of Mixup if both are on."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing of the CLS target while mixing is on. 0 = off."""
    off_in_drw: bool = False
    """Disable mixing and smoothing once re-weighting starts, as the reference on CIFAR."""

    @property
    def on(self) -> bool:
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


class StudentConfig(Section):
    """The distilled Vision Transformer."""

    name: str = "deit_base_distilled_patch16_224"
    """deit_{tiny,small,base,large}_distilled_patch{2,4,8,16}_<size>."""
    img_size: int = Field(0, ge=0)
    """Input height and width in pixels. 0 = the size in the name."""
    init: Place = ""
    """Initial weights: a run or model folder, or a .pth or .safetensors file of a plain or distilled ViT with timm's
    names. Other image sizes, patches, depths and classes are adapted. Empty: random weights."""
    depth: int = Field(0, ge=0)
    """Number of blocks. 0 = the architecture's 12 (large: 24)."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth rate of the last block, rising linearly from 0 at the first. 0 = off."""
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
    """bernoulli: each sample drops a branch independently, which is computed and multiplied by 0 (timm, the recipes).
    count: a fixed number of samples per batch and branch is not computed: less work, dependent draws."""

    @property
    def architecture(self) -> dict[str, Any]:
        """Arguments of ``create_student``."""
        return self.model_dump(exclude={"init"})

    @property
    def side(self) -> int:
        """Input height and width in pixels."""
        return self.img_size or int(self.name.rpartition("_")[2])


class TeacherConfig(Section):
    """The frozen CNN teacher of the DIST token."""

    path: Place = ""
    """Model folder or released checkpoint of the teacher. Empty: no distillation (a plain ViT)."""
    arch: str = "resnet32"
    """resnet<6n+2> (CIFAR, option A), resnet50, or any timm CNN name. A model folder's own takes precedence."""
    style: Literal["auto", "official_paco", "official_ldam", "timm", "fastdeitlt"] = "auto"
    """State-dict key format of the checkpoint."""
    img_size: int = Field(0, ge=0)
    """Input size of the teacher in pixels, to which the mixed student images are resized. 0 = the size stated in its
    model folder, else the student's."""
    normalise: Literal["auto", "student", "teacher"] = "auto"
    """Mean and std of the teacher's input. auto: those stated in its model folder, else the student's, as in the
    official code. teacher: those of its folder, else teacher.mean and teacher.std."""
    mean: ChannelMeans = IMAGENET_MEAN
    """Channel means of a teacher without a model folder (used by normalise=teacher)."""
    std: ChannelDeviations = IMAGENET_STD
    """Channel standard deviations of a teacher without a model folder (used by normalise=teacher)."""
    resize_antialias: bool = False
    """Antialias the resize to the teacher's size. false: as in the official environment (torchvision 0.15)."""
    map_classes: bool = False
    """The teacher's classes are in descending order of size, as in released LDAM teachers of ImageNet-LT and iNat.
    Classes of equal size are matched by its decisions. A model folder's own order takes precedence."""
    check: bool = True
    """Before the first step, refuse a teacher with exchanged classes, or whose balanced accuracy on clean training
    images is near chance or far below that stated in its folder."""
    fuse_epilogues: bool = False
    """Compute bias, shortcut and ReLU inside the teacher's convolutions, by cuDNN on a GPU. Equal logits up to
    rounding; not measured on a GPU."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms for the teacher's convolutions in the first step. The choice, and with it the last
    bits, may differ between runs; not measured on a GPU."""


class LossConfig(Section):
    """L = (1 - alpha) CE(CLS, y) + alpha L_DRW(DIST, teacher) (paper section 3)."""

    distillation: Literal["hard", "soft"] = "hard"
    """DIST target: the teacher's argmax, or its softened distribution (cosine head: at its training scale)."""
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
    """Divisor of the weighted DIST loss: the sum of weights of the (virtual) rank's micro-batch, as the reference, or
    the mean of that sum over all ranks, which gives the mean over the whole micro-step."""
    reweight_cls: bool = False
    """Also weight the CLS loss once re-weighting starts (official --weighted-baseloss)."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of the loss: Triton kernel, or torch. auto: the faster one measured on this GPU, else torch."""


class OptimConfig(Section):
    """AdamW or LAMB, cosine schedule, EMA."""

    lr: float = Field(5e-4, gt=0)
    """Base learning rate for a batch of 512 images."""
    lr_scale: Literal["official", "effective", "none"] = "official"
    """official: lr * batch_size * ranks / 512 (ignores accumulation, as the reference). effective: with accumulation.
    none: lr unchanged."""
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    """AdamW momenta."""
    eps: float = Field(1e-8, gt=0)
    """AdamW epsilon."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay of matrices; biases, norms, tokens and position embeddings have none."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning-rate factor from each layer to the one below it, for fine-tuning. 1 = equal rates."""
    clip_norm: float = Field(0.0, ge=0)
    """Maximum global gradient norm; larger gradients are scaled down. 0 = off."""
    algorithm: Literal["adamw", "lamb"] = "adamw"
    """adamw: as in the recipes. lamb: for very large batches (You et al. 2020); needs apex."""
    backend: Literal["auto", "fastdeitlt", "torch", "apex", "deepspeed"] = "auto"
    """Implementation of the optimizer step. torch: fused AdamW. fastdeitlt: one kernel over a flat buffer, including
    the EMA. apex: NVIDIA's FusedAdam or FusedLAMB, built from source. deepspeed: FusedAdam, compiled by DeepSpeed. The
    last two need a GPU. auto: torch, or fastdeitlt where it was measured faster on this GPU; for lamb apex."""
    warmup_epochs: float = Field(5, ge=0)
    """Epochs of linear warm-up."""
    warmup_lr: float = Field(1e-6, ge=0)
    """Learning rate at the start of warm-up (not scaled)."""
    min_lr: float = Field(1e-5, ge=0)
    """Learning rate at the end of the cosine (not scaled)."""
    ema_decay: float = Field(0.99996, ge=0, lt=1)
    """Decay of the exponential moving average of the weights per optimizer step. 0 = no EMA."""


class TrainConfig(Section):
    """The training loop."""

    epochs: int = Field(1200, ge=1)
    """Passes over the sampler's epoch (N images, about N / repeats distinct ones)."""
    batch_size: int = Field(128, ge=1)
    """Images in a micro-batch of one (virtual) rank."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches of a (virtual) rank in one optimizer step."""
    virtual_ranks: int = Field(0, ge=0)
    """Data-parallel ranks that the recipe is defined for; fewer real ranks process their batches in turn and give the
    same steps. 0 = the real number."""
    ranks_per_forward: int = Field(1, ge=1)
    """Virtual ranks per forward and backward pass, each with its own losses: the same steps up to rounding, with fewer,
    larger launches and more memory; not measured on a GPU. When compiled, drop path uses other random numbers."""
    seed: int = Field(0, ge=0)
    """Seed of weights, augmentation, mixing and drop path."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the training step."""
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    """Autocast type of the step. fp32: convolutions on a GPU use TF32, torch's default. fp8: bf16 with float8 products
    in the student's blocks, except for weight gradients; changes results, needs a GPU of compute capability 8.9 or
    newer, not measured on one."""
    compile: bool = True
    """Compile student, teacher and loss as one graph."""
    autotune: bool = False
    """Let the compiler time alternatives for each matrix product and convolution at the start, which takes minutes; on
    a GPU also Triton's, with fused epilogues. A resumed run may select others, and differ in the last bits."""
    cuda_graphs: bool = False
    """Replay forward and backward as CUDA graphs, for small students with launch-bound steps. Needs a GPU, the plain
    engine and compile=true; not measured on a GPU."""
    engine: Literal["auto", "plain", "deepspeed"] = "auto"
    """Backward, accumulation and step. auto: plain on one rank, DeepSpeed on more."""
    zero_stage: int = Field(1, ge=0, le=2)
    """DeepSpeed sharding over ranks: 0 none, 1 moments, 2 also gradients."""
    offload: bool = False
    """Keep moments and step in host memory (DeepSpeed, zero_stage 1 or 2): less device memory, slower."""
    measure_kernels: bool = True
    """At the first start on a GPU, time each kernel set to auto against torch's (about 30 s, estimated). Results are
    kept for this GPU, torch, Triton and shape. false: use earlier measurements, or torch's."""
    timeout_s: int = Field(600, ge=1)
    """Timeout in seconds of a rank waiting for the others."""
    main_timeout_s: int = Field(3600, ge=1)
    """Timeout in seconds for work of rank 0 alone: saving checkpoints, checking files, measuring kernels."""
    log_every: int = Field(10, ge=1)
    """Optimizer steps between log lines; the only host syncs of the loop."""
    save_every_epochs: int = Field(1, ge=0)
    """Epochs between checkpoints, in addition to one per evaluation. 0 = off."""
    save_every_steps: int = Field(0, ge=0)
    """Optimizer steps between checkpoints within an epoch. 0 = off."""
    keep: int = Field(2, ge=2)
    """Newest checkpoints kept, in addition to the last one before re-weighting (checkpoints/before-drw)."""
    patience: int = Field(0, ge=0)
    """Stop after this many consecutive evaluations without a better accuracy on the selection set, counted from the
    start of re-weighting. 0 = train all epochs."""
    nonfinite_skips: int = Field(0, ge=0)
    """Consecutive optimizer steps with a non-finite gradient that are skipped before the run stops. 0 = stop at the
    first. Such a step never changes the weights."""

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Options of ``torch.compile`` for every graph of the run."""
        return {"max_autotune": self.autotune}


class EvaluateConfig(Section):
    """Evaluation and model selection."""

    every: int = Field(10, ge=1)
    """Epochs between evaluations; the last epoch is always evaluated."""
    batch_size: int = Field(256, ge=1)
    """Images per evaluation batch."""
    crop_pct: float = Field(0.875, gt=0, le=1)
    """Centre crop: input size over resized short side (224 / 256)."""
    select_on: Literal["val", "last", "test"] = "val"
    """Selection set of the best checkpoint: validation, none (the last checkpoint), or test, as published numbers."""
    select_by: Literal["balanced", "micro"] = "balanced"
    """Accuracy for selecting the best checkpoint. balanced: mean of the class accuracies. micro: over all images, which
    favours head classes in a long-tailed hold-out."""
    weights: Literal["model", "ema", "both"] = "both"
    """Evaluated weights. both: the better ones on the selection set are reported."""
    analyze_images: int = Field(1024, ge=0)
    """After training, analyse student and teacher on up to this many images each, for the report (as `analyze`, without
    sharpness). 0 = off."""
    baseline_head: float = Field(0.0, ge=0, le=100)
    """Head-class accuracy in % (official split) of a baseline run, such as a plain ViT: training warns when AVG is 10
    points lower. 0 = this run's best before re-weighting."""
