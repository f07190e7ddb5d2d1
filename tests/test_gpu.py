"""What only a CUDA device can show: `pytest -m gpu`, or `make gpu` on a machine with torch, Triton and this checkout.

The same kernels run everywhere else in Triton's interpreter (test_kernels_*.py); the interpreter hides layouts, races,
shared memory, precision of tensor cores, and everything below about the stream.
"""

import itertools
import math

import pytest
import torch
from similarity import assert_accurate, assert_same, biased, embeddings, evaluate, generator, unit
from torch.nn import functional as F

import fastcontrast
from fastcontrast import ops
from fastcontrast.testing import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (1, 300), (300, 1), (0, 7), (7, 0), (61, 97), (257, 129), (1000, 1500))
WIDTHS = (1, 15, 64, 100, 384, 640, 1152, 4096)


def to_device(x):
    if isinstance(x, torch.Tensor):
        return x.cuda()
    return tuple(map(to_device, x)) if isinstance(x, tuple) else x


def on_device(given: dict) -> dict:
    return {name: to_device(x) for name, x in given.items()}


def options_of(m: int, n: int, name: str) -> dict:
    ids = {"query_ids": torch.arange(m) % 11, "key_ids": torch.arange(n) % 13}
    limit = torch.linspace(-0.5, 0.9, max(m, 1))[:m]
    return {
        "plain": {},
        "ids": ids,
        "guide": {"guide": (unit(m, 24, 7), unit(n, 24, 8), limit)},
        "own": {"return_positives": True},
        "best": {"return_best": True, **ids},
    }[name]


# ------------------------------------------------------------------------------------------------------ float64 truth


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dim", ["rows", "both"])
def test_small_lse(shape, dim, dtype):
    assert_accurate(on_device(biased(*shape, 64, dtype)), {"dim": dim}, implementation="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width, dtype):
    inputs = on_device(biased(257, 130, width, dtype))
    assert_accurate(inputs, {"dim": "both"}, implementation="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["plain", "ids", "guide", "own", "best"])
@pytest.mark.parametrize("dim", ["rows", "columns", "both"])
def test_small_masks(option, dim, dtype):
    inputs, options = on_device(biased(257, 130, 64, dtype)), on_device(options_of(257, 130, option))
    assert_accurate(inputs, {**options, "dim": dim}, implementation="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 50.0, 100.0])
@pytest.mark.parametrize("kind", ["near", "collapsed", "orthogonal"])
def test_ends_of_the_range(kind, scale, dtype):
    inputs = embeddings(300, 300, 128)
    if kind == "collapsed":
        inputs["queries"] = inputs["queries"][:1].expand(300, -1).clone()
        inputs["keys"] = inputs["queries"].clone()
    elif kind == "orthogonal":
        inputs["queries"], inputs["keys"] = torch.eye(300, 128), torch.eye(300, 128).flip(0)
    inputs = {"queries": inputs["queries"].to(dtype), "keys": inputs["keys"].to(dtype), "scale": torch.tensor(scale)}
    assert_accurate(on_device(inputs), {"dim": "both"}, implementation="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs", [("queries", "scale"), ("keys",), ("queries", "keys", "scale")], ids=str)
def test_frozen_sides(needs, dtype):
    inputs = on_device(embeddings(600, 900, 128, dtype))
    assert_accurate(inputs, {"return_positives": True}, needs=needs, implementation="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("kind", ["own", "labels", "soft"])
def test_small_softplus(kind, reduction, dtype):
    m, n = 257, 130
    options = {
        "own": {},
        "labels": {"query_labels": torch.arange(m) % 5, "key_labels": torch.arange(n) % 7},
        "soft": {"targets": torch.rand(m, n, generator=generator(4))},
    }[kind]
    inputs = {**embeddings(m, n, 64, dtype), "bias": torch.tensor(-10.0)}
    assert_accurate(
        on_device(inputs), {**on_device(options), "reduction": reduction}, implementation="triton",
        needs=("queries", "keys", "scale", "bias"), call=ops.similarity_softplus,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_mix(dtype):
    inputs = {**embeddings(257, 130, 64, dtype), "values": unit(130, 48, 9).to(dtype)}
    assert_accurate(
        on_device(inputs), {}, implementation="triton", needs=("queries", "keys", "values", "scale"),
        call=ops.similarity_mix,
    )  # fmt: skip


@pytest.mark.parametrize("largest", [True, False])
def test_small_topk(largest):
    q, k = unit(130, 64, 1).cuda(), unit(700, 64, 2).cuda()
    values, indices = ops.similarity_topk(q, k, 10, largest=largest)
    expected = (q.double() @ k.double().t()).topk(10, largest=largest)
    assert relative_error(values, expected.values) < 1e-5
    assert (indices == expected.indices).float().mean() > 0.999


def assert_gradients(ours, truth, inputs, limit: float) -> None:
    pairs = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(truth, inputs), strict=True)
    assert all(relative_error(a, b) < limit for a, b in pairs)


def language(tokens: int, vocabulary: int, width: int, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = (2 * unit(tokens, width, 1)).to("cuda", dtype).requires_grad_()
    weight = (2 * unit(vocabulary, width, 2)).to("cuda", dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator(3))
    targets[::7] = -100
    return hidden, weight, targets.cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_linear_cross_entropy(dtype):
    hidden, weight, targets = language(300, 1000, 64, dtype)
    ours = ops.linear_cross_entropy(hidden, weight, targets)
    dense = F.cross_entropy(hidden.double() @ weight.double().t(), targets)
    assert relative_error(ours, dense) < (1e-5 if dtype == torch.float32 else 1e-4)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert_gradients(ours, dense, (hidden, weight), limit)


@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_linear_kl(direction, dtype):
    hidden, weight, _ = language(130, 700, 64, dtype)
    teacher_hidden, teacher_weight = (x.detach().flip(0) for x in (hidden, weight))

    def kl(implementation, *inputs):
        return ops.linear_kl(*inputs, direction=direction, temperature=0.5, implementation=implementation)

    ours = kl("triton", hidden, weight, teacher_hidden, teacher_weight)
    truth = kl("reference", *(x.double() for x in (hidden, weight, teacher_hidden, teacher_weight)))
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(ours, truth) < limit
    assert_gradients(ours, truth, (hidden, weight), limit)


# ---------------------------------------------------------------------------------------------------------------- size


def test_large_batch():
    """N = 65,536: 2³² pairs. Shuffled copies of 2,048 rows, whose truth is that of the small batch: `times` of each key
    add log(times) to every log-sum-exp."""
    n, base, d = 65536, 2048, 128
    q, k = unit(base, d, 1).bfloat16().cuda(), unit(base, d, 2).bfloat16().cuda()
    index = torch.randperm(n, generator=generator(3)).cuda() % base
    large_q, large_k = (x[index].requires_grad_() for x in (q, k))
    r, c = ops.similarity_lse(large_q, large_k, 20.0, dim="both")
    logits = 20.0 * q.double() @ k.double().t()
    shift = torch.tensor(n / base, dtype=torch.float64).log()
    rows, columns = logits.logsumexp(1) + shift, logits.logsumexp(0) + shift
    assert relative_error(r, rows[index]) < 1e-6
    assert relative_error(c, columns[index]) < 1e-6
    dq, dk = torch.autograd.grad((r.sum() + c.sum()) / n, (large_q, large_k))
    weights = (logits - rows[:, None]).exp() + (logits - columns).exp()
    copies = n / base
    truth_q, truth_k = (20.0 * copies * w @ x.double() / n for w, x in ((weights, k), (weights.t(), q)))
    assert relative_error(dq, truth_q[index]) < 1e-2
    assert relative_error(dk, truth_k[index]) < 1e-2


def test_offsets_beyond_32_bits():
    """Keys of 2³¹ and more elements, and rows that lie more than 2³¹ elements apart."""
    width, rows = 64, (1 << 31) // 64 + 1000
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of device memory")
    keys = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    keys[-1, 0] = 1.0
    queries = torch.zeros(3, width, dtype=torch.bfloat16, device="cuda")
    queries[:, 0] = 1.0
    r, best = ops.similarity_lse(queries, keys, 30.0, return_best=True, implementation="triton")
    expected = torch.tensor(30.0, dtype=torch.float64).exp().add(rows - 1).log()
    assert relative_error(r, expected.expand(3).cuda()) < 1e-6
    assert best.tolist() == [rows - 1] * 3
    apart = keys.view(-1)[: 2 * (rows // 2 - 1) * width].view(2, -1)[:, :width]
    assert torch.equal(ops.similarity_lse(apart, queries, 1.0), ops.similarity_lse(apart.contiguous(), queries, 1.0))


# ------------------------------------------------------------------------------------------------ streams and compilers

LOSSES = {
    "clip": lambda q, k: fastcontrast.clip_loss(q, k, 20.0),
    "info_nce": lambda q, k: fastcontrast.info_nce(q, k, 20.0),
    "nt_xent": lambda q, k: fastcontrast.nt_xent_loss(q, k, 20.0),
    "supcon": lambda q, k: fastcontrast.supcon_loss(q, torch.arange(len(q), device=q.device) // 2, 20.0),
    "siglip": lambda q, k: fastcontrast.siglip_loss(q, k),
}


def pair(n: int = 384, d: int = 128, dtype=torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(unit(n, d, seed).to("cuda", dtype).requires_grad_() for seed in (1, 2))


def value_and_gradients(loss, q, k) -> list[torch.Tensor]:
    value = loss(q, k)
    wanted = torch.autograd.grad(value, (q, k), allow_unused=True)
    return [value.detach(), *(g for g in wanted if g is not None)]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_small_losses_run_on_triton_without_synchronising(loss):
    q, k = pair()
    value_and_gradients(loss, q, k)  # compiles kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        with ops.trace() as ran:
            value_and_gradients(loss, q, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {choice.implementation for choice in ran} == {"triton"}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_are_the_dense_ones(loss):
    q, k = pair()
    actual = value_and_gradients(loss, q, k)
    doubles = [x.detach().double().requires_grad_() for x in (q, k)]
    truth = value_and_gradients(loss, *doubles)  # float64 takes the dense reference
    for a, b in zip(actual, truth, strict=True):
        assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_cuda_graphs_replay_on_new_inputs(loss):
    q, k = pair()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            value_and_gradients(loss, q, k)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(loss, q, k)
    with torch.no_grad():
        q.copy_(unit(384, 128, 11))
        k.copy_(unit(384, 128, 12))
    graph.replay()
    for a, b in zip(captured, value_and_gradients(loss, q, k), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_another_stream_gives_the_same_bits(loss):
    q, k = pair()
    first = value_and_gradients(loss, q, k)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = value_and_gradients(loss, q, k)
        torch.cuda.current_stream().synchronize()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_autocast_does_not_round_logits():
    inputs = on_device({**embeddings(300, 300, 64), "scale": torch.tensor(100.0)})
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = evaluate(inputs, {"dim": "both"}, implementation="triton")
    assert_same(actual, evaluate(inputs, {"dim": "both"}, implementation="triton"), limit=0.0)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_compiled_into_one_graph(loss):
    q, k = pair()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for a, b in zip(value_and_gradients(compiled, q, k), value_and_gradients(loss, q, k), strict=True):
        assert relative_error(a, b) < 1e-2


def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    inputs = {name: x.to("cuda:1") for name, x in biased(257, 130, 64, torch.bfloat16).items()}
    assert torch.cuda.current_device() == 0
    actual = evaluate(inputs, {"dim": "both"}, implementation="triton")
    expected = evaluate(on_device(biased(257, 130, 64, torch.bfloat16)), {"dim": "both"}, implementation="triton")
    assert all(torch.equal(actual[name].cpu(), expected[name].cpu()) for name in expected)


def test_grad_cache_trains_two_towers():
    towers = [torch.nn.Linear(32, 16).cuda() for _ in range(2)]
    x, y = (torch.randn(96, 32, generator=generator(i)).cuda() for i in (1, 2))
    step = fastcontrast.GradCache(towers, chunk_sizes=32, loss_fn=lambda a, b: fastcontrast.clip_loss(a, b, 5.0))
    loss = step(x, y)
    whole = fastcontrast.clip_loss(towers[0](x), towers[1](y), 5.0)
    gradients = torch.autograd.grad(whole, [p for tower in towers for p in tower.parameters()])
    assert relative_error(loss, whole) < 1e-5
    for p, g in zip([p for tower in towers for p in tower.parameters()], gradients, strict=True):
        assert relative_error(p.grad, g) < 1e-4


# ------------------------------------------------------------------------------------------------------------- decoding

KERNELS = pytest.mark.parametrize("implementation", ["cuda", "triton"])


def need(op: str, implementation: str) -> None:
    if reason := ops.explain(op, "cuda")[implementation]:
        pytest.skip(reason)


def normal(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def assert_close(actual, expected, limit: float = 1e-5) -> None:
    """NaN and infinities in the same places, the rest within `limit` of 1 + |expected|."""
    actual, expected = actual.double(), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    assert torch.equal(actual[expected.isinf()], expected[expected.isinf()])
    assert not finite.any() or ((actual - expected).abs() / (1 + expected.abs()))[finite].max() < limit


def assert_same_bits(first, second) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_cosines(candidates, context, valid, implementation) -> None:
    values, indices = ops.max_cosine(candidates, context, valid, implementation=implementation)
    expected = ops.max_cosine(candidates.double(), context.double(), valid)
    assert_close(values, expected[0])
    assert torch.equal(indices == -1, expected[1] == -1)
    if context.shape[1]:
        # Where rounding decides between two positions either may be named.
        at = indices.clamp(min=0)[..., None].expand(*candidates.shape)
        named = F.cosine_similarity(candidates.double(), context.double().gather(1, at), dim=2, eps=1e-12)
        assert_close(named[indices >= 0], expected[0][indices >= 0], 1e-6)


def assert_selected(probabilities, candidates, context, valid, implementation) -> None:
    problem = (candidates, context, valid)
    actual = ops.contrastive_select(probabilities, *problem, alpha=0.6, implementation=implementation)
    expected = ops.contrastive_select(
        probabilities.double(), *(x if x is None or x.dtype == torch.bool else x.double() for x in problem), alpha=0.6
    )
    assert_close(actual.degeneration, expected.degeneration)
    assert_close(actual.score, expected.score)
    chosen, best = (expected.score.gather(1, x.choice[:, None]) for x in (actual, expected))
    assert_close(chosen, best, 1e-5)


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 40, 768, 4096])
@pytest.mark.parametrize("t", [1, 7, 257, 4096])
def test_cosines(t, d, dtype, implementation):
    need("max_cosine", implementation)
    for b, k in itertools.product((1, 3), (1, 5, 8)):
        candidates, context = normal(b, k, d, dtype=dtype, seed=1), normal(b, t, d, dtype=dtype, seed=2)
        valid = normal(b, t, seed=3) > 0
        valid[-1] = False
        for mask in (None, valid):
            assert_cosines(candidates, context, mask, implementation)
            assert_selected(normal(b, k, seed=4).softmax(1), candidates, context, mask, implementation)


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosines_at_the_edges(dtype, implementation):
    need("max_cosine", implementation)
    candidates, context = normal(3, 5, 40, dtype=dtype, seed=1), normal(3, 257, 40, dtype=dtype, seed=2)
    context[:, 11] = context[:, 200] = context[:, 201] = candidates[:, 0]  # the first of equals
    context[1, 30, 7] = context[1, 100, 0] = math.nan  # the first NaN, before any number
    candidates[2, 1] = 0.0
    candidates[2, 2, 3] = math.nan
    valid = torch.ones(3, 257, dtype=torch.bool, device="cuda")
    valid[2, :5] = False
    values, indices = ops.max_cosine(candidates, context, valid, implementation=implementation)
    assert_close(values, ops.max_cosine(candidates.double(), context.double(), valid)[0])
    assert indices[0, 0] == indices[2, 0] == 11
    assert indices[1].tolist() == [30] * 5
    assert indices[2, 1:3].tolist() == [5, 5]
    for wide in (40, 37):  # rows that do and do not begin where a 128-bit load may
        rows = normal(3, 257, 41, dtype=dtype, seed=3)
        assert_cosines(rows[:, :5, 1 : 1 + wide], rows[:, :, :wide], valid, implementation)
    assert_cosines(candidates[:, :, :1], context[:, :0, :1], None, implementation)
    assert_cosines(*(normal(2, n, 64, dtype=dtype, seed=n) for n in (19, 70)), None, implementation)


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 50257, 128256])
def test_candidates(vocabulary, dtype, implementation):
    need("contrastive_select", implementation)
    for rows, k in itertools.product((1, 3), (1, 5, 32, 50)):
        k = min(k, vocabulary)
        for kind in ("normal", "ties", "banned"):
            logits = normal(rows, vocabulary, dtype=dtype, seed=k) * 3
            if kind == "ties":
                logits = logits.round()
            elif kind == "banned":
                logits[normal(rows, vocabulary, seed=5) < 2] = -math.inf
                logits[0] = -math.inf
            actual = ops.contrastive_candidates(logits, k, implementation=implementation)
            expected = ops.contrastive_candidates(logits.double(), k)
            assert torch.equal(actual[1], expected[1])
            assert_close(actual[0], expected[0])


def assert_mixed(z1, z0, options: dict, implementation: str) -> None:
    options = {"divergence": True, **options}
    actual = ops.two_logit_mix(z1, z0, implementation=implementation, **options)
    expected = ops.two_logit_mix(z1.double(), z0.double(), **options)
    assert_close(actual.divergence, expected.divergence)
    assert_close(actual.weight, expected.weight)
    # A token at the border of the plausible falls where float32 puts it.
    banned = ops.two_logit_mix(z1, z0, implementation="reference", **options).log_probabilities == -math.inf
    assert torch.equal(actual.log_probabilities == -math.inf, banned)
    agreed = (expected.log_probabilities == -math.inf) == banned
    assert_close(actual.log_probabilities[agreed], expected.log_probabilities[agreed])


MIXES = {
    "adacad": {"floor": 0.05},
    "cad": {"weight": 0.7},
    "decoding": {"weight": 0.5, "keep": 1.0, "plausibility": 0.1},
    "greedy": {"weight": 0.5, "keep": 1.0, "plausibility": 1.0},
}


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 50257, 128256])
@pytest.mark.parametrize("options", MIXES.values(), ids=MIXES)
def test_mixes(options, vocabulary, dtype, implementation):
    need("two_logit_mix", implementation)
    for rows in (1, 3):
        z1, z0 = (normal(rows, vocabulary, dtype=dtype, seed=seed) * 2 for seed in (1, 2))
        assert_mixed(z1, z0, options, implementation)
        same = ops.two_logit_mix(z1, z1.clone(), divergence=True, implementation=implementation)
        assert (same.divergence == 0).all()


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", MIXES.values(), ids=MIXES)
def test_mixes_at_the_edges(options, dtype, implementation):
    need("two_logit_mix", implementation)
    z1, z0 = (normal(9, 5003, dtype=dtype, seed=seed) for seed in (1, 2))
    z1[1, 5], z0[2, 5] = math.nan, math.nan
    z1[3], z0[4], z1[5], z0[5] = (-math.inf,) * 4
    z1[6, ::2], z0[7, ::2] = -math.inf, -math.inf
    z0[8, 7], z1[8, 7], z0[8, 8] = math.nan, -math.inf, -math.inf
    assert_mixed(z1, z0, options, implementation)
    assert_mixed(z1[:, 1:4001], z0[:, :4000], options, implementation)


def decoding_problem(dtype=torch.bfloat16, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Candidates, context, valid, probabilities, and two rows of logits."""
    valid = normal(3, 70, seed=seed + 3) > 0
    hidden = (normal(3, n, 40, dtype=dtype, seed=seed + n) for n in (5, 70))
    logits = (normal(3, 2571, dtype=dtype, seed=seed + i) for i in (5, 6))
    return (*hidden, valid, normal(3, 5, seed=seed + 4).softmax(1), *logits)


def decode(candidates, context, valid, probabilities, z1, z0, implementation) -> list[torch.Tensor]:
    how = {"implementation": implementation}
    return [
        *ops.max_cosine(candidates, context, valid, **how),
        *ops.contrastive_candidates(z1, 40, **how),
        *ops.contrastive_select(probabilities, candidates, context, valid, alpha=0.6, **how),
        *ops.two_logit_mix(z1, z0, **how),
        *ops.two_logit_mix(z1, z0, 0.5, keep=1.0, plausibility=0.1, divergence=True, **how),
    ]


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_decoding(dtype, implementation):
    for op in ("max_cosine", "contrastive_select", "two_logit_mix"):
        need(op, implementation)
    candidates, context, valid, probabilities, z1, z0 = decoding_problem(dtype)
    assert_cosines(candidates, context, valid, implementation)
    assert_cosines(candidates[:, :1, 1:], context[:, :, 1:], valid, implementation)
    assert_selected(probabilities, candidates, context, valid, implementation)
    for k in (1, 40):
        actual = ops.contrastive_candidates(z1, k, implementation=implementation)
        assert torch.equal(actual[1], ops.contrastive_candidates(z1.double(), k)[1])
    for options in MIXES.values():
        assert_mixed(z1, z0, options, implementation)


@KERNELS
def test_decoding_has_the_same_bits_on_every_run_and_stream_and_waits_for_nothing(implementation):
    need("max_cosine", implementation)
    problem = decoding_problem()
    first = decode(*problem, implementation)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = decode(*problem, implementation)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.stream(torch.cuda.Stream()):
        third = decode(*problem, implementation)
        torch.cuda.current_stream().synchronize()
    assert_same_bits(first, second)
    assert_same_bits(first, third)


@KERNELS
def test_decoding_in_a_graph_replays_on_new_inputs(implementation):
    need("max_cosine", implementation)
    problem, other = decoding_problem(), decoding_problem(seed=100)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decode(*problem, implementation)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(*problem, implementation)
    for target, source in zip(problem, other, strict=True):
        target.copy_(source)
    graph.replay()
    assert_same_bits(captured, decode(*problem, implementation))


@KERNELS
def test_decoding_compiled_into_one_graph(implementation):
    need("max_cosine", implementation)
    problem = decoding_problem()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *tensors: decode(*tensors, implementation), fullgraph=True)
    assert_same_bits(compiled(*problem), decode(*problem, implementation))


@KERNELS
def test_cosine_offsets_beyond_32_bits(implementation):
    need("max_cosine", implementation)
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of device memory")
    rows, width = (1 << 31) // 64 + 1000, 64
    context = torch.zeros(1, rows, width, dtype=torch.bfloat16, device="cuda")
    context[0, -1, 0] = 1.0
    values, indices = ops.max_cosine(context[:, -1:], context, implementation=implementation)
    assert (values.item(), indices.item()) == (1.0, rows - 1)


# ------------------------------------------------------------------------------------- late interaction, triplets


def interaction(b: int, tq: int, c: int, td: int, d: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """Tokens and masks: holes in queries, padding of documents, of which one has nothing real."""
    lengths = torch.tensor([td, 0, 1, td // 2 + 1], device="cuda").repeat(c)[:c, None]
    tokens = normal(b, tq, d, dtype=dtype, seed=1), normal(c, td, d, dtype=dtype, seed=2)
    return *tokens, normal(b, tq, seed=3) > -0.5, torch.arange(td, device="cuda") < lengths


def interact(queries, documents, query_mask, document_mask, **options) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (queries, documents)]
    scores = ops.maxsim(*leaves, query_mask=query_mask, document_mask=document_mask, **options)
    upstream = torch.linspace(-1.0, 2.0, scores.numel(), device=scores.device, dtype=scores.dtype).view(scores.shape)
    return [scores.detach(), *torch.autograd.grad(scores, leaves, upstream)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", ["neg_inf", "zero"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 8), (3, 33, 5, 70, 65), (7, 32, 9, 180, 128), (2, 180, 3, 257, 96)])
def test_small_maxsim(shape, masked, dtype):
    *tokens, query_mask, document_mask = interaction(*shape, dtype=dtype)
    for masks in ((None, None), (query_mask, document_mask)):
        actual = interact(*tokens, *masks, masked=masked, implementation="triton")
        exact = interact(*(x.double() for x in tokens), *masks, masked=masked)
        for x, y, limit in zip(actual, exact, (1e-5, *(1e-5 if dtype == torch.float32 else 1e-2,) * 2), strict=True):
            assert relative_error(x, y) < limit


def test_maxsim_at_the_edges():
    queries, documents, _, _ = interaction(2, 40, 3, 300, 64)
    documents[0, 17] = documents[0, 200] = documents[0, 70] = 10 * queries[1, 5]  # the first of equals
    documents[1, 130, 3] = documents[1, 131, 0] = math.nan
    scores, _, dd = interact(queries, documents, None, None, implementation="triton")
    assert scores[:, 1].isnan().all() and scores[:, [0, 2]].isfinite().all()
    assert dd[1].any(1).nonzero().flatten().tolist() == [130]
    assert dd[0, 17].any() and not dd[0, [70, 200]].any()
    long = interaction(1, 2, 2, 40_000, 16)  # winners of four bytes
    exact = interact(*(x.double() for x in long[:2]), *long[2:])
    for x, y in zip(interact(*long, implementation="triton"), exact, strict=True):
        assert relative_error(x, y) < 1e-5


def triplets(*inputs, **options) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    near, far = ops.triplet_distances(*leaves, **options)
    return [near.detach(), far.detach(), *torch.autograd.grad((near - 2 * far).sum(), leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1025), (5, 4, 63, 65), (64, 4, 64, 64)], ids=str)
def test_small_triplet_distances(shape, dtype):
    inputs = [normal(*shape, dtype=dtype, seed=i) for i in range(3)]
    layouts = [inputs]
    if len(shape) == 4:
        layouts.append([x.contiguous(memory_format=torch.channels_last) for x in inputs])
    exact = triplets(*(x.double() for x in inputs))
    for layout in layouts:
        actual = triplets(*layout, implementation="triton")
        limits = (*(1e-6,) * 2, *(1e-6 if dtype == torch.float32 else 1e-2,) * 3)
        for x, y, limit in zip(actual, exact, limits, strict=True):
            assert relative_error(x, y) < limit


def test_triplet_offsets_beyond_32_bits():
    """A sample of more than 2³¹ numbers, whose last differs."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of device memory")
    target = torch.zeros(1, (1 << 31) + 1000, dtype=torch.bfloat16, device="cuda")
    positive = target.clone()
    positive[0, -1] = 256.0
    near, far = ops.triplet_distances(target, positive, target, implementation="triton")
    assert relative_error(near, torch.full_like(near, 65536 / target.numel())) < 1e-6 and far.item() == 0


RUNS = {
    "maxsim": (
        lambda *x: interact(*x, masked="zero", implementation="triton"),
        lambda: interaction(7, 32, 9, 180, 128),
    ),
    "triplet": (
        lambda *x: triplets(*x, implementation="triton"),
        lambda: tuple(normal(8, 4, 63, 65, seed=i) for i in range(3)),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_interactions_have_the_same_bits_on_every_run_and_stream_and_wait_for_nothing(name):
    run, problem = RUNS[name][0], RUNS[name][1]()
    first = run(*problem)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run(*problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.stream(torch.cuda.Stream()):
        third = run(*problem)
        torch.cuda.current_stream().synchronize()
    assert_same_bits(first, second)
    assert_same_bits(first, third)


@pytest.mark.parametrize("name", RUNS)
def test_interactions_in_a_graph_replay_on_new_inputs(name):
    run, problem = RUNS[name][0], RUNS[name][1]()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*problem)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*problem)
    for x in problem:
        x.copy_(x.roll(1, 0))
    graph.replay()
    assert_same_bits(captured, run(*problem))


def test_interactions_compiled_into_one_graph():
    torch._dynamo.reset()
    for run, problem in (
        (ops.maxsim, interaction(7, 32, 9, 180, 128)[:2]),
        (ops.triplet_distances, RUNS["triplet"][1]()),
    ):
        results = []
        for function in (torch.compile(run, fullgraph=True), run):
            leaves = [x.clone().requires_grad_() for x in problem]
            value = function(*leaves)
            total = sum(x.square().sum() for x in value) if isinstance(value, tuple) else value.square().sum()
            results.append(torch.autograd.grad(total, leaves))
        for x, y in zip(*results, strict=True):
            assert relative_error(x, y) < 1e-6
