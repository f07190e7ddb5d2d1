"""Decoding methods for models of `transformers`, and the measures that judge what they wrote.

Each method is a callable for `model.generate(..., custom_generate=method)`. Nothing here imports transformers before it
runs.
"""

from .contrastive_search import contrastive_search
from .generate import generate
from .two_logits import adacad, cad, cfg, contrastive_decoding, dola

__all__ = ["adacad", "cad", "cfg", "contrastive_decoding", "contrastive_search", "dola", "generate"]
