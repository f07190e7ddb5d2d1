"""What the tests of similarity operations share: small tiles, and an op's values and gradients against float64 truth.

Truth and the naive rival are both the op's reference, in float64 and on the very inputs under test. Tiles are mostly
shrunk to a few rows, so that matrices of a hundred rows cross every boundary that the real ones (1024 × 2048) cross at
ten thousand.
"""

import contextlib
from unittest import mock

import torch

from fastcontrast.ops import _sweep, similarity_lse
from fastcontrast.testing import assert_as_good_as, relative_error

FP32_LIMIT = 1e-5
DIMS = ("rows", "columns", "both")
LEAVES = ("queries", "keys", "scale", "key_bias")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator(seed)), dim=-1)


@contextlib.contextmanager
def tiles(rows: int, columns: int, kept: int = 1, threads: int = 2):
    """Tiles of `rows` × `columns`, at least `kept` rows of logits kept, `threads` threads in the epilogues."""
    with (
        mock.patch.multiple(_sweep, ROWS=rows, COLUMNS=columns, MIN_KEPT_ROWS=kept),
        mock.patch.object(torch, "get_num_threads", lambda: threads),
    ):
        yield


def one_sign(i: int, shape: torch.Size) -> torch.Tensor:
    """Upstream gradients of one sign and about one size, as losses have them."""
    return 0.5 + torch.rand(shape, generator=generator(99 + i))


def evaluate(
    inputs: dict,
    options: dict,
    *,
    dtype: torch.dtype | None = None,
    needs=LEAVES,
    implementation: str | None = "cpu",
    upstream=one_sign,
    call=similarity_lse,
) -> dict:
    """Values and gradients by name. No `keys`, or None, stands for `keys is queries`. `upstream(i, shape)` is the
    gradient of the i-th output, None if the loss does not use it."""
    leaves = {name: x.detach().to(dtype or x.dtype) for name, x in inputs.items() if x is not None}
    leaves = {name: x.requires_grad_(name in needs) for name, x in leaves.items()}
    arguments = {"keys": leaves["queries"], **leaves, **options, "implementation": implementation}
    outputs = call(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"value {i}": output.detach() for i, output in enumerate(outputs)}
    loss = torch.zeros(())
    for i, output in enumerate(outputs):
        weight = upstream(i, output.shape)
        if weight is not None:
            loss = loss + (torch.where(output.isneginf(), 0.0, output) * weight.to(output.device)).sum()
    wanted = [name for name in leaves if name in needs]
    for name, gradient in zip(wanted, torch.autograd.grad(loss, [leaves[n] for n in wanted]), strict=True):
        results[f"d{name}"] = gradient
    return results


def assert_accurate(
    inputs: dict, options: dict, *, strict=False, magnitude: float = 0.0, implementation="cpu", **how
) -> None:
    """fp32: relative error at most 1e-5, or, unless `strict`, as good as dense where the problem itself is worse
    conditioned than that. Half precision: as good as the same inputs upcast to fp32 logits densely."""
    actual = evaluate(inputs, options, implementation=implementation, **how)
    truth = evaluate(inputs, options, dtype=torch.float64, implementation="reference", **how)
    naive = evaluate(inputs, options, implementation="reference", **how)
    assert actual.keys() == truth.keys()
    for name in truth:
        like = inputs[name[1:]] if name.startswith("d") else None
        assert actual[name].dtype == (torch.float32 if like is None else like.dtype), name
        if inputs["queries"].dtype == torch.float32:
            error = relative_error(actual[name], truth[name])
            if error <= FP32_LIMIT:
                continue
            assert not strict, f"{name}: relative error {error:.2e}"
        try:
            assert_as_good_as(actual[name], truth[name], naive[name], magnitude=magnitude)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def assert_same(actual: dict, expected: dict, limit: float = 2e-6) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        error = relative_error(actual[name], expected[name])
        assert error <= limit, f"{name}: relative difference {error:.2e}"


def embeddings(m: int, n: int, d: int, dtype=torch.float32) -> dict:
    """Unit vectors, each query near its own key."""
    k = unit(n, d, 2)
    q = unit(m, d, 1)
    shared = min(m, n)
    q[:shared] = torch.nn.functional.normalize(q[:shared] + k[:shared], dim=-1)
    return {"queries": q.to(dtype), "keys": k.to(dtype), "scale": torch.tensor(20.0)}


def biased(m: int, n: int, d: int, dtype=torch.float32) -> dict:
    return {**embeddings(m, n, d, dtype), "key_bias": torch.randn(n, generator=generator(5))}
