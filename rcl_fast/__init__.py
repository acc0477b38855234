"""Supervised contrastive losses for long-tailed classification (SCL, BCL, and either with RCL), fast and tested."""

from rcl_fast.backends.select import explain_backend
from rcl_fast.cross_entropy import LDAM, BalancedSoftmax, CBFocal, CrossEntropy, LogitAdjusted
from rcl_fast.functional import contrastive_loss
from rcl_fast.losses import ContrastiveLoss

__all__ = [
    "LDAM",
    "BalancedSoftmax",
    "CBFocal",
    "ContrastiveLoss",
    "CrossEntropy",
    "LogitAdjusted",
    "contrastive_loss",
    "explain_backend",
]
__version__ = "0.1.0"
