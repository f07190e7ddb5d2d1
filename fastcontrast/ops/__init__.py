"""Operations: equation, reference, checks and autograd, one file each."""

from ._dispatch import Choice, explain, operations, trace
from ._workspace import set_workspace
from .similarity_cross_entropy import similarity_cross_entropy
from .similarity_lse import similarity_lse
from .similarity_softplus import similarity_softplus

__all__ = [
    "Choice",
    "explain",
    "operations",
    "set_workspace",
    "similarity_cross_entropy",
    "similarity_lse",
    "similarity_softplus",
    "trace",
]
