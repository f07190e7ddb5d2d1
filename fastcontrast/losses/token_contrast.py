"""SimCTG's contrastive loss of token representations."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from fastcontrast import ops
from fastcontrast.distributed._exchange import active
from fastcontrast.distributed._sums import share, whole_sum

__all__ = ["TokenContrastLoss", "token_contrast_margin"]


@functools.wraps(ops.token_contrast_margin)
def token_contrast_margin(
    hidden: Tensor, lengths: Tensor | None = None, *, valid: Tensor | None = None, reduction: str = "mean", **settings
) -> Tensor:
    if active() is None or reduction not in ("mean", "sum"):
        return ops.token_contrast_margin(hidden, lengths, valid=valid, reduction=reduction, **settings)
    total = ops.token_contrast_margin(hidden, lengths, valid=valid, reduction="sum", **settings)
    if reduction == "sum":
        return whole_sum(total)
    sequences, most = hidden.shape[:2]
    tokens = lengths if valid is None else valid.sum(1)
    return share(total, sequences * most * (most - 1) if tokens is None else (tokens * (tokens - 1)).sum())


class TokenContrastLoss(nn.Module):
    """`token_contrast_margin` as a module: pushes the tokens of a sequence apart until no cosine exceeds 1 − margin.

    SimCTG adds it to the cross entropy of the next token with weight 1, L = L_mle + L_cl, on the states that go into
    the language-model head:

        contrast = TokenContrastLoss(margin=0.5)
        loss = cross_entropy + contrast(hidden_states[-1], lengths)

    Args:
        margin: ρ, 0.5 in the paper.
        settings: reduction, workspace, implementation of `token_contrast_margin`.

    Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", equations 2 and 3.
    """

    def __init__(self, margin: float = 0.5, **settings):
        super().__init__()
        if unknown := sorted(set(settings) - {"reduction", "workspace", "implementation"}):
            raise TypeError(
                "TokenContrastLoss: settings must be among reduction, workspace, implementation, "
                f"got {', '.join(unknown)}"
            )
        self.margin, self.settings = margin, settings

    def forward(
        self,
        hidden: Tensor,  # [B, S, D]
        lengths: Tensor | None = None,  # [B] integer
        *,
        valid: Tensor | None = None,  # [B, S] bool
    ) -> Tensor:
        return token_contrast_margin(hidden, lengths, valid=valid, margin=self.margin, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join([f"margin={self.margin:g}", *(f"{name}={value!r}" for name, value in self.settings.items())])
