"""Configuration section of `train-teacher`."""

from typing import Literal

from pydantic import Field, model_validator

from fastdeitlt.config.section import Section


class TeacherTrainingConfig(Section):
    """`train-teacher`: the flat CNN and its SAM optimizer."""

    arch: str = "resnet32"
    """resnet<6n+2> (CIFAR, option A), resnet50, or any timm CNN name."""
    img_size: int = Field(32, ge=8)
    """Input height and width in pixels."""
    loss: Literal["ce", "focal", "ldam", "vs", "balanced_softmax", "logit_adjustment", "paco"] = "ce"
    """Training loss."""
    normed_head: bool = False
    """Cosine classifier; only with ldam, whose scale s it needs."""
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
    """Schedule of rho over epochs: constant; linear, rising to sam_rho in the last; step, by sam_rho_steps."""
    sam_rho_steps: tuple[tuple[int, float], ...] = ()
    """step: (first epoch, rho) pairs."""
    sam_scope: Literal["global", "rank"] = "global"
    """On several ranks: perturbation by the gradient of the whole batch, or of each rank's part (as in the SAM paper on
    several accelerators: no all-reduce in the first pass, and sharpness of a smaller batch)."""
    sam_bn_twice: bool = False
    """Update batch-norm statistics in both passes, as the reference."""
    lr: float = Field(0.1, gt=0)
    """Peak learning rate of SGD."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD momentum."""
    weight_decay: float = Field(2e-4, ge=0)
    """L2 penalty of all weights."""
    schedule: Literal["step", "cosine"] = "step"
    """Schedule of the learning rate over epochs."""
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
    """Micro-batches per rank and batch, to save memory. Batch norm uses one at a time."""
    clip_norm: float = Field(0.0, ge=0)
    """Maximum global gradient norm; larger gradients are scaled down. 0 = off."""

    @model_validator(mode="after")
    def _check(self) -> "TeacherTrainingConfig":
        if self.drw_epoch >= self.epochs:
            raise ValueError(
                f"drw_epoch: got {self.drw_epoch}, expected less than epochs={self.epochs}, or -1 for no re-weighting"
            )
        if self.normed_head and self.loss != "ldam":
            raise ValueError(
                f"normed_head: got true with loss={self.loss}, expected false because only ldam scales the cosine "
                "logits. Set teacher_training.normed_head=false."
            )
        if self.sam_schedule == "step" and not self.sam_rho_steps:
            raise ValueError("sam_rho_steps: got [], expected (first epoch, rho) pairs with sam_schedule=step")
        for name, steps in (("lr_steps", self.lr_steps), ("sam_rho_steps", self.sam_rho_steps)):
            if negative := [list(step) for step in steps if min(step) < 0]:
                raise ValueError(f"{name}: got {negative[0]}, expected a first epoch and a value of at least 0")
        if self.loss == "paco" and self.paco_queue % self.batch_size:
            raise ValueError(f"paco_queue: got {self.paco_queue}, expected a multiple of batch_size={self.batch_size}")
        return self
