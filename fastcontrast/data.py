"""Real pairs that need no model hub: icons and names, dictionary words and glosses, docstrings and code.

Every loader returns `Pairs`: item `i` is called `names[ids[i]]`. The split is by NAME: a name is either seen or unseen
in training, with all its items (five icon fonts draw a "home" each; all five are in training, or none is).

| loader       | item                    | name                          | comes with                     |
|--------------|-------------------------|-------------------------------|--------------------------------|
| `icons`      | glyph, uint8 [32, 32]   | "account check"               | `HOW_TO_INSTALL`               |
| `wordnet`    | gloss                   | "dog, domestic dog"           | `apt-get install wordnet-base` |
| `docstrings` | code without docstring  | docstring's first paragraph   | Python itself                  |
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HOW_TO_INSTALL = "pip install --no-deps -r requirements-data.txt"

# Glyph font and its {name: code point} table in qtawesome's folder `fonts`.
FONTS = {
    "mdi6": ("materialdesignicons6-webfont-6.9.96.ttf", "materialdesignicons6-webfont-charmap-6.9.96.json"),
    "phosphor": ("phosphor-1.3.0.ttf", "phosphor-charmap-1.3.0.json"),
    "remix": ("remixicon-2.5.0.ttf", "remixicon-charmap-2.5.0.json"),
    "fa6-solid": ("fontawesome6-solid-webfont-6.7.2.ttf", "fontawesome6-solid-webfont-charmap-6.7.2.json"),
    "codicon": ("codicon-0.0.36.ttf", "codicon-charmap-0.0.36.json"),
}
# Words that say how an icon is drawn, not what it shows: "home", "home outline" and "home fill" are one name.
STYLE_WORDS = {"outline", "line", "fill", "bold", "thin", "light", "variant"}
SIDE, POINTS = 32, 28  # glyph size in pixels, font size: at 28 only a few wide fa6-solid glyphs touch the border


class MissingDataError(FileNotFoundError):
    """Data that is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class Pairs:
    """Items and their names: item `i` is called `names[ids[i]]`.

    source  which loader made it
    items   glyphs uint8 [N, 32, 32], or N texts
    names   K distinct texts
    ids     int64 [N], the name of each item: equal ids are no negatives of each other
    unseen  bool [K], names kept out of training
    """

    source: str
    items: Tensor | list[str]
    names: list[str]
    ids: Tensor  # [N]
    unseen: Tensor  # [K]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def train(self) -> Tensor:
        """Indices of the items to train on."""
        return (~self.unseen[self.ids]).nonzero()[:, 0]

    @property
    def test(self) -> Tensor:
        """Indices of the items that carry an unseen name."""
        return self.unseen[self.ids].nonzero()[:, 0]


def icons(unseen: int = 1000, seed: int = 0, limit: int | None = None, progress: bool = True) -> Pairs:
    """(glyph, name) of five icon fonts: 15,969 items with 8,025 names; `limit` keeps about that many, evenly spread.

    A code point with several names keeps the alphabetically first one; glyphs without ink are left out; words of style
    (`STYLE_WORDS`) are dropped from names, unless nothing would remain. Glyphs are white (255) on black (0).

    Raises MissingDataError without the package qtawesome, whose fonts are read without importing it.
    """
    folder = package_folder("qtawesome") / "fonts"
    tables = {font: _first_names(json.loads((folder / table).read_text())) for font, (_, table) in FONTS.items()}
    named = [((font, code), plain_name(name)) for font, table in tables.items() for code, name in table.items()]
    glyphs = draw_glyphs([symbol for symbol, _ in named], progress)
    inked = glyphs.flatten(1).any(1).nonzero()[:, 0]
    pick = inked[_spread(len(inked), limit)]
    return _pairs("icons", glyphs[pick], [named[i][1] for i in pick.tolist()], unseen, seed)


def draw_glyphs(symbols: Sequence[tuple[str, int]], progress: bool = True) -> Tensor:
    """Glyphs uint8 [N, 32, 32] of pairs of a font in `FONTS` and a code point, white (255) on black (0).

    Raises MissingDataError without the package qtawesome.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    folder = package_folder("qtawesome") / "fonts"
    # FreeType's own layout: one code point needs no shaping, and the drawing must not depend on an optional library
    fonts = {
        font: ImageFont.truetype(str(folder / file), POINTS, layout_engine=ImageFont.Layout.BASIC)
        for font, (file, _) in FONTS.items()
    }
    glyphs = np.zeros((len(symbols), SIDE, SIDE), np.uint8)
    for glyph, (font, code) in zip(glyphs, _bar(symbols, "drawing icons", "icon", progress), strict=True):
        image = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(image).text((SIDE // 2, SIDE // 2), chr(code), font=fonts[font], fill=255, anchor="mm")
        glyph[:] = image
    return torch.from_numpy(glyphs)


def wordnet(
    unseen: int = 1000, seed: int = 0, limit: int | None = None, folder: str | os.PathLike = "/usr/share/wordnet"
) -> Pairs:
    """(gloss, words) of WordNet 3.0: 117,640 distinct pairs; examples after the gloss are dropped.

    Raises MissingDataError when `folder` lacks the database.
    """
    found: dict[tuple[str, str], None] = {}
    for part in ("noun", "verb", "adj", "adv"):
        path = Path(folder) / f"data.{part}"
        if not path.exists():
            raise MissingDataError(
                f"wordnet: {path} is missing; get WordNet 3.0 with `apt-get install wordnet-base` "
                "(or unpack its database files and pass folder=)"
            )
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):  # the licence, on indented lines
                continue
            fields, gloss = line.split(" | ", 1)
            fields = fields.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            found[gloss.split(";")[0].strip(), ", ".join(w.replace("_", " ") for w in words)] = None
    pairs = list(found)
    pairs = [pairs[i] for i in _spread(len(pairs), limit)]
    return _pairs("wordnet", [gloss for gloss, _ in pairs], [words for _, words in pairs], unseen, seed)


def docstrings(
    unseen: int = 1000,
    seed: int = 0,
    limit: int | None = None,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> Pairs:
    """(code, docstring's first paragraph) of functions and classes in `folder`, default Python's standard library.

    Docstrings shorter than four words are left out, and so are tests, and files that do not parse. About 7,000 items;
    the count depends on the Python version. Raises MissingDataError when `folder` holds no such pair.
    """
    root = Path(os.__file__).parent if folder is None else Path(folder)
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    found: dict[tuple[str, str], None] = {}
    for path in _bar(files, "reading code", "file", progress):
        found.update(dict.fromkeys(_documented(path)))
    if not found:
        raise MissingDataError(f"docstrings: no documented Python code under {root}; pass folder= with Python sources")
    pairs = list(found)
    pairs = [pairs[i] for i in _spread(len(pairs), limit)]
    return _pairs("docstrings", [code for code, _ in pairs], [text for _, text in pairs], unseen, seed)


LOADERS = {"icons": icons, "wordnet": wordnet, "docstrings": docstrings}


def plain_name(name: str) -> str:
    """An icon's name without words of style: "account-box-outline" -> "account box"."""
    words = name.split("-")
    return " ".join(w for w in words if w not in STYLE_WORDS) or " ".join(words)


def package_folder(package: str) -> Path:
    """Where an installed package lives, without importing it (qtawesome would ask for Qt)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingDataError(f"the package {package} is missing; get it with `{HOW_TO_INSTALL}`")
    return Path(spec.origin).parent


def cache_folder() -> Path:
    """Where what was computed once stays: $FASTCONTRAST_CACHE, else fastcontrast in $XDG_CACHE_HOME or ~/.cache."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FASTCONTRAST_CACHE") or caches / "fastcontrast")


def save_features(features: Tensor, path: Path) -> None:
    """As the tensor `features` of a safetensors file."""
    from safetensors.torch import save_file

    write_whole(path, lambda part: save_file({"features": features}, part))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write` writes beside, then it is renamed: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        write(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _first_names(table: dict[str, str]) -> dict[int, str]:
    """{code point: its alphabetically first name}, by code point. Tables write code points as f101 or 0xf101."""
    names: dict[int, str] = {}
    for name, code in sorted(table.items()):
        names.setdefault(int(code, 16), name)
    return dict(sorted(names.items()))


def nodes_of(path: Path) -> Iterator[ast.AST]:
    """Every node of a Python file; none where it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.walk(ast.parse(path.read_bytes()))
    except (SyntaxError, ValueError):
        return iter(())


def _documented(path: Path) -> Iterator[tuple[str, str]]:
    """(code, text) of every documented function or class in a file."""
    for node in nodes_of(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and (
            text := ast.get_docstring(node)
        ):
            text = " ".join(re.split(r"\n\s*\n", text)[0].split())
            if len(text.split()) >= 4:
                node.body = node.body[1:] or [ast.Pass()]
                yield ast.unparse(node), text


def _pairs(source: str, items: Tensor | list[str], called: list[str], unseen: int, seed: int) -> Pairs:
    """Pairs with `unseen` of the distinct names kept out of training, drawn by `seed`."""
    names = sorted(set(called))
    if not 0 < unseen < len(names):
        raise ValueError(
            f"{source}: unseen must lie in [1, {len(names)}), as there are {len(names)} names; got {unseen}"
        )
    index = {name: i for i, name in enumerate(names)}
    mask = torch.zeros(len(names), dtype=torch.bool)
    mask[random.Random(seed).sample(range(len(names)), unseen)] = True  # Python's generator: the same on every platform
    return Pairs(source, items, names, torch.tensor([index[name] for name in called]), mask)


def _spread(count: int, limit: int | None) -> list[int]:
    """All of 0 … count − 1, or `limit` of them at even distances."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def _bar(things: Iterable, label: str, unit: str, progress: bool) -> Iterable:
    if not progress:
        return things
    from tqdm import tqdm

    return tqdm(things, desc=label, unit=unit, leave=False)
