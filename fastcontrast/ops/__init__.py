"""Operations: equation, reference, checks and autograd, one file each."""

from ._dispatch import Choice, explain, operations, trace
from ._workspace import set_workspace
from .linear_cross_entropy import linear_cross_entropy
from .linear_kl import linear_kl
from .linear_logprob import linear_logprob
from .pairwise_reduce import pairwise_reduce
from .similarity_cross_entropy import similarity_cross_entropy
from .similarity_lse import similarity_lse
from .similarity_mix import similarity_mix
from .similarity_softplus import similarity_softplus
from .similarity_topk import similarity_topk

__all__ = [
    "Choice",
    "explain",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprob",
    "operations",
    "pairwise_reduce",
    "set_workspace",
    "similarity_cross_entropy",
    "similarity_lse",
    "similarity_mix",
    "similarity_softplus",
    "similarity_topk",
    "trace",
]
