"""GradCache: exact gradients of a giant batch with the activations of one chunk."""

from .step import GradCache, Plan

__all__ = ["GradCache", "Plan"]
