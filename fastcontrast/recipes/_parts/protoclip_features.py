"""Features of icons as ProtoCLIP wants them, and a linear probe of them: which frequent word is in the name?"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast.towers import TwoTowers

from .._shared.icons import Icons, raw_features

CLASSES = 40
DECAY = 1e-4


def raw(model: TwoTowers, icons: Icons, rows: Tensor) -> list[Tensor]:
    """What both towers give of items `rows` before they make it unit, [B, 256] each."""
    inputs = icons.glyphs[rows], icons.texts[icons.ids[rows]]
    return [raw_features(tower, x) for tower, x in zip((model.item_tower, model.name_tower), inputs, strict=True)]


@torch.no_grad()
def cluster(proto: nn.Module, model: TwoTowers, icons: Icons, rows: Tensor, external: Tensor | None) -> None:
    """Clusters an episode of items `rows`, with the heads in evaluation mode."""
    proto.eval()
    parts = [proto.project(*raw(model, icons, part)) for part in rows.split(1024)]
    proto.train()
    image, text = (torch.cat([part[side] for part in parts]) for side in ("image", "text"))
    proto.episode.cluster(image, text, None if external is None else external[icons.ids[rows]])


def principal(x: Tensor, width: int) -> Tensor:  # [N, D]
    """Rows in terms of their `width` first principal components, [N, min(width, D)]."""
    centred = x - x.mean(0)
    return centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -width:]


def frequent_words(icons: Icons) -> tuple[Tensor, Tensor]:
    """Items whose name has just one of the `CLASSES` most frequent words of all names, and which; [N], [N]."""
    words = [set(icons.names[i].split()) for i in icons.ids.tolist()]
    counts = Counter(word for found in words for word in found)
    classes = {word: i for i, word in enumerate(sorted(counts, key=lambda word: (-counts[word], word))[:CLASSES])}
    labels = [[classes[word] for word in found if word in classes] for found in words]
    items = [i for i, found in enumerate(labels) if len(found) == 1]
    return torch.tensor(items), torch.tensor([labels[i][0] for i in items])


def linear_probe(features: Tensor, labels: Tensor, seed: int) -> float:  # [N, D], [N]
    """Accuracy, per cent, of a logistic regression on one half of the rows, asked about the other half."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order.tensor_split(2)
    deviation, mean = torch.std_mean(features[train], dim=0)
    x = (features - mean) / (deviation + 1e-6)
    weight, bias = torch.zeros(CLASSES, x.shape[1], requires_grad=True), torch.zeros(CLASSES, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x[train], weight, bias), labels[train]) + DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return 100 * (F.linear(x[test], weight, bias).argmax(1) == labels[test]).float().mean().item()
