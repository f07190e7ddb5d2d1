"""The run of DreamLIP: pages of four to eight icons, whose names are the sentences of a long caption."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast import clip_loss
from fastcontrast.minilm import minilm_features
from fastcontrast.towers import TextHead

from .._shared.icons import Icons, load_icons
from .._shared.pages import CELLS, Pages, PageTower, cell_tokens, compose
from .._shared.report import Report, Scale, train
from ..dreamlip import dreamlip_loss
from .dreamlip_sentences import draw_sentences, sentences

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

STEPS, BATCH, RATE = 100, 128, 2e-3
PAGES, SENTENCES = 3000, 6  # pages to train on; names drawn beside the raw caption
FEWEST, MOST = 4, 8  # icons on a page: of the small ones names are drawn twice
ROUNDS = 4  # times that the unseen names are put on pages for the test
SHOWN = 3  # pages in the picture


class PageModel(nn.Module):
    """Features of pages, of their patches, which have a projection of their own, and of texts. Two scales.

    The patches are the means of the 3 × 3 cells. Weights are linear in similarity, so that from many patches a g near
    any sentence can be mixed, whatever the page shows: for 64 × 7 random features of width 256, L_S is 3.0 with all
    144 tokens and 5.3 with nine, where ln 448 = 6.1 is chance.
    """

    def __init__(self, dim: int = 256):
        super().__init__()
        self.pages, self.texts = PageTower(dim), TextHead(dim=dim)
        self.norm, self.projection = nn.LayerNorm(self.pages.width), nn.Linear(self.pages.width, dim)
        self.scale, self.local_scale = Scale(), Scale()

    def forward(self, images: Tensor, own: bool = True) -> tuple[Tensor, Tensor]:  # [B, 96, 96]
        """v [B, E] and p [B, 9, E]; without `own`, patches through the projection of v."""
        tokens = self.pages(images)
        cells = cell_tokens(tokens.mT).mT
        patches = self.projection(self.norm(cells)) if own else self.pages.projection(cells)
        return self.pages.pool(tokens), F.normalize(patches, dim=-1)

    def clamp(self, *_: Any) -> None:
        self.scale.clamp()
        self.local_scale.clamp()


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """CLIP on the raw caption, which lists a page's names; L_MP alone, with six names drawn beside it; DreamLIP. Each
    time a page is seen its icons lie in other places. Tested on pages of icons whose names none of the models saw.

    A name points at the patch most similar to it, which should be its icon's cell: one in nine by chance. Patches go
    through the projection of whole pages where they have none of their own, that is but for DreamLIP. Sentences as
    positives of their own help; the grouping loss beside them does not, in so few steps.
    """
    steps = STEPS if steps is None else steps
    report = Report("dreamlip", output, steps=steps, seed=seed, limit=limit, batch=BATCH)
    icons, models = load_icons(limit), {}
    data = Data(icons, seed)
    for label in ("CLIP", "L_MP alone", "DreamLIP"):
        torch.manual_seed(seed)
        model = models[label] = PageModel()
        model.texts.mean.copy_(icons.texts[~icons.pairs.unseen].mean(0))
        batches, local = data.batches(seed), label == "DreamLIP"

        def step(_: int, label=label, model=model, batches=batches, local=local) -> Tensor:
            pages, texts, same = next(batches)
            image, patches = model(pages, own=local)
            if label == "CLIP":
                return clip_loss(image, model.texts(texts[:, 0]), model.scale())
            texts = model.texts(texts.flatten(0, 1)).unflatten(0, same.shape)
            scales = model.scale(), model.local_scale()
            return dreamlip_loss(image, texts, patches, *scales, lambda_s=float(local), same=same)

        with report.model(label) as found:
            found.losses = train(label, steps, model, step, rate=RATE, decay=0.1, clip=1.0, after=model.clamp)
            found.metrics = data.evaluate(model, local)
    return report.close(models["DreamLIP"], lambda panel: data.draw(panel, models))


class Data:
    """Pages to train on, by their icons, captions and names; and pages to test on."""

    def __init__(self, icons: Icons, seed: int):
        self.icons, self.number = icons, {name: i for i, name in enumerate(icons.names)}
        generator = torch.Generator().manual_seed(seed)
        count = min(PAGES, len(icons.pairs))
        self.items = some_of(next(icons.batches(count * MOST, seed)).view(count, MOST), generator)
        captions = [". ".join(self.names(items)) for items in self.items]
        self.pools, self.captions = [sentences([caption]) for caption in captions], minilm_features(captions)
        self.tests = [compose(icons.glyphs, held_out(icons, generator), generator) for _ in range(ROUNDS)]

    def names(self, items: Tensor) -> list[str]:  # [MOST]
        return [self.icons.names[i] for i in self.icons.ids[items[items >= 0]].tolist()]

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Endless pages [B, 96, 96], features of the raw caption and of names [B, K, 384], and which of these are the
        same [B, K]. Places and names are drawn anew each time."""
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        batch = min(BATCH, len(self.items))
        while True:
            for rows in torch.randperm(len(self.items), generator=generator).split(batch):
                drawn = [draw_sentences(self.pools[i], SENTENCES, draw) for i in rows.tolist()]
                ids = torch.tensor([[self.number[name] for name in names] for names in drawn])
                texts = torch.cat([self.captions[rows, None], self.icons.texts[ids]], 1)
                pages = compose(self.icons.glyphs, self.items[rows], generator)
                yield pages.images, texts, F.pad(ids, (1, 0), value=-1)

    @torch.no_grad()
    def evaluate(self, model: PageModel, own: bool) -> dict[str, float]:
        """Per cent of names that point to their cell; page → one of its names, name → its page, among all others."""
        found = []
        for pages in self.tests:
            features = [model(images, own) for images in pages.images.split(BATCH)]
            image, patches = (torch.cat(x) for x in zip(*features, strict=True))
            page, slot = (pages.items >= 0).nonzero(as_tuple=True)
            names = model.texts(self.icons.texts[self.icons.ids[pages.items[page, slot]]])  # [U, E], each once
            similarity, own_page = image @ names.T, F.one_hot(page, len(image)).T.bool()
            found_it = similarity_maps(patches[page], names).argmax(1) == pages.places[page, slot]
            page_to_name = own_page.gather(1, similarity.argmax(1, keepdim=True))
            found.append([x.float().mean() for x in (found_it, page_to_name, similarity.argmax(0) == page)])
        labels = "name → its place, %", "page → name R@1, %", "name → page R@1, %"
        return dict(zip(labels, (100 * torch.tensor(found).mean(0)).tolist(), strict=True))

    @torch.no_grad()
    def draw(self, panel: SubFigure, models: dict[str, PageModel]) -> None:
        """A page a column; below it, where CLIP and DreamLIP find the name of its first icon."""
        from fastcontrast.figures import INK, ORANGE

        pages = Pages(*(x[:SHOWN] for x in self.tests[0]))
        texts = self.icons.texts[self.icons.ids[pages.items[:, 0]]]
        rows = {"": pages.images}
        for label in ("CLIP", "DreamLIP"):
            _, patches = models[label](pages.images, own=label == "DreamLIP")
            rows[label] = similarity_maps(patches, models[label].texts(texts)).unflatten(1, (CELLS, CELLS))
        axes = panel.subplots(len(rows), len(texts), squeeze=False)
        for (label, shown), line in zip(rows.items(), axes, strict=True):
            for i, (ax, picture) in enumerate(zip(line, shown, strict=True)):
                ax.imshow(picture.numpy(), cmap="viridis" if label else "gray", extent=(0, 1, 1, 0))
                x0, y0, x1, y1 = pages.boxes[i, 0].tolist()
                ax.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=ORANGE, linewidth=2)
                ax.set(xticks=[], yticks=[], title=label or self.names(pages.items[i])[0])
                ax.title.set(fontsize=9, color=INK)


def some_of(items: Tensor, generator: torch.Generator) -> Tensor:  # [P, MOST]
    """The first four to eight of each row, −1 in place of the others."""
    counts = torch.randint(FEWEST, MOST + 1, (len(items), 1), generator=generator)
    return items.masked_fill(torch.arange(MOST) >= counts, -1)


def held_out(icons: Icons, generator: torch.Generator) -> Tensor:
    """Pages [P, MOST] of unseen names, each at most once, by a random one of its items."""
    items = icons.pairs.test[torch.randperm(len(icons.pairs.test), generator=generator)]
    ids = icons.ids[items]
    first = torch.full((len(icons.names),), len(items)).scatter_reduce(0, ids, torch.arange(len(items)), "amin")
    once = items[first[ids] == torch.arange(len(items))]
    return some_of(F.pad(once, (0, -len(once) % MOST), value=-1).view(-1, MOST), generator)


def similarity_maps(patches: Tensor, names: Tensor) -> Tensor:  # [U, M, E], [U, E]
    """Each name with the patches of its page, [U, M]."""
    return (patches @ names[:, :, None])[..., 0]
