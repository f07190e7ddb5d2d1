"""Kullback-Leibler divergence of two language-model heads whose logits are never stored.

z = (W h + b) / T,   p = softmax z of the student,   t = softmax of the teacher,   over the vocabulary v

forward     KL(t ‖ p) = Σ_v t (log t − log p)          G = p − t
reverse     KL(p ‖ t) = Σ_v p (log p − log t)          G = p (log p − log t − KL(p ‖ t))
symmetric   ½ KL(t ‖ p) + ½ KL(p ‖ t)

dh = G W / T,   dW = Gᵀ h / T,   db = Σ_tokens G / T

The terms that are summed are t (e^−d − 1 + d) for d = log t − log p: the same sum, since Σ p = Σ t, but none is
negative, and a student that has nearly become its teacher keeps the digits of their divergence.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check as check
from . import _divergence
from ._dispatch import choose, refuse_cpu, refuse_triton, register
from ._divergence import Problem, Rows
from ._formed import formed
from ._precision import no_second_backward
from ._tokens import TWO_HEADS, average, head, token_weights, workspace_of

register("linear_kl", {"cpu": refuse_cpu, "triton": refuse_triton})

SHARES = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0), "symmetric": (0.5, 0.5)}


# -------------------------------------------------------------------------------------------- torch.library, autograd

_library = torch.library.Library("fastcontrast", "FRAGMENT")
_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias,"
    " Tensor? token_ids, Tensor? vocabulary_ids, float scale, float teacher_scale, float forward, float reverse"
)
_library.define(f"linear_kl({_PROBLEM}, SymInt workspace, str implementation) -> (Tensor divergence, Tensor entropy)")
_library.define(
    f"linear_kl_backward({_PROBLEM}, Tensor upstream, bool[3] needs, SymInt workspace, str implementation)"
    " -> (Tensor hidden, Tensor weight, Tensor bias)"
)
N_PROBLEM = len(Problem._fields)  # first in both schemas


def _forward(*inputs) -> tuple[Tensor, Tensor]:
    problem, (workspace, implementation) = Problem(*inputs[:N_PROBLEM]), inputs[N_PROBLEM:]
    return _divergence.RUNS[implementation](problem.hidden, problem, None, (), workspace).rows


def _backward(*inputs) -> tuple[Tensor, Tensor, Tensor]:
    problem, (upstream, needs, workspace, implementation) = Problem(*inputs[:N_PROBLEM]), inputs[N_PROBLEM:]
    upstream = upstream.float().contiguous()
    run = _divergence.RUNS[implementation]
    gradients = run(problem.hidden, problem, upstream, needs, workspace).gradients
    return tuple(
        upstream.new_empty(0) if gradient is None else gradient.to(like.dtype)
        for gradient, like in zip(gradients, problem[:3], strict=True)
    )


def _forward_fake(hidden, *rest):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(2))


def _backward_fake(*inputs):
    needs = inputs[N_PROBLEM + 1]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if need and x is not None
        else inputs[0].new_empty(0, dtype=torch.float32)
        for x, need in zip(inputs[:3], needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.rest = inputs[8:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, upstream, _):
    none = (None,) * (N_PROBLEM + 2)
    if upstream is None:
        return none
    *numbers, workspace, implementation = ctx.rest
    needs = [*ctx.needs_input_grad[:3]]
    run = torch.ops.fastcontrast.linear_kl_backward
    gradients = run(*ctx.saved_tensors, *numbers, upstream, needs, workspace, implementation)
    return (*(x if need else None for x, need in zip(gradients, needs, strict=True)), *none[3:])


for _name, _run, _fake, _derivative, _setup in (
    ("linear_kl", _forward, _forward_fake, _autograd, _setup_context),
    ("linear_kl_backward", _backward, _backward_fake, no_second_backward("linear_kl"), None),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastcontrast::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"fastcontrast::{_name}", _derivative, setup_context=_setup, lib=_library)


class _WeightedSum:
    """Σ_i w_i KL_i and its gradients, for `formed`; keeps Σ_i w_i H_i, which has none."""

    def __init__(self, problem: Problem, weights: Tensor, workspace: int, implementation: str):
        self.problem, self.weights = Problem(None, None, None, *problem[3:]), weights
        self.workspace, self.implementation = workspace, implementation
        self.entropy: Tensor | None = None

    def __call__(self, inputs, needs):
        problem, upstream = Problem(*inputs, *self.problem[3:]), self.weights if any(needs) else None
        run = _divergence.RUNS[self.implementation]
        rows, gradients = run(inputs[0], problem, upstream, needs, self.workspace)
        total, self.entropy = (_dot(self.weights, x) for x in rows)
        return total, gradients


def _dot(weights: Tensor, values: Tensor) -> Tensor:
    return torch.dot(weights.double(), values.double()).float()


# --------------------------------------------------------------------------------------------------------------- public


class Divergence(NamedTuple):
    """Reduced, or of each token; the entropy has no gradient."""

    divergence: Tensor
    entropy: Tensor


def divergence(
    op: str,
    problem: Problem,
    weights: Tensor | None,  # [T]
    reduction: str,
    workspace: int,
    implementation: str | None,
) -> Divergence:
    """What `linear_kl` and losses on similarities share: checked inputs in, rows that count picked out, reduced."""
    choice = choose("linear_kl", implementation, problem.hidden.device, problem.dtype)
    count = problem.hidden.shape[0]
    if weights is None:
        weights = torch.ones(count, dtype=problem.dtype, device=problem.hidden.device)
    weights = weights.to(problem.dtype)
    if reduction == "mean":
        weights = average(weights)
    index = None
    if choice != "reference" and not torch.compiler.is_compiling():
        # On a CPU rows of weight 0 cost nothing. Elsewhere their number could not be known without waiting.
        if problem.hidden.device.type == "cpu" and not (weights != 0).all():
            index = weights.nonzero()[:, 0]
            problem, weights = problem.rows(index), weights[index]
        if reduction != "none":
            run = _WeightedSum(problem, weights, workspace, choice)
            total = formed(run, *problem[:3], op=op)
            return Divergence(total, run.entropy)
    if choice == "reference":
        rows = _divergence.reference(problem.hidden, problem)
    else:
        rows = Rows(*torch.ops.fastcontrast.linear_kl(*problem, workspace, choice))
    rows = [x * weights for x in rows]
    if reduction != "none":
        return Divergence(*(x.sum() for x in rows))
    if index is not None:
        rows = [x.new_zeros(count).index_copy(0, index, x) for x in rows]
    return Divergence(*rows)


def linear_kl(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    teacher_hidden: Tensor,  # [..., Dt]
    teacher_weight: Tensor,  # [V, Dt]
    *,
    bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    direction: str = "forward",
    weights: Tensor | None = None,  # [...]
    reduction: str = "mean",
    return_entropy: bool = False,
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Σ_v t (log t − log p) of each token, p = softmax((hidden @ weight.T + bias) / temperature), t the teacher's.

    Equals `F.kl_div(log_softmax(student), log_softmax(teacher), log_target=True, reduction="none").sum(-1)` with logits
    in float32, without the logits [T, V] of either head. There is no factor temperature²: multiply by it to keep the
    size of gradients when the temperature changes. The teacher is frozen: it gets no gradient, whether or not its
    tensors require one. With `mean` and `sum` the gradients are formed in the forward, four matrix products in all
    (three where the vocabulary needs none); with `none` the backward computes logits again: six.

    Args:
        hidden, weight, bias: the student's, [..., D], [V, D], [V]; float32, bfloat16 or float16 (float64: dense
            reference), hidden and weight of one dtype. With gradients.
        teacher_hidden, teacher_weight, teacher_bias: the teacher's on the same tokens and vocabulary; its width Dt and
            its dtype may differ.
        temperature: a positive number, of both heads; `teacher_temperature` if that of the teacher differs.
        direction: "forward" KL(teacher ‖ student), which the student must cover; "reverse" KL(student ‖ teacher), which
            it may seek a mode of; "symmetric" the mean of both.
        weights: [...], multiply the tokens' divergences; they must not require a gradient. A token of weight 0 does
            not count, and on a CPU costs nothing.
        reduction: "mean" divides by the sum of the weights (0 where that is 0, also for no tokens), "sum", or "none"
            for [...].
        return_entropy: also −Σ_v t log t of the teacher, reduced alike, without gradient: "forward" plus it is the
            cross entropy −Σ_v t log p of soft targets.
        workspace: bytes for the logits of a chunk of tokens, at least 64 of them; default `set_workspace`, without it
            288 MiB on a CPU.
        implementation: None (the best that can run), "cpu", "triton" or "reference".

    Where a probability is 0 its term is 0, unless the other head's log-probability is −inf: then the divergence is
    infinite, as it is. Returns float32 (float64 for float64 inputs).

    Raises: ValueError or TypeError naming the argument, what was expected and what came; NotImplementedError if the
    requested implementation cannot run.
    """
    op = "linear_kl"
    rows = head(op, hidden, weight, bias)
    names = ("teacher_hidden", "teacher_weight", "teacher_bias")
    teacher_rows = head(op, teacher_hidden, teacher_weight, teacher_bias, names)
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        got = f"{list(teacher_hidden.shape[:-1])} and {list(hidden.shape[:-1])}"
        raise ValueError(f"{op}: teacher_hidden must have the tokens of hidden, got {got}")
    if teacher_weight.shape[0] != weight.shape[0]:
        got = f"{teacher_weight.shape[0]} and {weight.shape[0]}"
        raise ValueError(f"{op}: teacher_weight must have the vocabulary of weight, got {got} rows")
    check.same_kind(op, "teacher_hidden", teacher_hidden, hidden, dtype=False, like_name="hidden")
    check.one_of(op, "direction", direction, tuple(SHARES))
    check.one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    check.workspace(op, workspace)
    scale = _inverse(op, "temperature", temperature)
    teacher_scale = scale if teacher_temperature is None else _inverse(op, "teacher_temperature", teacher_temperature)
    weights = token_weights(op, weights, hidden)
    teacher = (x if x is None else x.detach() for x in (teacher_rows, teacher_weight, teacher_bias))
    problem = Problem(rows, weight, bias, *teacher, None, None, scale, teacher_scale, *SHARES[direction])
    budget = workspace_of(workspace, hidden.device, TWO_HEADS)
    results = divergence(op, problem, weights, reduction, budget, implementation)
    if reduction == "none":
        results = Divergence(*(x.view(hidden.shape[:-1]) for x in results))
    return tuple(results) if return_entropy else results.divergence


def _inverse(op: str, name: str, temperature: Any) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(temperature).__name__}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{op}: {name} must be positive, got {temperature}")
    return 1.0 / temperature
