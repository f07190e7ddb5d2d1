"""Log-probabilities of given tokens under a language-model head whose logits are never stored.

z_t = W h_t + b,      log p_t = z_t,target(t) − logsumexp_v z_tv
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from . import _check as check
from ._dispatch import note, register_through, select
from ._precision import without_autocast
from ._sweep import Masks
from ._tokens import head, per_token, workspace_of
from ._tokens import select as select_tokens
from .similarity_lse import reference_logits, reference_lse, similarity_lse

register_through("linear_logprob", "similarity_lse")


@without_autocast
def _reference(hidden, weight, bias, targets, ignore_index) -> tuple[Tensor, Tensor]:
    logits = reference_logits(hidden, weight, 1.0, bias, Masks())
    logprob = -F.cross_entropy(logits, targets.long(), ignore_index=ignore_index, reduction="none")
    return logprob, reference_lse(logits, 1).masked_fill(targets == ignore_index, 0.0)


@without_autocast
def linear_logprob(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...] integer
    *,
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    return_lse: bool = False,
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log_softmax(hidden @ weight.T + bias).gather(-1, targets), with logits in float32; 0 at ignored targets.

    Gradients to hidden, weight and bias for any upstream gradient, as policy gradients, preference losses and weighted
    likelihoods have them: four matrix products, two where the vocabulary needs no gradient. A plain mean or sum takes
    three in `linear_cross_entropy`.

    Args: as `linear_cross_entropy`.
        return_lse: also logsumexp_v of each token's logits [...], 0 at ignored targets, with its gradient.

    Returns float32 [...] (float64 for float64 inputs). Raises as `linear_cross_entropy`.
    """
    op = "linear_logprob"
    rows = head(op, hidden, weight, bias)
    targets = per_token(op, "targets", targets, hidden, floating=False)
    check.workspace(op, workspace)
    shape = hidden.shape[:-1]
    choice = select(op, implementation, hidden.device, hidden.dtype)
    if choice.implementation == "reference":
        check.within(op, "targets", targets[targets != ignore_index], 0, weight.shape[0])
        note(choice._replace(op="similarity_lse"))
        logprob, lse = (x.view(shape) for x in _reference(rows, weight, bias, targets, ignore_index))
        return (logprob, lse) if return_lse else logprob
    tokens = select_tokens(op, rows, weight.shape[0], targets, ignore_index)
    settings = {"key_bias": bias, "positives": tokens.targets, "return_positives": True}
    settings["workspace"] = workspace_of(workspace, hidden.device)
    lse, own = similarity_lse(tokens.hidden, weight, **settings, implementation=choice.implementation)
    logprob = tokens.spread(own - lse, shape)
    return (logprob, tokens.spread(lse, shape)) if return_lse else logprob
