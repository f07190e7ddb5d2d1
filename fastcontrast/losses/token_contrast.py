"""SimCTG's contrastive loss of token representations."""

from __future__ import annotations

from torch import Tensor, nn

from fastcontrast.ops import token_contrast_margin

__all__ = ["TokenContrastLoss", "token_contrast_margin"]


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
