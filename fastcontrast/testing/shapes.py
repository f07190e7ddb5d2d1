"""Named workloads: what is tested is what is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """`m` queries against `n` keys of width `d`."""

    name: str
    m: int
    n: int
    d: int

    @property
    def product_flop(self) -> int:
        """Floating-point operations of one matrix product, the unit in which a sweep is counted."""
        return 2 * self.m * self.n * self.d


# Fine-tuning batches: the whole matrix fits into one to a few tiles, so fixed costs show.
SMALL = tuple(Shape(f"batch_{n}", n, n, 512) for n in (128, 256, 512, 1024, 2048))

# Pre-training batches: open_clip's on one node, on a few, and CLIP's own 32k doubled. Dense logits: 0.25, 1 and 16 GiB.
LARGE = tuple(Shape(f"batch_{n}", n, n, 512) for n in (8192, 16384, 65536))

# Beside the tiles of the CPU sweep (1024 × 2048, columns in lanes of 64, rows in groups of 16) and beside everything.
RAGGED = (
    Shape("one_pair", 1, 1, 64),
    Shape("one_query", 1, 2100, 48),
    Shape("one_key", 1100, 1, 48),
    Shape("no_queries", 0, 7, 16),
    Shape("no_keys", 7, 0, 16),
    Shape("no_width", 5, 9, 0),
    Shape("width_one", 130, 67, 1),
    Shape("wide", 65, 129, 4096),
    Shape("primes", 337, 523, 61),
    Shape("below_tile", 1023, 2047, 24),
    Shape("tile", 1024, 2048, 24),
    Shape("above_tile", 1025, 2049, 24),
)


def named(name: str) -> Shape:
    for shape in (*SMALL, *LARGE, *RAGGED):
        if shape.name == name:
            return shape
    raise ValueError(f"no shape is named {name!r}")


@dataclass(frozen=True)
class Clips:
    """`b` clips of `f` frames of `t` tokens, `h` heads of width `d`; `rule` "temporal" or that of frame attention."""

    name: str
    b: int
    f: int
    t: int
    h: int
    d: int
    rule: str
    extra: int = 0  # keys more, each frame's own
    ragged: bool = False  # clips of 1 to f frames, padded

    @property
    def elements(self) -> int:
        """Of q."""
        return self.b * self.f * self.t * self.h * self.d


# What video models ask of attention across frames. `l0` to `mid` are levels of a diffusion model's U-Net; its two
# halves of guidance are clips.
VIDEO = (
    Clips("xclip_message", 8, 8, 1, 12, 64, "temporal"),
    Clips("clip4clip", 128, 12, 1, 8, 64, "temporal", ragged=True),
    Clips("timesformer", 8, 8, 196, 12, 64, "temporal"),
    Clips("timesformer_long", 8, 96, 196, 12, 64, "temporal"),
    Clips("animatediff_l0", 2, 16, 4096, 8, 40, "temporal"),
    Clips("animatediff_l1", 2, 16, 1024, 8, 80, "temporal"),
    Clips("animatediff_l2", 2, 16, 256, 8, 160, "temporal"),
    Clips("animatediff_mid", 2, 16, 64, 8, 160, "temporal"),
    Clips("svd_l0", 2, 25, 9216, 5, 64, "temporal"),
    Clips("svd_l1", 2, 25, 2304, 10, 64, "temporal"),
    Clips("opensora", 1, 15, 1590, 16, 72, "temporal"),
    Clips("t2v_zero_l0", 2, 8, 4096, 8, 40, "first"),
    Clips("t2v_zero_l1", 2, 8, 1024, 8, 80, "first"),
    Clips("t2v_zero_l2", 2, 8, 256, 8, 160, "first"),
    Clips("tune_l0", 2, 8, 4096, 8, 40, "first_previous"),
    Clips("tune_l1", 2, 8, 1024, 8, 80, "first_previous"),
    Clips("tune_l2", 2, 8, 256, 8, 160, "first_previous"),
    Clips("tune_mid", 2, 8, 64, 8, 160, "first_previous"),
    Clips("controlvideo_l1", 2, 15, 1024, 8, 80, "all"),
    Clips("xclip_frame", 8, 8, 197, 12, 64, "self", extra=1),
    Clips("vggt_8", 1, 8, 1374, 16, 64, "all"),
    Clips("vggt_32", 1, 32, 1374, 16, 64, "all"),
    Clips("dust3r", 1, 2, 768, 12, 64, "swap"),
    Clips("selfforcing", 1, 21, 1560, 12, 128, "causal(3)"),
)


def video(name: str) -> Clips:
    for shape in VIDEO:
        if shape.name == name:
            return shape
    raise ValueError(f"no clips are named {name!r}")


@dataclass(frozen=True)
class Interaction:
    """`b` queries of `tq` tokens against `c` documents of `td` tokens, of width `d`."""

    name: str
    b: int
    tq: int
    c: int
    td: int
    d: int


# ColBERT's 32 query tokens and 180 document tokens: a batch in training, documents among themselves, and a search.
COLBERT = (
    Interaction("colbert", 32, 32, 32, 180, 128),
    Interaction("documents", 32, 180, 32, 180, 128),
    Interaction("search", 32, 32, 1000, 180, 128),
)

# Latents of a diffusion model at 512 × 512: the noise and two predictions of it.
LATENTS = (64, 4, 64, 64)
