"""The plan of a distributed loss against what really moves, and against a page of the documentation that quotes it."""

import functools
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import fastcontrast as fc
from fastcontrast import distributed as fd
from fastcontrast.distributed.plan import plan, ring_seconds
from fastcontrast.testing import ranks

# What the page assumes: an H200's products in half precision, and 400 Gbit/s from node to node.
on_h200 = functools.partial(plan, flops=790e12, bandwidth=50e9)
PAGE = Path(__file__).parents[1] / "docs" / "million_pairs.md"


def _moved(rows, width):
    """Bytes that this rank sends in the forward and in the backward of a ring."""
    from fastcontrast.distributed import _exchange

    sent = [0, 0]
    post = _exchange._Transfer.__init__

    def counted(self, group, out, into):
        post(self, group, out, into)
        sent[1 if passed else 0] += sum(x.nbytes for x in self.out)

    _exchange._Transfer.__init__ = counted
    torch.manual_seed(dist.get_rank())
    q, k = (F.normalize(torch.randn(rows, width), dim=1).requires_grad_() for _ in range(2))
    passed = False
    with fd.exchange("ring", equal=True):
        loss = fc.clip_loss(q, k, 5.0)
        passed = True
        loss.backward()
    return tuple(sent)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_ring_moves_the_planned_bytes(world):
    expected = plan(world * 11, 6, world, feature_bytes=4, flops=1.0, bandwidth=1.0).moved_bytes
    assert ranks.run(world, _moved, 11, 6) == [expected] * world


def test_a_ring_costs_the_longer_of_work_and_hop():
    """Far from the ends of the ring a step costs its work or its hop, whichever is longer."""
    for block, keys, found in ((5.0, 1.0, 2.0), (1.0, 5.0, 2.0), (1.0, 1.0, 4.0), (3.0, 2.0, 2.0)):
        many, more = (ring_seconds(w, block, keys, found) for w in (100, 101))
        assert more - many == pytest.approx(max(block, keys + found))
    assert ring_seconds(4, 5.0, 1.0, 2.0) == pytest.approx(4 * 5.0 + 2.0)  # the last thing found must still go home
    assert ring_seconds(1, 5.0, 0.0, 0.0) == 5.0


def test_hops_hide_from_the_planned_rows_on():
    for bandwidth, width in ((50e9, 512), (50e9, 4096), (400e9, 512)):
        least = max(on_h200(1024, width, 2, bandwidth=bandwidth).least_rows)
        for rows, hidden in ((least * 0.8, False), (least * 1.3, True)):
            found = on_h200(64 * int(rows), width, 64, bandwidth=bandwidth)
            assert found.hidden is hidden
            assert (found.seconds < 1.05 * found.compute_seconds) is hidden


def test_a_ring_holds_a_share_of_what_gathering_holds():
    ring, gather = (on_h200(1 << 20, 512, 64, exchange=how) for how in ("ring", "gather"))
    assert ring.held_bytes < gather.held_bytes / 10
    assert gather.moved_bytes[1] <= ring.moved_bytes[1]
    assert ring.seconds < gather.seconds


def test_refusals():
    with pytest.raises(ValueError, match="positive multiple of ranks, got 10 and 3"):
        on_h200(10, 8, 3)
    with pytest.raises(ValueError, match="exchange must be one of"):
        on_h200(9, 8, 3, exchange="tree")


def test_the_page_quotes_the_plan():
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) >= 4
    for ranks_, held, cells in rows:
        found = on_h200(1 << 20, 1024, int(ranks_.replace(",", "")))
        assert held == f"{found.rows:,}"
        shown = [cell.strip() for cell in cells.split("|")]
        hops = " / ".join(f"{x / 1e6:.3g}" for x in found.hop_bytes)
        memory = f"{found.held_bytes / 1e9:.3g}"
        times = f"{found.seconds * 1e3:.3g}"
        assert shown == [hops, f"{sum(found.moved_bytes) / 1e9:.3g}", memory, times, "yes" if found.hidden else "no"]
