"""Contrastive learning and contrastive decoding that never store what they need not store."""

from .attention import CrossFrameAttention
from .decoding import adacad, cad, cfg, contrastive_decoding, contrastive_search, dola, generate
from .ema import EMATeacher, cosine_momentum
from .grad_cache import GradCache
from .losses import (
    ClipLoss,
    DistillLoss,
    DistributedLoss,
    InfoNCELoss,
    MultiPositiveLoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
    TokenContrastLoss,
    clip_loss,
    distill_loss,
    info_nce,
    multi_positive_loss,
    nt_xent_loss,
    siglip_loss,
    supcon_loss,
    token_contrast_margin,
)
from .memory import MemoryBank
from .ops import set_workspace

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "CrossFrameAttention",
    "DistillLoss",
    "DistributedLoss",
    "EMATeacher",
    "GradCache",
    "InfoNCELoss",
    "MemoryBank",
    "MultiPositiveLoss",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "TokenContrastLoss",
    "adacad",
    "cad",
    "cfg",
    "clip_loss",
    "contrastive_decoding",
    "contrastive_search",
    "cosine_momentum",
    "distill_loss",
    "dola",
    "generate",
    "info_nce",
    "multi_positive_loss",
    "nt_xent_loss",
    "set_workspace",
    "siglip_loss",
    "supcon_loss",
    "token_contrast_margin",
]
