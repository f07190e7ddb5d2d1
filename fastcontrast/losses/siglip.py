"""SigLIP's sigmoid loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast.distributed._exchange import active, within
from fastcontrast.distributed._sums import formed_over_keys, over_keys, own_parameter, share, whole_sum
from fastcontrast.ops import _check as check
from fastcontrast.ops import similarity_softplus
from fastcontrast.ops._precision import without_autocast

from ._common import ScaledLoss, features, reduce


@without_autocast
def siglip_loss(
    image_features: Tensor,  # [M, D]
    text_features: Tensor,  # [N, D]
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    *,
    image_labels: Tensor | None = None,  # [M] integer
    text_labels: Tensor | None = None,  # [N] integer
    targets: Tensor | None = None,  # [M, N]
    label_smoothing: float = 0.0,
    positives: Tensor | None = None,  # [M] integer
    image_ids: Tensor | None = None,  # [M] integer
    text_ids: Tensor | None = None,  # [N] integer
    weights: Tensor | None = None,  # [M]
    reduction: str = "mean",
    implementation: str | None = None,
) -> Tensor:
    """1/M Σ_i S_i,   S_i = −Σ_j log σ(z_ij L_ij),   L = scale · image · textᵀ + bias,   z_ij = 1 for a pair, else −1.

    A sum over texts and a mean over images, as in big_vision and open_clip. Features are taken as they are (normalise
    them first). Equals `-F.logsigmoid(z * L).sum(1).mean()` with z = 2·eye − 1.

    Args:
        image_features, text_features: [M, D], [N, D]; pairs in order, or as `positives` says.
        scale, bias: the paper's exp(t') and b, which start at 10 and −10; tensors get their gradients.
        image_labels, text_labels: pairs of equal labels are all positive (several captions of one image, classes), or
        targets: [M, N] (inside `exchange` N of all ranks), soft labels in [0, 1]:
            S_i = Σ_j y_ij softplus(−L_ij) + (1 − y_ij) softplus(L_ij).
        label_smoothing: ε; positives count as 1 − ε/2, negatives as ε/2.
        positives: index of each image's own text; default 0 … M − 1. Ignored where labels or targets are given, except
            that an image's own text is never masked.
        image_ids, text_ids: other pairs with equal ids count for nothing (false negatives).
        weights: [M], factors of the S_i; the mean stays over M.
        reduction: "mean", "sum" or "none" → [M].
        implementation: see `similarity_softplus`.

    Raises: as `similarity_softplus`.
    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", algorithm 1.
    """
    op = "siglip_loss"
    image_features, text_features = features(op, image_features, text_features, ("image_features", "text_features"))
    m, n = image_features.shape[0], text_features.shape[0]
    if m > n and positives is None and image_labels is None and targets is None:
        raise ValueError(f"{op}: positives must be given when there are more images ({m}) than texts ({n})")
    check.one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    pairs = {"labels": (image_labels, text_labels), "ids": (image_ids, text_ids)}
    for kind, (of_images, of_texts) in pairs.items():
        if (of_images is None) != (of_texts is None):
            raise ValueError(f"{op}: image_{kind} and text_{kind} go together")
        if of_images is not None:
            check.vector(op, f"image_{kind}", of_images, m, image_features, floating=False)
            check.vector(op, f"text_{kind}", of_texts, n, image_features, floating=False)
    problem: dict[str, Any] = {
        "query_labels": image_labels, "key_labels": text_labels, "targets": targets, "positives": positives,
        "label_smoothing": label_smoothing, "query_ids": image_ids, "key_ids": text_ids,
        "implementation": implementation,
    }  # fmt: skip
    how = active()
    if how is not None:
        return _over_ranks(op, how, image_features, text_features, scale, bias, problem, weights, reduction)
    if reduction != "none" and (weights is None or not weights.requires_grad):
        problem |= {"weights": weights, "reduction": reduction}
        return similarity_softplus(image_features, text_features, scale, bias, **problem)
    rows = similarity_softplus(image_features, text_features, scale, bias, **problem)
    return reduce(op, rows, weights, reduction, m, like=image_features)


def _over_ranks(op, how, image_features, text_features, scale, bias, problem, weights, reduction) -> Tensor:
    """This rank's images against the texts of all."""
    m, device = image_features.shape[0], image_features.device
    scale, bias = (check.scalar(op, name, x, image_features) for name, x in (("scale", scale), ("bias", bias)))
    own = problem["positives"]
    if own is None:
        own = torch.arange(m, device=device)
    check.vector(op, "positives", own, m, image_features, floating=False)
    own = torch.where(own < 0, -1, own + how.shards(text_features.shape[0], device).offset)
    scalar = reduction != "none" and (weights is None or not weights.requires_grad)
    each = {"reduction": "sum", "weights": weights} if scalar else {}
    fixed = {name: problem[name] for name in ("label_smoothing", "implementation")}

    def block(local, texts, rows):
        images, scale, bias, labels, ids, targets, own = local
        texts, text_labels, text_ids = texts
        return similarity_softplus(
            images, texts, scale, bias, query_labels=labels, key_labels=text_labels, query_ids=ids, key_ids=text_ids,
            targets=None if targets is None else targets[:, rows], positives=within(own, rows), **fixed, **each,
        )  # fmt: skip

    local = [image_features, scale, bias, problem["query_labels"], problem["query_ids"], problem["targets"], own]
    texts = [text_features, problem["key_labels"], problem["key_ids"]]
    if not scalar:
        return reduce(op, over_keys(block, local, texts), weights, reduction, m, like=image_features)
    total = formed_over_keys(block, local, texts)
    return whole_sum(total) if reduction == "sum" else share(total, m)


class SigLipLoss(ScaledLoss):
    """`siglip_loss` as a module with a bias: `SigLipLoss(learnable=True)(image_features, text_features)`.

    Args:
        scale, learnable, max_scale, settings: as for the other losses; `learnable` learns `log_scale` and `bias`.
        bias: initial bias.
    """

    function = staticmethod(siglip_loss)
    default_scale = 10.0

    def __init__(
        self,
        scale: float | None = None,
        bias: float = -10.0,
        *,
        learnable: bool = False,
        max_scale: float = 100.0,
        **settings: Any,
    ):
        super().__init__(scale, learnable=learnable, max_scale=max_scale, **settings)
        bias = torch.tensor(float(bias))
        if learnable:
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias)

    def forward(self, image_features: Tensor, text_features: Tensor, **settings: Any) -> Tensor:
        return super().forward(image_features, text_features, bias=own_parameter(self.bias), **settings)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias.item():.4g}"
