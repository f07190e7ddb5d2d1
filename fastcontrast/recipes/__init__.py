"""Recipes: one paper a file, with its citation, its equation and the settings that make it.

A recipe is a module `fastcontrast.recipes.NAME` with `run(steps, output=..., seed=..., limit=...)`, which trains or
decodes on real data that ships inside packages. This table is all that `fastcontrast recipes` reads: a recipe is
imported when it runs.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """What the table says of a recipe."""

    title: str
    citation: str
    primitive: str  # the operations that it stands on
    data: str  # what `fastcontrast train` trains it on


RECIPES = {
    "x_clip": Entry(
        "Expanding Language-Image Pretrained Models for General Video Recognition",
        "Ni et al. 2022, arXiv 2208.02816",
        "temporal_attention, and frame_attention with a message as extra key",
        "eight shots of real video, shown in motion, frozen or cut",
    ),
    "dreamlip": Entry(
        "DreamLIP: Language-Image Pre-training with Long Captions",
        "Zheng et al. 2024, arXiv 2403.17007",
        "clip_loss once a sentence, and over pooled patches",
        "pages composed of icons, whose names are the sentences of a long caption",
    ),
    "alip": Entry(
        "ALIP: Adaptive Language-Image Pre-training with Synthetic Caption",
        "Yang et al. 2023, arXiv 2308.08428",
        "clip_loss with a weight a pair",
        "icons, half of whose names are shuffled, beside synthetic captions",
    ),
    "clip_refine": Entry(
        "Post-pre-training for Modality Alignment in Vision-Language Foundation Models",
        "Yamaguchi et al. 2025, arXiv 2504.12717",
        "similarity_lse of student and teacher, and their divergence in tiles; clip_loss",
        "icons and their names, after a CLIP trained on them",
    ),
    "degla": Entry(
        "Decoupled Global-Local Alignment for Improving Compositional Understanding",
        "Hu et al. 2025, arXiv 2504.16801",
        "info_nce with hard negatives, and EMATeacher",
        "icons with names of several words, and corruptions of them",
    ),
    "protoclip": Entry(
        "Prototypical Contrastive Language Image Pretraining",
        "Chen et al. 2022, arXiv 2206.10996",
        "similarity_mix and similarity_lse over prototypes, similarity_topk inside K-means",
        "icons and their names, clustered anew in every episode",
    ),
    "laclip": Entry(
        "Improving CLIP Training with Language Rewrites",
        "Fan et al. 2023, arXiv 2305.20088",
        "clip_loss, once a version of the text in LaCLIP-MT",
        "icons, their names and four rewrites of each",
    ),
    "proclip": Entry(
        "ProCLIP: Progressive Vision-Language Alignment via LLM-based Embedder",
        "Hu et al. 2025, arXiv 2510.18795",
        "pairwise_reduce over distances, clip_loss, and EMATeacher",
        "icons and their names, MiniLM as the new embedder",
    ),
    "cloc": Entry(
        "Contrastive Localized Language-Image Pre-training",
        "Chen et al. 2024, arXiv 2410.02746",
        "info_nce with a guide: texts too similar are no negatives",
        "pages composed of icons, with boxes and names",
    ),
    "denseclip": Entry(
        "DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting",
        "Rao et al. 2021, arXiv 2112.01518",
        "upsampled_cross_entropy: bilinear upsampling inside a cross-entropy over classes",
        "pages composed of icons, whose pixels are named",
    ),
    "uclip": Entry(
        "uCLIP: Parameter-Efficient Multilingual Extension of Vision-Language Models with Unpaired Data",
        "Chung et al. 2025, arXiv 2511.13036",
        "similarity_mix over banks of millions, and clip_loss",
        "icons, and Django's texts in other languages, without pairs of the two",
    ),
    "close": Entry(
        "I Can't Believe There's No Images! Learning Visual Tasks Using only Language Supervision",
        "Gu et al. 2022, arXiv 2211.09778",
        "linear_cross_entropy over a vocabulary, and seeded noise",
        "names alone, through two layers of SmolLM2; icons only in the test",
    ),
    "limber": Entry(
        "Linearly Mapping from Image to Text Space",
        "Merullo et al. 2022, arXiv 2209.15162",
        "linear_cross_entropy over a vocabulary",
        "icons and their names, through two frozen layers of SmolLM2",
    ),
}
