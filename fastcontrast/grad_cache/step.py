"""GradCache: exact full-batch gradients of any contrastive loss with the activations of one chunk.

With `E_c` the representations of chunk `c`, and the loss one function of all of them,

    dL/dθ = Σ_c (dL/dE_c)ᵀ · dE_c/dθ,        the gradient of the surrogate  Σ_c ⟨E_c, stop(dL/dE_c)⟩.

So: encode every chunk, take the loss's gradient with respect to the representations alone (the *cache*), then send
each chunk's slice of the cache through that chunk's own graph. A chunk whose graph was kept from the first pass is not
encoded twice: when backward costs two forwards, keeping K of C makes a step (3 + (C − K)/C) / 4 of one that keeps none.

What "exact" takes. The second encoding sees the random state and the buffers of the first: dropout masks agree,
BatchNorm's statistics move once a chunk, and the global random stream goes on as after one forward of every chunk.
Where the encoder couples the rows of a batch (BatchNorm in train mode), gradients equal those of the encoder applied
chunk by chunk. Random numbers of Python or numpy inside an encoder are not replayed.

Source: Gao, Zhang, Han, Callan 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
arXiv 2101.06983. Keeping graphs is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from . import chunks as _chunks
from .chunks import leaves, map_leaves, tensors
from .graph_keeper import GraphKeeper
from .replay import Buffers, Replay, random_devices


@dataclass(frozen=True)
class Plan:
    """What the last step did with the graphs of its first pass, and why. Tuples have one entry a model."""

    chunks: tuple[int, ...]
    kept: tuple[int, ...]  # chunks encoded once, because their graph stayed
    frozen: tuple[bool, ...]  # nothing to differentiate: encoded once, no second pass
    chunk_bytes: int  # the largest graph of a chunk that "auto" measured
    budget_bytes: int  # what "auto" allowed itself
    reason: str

    @property
    def extra_forward(self) -> float:
        """(C − K) / C over the models that train."""
        chunks = sum(c for c, frozen in zip(self.chunks, self.frozen, strict=True) if not frozen)
        return (chunks - sum(self.kept)) / max(1, chunks)

    def __str__(self) -> str:
        return f"{sum(self.kept)} graphs kept, {self.extra_forward:.0%} of chunks encoded twice ({self.reason})"


class GradCache:
    """`GradCache(models, chunk_sizes, loss_fn)(*inputs, **loss_kwargs)` returns the detached loss, and fills `.grad` as
    `loss_fn(*[model(x) for model, x in zip(models, inputs)], **loss_kwargs).backward()` would, the whole batch at once.

    models          one encoder an input; the same object may come twice (tied towers)
    chunk_sizes     rows a chunk: an int, or one int a model; the last chunk may be smaller
    loss_fn         called once a step, returns a scalar. Whatever requires grad in it gets its gradient: its own
                    parameters, captured tensors, tensors among `loss_kwargs`.
    split_input_fn  (input, chunk_size) -> chunks; else `split_inputs`
    get_rep_fn      model output -> representations, else the output itself: a tensor [B, ...], or a tuple, list or
                    mapping of such. The loss gets the same structure with the chunks concatenated.
    fp16, scaler    encode and evaluate the loss under float16 autocast; needs a GradScaler. Gradients stay scaled, as
                    after `scaler.scale(loss).backward()`; the returned loss is not scaled.
    autocast        a dtype (`torch.bfloat16`), a `torch.autocast(...)`, or a callable that makes a context: entered
                    for each encoding and for the loss, never for a backward. A scaler may join it.
    keep_graphs     how many chunks keep the graph of the first pass. An int K: the first K trainable chunks in encoding
                    order, all of model 0 before any of model 1. "auto": as many as fit in half of the memory that is
                    free (what host, memory cgroup and device report, less gradients not allocated yet), by the size of
                    each model's first graph; none where the forward rewrites a floating-point buffer that autograd may
                    have saved. Out of memory while keeping drops every kept graph, and the step goes on.
    progress        a tqdm bar over chunk passes

    An input is a tensor, a mapping (keyword arguments), a list or tuple (positional arguments), or `(args, kwargs)`,
    nested as you like. Tensors are cut along dimension 0; numbers, strings, None and 0-dimensional tensors go to every
    chunk. Inputs that require grad get theirs. Gradients accumulate into `.grad`.

    With `no_sync_except_last=True` in the call, all backwards of a model but its last run under `model.no_sync()`
    (DistributedDataParallel). The last chunk of such a model is always encoded again, since its forward arms the
    reduction; and "auto", which may keep other chunks on other ranks, synchronises once a model whatever the flag.

    After a step `plan` says what was kept and why, and `kept_graphs` how many.

    Raises ValueError or TypeError where settings and inputs do not fit together, RuntimeError if nothing requires grad.
    """

    def __init__(
        self,
        models: Sequence[Callable[..., Any]],
        chunk_sizes: int | Sequence[int],
        loss_fn: Callable[..., Tensor],
        split_input_fn: Callable[[Any, int], Sequence[Any]] | None = None,
        get_rep_fn: Callable[[Any], Any] | None = None,
        fp16: bool = False,
        scaler: Any = None,
        *,
        autocast: torch.dtype | torch.autocast | Callable[[], AbstractContextManager] | None = None,
        keep_graphs: int | str = "auto",
        progress: bool = False,
    ) -> None:
        if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
            raise TypeError(f"GradCache: models must be a list, one model an input, got one {type(models).__name__}")
        if fp16 and scaler is None:
            raise ValueError("GradCache: fp16=True needs scaler=torch.amp.GradScaler(...), got None")
        if scaler is not None and scaler.is_enabled() and not fp16 and autocast is None:
            raise ValueError("GradCache: an enabled scaler needs fp16=True or autocast=, got neither")
        if not (autocast is None or isinstance(autocast, torch.dtype) or callable(autocast)):
            raise TypeError(f"GradCache: autocast must be a dtype or make a context, got {type(autocast).__name__}")
        self.models = list(models)
        self.chunk_sizes = _chunk_sizes(chunk_sizes, len(self.models))
        self.loss_fn, self.split_input_fn, self.get_rep_fn = loss_fn, split_input_fn, get_rep_fn
        self.fp16, self.scaler, self.progress = fp16, scaler, progress
        self.autocast = torch.float16 if fp16 and autocast is None else autocast
        self.keep_graphs = "auto" if keep_graphs == "auto" else _count("keep_graphs", keep_graphs, least=0)
        self.plan: Plan | None = None
        self._ceiling: int | None = None  # later steps of "auto" try no more, once memory ran out
        self._frozen: tuple[bool, ...] = ()
        self._bar: Any = None

    @property
    def kept_graphs(self) -> int | None:
        """Chunks of the last step that were encoded once; None before the first step."""
        return None if self.plan is None else sum(self.plan.kept)

    def __call__(self, *model_inputs: Any, no_sync_except_last: bool = False, **loss_kwargs: Any) -> Tensor:
        return self.cache_step(*model_inputs, no_sync_except_last=no_sync_except_last, **loss_kwargs)

    def cache_step(self, *model_inputs: Any, no_sync_except_last: bool = False, **loss_kwargs: Any) -> Tensor:
        """One step: gradients into `.grad`, the detached loss back."""
        if len(model_inputs) != (count := len(self.models)):
            raise ValueError(f"GradCache: {count} models need {count} inputs, got {len(model_inputs)}")
        taps: list[tuple[Tensor, Tensor]] = []
        inputs = [self._chunks(x, size, taps) for x, size in zip(model_inputs, self.chunk_sizes, strict=True)]
        self._keeper = GraphKeeper(
            self.keep_graphs, self._ceiling, _modules(*self.models, self.get_rep_fn, self.loss_fn)
        )
        try:
            with self._progress(sum(map(len, inputs))):
                reps, states = zip(*map(self.forward_no_grad, self.models, inputs), strict=True)
                self._note(states)
                cache, loss = self.build_cache(*reps, **loss_kwargs)
                cache = list(map(_split_cache, cache, states, self.chunk_sizes))
                self._second_pass(inputs, cache, states, no_sync_except_last)
        finally:
            self._keeper.forget()
            self._frozen = ()
        # One call, since the chunks hang on one graph; it walks whatever made the inputs once.
        _backward([x for x, _ in taps], [leaf.grad for _, leaf in taps])
        return loss

    def split_inputs(self, model_input: Any, chunk_size: int) -> list[Any]:
        """Chunks of one model's input, in its own structure (mappings become dict)."""
        return list((self.split_input_fn or _chunks.split)(model_input, chunk_size))

    def get_input_tensors(self, model_input: Any) -> list[Tensor]:
        """Every tensor of an input, in order."""
        return tensors(model_input)

    def model_call(self, model: Callable[..., Any], model_input: Any) -> Any:
        """`model(x)`, `model(**mapping)`, `model(*list_or_tuple)`, or `model(*args, **kwargs)` for `(args, kwargs)`."""
        if isinstance(model_input, Mapping):
            return model(**model_input)
        if isinstance(model_input, tuple) and len(model_input) == 2:
            args, kwargs = model_input
            if isinstance(args, (list, tuple)) and isinstance(kwargs, Mapping):
                return model(*args, **kwargs)
        return model(*model_input) if isinstance(model_input, (list, tuple)) else model(model_input)

    def get_reps(self, model_out: Any) -> Any:
        """Representations in a model's output."""
        return model_out if self.get_rep_fn is None else self.get_rep_fn(model_out)

    def compute_loss(self, *reps: Any, **loss_kwargs: Any) -> Tensor:
        """The loss of the whole batch; called once a step."""
        return self.loss_fn(*reps, **loss_kwargs)

    def forward_no_grad(self, model: Callable[..., Any], model_inputs: list[Any]) -> tuple[Any, list[Replay]]:
        """First pass over one model: its concatenated representations, and a state a chunk for the second pass.

        The first chunk always runs with gradients on, and what comes out tells whether there is anything to train:
        true for frozen weights, adapters, a head in get_rep_fn and plain functions alike, at no more memory than the
        second pass takes."""
        keeper, modules = self._keeper, _modules(model, self.get_rep_fn)
        devices = random_devices(modules, (t for chunk in model_inputs for t in self.get_input_tensors(chunk)))
        buffers = Buffers(modules)
        keeper.open(devices)
        reps, states, trains = [], [], True
        with _no_sync(model):
            for i, chunk in enumerate(model_inputs):
                first, armed = i == 0, i == len(model_inputs) - 1 and hasattr(model, "no_sync")
                state = Replay(devices, buffers.snapshot() if trains else {})
                graph = first or (trains and keeper.fits(armed))
                out = self._encode_first(model, chunk, state, graph, buffers if first else None)
                live = any(t.requires_grad for t in leaves(out))
                trains = trains and (live or keeper.failed or not first)
                if live and (not first or keeper.fits(armed, held=True)):
                    keeper.take(state, out)
                state.frozen, state.rows = not trains, [t.shape[0] for t in leaves(out)]
                reps.append(map_leaves(Tensor.detach, out))
                states.append(state)
                del out  # else a graph that does not stay lives until the next chunk is encoded
                self._tick()
        return _chunks.cat(reps), states

    def build_cache(self, *reps: Any, **loss_kwargs: Any) -> tuple[list[Any], Tensor]:
        """dL/dE in the structure of `reps`, None where the loss does not depend on it; and the detached loss."""
        trains = [not frozen for frozen in self._frozen] or [True] * len(reps)
        reps = [map_leaves(partial(_leaf, trains=t), r) for t, r in zip(trains, reps, strict=True)]
        with self._autocast(t for r in reps for t in leaves(r)):
            loss = self.compute_loss(*reps, **loss_kwargs)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"GradCache: loss_fn must return a scalar tensor, got {came}")
        if not loss.requires_grad:
            raise RuntimeError("GradCache: nothing requires grad: no representation, no loss parameter, or no_grad")
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return [map_leaves(lambda t: t.grad, r) for r in reps], loss.detach()

    def forward_backward(
        self,
        model: Callable[..., Any],
        model_inputs: list[Any],
        cached_gradients: list[Any],
        random_states: list[Replay],
        no_sync_except_last: bool = False,
    ) -> None:
        """Second pass over one model. Kept graphs go first: their memory is back before anything is encoded again."""
        kept = [getattr(state, "kept", None) for state in random_states]
        order = sorted(range(len(kept)), key=lambda i: kept[i] is None)
        once = no_sync_except_last or self.keep_graphs == "auto"
        for i in order:
            with _no_sync(model, kept[i] is not None or (once and i != order[-1])):
                if kept[i] is None:
                    with random_states[i], torch.enable_grad():
                        kept[i] = self._encode(model, model_inputs[i])
                _backward(kept[i], cached_gradients[i])
            kept[i] = random_states[i].kept = None
            self._tick()

    def _encode(self, model: Callable[..., Any], model_input: Any) -> Any:
        with self._autocast(chain(self.get_input_tensors(model_input), *(m.parameters() for m in _modules(model)))):
            reps = self.get_reps(self.model_call(model, model_input))
        for leaf in leaves(reps) or [None]:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0:
                came = "a 0-dimensional tensor" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"GradCache: representations must be tensors [B, ...], got {came}; get_rep_fn can pick")
        return reps

    def _encode_first(self, model: Any, chunk: Any, state: Replay, graph: bool, watch: Buffers | None) -> Any:
        """Encode in the first pass, with a graph or without; a model's first chunk is also measured and watched."""
        keeper, out = self._keeper, None
        meter = keeper.meter(tensors(chunk)) if watch is not None and keeper.auto else None
        try:
            with torch.set_grad_enabled(graph), meter or nullcontext():
                out = self._encode(model, chunk)
        except torch.OutOfMemoryError:
            if not (keeper.auto and (graph or keeper.states)):
                raise
            self._ceiling = keeper.surrender()
        except RuntimeError as error:  # torch.func.grad inside the model works, but not under a meter
            if meter is None or "saved tensor hooks" not in str(error):
                raise
            keeper.blind = True
        if out is None:  # not in a handler, whose traceback holds what the failed forward allocated
            keeper.release()
            state.rewind()
            with torch.set_grad_enabled(keeper.blind):
                out = self._encode(model, chunk)
        if watch is not None:
            watch.learn(state)
            keeper.rewritten = watch.rewritten
        return out

    def _second_pass(self, inputs: list[Any], cache: list[Any], states: Any, no_sync_except_last: bool) -> None:
        todo = [i for i, chunks in enumerate(cache) if any(g is not None for g in leaves(chunks))]
        if self._bar is not None:
            self._bar.total += sum(len(inputs[i]) for i in todo)
        for place, i in enumerate(todo):
            model = self.models[i]
            again = any(self.models[j] is model for j in todo[place + 1 :])  # its last backward is still to come
            with _no_sync(model, no_sync_except_last and again):
                self.forward_backward(model, inputs[i], cache[i], states[i], no_sync_except_last=no_sync_except_last)

    def _chunks(self, model_input: Any, chunk_size: int, taps: list[tuple[Tensor, Tensor]]) -> list[Any]:
        """Chunks whose differentiable tensors are cut off as leaves; `taps` remembers where they belong."""

        def tap(t: Tensor) -> Tensor:
            if not t.requires_grad:
                return t
            taps.append((t, _leaf(t)))
            return taps[-1][1]

        chunks = self.split_inputs(model_input, chunk_size)
        if not chunks:
            raise ValueError("GradCache: split_input_fn must return at least one chunk, got none")
        return [map_leaves(tap, c) if any(t.requires_grad for t in tensors(c)) else c for c in chunks]

    def _autocast(self, among: Iterable[Tensor]) -> AbstractContextManager:
        if isinstance(self.autocast, torch.dtype):
            return torch.autocast(next((t.device.type for t in among), "cpu"), self.autocast)
        if self.autocast is None or isinstance(self.autocast, torch.autocast):
            return self.autocast or nullcontext()
        return self.autocast()

    def _note(self, states: Sequence[Sequence[Any]]) -> None:
        keeper = self._keeper
        self._frozen = tuple(all(getattr(s, "frozen", False) for s in chunks) for chunks in states)
        kept = tuple(sum(getattr(s, "kept", None) is not None for s in chunks) for chunks in states)
        sizes = tuple(map(len, states))
        self.plan = Plan(sizes, kept, self._frozen, keeper.largest, keeper.budget_bytes, keeper.why())

    @contextmanager
    def _progress(self, total: int) -> Iterator[None]:
        if not self.progress:
            yield
            return
        from tqdm import tqdm  # here, so that only who asks for a bar needs tqdm

        with tqdm(total=total, desc="GradCache", unit="chunk", leave=False) as self._bar:
            yield
        self._bar = None

    def _tick(self) -> None:
        if self._bar is not None:
            self._bar.update()


def _modules(*candidates: Any) -> list[nn.Module]:
    return [m for m in candidates if isinstance(m, nn.Module)]


def _no_sync(model: Any, on: bool = True) -> AbstractContextManager:
    return model.no_sync() if on and hasattr(model, "no_sync") else nullcontext()


def _leaf(t: Tensor, trains: bool = True) -> Tensor:
    return t.detach().requires_grad_(trains and (t.is_floating_point() or t.is_complex()))


def _backward(out: Any, gradients: Any) -> None:
    pairs = [(t, g) for t, g in zip(leaves(out), leaves(gradients), strict=True) if g is not None and t.requires_grad]
    if pairs:
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))


def _split_cache(cache: Any, states: Sequence[Any], chunk_size: int) -> list[Any]:
    """The cache cut as the representations came; by chunk size where a subclass brings states of its own."""
    known = all(hasattr(state, "rows") for state in states)
    return _chunks.split_as(cache, [state.rows for state in states] if known else chunk_size, len(states))


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or index(value) < least:
        raise ValueError(f"GradCache: {name} must be an integer of at least {least}, got {value!r}")
    return index(value)


def _chunk_sizes(sizes: Any, models: int) -> list[int]:
    if models == 0:
        raise ValueError("GradCache: models must hold at least one model, got none")
    sizes = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes] * models
    if len(sizes) != models:
        raise ValueError(f"GradCache: {models} models need one chunk size or {models}, got {len(sizes)}")
    return [_count("chunk_sizes", size, least=1) for size in sizes]
