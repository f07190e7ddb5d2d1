"""Operations: equation, reference, checks and autograd, one file each."""

from ._dispatch import Choice, explain, operations, trace
from ._workspace import set_workspace
from .contrastive_select import contrastive_candidates, contrastive_select
from .frame_attention import frame_attention
from .linear_cross_entropy import linear_cross_entropy
from .linear_kl import linear_kl
from .linear_logprob import linear_logprob
from .max_cosine import max_cosine
from .maxsim import maxsim
from .pairwise_reduce import pairwise_reduce
from .similarity_cross_entropy import similarity_cross_entropy
from .similarity_lse import similarity_lse
from .similarity_mix import similarity_mix
from .similarity_softplus import similarity_softplus
from .similarity_topk import similarity_topk
from .temporal_attention import temporal_attention
from .token_contrast_margin import token_contrast_margin
from .triplet_distances import triplet_distances
from .two_logit_mix import two_logit_mix
from .upsampled_cross_entropy import upsampled_binary_cross_entropy, upsampled_cross_entropy

__all__ = [
    "Choice",
    "contrastive_candidates",
    "contrastive_select",
    "explain",
    "frame_attention",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprob",
    "max_cosine",
    "maxsim",
    "operations",
    "pairwise_reduce",
    "set_workspace",
    "similarity_cross_entropy",
    "similarity_lse",
    "similarity_mix",
    "similarity_softplus",
    "similarity_topk",
    "temporal_attention",
    "token_contrast_margin",
    "trace",
    "triplet_distances",
    "two_logit_mix",
    "upsampled_binary_cross_entropy",
    "upsampled_cross_entropy",
]
