"""GradCache: exact full-batch gradients of any contrastive loss with the activations of one chunk.

With `E_c` the representations of chunk `c`, and the loss one function of all of them,

    dL/dθ = Σ_c (dL/dE_c)ᵀ · dE_c/dθ,        the gradient of the surrogate  Σ_c ⟨E_c, stop(dL/dE_c)⟩.

So: encode every chunk, take the loss's gradient with respect to the representations alone (the *cache*), then send
each chunk's slice of the cache through that chunk's own graph. A chunk whose graph was kept from the first pass is not
encoded twice: when backward costs two forwards, keeping K of C makes a step (3 + (C − K)/C) / 4 of one that keeps none.
What is kept does not change a bit of the result: chunks go backward in the same order.

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
import torch.distributed as dist
from torch import Tensor, nn

from . import chunks as _chunks
from .chunks import leaves, map_leaves, tensors
from .gradients import all_or_nothing, backward, leaf_of
from .graph_keeper import GraphKeeper, out_of_memory
from .reduction import arms, collective, learns_graph, no_sync, share_buffers
from .replay import Buffers, Replay, random_devices
from .tokens import split_tokens


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
    chunk_tokens    tokens a chunk: an int, or one int or None a model. Consecutive rows go together while their number
                    × the longest of them stays within it (and chunk_sizes); padding behind the longest is cut off. For
                    inputs with an attention_mask [B, T], of models whose representations have no token dimension.
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
                    have saved, or needs other ranks. When memory runs out beside kept graphs (host or device, while
                    encoding or in a loss on one process) all are dropped, what failed is done again, and later steps
                    keep half as many. A backward that fails may have accumulated already: its error is raised.
    progress        a tqdm bar over chunk passes

    An input is a tensor, a mapping (keyword arguments), a list or tuple (positional arguments: `[features]` for a
    model that takes one mapping, as those of sentence-transformers), or `(args, kwargs)`, nested as you like. Tensors
    are cut along dimension 0; numbers, strings, None and 0-dimensional tensors go to every chunk. Inputs that require
    grad get theirs. Gradients accumulate into `.grad`.

    Ranks. Give the model as DistributedDataParallel wraps it: it reduces once a step, in the backward of its last
    chunk, so ranks may have different numbers of chunks and keep different graphs. That chunk is always encoded again,
    since its forward arms the reduction. (With static_graph=True a backward of zeros precedes the first step, for the
    reducer to learn the graph.) A model under FSDP2's fully_shard reduces in every backward, so that no rank holds the
    gradients of all parameters; once a step with `no_sync_except_last=True` in the call. Its forward needs all ranks,
    as SyncBatchNorm's does: the same number of chunks on each, and "auto" keeps none of them. The loss itself gathers
    representations (`fastcontrast.distributed.gather`); its own parameters lie outside the wrapped models
    (`mean_gradient`).

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
        chunk_tokens: int | Sequence[int | None] | None = None,
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
        if chunk_tokens is not None and split_input_fn is not None:
            raise ValueError("GradCache: chunk_tokens and split_input_fn both cut the input, got both")
        self.models = list(models)
        self.chunk_sizes = _chunk_sizes("chunk_sizes", chunk_sizes, len(self.models))
        self.chunk_tokens = _chunk_sizes("chunk_tokens", chunk_tokens, len(self.models), optional=True)
        self.loss_fn, self.split_input_fn, self.get_rep_fn = loss_fn, split_input_fn, get_rep_fn
        self.fp16, self.scaler, self.progress = fp16, scaler, progress
        self.autocast = torch.float16 if fp16 and autocast is None else autocast
        self.keep_graphs = "auto" if keep_graphs == "auto" else _count("keep_graphs", keep_graphs, least=0)
        self.plan: Plan | None = None
        self._ceiling: int | None = None  # later steps of "auto" try no more, once memory ran out
        self._keeper = GraphKeeper(0, None, [])
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
        cuts = zip(model_inputs, self.chunk_sizes, self.chunk_tokens, strict=True)
        inputs = [self._chunks(x, size, tokens, taps) for x, size, tokens in cuts]
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
                self._note(states)
        finally:
            self._keeper.forget()
            self._frozen = ()
        # One call, since the chunks hang on one graph; it walks whatever made the inputs once.
        backward([x for x, _ in taps], [leaf.grad for _, leaf in taps])
        return loss

    def split_inputs(self, model_input: Any, chunk_size: int, chunk_tokens: int | None = None) -> list[Any]:
        """Chunks of one model's input, in its own structure (mappings become dict)."""
        if chunk_tokens is not None:
            return split_tokens(model_input, chunk_size, chunk_tokens)
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
        """The loss of the whole batch; called once a step, and again where memory ran out beside kept graphs."""
        return self.loss_fn(*reps, **loss_kwargs)

    def forward_no_grad(self, model: Callable[..., Any], model_inputs: list[Any]) -> tuple[Any, list[Replay]]:
        """First pass over one model: its concatenated representations, and a state a chunk for the second pass.

        The first chunk always runs with gradients on, and what comes out tells whether there is anything to train:
        true for frozen weights, adapters, a head in get_rep_fn and plain functions alike, at no more memory than the
        second pass takes."""
        keeper, modules = self._keeper, _modules(model, self.get_rep_fn)
        devices = random_devices(modules, (t for chunk in model_inputs for t in self.get_input_tensors(chunk)))
        keeper.open(devices, collective(modules))
        share_buffers(model)
        buffers = Buffers(modules)
        last = len(model_inputs) - 1 if arms(model) else None
        reps, states, trains = [], [], True
        with no_sync(model):
            for i, chunk in enumerate(model_inputs):
                first, armed = i == 0, i == last
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
        return self._afford(lambda: _chunks.cat(reps)), states

    def build_cache(self, *reps: Any, **loss_kwargs: Any) -> tuple[list[Any], Tensor]:
        """dL/dE in the structure of `reps`, None where the loss does not depend on it; and the detached loss."""
        trains = [not frozen for frozen in self._frozen] or [True] * len(reps)
        # Another attempt on one rank alone would meet other collectives there than its peers are in.
        sound = self._keeper.auto and self._keeper.holds and not (dist.is_available() and dist.is_initialized())
        modules = _modules(self.loss_fn)
        state = Replay(random_devices(modules, tensors(list(reps))), Buffers(modules).snapshot() if sound else {})

        def attempt() -> tuple[list[Any], Tensor]:
            cut = [map_leaves(partial(leaf_of, trains=t), r) for t, r in zip(trains, reps, strict=True)]
            with self._autocast(t for r in cut for t in leaves(r)):
                loss = self.compute_loss(*cut, **loss_kwargs)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"GradCache: loss_fn must return a scalar tensor, got {came}")
            if not loss.requires_grad:
                raise RuntimeError("GradCache: nothing requires grad: no representation, no loss parameter, or no_grad")
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            with all_or_nothing(scaled) if sound else nullcontext():
                scaled.backward()
            return [map_leaves(lambda t: t.grad, r) for r in cut], loss.detach()

        return self._afford(attempt, state.rewind, sound=sound)

    def forward_backward(
        self,
        model: Callable[..., Any],
        model_inputs: list[Any],
        cached_gradients: list[Any],
        random_states: list[Replay],
        no_sync_except_last: bool = False,
    ) -> None:
        """Second pass over one model; gradients are reduced over ranks in its last backward, or in all of them."""
        last = len(model_inputs) - 1
        for i, (chunk, state) in enumerate(zip(model_inputs, random_states, strict=True)):
            with no_sync(model, no_sync_except_last and i != last):
                out = getattr(state, "kept", None)
                if out is None:
                    out = self._encode_again(model, chunk, state)
                self._afford(partial(backward, out, cached_gradients[i]), sound=False)
            out = state.kept = None
            self._tick()

    def _encode(self, model: Callable[..., Any], model_input: Any) -> Any:
        with self._autocast(chain(self.get_input_tensors(model_input), *(m.parameters() for m in _modules(model)))):
            reps = self.get_reps(self.model_call(model, _chunks.fresh(model_input)))
        for leaf in leaves(reps) or [None]:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0:
                came = "a 0-dimensional tensor" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"GradCache: representations must be tensors [B, ...], got {came}; get_rep_fn can pick")
        return reps

    def _encode_first(self, model: Any, chunk: Any, state: Replay, graph: bool, watch: Buffers | None) -> Any:
        """Encode in the first pass, with a graph or without; a model's first chunk is also measured and watched."""
        keeper, out = self._keeper, None
        meter = keeper.meter(tensors(chunk)) if watch is not None and keeper.auto and not keeper.exchanges else None

        def attempt() -> Any:
            with torch.set_grad_enabled(graph), meter or nullcontext():
                return self._encode(model, chunk)

        def without_graph() -> None:
            nonlocal graph
            graph = False
            state.rewind()

        try:
            out = self._afford(attempt, without_graph, sound=not keeper.exchanges, graph=graph)
        except RuntimeError as error:  # torch.func.grad inside the model works, but not under a meter
            if meter is None or "saved tensor hooks" not in str(error):
                raise
            keeper.blind = True
        if out is None:
            state.rewind()
            with torch.enable_grad():
                out = self._encode(model, chunk)
        if watch is not None:
            watch.learn(state)
            keeper.rewritten = watch.rewritten
        return out

    def _encode_again(self, model: Any, chunk: Any, state: Any) -> Any:
        def attempt() -> Any:
            with state, torch.enable_grad():
                return self._encode(model, chunk)

        return self._afford(attempt, sound=not collective(_modules(model, self.get_rep_fn)))

    def _afford(
        self,
        attempt: Callable[[], Any],
        before_again: Callable[[], None] = lambda: None,
        sound: bool = True,
        graph: bool = False,
    ) -> Any:
        """`attempt()`. If memory runs out while graphs are kept ("auto"; or with `graph`, one to be kept), they are
        dropped, and it is tried once more where that is sound."""
        keeper = self._keeper
        try:
            return attempt()
        except (MemoryError, RuntimeError) as error:
            if not (out_of_memory(error) and keeper.auto and (graph or keeper.holds)):
                raise
            self._ceiling = keeper.surrender()
            if not sound:
                raise
        # Not in the handler, whose traceback holds what the failed attempt allocated.
        keeper.release()
        before_again()
        return attempt()

    def _second_pass(self, inputs: list[Any], cache: list[Any], states: Any, no_sync_except_last: bool) -> None:
        todo = [i for i, chunks in enumerate(cache) if any(g is not None for g in leaves(chunks))]
        if self._bar is not None:
            self._bar.total += sum(len(inputs[i]) for i in todo)
        for place, i in enumerate(todo):
            model = self.models[i]
            once = no_sync_except_last or arms(model)
            again = any(self.models[j] is model for j in todo[place + 1 :])  # its last backward is still to come
            if learns_graph(model):
                self._teach_graph(model, inputs[i][0], cache[i][0], states[i][0])
            with no_sync(model, once and again):
                self.forward_backward(model, inputs[i], cache[i], states[i], no_sync_except_last=once)

    def _teach_graph(self, model: Any, chunk: Any, gradients: Any, state: Any) -> None:
        """One backward of zeros. It is reduced on every rank, however many chunks there are."""
        zeros = map_leaves(torch.zeros_like, gradients)
        backward(self._encode_again(model, chunk, state), zeros)

    def _chunks(self, model_input: Any, size: int, tokens: int | None, taps: list[tuple[Tensor, Tensor]]) -> list[Any]:
        """Chunks whose differentiable tensors are cut off as leaves; `taps` remembers where they belong."""

        def tap(t: Tensor) -> Tensor:
            if not t.requires_grad:
                return t
            taps.append((t, leaf_of(t)))
            return taps[-1][1]

        chunks = self.split_inputs(model_input, size, *(() if tokens is None else (tokens,)))
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
        kept = tuple(sum(getattr(s, "once", False) for s in chunks) for chunks in states)
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


def _split_cache(cache: Any, states: Sequence[Any], chunk_size: int) -> list[Any]:
    """The cache cut as the representations came; by chunk size where a subclass brings states of its own."""
    known = all(hasattr(state, "rows") for state in states)
    return _chunks.split_as(cache, [state.rows for state in states] if known else chunk_size, len(states))


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or index(value) < least:
        raise ValueError(f"GradCache: {name} must be an integer of at least {least}, got {value!r}")
    return index(value)


def _chunk_sizes(name: str, sizes: Any, models: int, optional: bool = False) -> list[Any]:
    if models == 0:
        raise ValueError("GradCache: models must hold at least one model, got none")
    sizes = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes] * models
    if len(sizes) != models:
        raise ValueError(f"GradCache: {models} models need 1 or {models} {name}, got {len(sizes)}")
    return [None if optional and size is None else _count(name, size, least=1) for size in sizes]
