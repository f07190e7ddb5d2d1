"""What an icon is not called: four corruptions of a name of several words, by rule; and who is not taken in."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from fastcontrast.minilm import minilm_features
from fastcontrast.towers import encode

from .._shared.icons import Icons

K = 4


def corrupted(icons: Icons, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """MiniLM's features of corruptions [names, K, 384], and which there are, bool [names, K]: those of all unseen names
    of several words, and of as many seen ones as make `count`."""
    draw = random.Random(seed)
    several = [i for i, name in enumerate(icons.names) if len(name.split()) > 1]
    draw.shuffle(several)
    several.sort(key=lambda i: not icons.pairs.unseen[i])  # all that are unseen, then a random part of the seen
    texts = {i: corruptions_of(icons.names[i], icons.names, draw) for i in several[:count]}
    wrong, there = torch.zeros(len(icons.names), K, icons.texts.shape[1]), torch.zeros(len(icons.names), K).bool()
    for i, found in texts.items():
        there[i] = torch.tensor([text is not None for text in found])
    wrong[there] = minilm_features([text for i in sorted(texts) for text in texts[i] if text is not None])
    return wrong, there


def corruptions_of(name: str, names: list[str], draw: random.Random) -> list[str | None]:
    """Of a name, by rule: its words in another order (None where all are equal); its first word, its last word, and a
    random one replaced by the first, the last, and a random word of another name."""
    words = name.split()
    order = words
    while order == words and len(set(words)) > 1:
        order = draw.sample(words, len(words))

    def replaced(mine: int, theirs: int | None) -> str:
        while True:
            others = draw.choice(names).split()
            word = draw.choice(others) if theirs is None else others[theirs]
            if word != words[mine]:
                return " ".join([*words[:mine], word, *words[mine + 1 :]])

    last = len(words) - 1
    own = [replaced(0, 0), replaced(last, -1), replaced(draw.randint(0, last), None)]
    return [None if order == words else " ".join(order), *own]


def told_apart(towers: nn.Module, icons: Icons, wrong: Tensor, there: Tensor) -> float:
    """Per cent of icons with unseen, corrupted names that are nearer to the name than to all its corruptions."""
    test = icons.pairs.test
    test = test[there[icons.ids[test]].any(1)]
    ids = icons.ids[test]
    image, text = encode(towers.item_tower, icons.glyphs[test]), encode(towers.name_tower, icons.texts[ids])
    corruptions = encode(towers.name_tower, wrong[ids].flatten(0, 1)).unflatten(0, (len(ids), -1))
    similarities = torch.einsum("bd,bkd->bk", image, corruptions).masked_fill(~there[ids], float("-inf"))
    return 100 * (torch.linalg.vecdot(image, text) > similarities.amax(1)).float().mean().item()
