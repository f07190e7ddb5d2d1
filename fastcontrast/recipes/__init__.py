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
    "multicsr": Entry(
        "Large Language Models can Contrastively Refine their Generation for Better Sentence Representation Learning",
        "Wang et al. 2023, arXiv 2310.10962",
        "a masked softmax over positives and hard negatives, some rows at a time, gradients formed in the forward",
        "sentences of news, what SmolLM2 writes for them, people's ratings as the test",
    ),
    "saha": Entry(
        "From Generator to Embedder: Harnessing Innate Abilities of Multimodal LLMs",
        "Ju and Lee 2025, arXiv 2508.00955",
        "similarity_topk mines clusters, info_nce trains on them",
        "docstrings and their code",
    ),
    "unime": Entry(
        "Breaking the Modality Barrier: Universal Embedding Learning with Multimodal LLMs",
        "Gu et al. 2025, arXiv 2504.17432",
        "distill_loss over a batch's similarities; similarity_topk below a threshold",
        "docstrings and their code, MiniLM as the teacher",
    ),
    "space2": Entry(
        "SPACE-2: Tree-Structured Semi-Supervised Contrastive Pre-training for Task-Oriented Dialog Understanding",
        "He et al. 2022, arXiv 2209.06638",
        "similarity_lse with soft positives as a product with their weights; nt_xent_loss, linear_cross_entropy",
        "docstrings of functions: package, first verb, parameters and defaults are trees of labels",
    ),
    "coconut": Entry(
        "Continual Contrastive Spoken Language Understanding",
        "Cappellazzo et al. 2023, arXiv 2310.02699",
        "similarity_lse over a student's keys, positives among a teacher's; EMATeacher",
        "sentences spoken by espeak-ng, or as sounds of their letters; the package is the intent",
    ),
    "ccp": Entry(
        "Unsupervised Context Aware Sentence Representation Pretraining for Multi-lingual Dense Retrieval",
        "Wu et al. 2022, arXiv 2206.03281",
        "similarity_lse over the bank of a language; info_nce for fine-tuning",
        "Django's texts in six languages, in the order of their files; translations only in the test",
    ),
    "superedit": Entry(
        "SuperEdit: Rectifying and Facilitating Supervision for Instruction-Based Image Editing",
        "Li et al. 2025, arXiv 2505.02370",
        "triplet_distances: both squared distances in one pass; EMATeacher",
        "icons whose names differ by one word, and instructions that say so by rule",
    ),
    "mend": Entry(
        "MEND: Meta dEmonstratioN Distillation for Efficient and Effective In-Context Learning",
        "Li et al. 2024, arXiv 2403.06914",
        "linear_kl between two states through one frozen head; linear_cross_entropy",
        "28 tasks of words and docstrings, through a small Llama that learned them",
    ),
    "pcp": Entry(
        "Don't Stop Pretraining? Make Prompt-based Fine-tuning Powerful Learner",
        "Shi and Lipani 2023, arXiv 2305.01711",
        "linear_cross_entropy over the masked tokens, and over the few words of a label",
        "sentences of docstrings, to be told by their module, sixteen of each labelled",
    ),
    "primer": Entry(
        "A Primer on Contrastive Pretraining in Language Processing",
        "Rethmeier and Augenstein 2021, arXiv 2102.12982",
        "info_nce, siglip_loss, similarity_softplus, similarity_topk and pairwise_reduce: a catalogue of losses",
        "sentences of docstrings, whose labels are their words, then the names of their modules",
    ),
    "text_embeddings": Entry(
        "On The Role of Pretrained Language Models in General-Purpose Text Embeddings: A Survey",
        "Zhang et al. 2025, arXiv 2507.20783",
        "info_nce in all directions with masks and guides, similarity_topk, maxsim over tokens and over words",
        "docstrings and their code",
    ),
    "simctg": Entry(
        "A Contrastive Framework for Neural Text Generation",
        "Su et al. 2022, arXiv 2202.06417",
        "token_contrast_margin and linear_cross_entropy; contrastive search in decoding",
        "the standard library's docstrings, through a small Llama",
    ),
    "adacad": Entry(
        "AdaCAD: Adaptively Decoding to Balance Conflicts between Contextual and Parametric Knowledge",
        "Wang et al. 2024, arXiv 2409.07394",
        "two_logit_mix: two distributions mixed in one pass over the vocabulary",
        "questions whose context contradicts what SmolLM2 remembers",
    ),
    "salt": Entry(
        "A Little Help Goes a Long Way: Efficient LLM Training by Leveraging Small LMs",
        "Rawat et al. 2024, arXiv 2410.18779",
        "linear_cross_entropy; with a teacher, hard and soft cross entropy in one pass over chunks of tokens",
        "the standard library's source, first under a smaller model trained on it",
    ),
    "phf": Entry(
        "Pretraining Language Models with Human Preferences",
        "Korbak et al. 2023, arXiv 2302.08582",
        "linear_logprob with any gradient a token",
        "functions and classes of the standard library, whose lines keep to a few rules of PEP 8 or do not",
    ),
    "climb": Entry(
        "CLIMB: Curriculum Learning for Infant-inspired Model Building",
        "Martinez et al. 2023, arXiv 2311.08886",
        "linear_cross_entropy over the tokens that were masked",
        "sentences of docstrings, easy ones first",
    ),
    "pints": Entry(
        "1.5-Pints Technical Report: Pretraining in Days, Not Months",
        "Tan and Wang 2024, arXiv 2408.03506",
        "linear_cross_entropy, and linear_logprob for DPO",
        "the standard library's source, then its docstrings as answers",
    ),
}
