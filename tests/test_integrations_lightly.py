"""lightly's losses against ours: the same values, gradients and memory banks, on one process and on several."""

import copy
import itertools
import pickle
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcontrast._torchvision import declare_torchvision_operators

pytest.importorskip("lightly")
declare_torchvision_operators()  # also for ranks, which import this module without conftest

from lightly import loss as originals  # noqa: E402

from fastcontrast.integrations import lightly as ours  # noqa: E402
from fastcontrast.ops import trace  # noqa: E402
from fastcontrast.testing import assert_as_good_as, ranks, relative_error  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),  # lightly's weights
]
SIZES = (1, 2, 3, 7, 37)


def distances(out0: Tensor, out1: Tensor) -> Tensor:
    """Weights that differ between views, and have a gradient."""
    return 1.5 + ((out0 - 0.5 * out1) ** 2).sum(1)


LOSSES = {
    "NTXentLoss": [{}, {"temperature": 0.07}, {"temperature": -0.5}, {"temperature": 3, "gather_distributed": True}],
    "DCLLoss": [{}, {"temperature": 0.5, "gather_distributed": True}, {"weight_fn": distances}],
    "DCLWLoss": [{}, {"temperature": 0.2, "sigma": 0.3}],
}
BANKS = [
    {"temperature": temperature, "memory_bank_size": (size, 5), "gather_distributed": size == 4}
    for temperature, size in ((0.5, 1), (0.07, 4), (0.1, 16), (0.2, 41))
]


def views(n: int, d: int, seed: int) -> list[Tensor]:
    """Of float32's precision, so that the truth is that of the same inputs; alike, as views of one sample are."""
    generator = torch.Generator().manual_seed(seed)
    out0, noise = torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)
    return [out0.double(), (1.5 * out0 + noise).double()]


def evaluate(loss: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, [*leaves, *loss.parameters()])


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for actual, truth in zip(found, expected, strict=True):
        assert torch.equal(actual.isfinite(), truth.isfinite())
        actual, truth = actual.double().nan_to_num(), truth.nan_to_num()
        # gradients that are zero in truth leave rounding of the terms that cancel
        assert (actual - truth).norm() <= tolerance * max(truth.norm().item(), 1e-2)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_original(name):
    assert issubclass(getattr(ours, name), getattr(originals, name))
    for seed, (settings, n) in enumerate(itertools.product(LOSSES[name], SIZES)):
        original, loss = (getattr(module, name)(**settings) for module in (originals, ours))
        inputs = views(n, (3, 5, 17)[seed % 3], seed)
        truth = evaluate(original, inputs)
        with trace() as ran:
            for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
                found = evaluate(loss, [x.to(dtype) for x in inputs])
                assert all(x.dtype == dtype for x in found)
                assert_close(found, truth, tolerance)
        assert [choice.implementation for choice in ran] == ["reference", "cpu"]


def test_a_memory_bank_is_used_and_updated_as_theirs():
    """Six batches of unequal sizes through each bank, one of them without gradient, which leaves the bank alone."""
    for seed, settings in enumerate(BANKS):
        torch.manual_seed(seed)
        original, double, single = (module.NTXentLoss(**settings) for module in (originals, ours, ours))
        for loss in (double, single):
            loss.memory_bank.bank.copy_(original.memory_bank.bank)
        original.double(), double.double()
        for step, n in enumerate((3, 7, 1, 5, 16, 2)):
            inputs = views(n, 5, 100 * seed + step)
            if step == 2:
                before = single.memory_bank.bank.clone()
                truth, found, found_single = original(*inputs), double(*inputs), single(*(x.float() for x in inputs))
                assert_close((found,), (truth,), 1e-11)
                assert_close((found_single,), (truth,), 1e-5)
                assert torch.equal(single.memory_bank.bank, before)
            else:
                truth = evaluate(original, inputs)
                assert_close(evaluate(double, inputs), truth, 1e-11)
                assert_close(evaluate(single, [x.float() for x in inputs]), truth, 1e-5)
            for bank in (double.memory_bank, single.memory_bank):
                assert bank.bank_ptr == original.memory_bank.bank_ptr
            assert torch.equal(double.memory_bank.bank, original.memory_bank.bank)
            assert relative_error(single.memory_bank.bank, original.memory_bank.bank) < 1e-6


def test_what_the_original_refuses_is_refused():
    for module in (originals, ours):
        with pytest.raises(ValueError, match="Illegal temperature"):
            module.NTXentLoss(temperature=1e-9)
        with pytest.raises(ValueError, match="feature dimension"):
            module.NTXentLoss(memory_bank_size=16)


@pytest.mark.parametrize("name", LOSSES)
def test_learned_temperature_and_copies(name):
    def make(module):
        loss = getattr(module, name)()
        loss.temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        return loss

    inputs = views(9, 4, 1)
    truth = evaluate(make(originals), inputs)
    assert len(truth) == 4
    for loss in (make(ours), copy.deepcopy(make(ours)), pickle.loads(pickle.dumps(make(ours)))):
        assert_close(evaluate(loss, inputs), truth, 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_as_good_as_float32_logits(name, dtype):
    inputs = [x.to(dtype) for x in views(33, 24, 1)]
    banks = [{}, {"memory_bank_size": (19, 24)}] if name == "NTXentLoss" else [{}]
    for settings in banks:
        torch.manual_seed(3)
        loss = getattr(ours, name)(temperature=0.1, **settings)
        original = getattr(originals, name)(temperature=0.1, **settings)
        if settings:
            original.memory_bank.bank.copy_(loss.memory_bank.bank)
        truth = evaluate(copy.deepcopy(original).double(), [x.double() for x in inputs])
        naive = evaluate(original, [x.float() for x in inputs])
        plain = evaluate(copy.deepcopy(loss), inputs)
        with torch.autocast("cpu", torch.bfloat16):
            cast = evaluate(loss, inputs)
        for results in (plain, cast):
            assert results[0].dtype == torch.float32 and results[1].dtype == dtype
            for actual, expected, dense in zip(results, truth, naive, strict=True):
                assert_as_good_as(actual, expected, dense.to(actual.dtype))


# ---------------------------------------------------------------------------------------------------------------- ranks

SHARDS = [(4, 4, 4), (1, 1, 1), (3, 1, 4), (5, 5), (1, 3), (6,)]


def _on(group_rank: int, sizes: tuple[int, ...]) -> list:
    """Each loss on this rank's shard, weighted by its share of the batch: ours, and theirs if shards are equal."""
    begin, n, results = sum(sizes[:group_rank]), sizes[group_rank], []
    for name, module in itertools.product(LOSSES, (ours, originals)):
        if module is originals and len(set(sizes)) > 1:
            continue
        for dtype in (torch.float64, torch.float32):
            loss = getattr(module, name)(temperature=0.2, gather_distributed=True)
            shard = [x[begin : begin + n].to(dtype).requires_grad_() for x in views(sum(sizes), 5, 7)]
            value = loss(*shard) * (n / sum(sizes))
            results.append(((name, module is ours, dtype), value.detach(), *torch.autograd.grad(value, shard)))
    for module in (ours, originals) if len(set(sizes)) == 1 else ():
        torch.manual_seed(11)
        loss = module.NTXentLoss(memory_bank_size=(7, 5), gather_distributed=True).double()
        for seed in range(3):
            out = evaluate(loss, [x[begin : begin + n] for x in views(sum(sizes), 5, seed)])
        results.append((("bank", module is ours, torch.float64), *out, loss.memory_bank.bank))
    return results


def _all_worlds(folder: str) -> list:
    """On three ranks; then two of them, and the third by itself, form new groups: the imports are paid once."""
    rank, found = dist.get_rank(), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "To copy construct from a tensor")
        found += [(sizes, rank, _on(rank, sizes)) for sizes in SHARDS if len(sizes) == 3]
        dist.destroy_process_group()
        rank, world = (rank, 2) if rank < 2 else (0, 1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
        found += [(sizes, rank, _on(rank, sizes)) for sizes in SHARDS if len(sizes) == world]
    return found


def test_ranks_equal_the_original_and_one_process():
    """Equal shards: the original on the same ranks. All shards: the whole batch on one process, whose gradients are the
    sum over ranks of those of losses weighted by their share."""
    with tempfile.TemporaryDirectory() as folder:
        found = [result for results in ranks.run(3, _all_worlds, folder) for result in results]
    assert sorted(sizes for sizes, *_ in found) == sorted(sizes for sizes in SHARDS for _ in sizes)
    for sizes in SHARDS:
        of_ranks = [(rank, results) for of, rank, results in found if of == sizes]
        shards = [{key: rest for key, *rest in results} for _, results in sorted(of_ranks, key=lambda x: x[0])]
        for name in LOSSES:
            whole = evaluate(getattr(originals, name)(temperature=0.2), views(sum(sizes), 5, 7))
            for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
                ranked = [shard[name, True, dtype] for shard in shards]
                assert all(x.dtype == dtype for result in ranked for x in result)
                if len(set(sizes)) == 1:
                    for result, shard in zip(ranked, shards, strict=True):
                        assert_close(result, shard[name, False, torch.float64], tolerance)
                if name != "DCLWLoss":  # whose weights are of a rank's samples
                    together = [sum(r[0] for r in ranked), *(torch.cat([r[i] for r in ranked]) for i in (1, 2))]
                    assert_close(together, whole, tolerance)
        if len(set(sizes)) == 1:
            for shard in shards:
                assert_close(shard["bank", True, torch.float64], shard["bank", False, torch.float64], 1e-11)
