"""pairwise_reduce: whatever fn is, the sum over tiles and its gradients are those of fn on everything; losses."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from similarity import assert_same, generator, unit

from fastcontrast.ops import pairwise_reduce, similarity_lse, trace
from fastcontrast.testing import relative_error

SIZES = ((1, 1), (7, 1), (1, 9), (23, 31), (32, 16))
BLOCKS = (1, 7, (5, 16), (16, 5), 64, None)


def squared_distances(q, k, i, j):
    """Depends on features and on indices, so that a block at the wrong place is seen."""
    distances = q.square().sum(1)[:, None] - 2 * q @ k.t() + k.square().sum(1)
    return (distances * (1 + i[:, None]) / (2 + j)).sum()


def several(q, k, i, j):
    products = q @ k.t()
    rows = products.new_zeros(40).index_add(0, i, products.exp().sum(1))
    return products.sum(), rows, (products > 0).sum()


def both(fn, q, k, implementation, **how):
    """Values, and gradients of their weighted sum."""
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    values = pairwise_reduce(fn, q, k, implementation=implementation, **how)
    values = values if isinstance(values, tuple) else (values,)
    loss = sum((x * (1 + torch.arange(x.numel()).view(x.shape))).sum() for x in values if x.is_floating_point())
    names = [f"value {i}" for i in range(len(values))] + ["dqueries", "dkeys"]
    return dict(zip(names, [x.detach() for x in values] + [*torch.autograd.grad(loss, (q, k))], strict=True))


@pytest.mark.parametrize("fn", [squared_distances, several])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_equals_fn_on_everything(fn, block, shape):
    q, k = unit(shape[0], 6, 1).double(), unit(shape[1], 6, 2).double()
    assert_same(both(fn, q, k, None, block=block), both(fn, q, k, "reference"), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype(dtype):
    q, k = unit(23, 6, 1).to(dtype), unit(31, 6, 2).to(dtype)

    def fn(q, k, i, j):
        return (q.double() @ k.double().t()).sin().sum()

    actual, expected = both(fn, q, k, None, block=7), both(fn, q, k, "reference")
    # A block's gradient is rounded to the dtype before those of its tiles are added, as autograd does with any branch.
    assert_same(actual, expected, {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 2e-2))
    assert actual["dqueries"].dtype == actual["dkeys"].dtype == dtype


def test_any_shape_of_rows():
    q, k = torch.randn(9, 4, 6, generator=generator(1)), torch.randn(11, 6, generator=generator(2))

    def fn(q, k, i, j):
        return torch.einsum("qte,ke->qkt", q, k).amax(2).sum()

    assert_same(both(fn, q, k, None, block=4), both(fn, q, k, "reference"), 1e-6)


def test_one_tensor_as_both_sides():
    def gradient(implementation):
        x = unit(23, 6, 1).double().requires_grad_()
        total = pairwise_reduce(squared_distances, x, x, block=5, implementation=implementation)
        return torch.autograd.grad(total, x)[0]

    assert relative_error(gradient(None), gradient("reference")) < 1e-14


def test_what_fn_closes_over_gets_its_gradient():
    q, k = unit(23, 6, 1).double(), unit(31, 6, 2).double()
    layer, scale = torch.nn.Linear(6, 4).double(), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    offsets = torch.randn(23, generator=generator(3)).double().requires_grad_()
    leaves = [*layer.parameters(), scale, offsets]

    def fn(q, k, i, j):
        return torch.sigmoid(scale * layer(q) @ layer(k).t() - offsets[i, None]).sum()

    results = [
        torch.autograd.grad(pairwise_reduce(fn, q, k, block=5, implementation=x), leaves) for x in (None, "reference")
    ]
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-13


def test_second_derivatives():
    def total(q, k, scale):
        return pairwise_reduce(lambda q, k, i, j: (scale * q @ k.t()).sin().sum(), q, k, block=2)

    inputs = [x.double().requires_grad_() for x in (unit(5, 3, 1), unit(4, 3, 2), torch.tensor(1.5))]
    assert torch.autograd.gradcheck(total, inputs)
    assert torch.autograd.gradgradcheck(total, inputs)


# --------------------------------------------------------------------------------------------------- how fn is called


class Counted:
    """squared_distances, and the index ranges with which it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, q, k, i, j):
        assert (len(q), len(k)) == (len(i), len(j))
        assert i.dtype == j.dtype == torch.int64
        self.calls.append((i.tolist(), j.tolist()))
        return squared_distances(q, k, i, j)


def test_each_tile_is_called_once_and_again_in_the_backward():
    q, k = unit(7, 6, 1).requires_grad_(), unit(5, 6, 2)
    tiles = [([*range(i, min(i + 3, 7))], [*range(j, min(j + 2, 5))]) for i in (0, 3, 6) for j in (0, 2, 4)]
    fn = Counted()
    total = pairwise_reduce(fn, q, k, block=(3, 2))
    assert fn.calls == tiles
    total.backward()
    assert sorted(fn.calls) == sorted(2 * tiles)
    fn = Counted()
    with torch.no_grad():
        assert not pairwise_reduce(fn, q, k, block=(3, 2)).requires_grad
    assert fn.calls == tiles


@pytest.mark.parametrize("block", [1, 3, (2, 5), (5, 2), 100], ids=str)
@pytest.mark.parametrize("n", [0, 1, 11])
def test_tiles_below_the_diagonal_can_be_left_out(block, n):
    calls = Counted()

    def fn(q, k, i, j):
        return torch.where(j > i[:, None], q @ k.t(), 0.0).sum() + 0 * calls(q, k, i, j)

    x = unit(n, 6, 1).double()
    assert_same(both(fn, x, x, None, block=block, upper=True), both(fn, x, x, "reference"), 1e-14)
    pairs = [(i, j) for rows, columns in calls.calls for i in rows for j in columns]
    assert {(i, j) for i in range(n) for j in range(i, n)} <= {*pairs}
    if n == 11 and block == 1:
        calls.calls.clear()
        pairwise_reduce(fn, x, x, block=1, upper=True)
        assert len(calls.calls) == 66


def test_random_numbers_are_the_same_in_the_backward():
    """A sum of dropped-out products is linear in the queries: ⟨dq, q⟩ is the sum, if the same ones are dropped."""
    q, k = unit(23, 6, 1).double().requires_grad_(), unit(31, 6, 2).double()
    total = pairwise_reduce(lambda q, k, i, j: F.dropout(q @ k.t()).sum(), q, k, block=5)
    torch.randn(3)
    before = torch.get_rng_state()
    (gradient,) = torch.autograd.grad(total, q)
    assert torch.equal(torch.get_rng_state(), before)
    assert float((gradient * q).sum().detach()) == pytest.approx(float(total.detach()), rel=1e-12)


def test_autocast_is_that_of_the_caller_in_both_passes():
    q, k = unit(23, 64, 1), unit(31, 64, 2)
    dtypes = []

    def fn(q, k, i, j):
        products = q @ k.t()
        dtypes.append(products.dtype)
        return products.float().exp().sum()

    leaf = q.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total = pairwise_reduce(fn, leaf, k, block=16)
    total.backward()
    assert len(dtypes) == 8
    assert {*dtypes} == {torch.bfloat16}


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("fn", [squared_distances, several])
def test_without_queries_or_keys(fn, shape):
    q, k = unit(shape[0], 6, 1), unit(shape[1], 6, 2)
    actual, expected = both(fn, q, k, None, block=2), both(fn, q, k, "reference")
    assert_same(actual, expected, 0.0)
    assert actual["value 0"] == 0


MEMORY = """
import json, resource, torch
from fastcontrast.ops import pairwise_reduce

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(x):
    pairwise_reduce(lambda q, k, i, j: (q @ k.t()).exp().sin().sum(), x, x).backward()

step(torch.randn(1500, 8).requires_grad_())
x = torch.randn(8000, 16).requires_grad_()
before = peak()
step(x)
print(json.dumps(peak() - before))
"""


def test_peak_memory_is_that_of_a_tile():
    """A matrix of all pairs would be 256 MB, and fn makes several; a tile's are 4 MiB each."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) < 64 << 20


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(dynamic):
    torch._dynamo.reset()
    scale = torch.tensor(3.0, requires_grad=True)

    def loss(q, k, scale):
        def fn(q, k, i, j):
            return torch.where(i[:, None] == j, 0.0, F.softplus(scale * q @ k.t())).sum()

        return pairwise_reduce(fn, q, k, block=16)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    leaves = [unit(23, 6, 1).requires_grad_(), unit(31, 6, 2).requires_grad_(), scale]
    expected, actual = (f(*leaves) for f in (loss, compiled))
    assert relative_error(actual, expected) < 1e-6
    pairs = zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True)
    assert all(relative_error(a, b) < 1e-6 for a, b in pairs)


# ------------------------------------------------------------------------------------------------- losses from papers


def fixture(n: int, d: int, c: int) -> torch.Tensor:
    p, q = torch.arange(1, n + 1)[:, None].double(), torch.arange(1, d + 1).double()
    return torch.sin(p * q + (c + 1) * (0.7 * p + 0.3 * q))


def distances(a, b):
    """‖a_i − b_j‖ of unit rows, with derivative 0 where it is 0."""
    squares = (2 - 2 * a @ b.t()).clamp(min=0)
    apart = squares > 1e-14
    return torch.where(apart, squares.where(apart, 1.0).sqrt(), 0.0)


def structure(student, teacher, h, **how):
    """ProCLIP: Σ_{i<j} h(d(a_i, a_j) − d(e_i, e_j))."""

    def fn(a, b, i, j):
        difference = distances(a, b) - distances(teacher[i], teacher[j])
        return torch.where(j > i[:, None], h(difference), 0.0).sum()

    return pairwise_reduce(fn, student, student, upper=True, **how)


def smooth_l1(x):
    return F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none")


@pytest.mark.parametrize("block", [1, 2, None])
def test_proclip_structure(block):
    raw = fixture(5, 6, 0).requires_grad_()
    a, e = F.normalize(raw, dim=1), F.normalize(fixture(5, 6, 1), dim=1)
    struct = structure(a, e, smooth_l1, block=block)
    assert struct.item() == pytest.approx(0.25822217, abs=5e-9)
    assert structure(a, e, torch.square, block=block).item() == pytest.approx(0.51644434, abs=5e-9)
    loss = (a - e).square().sum() + struct
    assert loss.item() == pytest.approx(15.27077967, abs=5e-9)
    assert torch.autograd.grad(loss, raw)[0].norm().item() == pytest.approx(2.16395005, abs=5e-9)


def test_proclip_duplicates_have_no_slope():
    a = F.normalize(fixture(5, 6, 0), dim=1)
    a = a[[0, 1, 1, 2, 0]].requires_grad_()
    e = F.normalize(fixture(5, 6, 1), dim=1)
    (gradient,) = torch.autograd.grad(structure(a, e, torch.square, block=2), a)
    assert gradient.isfinite().all()
    one = a[:1].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(structure(one, e[:1], torch.square), one)
    assert (gradient == 0).all()
    teacher = a.detach()
    (gradient,) = torch.autograd.grad(structure(a, teacher, smooth_l1, block=2), a)
    assert (gradient == 0).all()


@pytest.mark.parametrize("block", [1, 2, None])
def test_dreamlip_circle(block):
    """Row sums of exponentials leave the reduction; what is added to them is one offset, as sums have no maximum."""
    v, t = (F.normalize(fixture(n, 6, c), dim=1).requires_grad_() for n, c in ((3, 0), (6, 1)))
    margin, gamma, offset = 0.25, 32.0, 40.0

    def fn(v, t, i, j):
        s, positive = v @ t.t(), i[:, None] == j // 2
        up = -gamma * torch.relu(1 + margin - s).detach() * (s - 1 + margin)
        down = gamma * torch.relu(s + margin).detach() * (s - margin)
        parts = torch.where(positive, up, -torch.inf), torch.where(positive, -torch.inf, down)
        sums = torch.stack([torch.exp(part - offset).sum(1) for part in parts])
        return s.new_zeros(2, 3).index_add(1, i, sums)

    def loss(implementation):
        sums = pairwise_reduce(fn, v, t, block=block, implementation=implementation)
        return F.softplus(sums.log().sum(0) + 2 * offset).mean()

    assert loss(None).item() == pytest.approx(45.79555898, abs=5e-9)
    pairs = zip(torch.autograd.grad(loss(None), (v, t)), torch.autograd.grad(loss("reference"), (v, t)), strict=True)
    assert all(relative_error(a, b) < 1e-13 for a, b in pairs)


def wave(n: int, d: int, c: float) -> torch.Tensor:
    i, k = torch.arange(n)[:, None].double(), torch.arange(d).double()
    return torch.sin(1 + c + 0.7 * i + 1.3 * k + 0.11 * i * k).requires_grad_()


def multicsr(queries, keys, guide_queries, guide_keys, phi, block):
    """−1/(2B²) Σ [t log P + (1 − t) log(1 − P)], P the softmax of logits that are 0 where the guide says so."""

    def logits(q, k, i, j):
        masked = (guide_queries[i] @ guide_keys[j].t() > phi) & (i[:, None] != j)
        return (q @ k.t() / 0.05).masked_fill(masked, 0.0)

    def sums(q, k, i, j):  # no logit is above 20
        return q.new_zeros(len(queries)).index_add(0, i, torch.exp(logits(q, k, i, j) - 20).sum(1))

    lse = pairwise_reduce(sums, queries, keys, block=block).log() + 20
    if phi > 1:
        assert relative_error(similarity_lse(queries, keys, 20.0), lse) < 1e-12

    def cells(q, k, i, j):
        log_p = logits(q, k, i, j) - lse[i, None]
        return torch.where(i[:, None] == j, log_p, torch.log1p(-torch.exp(log_p))).sum()

    return -pairwise_reduce(cells, queries, keys, block=block) / (2 * len(queries) ** 2)


@pytest.mark.parametrize("block", [1, 5, None])
@pytest.mark.parametrize(("phi", "expected"), [(2.0, 0.1168681082), (0.95, 0.0920700848), (0.9, 0.00102819496)])
def test_multicsr(block, phi, expected):
    raw = [wave(6, 8, c) for c in (0, 0.3, 1.1)]
    a, p, n = (F.normalize(x, dim=1) for x in raw)
    ga, gp, gn = (F.normalize(wave(6, 8, c).detach(), dim=1) for c in (0.1, 0.25, 0.9))
    loss = multicsr(a, torch.cat([p, n]), ga, torch.cat([gp, gn]), phi, block)
    assert loss.item() == pytest.approx(expected, rel=1e-8)
    if phi == 0.9:
        norms = [x.norm().item() for x in torch.autograd.grad(loss, raw)]
        assert norms == pytest.approx([0.0049695991, 0.0042386378, 5.252752e-05], rel=1e-6)


# ------------------------------------------------------------------------------------------------------ choosing, doors


def test_what_runs():
    q = unit(5, 3, 1)
    with trace() as ran:
        pairwise_reduce(squared_distances, q, q)
        pairwise_reduce(squared_distances, q.double(), q.double(), implementation="reference")
    assert [(choice.op, choice.implementation) for choice in ran] == [
        ("pairwise_reduce", "torch"),
        ("pairwise_reduce", "reference"),
    ]


Q, K = torch.zeros(4, 8), torch.zeros(6, 8)
REFUSED = {
    "fn": (TypeError, "fn must be callable, got NoneType", {"fn": None}),
    "queries": (TypeError, "queries must be a tensor, got list", {"queries": [[1.0]]}),
    "keys": (TypeError, "keys must be a tensor, got NoneType", {"keys": None}),
    "keys: a number": (ValueError, r"keys must be \[rows, ...\].* without dimensions", {"keys": torch.tensor(1.0)}),
    "keys: device": (ValueError, "keys must be on cpu like queries, got meta", {"keys": K.to("meta")}),
    "block: zero": (ValueError, "block must be at least 1, got 0", {"block": 0}),
    "block: half": (ValueError, r"block must be at least 1, got \(2, -1\)", {"block": (2, -1)}),
    "block: three": (
        TypeError,
        r"block must be an integer or \(rows, columns\).* got \(1, 2, 3\)",
        {"block": (1, 2, 3)},
    ),
    "block: a fraction": (TypeError, "block must be an integer .* got 0.5", {"block": 0.5}),
    "block: bool": (TypeError, "block must be an integer .* got True", {"block": True}),
    "returns a number": (TypeError, "fn must return a tensor .* got float", {"fn": lambda q, k, i, j: 1.0}),
    "returns None": (TypeError, "fn must return a tensor .* got NoneType", {"fn": lambda q, k, i, j: None}),
    "returns a tuple of it": (TypeError, "fn must return .* got int", {"fn": lambda q, k, i, j: (q.sum(), 1)}),
    "rows of the tile": (
        ValueError,
        r"fn must return the same shapes for every tile, got \[3\], then \[1\]",
        {"fn": lambda q, k, i, j: q.sum(1), "block": (3, 6)},
    ),
    "more and fewer": (
        ValueError,
        r"the same shapes for every tile, got \[\[\]\], then \[\[\], \[\]\]",
        {"fn": lambda q, k, i, j: (q.sum(),) * (1 + int(i[0] > 0)), "block": 3},
    ),
    "implementation": (ValueError, "implementation must be one of torch, reference.* 'cpu'", {"implementation": "cpu"}),
}


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_door(error, message, changed):
    with pytest.raises(error, match=f"^pairwise_reduce: .*{message}"):
        pairwise_reduce(**{"fn": squared_distances, "queries": Q, "keys": K, **changed})
