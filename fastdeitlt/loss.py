"""The joint loss, at its public name."""

from fastdeitlt.core.loss import JointLoss, joint_loss

__all__ = ["JointLoss", "joint_loss"]
