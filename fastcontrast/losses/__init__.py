"""Losses: functions, and modules that hold a scale and settings. All are algebra on `ops.similarity_lse`."""

from .clip import ClipLoss, clip_loss
from .distill import DistillLoss, distill_loss
from .distributed import DistributedLoss
from .info_nce import InfoNCELoss, info_nce
from .multi_positive import MultiPositiveLoss, SupConLoss, multi_positive_loss, supcon_loss
from .nt_xent import NTXentLoss, nt_xent_loss
from .siglip import SigLipLoss, siglip_loss
from .token_contrast import TokenContrastLoss, token_contrast_margin

__all__ = [
    "ClipLoss",
    "DistillLoss",
    "DistributedLoss",
    "InfoNCELoss",
    "MultiPositiveLoss",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "TokenContrastLoss",
    "clip_loss",
    "distill_loss",
    "info_nce",
    "multi_positive_loss",
    "nt_xent_loss",
    "siglip_loss",
    "supcon_loss",
    "token_contrast_margin",
]
