"""CLIP's symmetric loss."""

from __future__ import annotations

from torch import Tensor

from fastcontrast.ops import _check as check

from ._common import ScaledLoss, features
from .info_nce import info_nce


def clip_loss(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    scale: float | Tensor = 1 / 0.07,
    *,
    ids: Tensor | None = None,  # [N] integer
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,  # [N]
    reduction: str = "mean",
    return_accuracy: bool = False,
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """½ mean_i (r_i − p_i) + ½ mean_i (c_i − p_i),   L = scale · image · textᵀ,   p_i = L_ii,

    r and c the log-sum-exps of the rows and columns of L. Both directions, averaged; mean over pairs; features taken as
    they are (normalise them first). Equals `(F.cross_entropy(L, arange(N)) + F.cross_entropy(L.T, arange(N))) / 2`.

    Args:
        image_features, text_features: [N, D], pairs in order.
        scale: 1 / temperature; a tensor gets its gradient. (open_clip's `logit_scale`, already exponentiated.)
        ids: [N]; pairs with equal ids are not negatives of each other (the same caption, class, or name).
        label_smoothing, weights, reduction, return_accuracy, workspace, implementation: see `info_nce`; the accuracy is
            the mean of image → text and text → image in the batch.

    Raises: as `info_nce`; ValueError unless there are as many texts as images.
    Source: Radford et al. 2021.
    """
    op, names = "clip_loss", ("image_features", "text_features")
    image_features, text_features = features(op, image_features, text_features, names)
    if image_features.shape != text_features.shape:
        got = f"{list(image_features.shape)} and {list(text_features.shape)}"
        raise ValueError(f"{op}: image_features and text_features must have as many rows, got {got}")
    if ids is not None:
        check.vector(op, "ids", ids, image_features.shape[0], image_features, floating=False)
    scale = check.scalar(op, "scale", scale, image_features)
    return info_nce(
        image_features,
        text_features,
        scale,
        directions=("query_to_key", "key_to_query"),
        joint=False,
        query_ids=ids,
        key_ids=ids,
        label_smoothing=label_smoothing,
        weights=weights,
        reduction=reduction,
        return_accuracy=return_accuracy,
        workspace=workspace,
        implementation=implementation,
    )


class ClipLoss(ScaledLoss):
    """`clip_loss` as a module: `ClipLoss(learnable=True)(image_features, text_features)`; see there for settings."""

    function = staticmethod(clip_loss)
    default_scale = 1 / 0.07
