"""What stands between demonstrations and a frozen language model: a distiller, and batches whose rows match.

Texts are padded on the right and no attention mask exists: a causal model's real tokens do not see what comes after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from fastcontrast.ops import linear_logprob

from .._shared.language import IGNORED

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class Distiller(nn.Module):
    """S = G([D; P]): a small causal language model reads demonstrations D, then `vectors` learned prompts P, whose last
    states are S; tanh(Linear(S)) where the frozen model has another width.

    Args:
        reader: G, without its head. vectors: L_v, how many. width: of the frozen model, default the reader's.
    """

    def __init__(self, reader: LlamaForCausalLM, vectors: int = 100, width: int | None = None):
        super().__init__()
        self.reader, own = reader.model, reader.config.hidden_size
        # As large as the words that G knows: larger ones would drown them, smaller ones its norm would blow up.
        self.prompts = nn.Parameter(torch.randn(vectors, own) * self.reader.embed_tokens.weight.std().item())
        self.adapter = None if width in (None, own) else nn.Sequential(nn.Linear(own, width), nn.Tanh())

    def forward(self, demonstrations: Tensor, lengths: Tensor) -> Tensor:  # [B, S], [B] -> [B, L_v, width]
        """Of ids padded on the right; `lengths` may be 0."""
        words = self.reader.embed_tokens(demonstrations)
        prompts = self.prompts.expand(len(words), -1, -1)
        places = lengths[:, None, None] + torch.arange(len(self.prompts), device=words.device)[:, None]
        places = places.expand_as(prompts)  # right behind each text, over its padding
        inputs = torch.cat([words, torch.zeros_like(prompts)], 1).scatter(1, places, prompts)
        states = self.reader(inputs_embeds=inputs, use_cache=False).last_hidden_state.gather(1, places)
        return states if self.adapter is None else self.adapter(states)


class Example(NamedTuple):
    """Token ids of demonstrations, and of a query whose last `answer` tokens are the answer; 0 for plain text."""

    demonstrations: Tensor  # [S]
    query: Tensor  # [T]
    answer: int = 0


class Batch(NamedTuple):
    """What student and teacher read; `collate` makes it."""

    demonstrations: Tensor  # [B, S]
    lengths: Tensor  # [B]
    query: Tensor  # [B, T]
    mask: Tensor  # [B, T], True on tokens of the query
    targets: Tensor  # [B, T], the token that follows where it is one of the answer, elsewhere IGNORED
    whole: Tensor  # [B, W], demonstrations and query
    whole_mask: Tensor  # [B, W], True on tokens of the query


def halves(tokens: Tensor, share: float = 0.8) -> Example:  # [T]
    """Plain text for pre-training: the first ⌊share · T⌋ tokens count as demonstrations, the rest as the query."""
    cut = int(share * len(tokens))
    return Example(tokens[:cut], tokens[cut:])


def collate(examples: Sequence[Example], longest: int = 1024, longest_student: int = 900) -> Batch:
    """Texts cut on the left: the teacher's, demonstrations and query, to `longest` tokens, the student's demonstrations
    to `longest_student`. A query longer than `longest` loses tokens in the teacher alone, which `align` refuses."""
    read = [one.demonstrations[-longest_student:] for one in examples]
    whole = [torch.cat([one.demonstrations, one.query])[-longest:] for one in examples]
    targets = [torch.full_like(one.query, IGNORED) for one in examples]
    for row, one in zip(targets, examples, strict=True):
        first = max(len(one.query) - one.answer, 1)  # nothing of the query predicts its first token
        row[first - 1 : -1] = one.query[first:] if one.answer else IGNORED
    masks = [torch.arange(len(row)) >= len(row) - len(one.query) for row, one in zip(whole, examples, strict=True)]
    lengths = torch.tensor([len(row) for row in read])
    query, mask = [one.query for one in examples], [torch.ones(len(one.query)).bool() for one in examples]
    return Batch(
        _padded(read), lengths, _padded(query), _padded(mask), _padded(targets, IGNORED), _padded(whole), _padded(masks)
    )


def align(student: Tensor, mask: Tensor, teacher: Tensor, teacher_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, D] and [N, Dt] of the tokens of queries, in one order, of states [B, T, D] and [B, W, Dt].

    Raises ValueError where a query has not as many tokens in both: no row may meet another's.
    """
    if (counts := mask.sum(1).tolist()) != (found := teacher_mask.sum(1).tolist()):
        raise ValueError(f"align: teacher and student must see as many tokens of each query, got {found} and {counts}")
    return tuple(
        states.flatten(0, 1).index_select(0, kept.flatten().nonzero()[:, 0])
        for states, kept in ((student, mask), (teacher, teacher_mask))
    )


def behind(model: LlamaForCausalLM, vectors: Tensor, query: Tensor) -> Tensor:  # [B, L_v, D], [B, T] -> [B, T, D]
    """The frozen model's states of the query behind the vectors; the vectors' own are dropped. The gradient passes
    through the model, whose weights should require none."""
    inputs = torch.cat([vectors, model.get_input_embeddings()(query)], 1)
    return model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, vectors.shape[1] :]


@torch.no_grad()
def classify(model: LlamaForCausalLM, vectors: Tensor, question: Tensor, answers: Sequence[Tensor]) -> int:
    """Which of `answers` (ids [T_i], none empty) the model finds likeliest after vectors [L_v, D] and a question [T]:
    that of the least mean loss a token. The vectors of a set of demonstrations serve all its questions."""
    batch = collate([Example(question[:0], torch.cat([question, answer]), len(answer)) for answer in answers])
    states = behind(model, vectors.expand(len(answers), -1, -1), batch.query)
    losses = -linear_logprob(states, model.get_output_embeddings().weight, batch.targets)  # 0 where ignored
    return (losses.sum(1) / (batch.targets != IGNORED).sum(1)).argmin().item()


def _padded(rows: Sequence[Tensor], value: int = 0) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
