"""Attention of siblings over one prefix: the C++ core against float64, and when it is asked."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcontrast.decoding import _siblings
from fastcontrast.decoding._siblings import sibling_attention
from fastcontrast.ops._dispatch import native


def problem(b=1, groups=2, heads=3, k=4, t=50, d=16, dv=None, spare=7, dtype=torch.float32):
    """Queries as a model gives them, keys and values as the cache does, the mask of k siblings behind t − k slots."""
    torch.manual_seed(b * t + d)
    query = torch.randn(b, k, groups * heads, d, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(b, groups, t + spare, width, dtype=dtype)[:, :, :t] for width in (d, dv or d))
    mask = torch.zeros(b, 1, k, t + spare, dtype=dtype)[..., :t]
    mask[..., t - k :] = torch.full((k, k), torch.finfo(dtype).min, dtype=dtype).fill_diagonal_(0)
    return query, key, value, mask


def dense(query, key, value, mask, scaling=None):
    heads = query.shape[1] // key.shape[1]
    query, key, value, mask = (x.double() for x in (query, key, value, mask))
    key, value = (x.repeat_interleave(heads, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[3] ** -0.5 if scaling is None else scaling) + mask
    return (scores.softmax(3) @ value).transpose(1, 2)


def run(*tensors, **options):
    """By the core, which must be what ran."""
    calls = []
    core = _siblings.native

    class Spy:
        MOST_QUERIES = core.MOST_QUERIES

        def sibling_attention(self, *arguments):
            calls.append(arguments)
            return core.sibling_attention(*arguments)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(_siblings, "native", Spy())
        out, weights = sibling_attention(nn.Module(), *tensors, **options)
    assert len(calls) == 1 and weights is None and out.is_contiguous()
    return out


def check(*tensors):
    out = run(*tensors)
    torch.testing.assert_close(out.double(), dense(*tensors), rtol=1e-5, atol=2e-6)
    return out


@pytest.mark.skipif(native is None, reason="the C++ core is not built")
class TestCore:
    @pytest.mark.parametrize(
        ("groups", "heads", "k"), [(1, 1, 2), (3, 3, 5), (3, 3, 8), (12, 1, 8), (2, 2, 8), (1, 8, 4)]
    )
    @pytest.mark.parametrize("t", [8, 9, 64, 65, 200, 1031])
    def test_values(self, groups, heads, k, t):
        check(*problem(2, groups, heads, k, t, 64))

    @pytest.mark.parametrize(("d", "dv"), [(1, 1), (5, 40), (40, 5), (80, 96), (48, 33), (128, 128), (256, 17)])
    def test_widths(self, d, dv):
        for k in (2, 5, 8):
            check(*problem(1, 2, 3, k, 130, d, dv))

    def test_threads_divide_the_keys_and_change_nothing_but_rounding(self):
        tensors = problem(1, 3, 3, 8, 3000, 64)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                assert torch.equal(check(*tensors), run(*tensors))
        finally:
            torch.set_num_threads(before)

    def test_scores_of_any_size_and_scale(self):
        query, key, value, mask = problem(1, 1, 2, 5, 300, 32)
        for factor in (1e-3, 30.0, 1e3):
            out, exact = (f(query * factor, key, value, mask, scaling=0.3) for f in (run, dense))
            # A weight's exponent has the rounding of the scores, which are sums of 32 products.
            scores = 0.3 * factor * (query.abs() @ key.abs().repeat_interleave(2, 1).mT).max()
            tolerance = 4 * torch.finfo(torch.float32).eps * (1 + scores) * value.abs().max()
            assert (out - exact).abs().max() < tolerance

    @pytest.mark.parametrize("closed", [torch.finfo(torch.float32).min, -torch.inf])
    def test_padding_and_windows(self, closed):
        """Closed slots before the first, whole blocks of them, one alone, and others for other rows of the batch."""
        query, key, value, mask = problem(3, 2, 2, 5, 400, 24)
        mask = torch.where(mask < 0, closed, mask)
        mask[0, ..., :150], mask[1, ..., 70:300], mask[2, ..., 65] = closed, closed, closed
        key[0, :, :150], value[1, :, 70:300] = 1e4, 1e30
        check(query, key, value, mask)

    def test_one_mask_for_the_whole_batch(self):
        query, key, value, mask = problem(3, 1, 2, 4, 40, 16)
        check(query, key, value, mask[:1].expand(3, -1, -1, -1))

    def test_nan_reaches_those_who_see_it(self):
        query, key, value, mask = problem(1, 2, 1, 3, 20, 16)
        key[0, 0, 5] = torch.nan
        out = run(query, key, value, mask)
        assert out[:, :, 0].isnan().all() and not out[:, :, 1].isnan().any()
        query, key, value, mask = problem(1, 1, 1, 3, 20, 16)
        query[0, 0, 1] = torch.nan
        out = run(query, key, value, mask)
        assert out[0, 1].isnan().all() and not out[0, ::2].isnan().any()

    def test_a_row_that_sees_nothing_has_no_value(self):
        query, key, value, mask = problem(1, 1, 1, 3, 20, 16)
        mask[0, 0, 1] = -torch.inf
        out = run(query, key, value, mask)
        assert out[0, 1].isnan().all() and not out[0, ::2].isnan().any()


@pytest.mark.parametrize("case", ["bfloat16", "gradients", "many", "strided"])
def test_others_go_to_the_library(case, monkeypatch):
    """Half precision, gradients, more queries than the core has lanes, elements that do not lie side by side."""
    monkeypatch.setattr(_siblings.native, "sibling_attention", None) if native else None
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    query, key, value, mask = problem(2, 2, 3, 20 if case == "many" else 4, 60, 16, dtype=dtype)
    if case == "strided":
        key = key.mT.contiguous().mT
    with torch.set_grad_enabled(case == "gradients"):
        out, _ = sibling_attention(nn.Module(), query, key, value, mask)
    tolerance = 2e-2 if case == "bfloat16" else 1e-5
    torch.testing.assert_close(out.double(), dense(query, key, value, mask), rtol=tolerance, atol=tolerance)


def test_another_thread_s_pass_is_the_library_s():
    """The prompt of another generation: many queries, and no mask of ours."""
    query, key, value, _ = problem(2, 2, 1, 6, 6, 16)
    module = nn.Module()
    module.is_causal = True
    out, _ = sibling_attention(module, query, key, value, None)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)
