"""open_clip's losses without their matrices of logits: the same classes, arguments, values and gradients.

    from fastcontrast.integrations.open_clip import ClipLoss
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)

Each is a subclass of open_clip's class of its name, and goes where that went. A subclass of these that overrides
`get_logits`, `get_ground_truth` or `dist_loss` is heard: open_clip's own forward calls it, and stores its logits. So it
is where a scale or a bias is not one number, or a teacher requires a gradient. `fastcontrast.ops.trace` lists that
forward as implementation "open_clip" and says why; else it lists the operations that ran.

Losses are in float32 also inside autocast, where open_clip rounds logits to half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from open_clip import loss as theirs
from torch import Tensor, nn

from fastcontrast.distributed import exchange, mean_gradient, world_size
from fastcontrast.losses import clip_loss, distill_loss, info_nce, siglip_loss
from fastcontrast.ops._dispatch import Choice, note
from fastcontrast.ops._precision import for_products

from ._recall import Recall

# term(images, texts, scale): both directions; with `own`, the index of each image's text, of the images alone
Term = Callable[..., Tensor]


def _asks_for_logits(loss: nn.Module, base: type[nn.Module], methods: Sequence[str], *scalars: Any) -> str | None:
    """Why the forward of `base`, which stores logits, has to run."""
    name = type(loss).__name__
    for method in methods:
        # Of the class and of the object apart: bound methods are not told apart under torch.compile.
        if method in vars(loss) or getattr(type(loss), method) is not getattr(base, method):
            return f"{name} has a {method} of its own"
    for x in scalars:
        if isinstance(x, Tensor) and x.numel() != 1:
            return f"logits are scaled or shifted by a tensor {list(x.shape)}, not by one number"
    return None


def _note(loss: nn.Module, why: str) -> None:
    note(Choice(type(loss).__name__, "open_clip", {"fastcontrast": why}))


def _contrastive(images, texts, scale, own: Tensor | None = None, **settings) -> Tensor:
    if own is None:
        return clip_loss(images[0], texts[0], scale, **settings)
    return info_nce(images[0], texts[0], scale, positives=own)


def _distilled(teacher_scale: float | Tensor) -> Term:
    def term(images, texts, scale, own: Tensor | None = None, **settings) -> Tensor:
        if own is not None:
            settings["directions"] = ("query_to_key",)
        return distill_loss(images[0], texts[0], images[1], texts[1], scale, teacher_scale=teacher_scale, **settings)

    return term


def _times_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied."""
    return x if factor == 1 else x.detach() + factor * (x - x.detach())


class ClipLoss(theirs.ClipLoss):
    """½ CE(L, own) + ½ CE(L.T, own),   L = logit_scale · image · textᵀ + logit_bias: `open_clip.loss.ClipLoss`.

    The bias cancels: its gradient is 0. On several ranks values and gradients are open_clip's in all four modes:

        local_loss=False    every rank gives the loss of the whole batch; open_clip computes all of it on each,
        local_loss=True     that of its own rows and columns;
        gather_with_grad    features get the gradient of all ranks' losses, or only of their own rank's.

    Here each rank meets its own images with all texts, once. The gradient of `logit_scale` is then on every rank the
    ranks' mean, which DistributedDataParallel makes of open_clip's as well. Where own rows alone have gradients, with
    Horovod, and under torch.compile, which cannot look into the exchange, open_clip's function gathers both sides
    instead: one graph where that is one. (Of a gathering without gradients torch 2.13 makes one with, and open_clip's
    own compiled losses get wrong ones; not these.) `torch.compiler.disable(loss)` keeps the exchange.

    Args: open_clip's; `use_horovod` as long as it has it. Attributes, of the class or of an object:
        exchange: "gather", or "ring", which holds two ranks' texts instead of all.
        equal: every rank always holds as many rows, as open_clip demands: nobody is asked. False: they may differ where
            features are exchanged; local_loss=False then is the loss of all rows.
        reuse: True for a loop that asks for the loss of equal features several times in a row, as open_clip's does for
            every chunk with --accum-freq: it is computed once. Features and their gradients are kept meanwhile.

    Raises: ValueError where rank and world_size are not those of the process group.
    Source: open_clip; Radford et al. 2021.
    """

    exchange = "gather"
    equal = False
    reuse = False

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size)
        self.use_horovod = use_horovod  # which newer versions no longer take
        self._recall = Recall()

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        methods = "get_logits", "get_ground_truth"
        if (why := _asks_for_logits(self, theirs.ClipLoss, methods, logit_scale, logit_bias)) is not None:
            _note(self, why)
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        if self.reuse and not torch.compiler.is_compiling():
            scale = torch.as_tensor(logit_scale, dtype=torch.float32, device=image_features.device)
            loss = self._recall(self._contrastive_loss, image_features, text_features, scale)
        else:
            loss = self._contrastive_loss(image_features, text_features, logit_scale)
        if isinstance(logit_bias, Tensor):
            loss = loss + (0.0 * logit_bias).sum().to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss

    def _contrastive_loss(self, image_features: Tensor, text_features: Tensor, scale: float | Tensor) -> Tensor:
        return self._over_ranks([_contrastive], [image_features], [text_features], scale)[0]

    def _over_ranks(
        self, terms: list[Term], images: list[Tensor], texts: list[Tensor], scale: float | Tensor
    ) -> list[Tensor]:
        # Once for all terms, whose gradients then meet before they are rounded.
        images, texts = ([for_products(x) for x in features] for features in (images, texts))
        if self.world_size == 1:
            return [term(images, texts, scale) for term in terms]
        own_rows_alone = self.local_loss and not self.gather_with_grad
        if own_rows_alone or self.use_horovod or torch.compiler.is_compiling():
            return self._gathered(terms, images, texts, scale)
        return self._exchanged(terms, images, texts, scale)

    @torch.compiler.disable  # it would be compiled by itself where a graph broke on its way here
    def _exchanged(self, terms, images, texts, scale) -> list[Tensor]:
        self._check_place()
        # In the exchange features get the sum of all ranks' gradients, which without gather_with_grad is W times what
        # open_clip gives them. Not so the scale.
        factor = 1 if self.gather_with_grad else self.world_size
        if isinstance(scale, Tensor):
            scale = mean_gradient(_times_gradient(scale, factor))
        with exchange(self.exchange, equal=self.equal):
            if self.local_loss:
                rows = max(images[0].shape[0], 1)
                return [term(images, texts, scale, reduction="none").sum() / rows for term in terms]
            return [_times_gradient(term(images, texts, scale), 1 / factor) for term in terms]

    def _check_place(self) -> None:
        world = world_size()
        rank = dist.get_rank() if world > 1 else 0
        if (self.rank, self.world_size) != (rank, world):
            raise ValueError(
                f"{type(self).__name__}: rank and world_size must be those of the process group, {rank} and {world}, "
                f"got {self.rank} and {self.world_size}"
            )

    def _gathered(self, terms, images, texts, scale) -> list[Tensor]:
        every_image, every_text = zip(*map(self._gather, images, texts), strict=True)
        if not self.local_loss:
            return [term(every_image, every_text, scale) for term in terms]
        own = self.get_ground_truth(images[0].device, images[0].shape[0])
        return [(term(images, every_text, scale, own) + term(texts, every_image, scale, own)) / 2 for term in terms]

    def _gather(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        run = {"rank": self.rank, "world_size": self.world_size} | ({"use_horovod": True} if self.use_horovod else {})
        if self.gather_with_grad:
            return theirs.gather_features(image_features, text_features, self.local_loss, True, **run)
        # Detached, for torch.compile makes of a gathering without gradient one with.
        pair = image_features, text_features
        every = theirs.gather_features(*(x.detach() for x in pair), True, False, **run)
        return every if self.local_loss else tuple(map(self._with_own, every, pair))

    def _with_own(self, every: Tensor, own: Tensor) -> Tensor:
        """All ranks' rows, of which its own have gradients."""
        start = self.rank * own.shape[0]
        return torch.cat([every[:start], own, every[start + own.shape[0] :]])


class CoCaLoss(theirs.CoCaLoss, ClipLoss):
    """clip_loss_weight · `ClipLoss`,   caption_loss_weight · CE(logits, labels): `open_clip.loss.CoCaLoss`.

    The logits of captions come stored: their cross entropy is open_clip's own. See `ClipLoss`.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        modes = local_loss, gather_with_grad, cache_labels, rank, world_size
        super().__init__(caption_loss_weight, clip_loss_weight, pad_id, *modes)
        self.use_horovod = use_horovod


class DistillClipLoss(theirs.DistillClipLoss, ClipLoss):
    """`ClipLoss`,   −½ mean_i Σ_j t_ij log p_ij of the rows and −½ of the columns,   p = softmax L, t the teacher's:
    `open_clip.loss.DistillClipLoss`. See `ClipLoss`; the equation is that of `fastcontrast.distill_loss`."""

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: float | Tensor,
        dist_image_features: Tensor,  # [N, Dt]
        dist_text_features: Tensor,  # [N, Dt]
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        teacher = dist_image_features, dist_text_features, dist_logit_scale
        methods = "get_logits", "get_ground_truth", "dist_loss"
        why = _asks_for_logits(self, theirs.DistillClipLoss, methods, logit_scale, dist_logit_scale)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in teacher):
            why = why or "the teacher requires a gradient"
        if why is not None:
            _note(self, why)
            return super().forward(image_features, text_features, logit_scale, *teacher, output_dict)
        terms = [_contrastive, _distilled(dist_logit_scale)]
        images, texts = [image_features, dist_image_features], [text_features, dist_text_features]
        names = "contrastive_loss", "distill_loss"
        losses = dict(zip(names, self._over_ranks(terms, images, texts, logit_scale), strict=True))
        return losses if output_dict else tuple(losses.values())


class SigLipLoss(theirs.SigLipLoss):
    """−1/n Σ_ij log σ(z_ij L_ij),   L = logit_scale · image · textᵀ + logit_bias,   z_ij = 1 for a pair, else −1:
    `open_clip.loss.SigLipLoss`, of this rank's n images and the texts of all.

    On several ranks texts travel as open_clip's `dist_impl` has it; of each block that arrives the loss and its
    gradients are formed at once.

    Args: open_clip's. `chunk_size`, of newer versions, cuts the logits where those are stored; here they never are.
    Source: open_clip; Zhai et al. 2023.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__(cache_labels, rank, world_size, dist_impl)
        self.chunk_size = chunk_size

    def _loss(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        methods = "get_logits", "get_ground_truth"
        if (why := _asks_for_logits(self, theirs.SigLipLoss, methods, logit_scale, logit_bias)) is not None:
            _note(self, why)
            return super()._loss(image_features, text_features, logit_scale, logit_bias, negative_only)
        rows = image_features.shape[0]
        none = torch.full((rows,), -1, device=image_features.device) if negative_only else None
        bias = 0.0 if logit_bias is None else logit_bias
        return siglip_loss(image_features, text_features, logit_scale, bias, positives=none)
