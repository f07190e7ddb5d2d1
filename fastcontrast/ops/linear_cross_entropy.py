"""Cross entropy of a language-model head whose logits are never stored.

z_t = W h_t + b,      loss_t = logsumexp_v z_tv − z_t,target(t),      loss = Σ_t w_t loss_t / Σ_t w_t

G_tv = w_t (softmax_v z_tv − [v is t's target]) / Σ w,   dh = G W,   dW = Gᵀ h,   db_v = Σ_t G_tv
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from . import _check as check
from ._dispatch import note, register_through, select
from ._precision import without_autocast
from ._sweep import Masks
from ._tokens import average, head, per_token, token_weights, workspace_of
from ._tokens import select as select_tokens
from .linear_logprob import linear_logprob
from .similarity_cross_entropy import similarity_cross_entropy
from .similarity_lse import reference_logits

register_through("linear_cross_entropy", "similarity_lse")


@without_autocast
def _reference(hidden, weight, bias, targets, ignore_index, weights, reduction) -> Tensor:
    logits = reference_logits(hidden, weight, 1.0, bias, Masks())
    losses = F.cross_entropy(logits, targets.long(), ignore_index=ignore_index, reduction="none")
    counted = (targets != ignore_index).to(losses.dtype)
    weights = counted if weights is None else counted * weights
    if reduction == "mean":
        weights = average(weights)
    return losses * weights if reduction == "none" else (losses * weights).sum()


@without_autocast
def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...] integer
    *,
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    weights: Tensor | None = None,  # [...]
    reduction: str = "mean",
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """F.cross_entropy(hidden @ weight.T + bias, targets, ignore_index=ignore_index), with logits in float32.

    Equals it in value and gradients to hidden, weight and bias, without the logits [T, V] of the T tokens. With `mean`
    and `sum` the gradients are formed in the forward, from a chunk of tokens at a time: three matrix products. With
    `none` the backward takes any upstream gradient and computes logits again: four.

    Args:
        hidden: [..., D]; float32, bfloat16 or float16 (float64: dense reference), any strides.
        weight: [V, D], of the same dtype. Cast one of the two if they differ: a silent copy of a vocabulary is large.
        targets: [...] integer in [0, V), or `ignore_index`: such a token has loss 0 and gradient 0, and does not count.
            On a CPU it costs nothing either.
        bias: [V].
        weights: [...], multiply the tokens' losses; they must not require a gradient.
        reduction: "mean" divides by the sum of the weights of the tokens that count (by their number without weights);
            0 where that is 0, also when every token is ignored. "sum"; or "none" for [...].
        workspace: bytes for the logits of a chunk of tokens; default `set_workspace`, without it 96 MiB on a CPU.
            Beside it, float32 gradients exist once, whatever the dtype: they are rounded at the end.
        implementation: chosen as for `similarity_lse`, under whose name `trace` lists it.

    Returns float32 (float64 for float64 inputs). Raises: ValueError or TypeError naming the argument, what was expected
    and what came; NotImplementedError if the requested implementation cannot run.
    """
    op = "linear_cross_entropy"
    rows = head(op, hidden, weight, bias)
    targets = per_token(op, "targets", targets, hidden, floating=False)
    check.one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    check.workspace(op, workspace)
    weights = token_weights(op, weights, hidden)
    choice = select(op, implementation, hidden.device, hidden.dtype)
    run = {"workspace": workspace_of(workspace, hidden.device), "implementation": choice.implementation}
    if choice.implementation == "reference":
        check.within(op, "targets", targets[targets != ignore_index], 0, weight.shape[0])
        note(choice._replace(op="similarity_lse"))
        losses = _reference(rows, weight, bias, targets, ignore_index, weights, reduction)
        return losses.view(hidden.shape[:-1]) if reduction == "none" else losses
    if reduction == "none":
        targets = targets.view(hidden.shape[:-1])
        losses = -linear_logprob(hidden, weight, targets, bias=bias, ignore_index=ignore_index, **run)
        return losses if weights is None else losses * weights.view(losses.shape)

    tokens = select_tokens(op, rows, weight.shape[0], targets, ignore_index)
    weights = weights if weights is None or tokens.index is None else weights.index_select(0, tokens.index)
    if tokens.valid is not None:
        weights = tokens.valid.float() if weights is None else weights.masked_fill(~tokens.valid, 0.0)
    if reduction == "mean":
        weights = weights if weights is None else average(weights)
        reduction = "mean" if weights is None and tokens.targets.numel() else "sum"
    settings = {"key_bias": bias, "positives": tokens.targets, "weights": weights, "reduction": reduction}
    return similarity_cross_entropy(tokens.hidden, weight, **settings, **run)
