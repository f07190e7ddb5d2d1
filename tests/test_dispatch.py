"""The one place that picks an implementation: order, refusals, reasons, traces, the workspace setting."""

import threading

import pytest
import torch

from fastcontrast.ops import _dispatch, _workspace, explain, operations, set_workspace, similarity_lse, trace
from fastcontrast.ops._workspace import workspace_bytes

MIB = 1 << 20


@pytest.fixture
def toy(monkeypatch):
    """An operation `toy` of which "fast" runs on float32 only and "broken" nowhere."""
    monkeypatch.setattr(_dispatch, "_registry", dict(_dispatch._registry))
    monkeypatch.setattr(_dispatch, "_settled", {})

    def fast(device, dtype):
        return None if dtype == torch.float32 else f"it takes float32, got {dtype}"

    _dispatch.register("toy", {"broken": lambda device, dtype: "it never could", "fast": fast})


CPU = torch.device("cpu")


def choose(*request) -> str:
    return _dispatch.note(_dispatch.select(*request))


def test_the_first_that_can_run_is_chosen(toy):
    assert choose("toy", None, CPU, torch.float32) == "fast"
    assert choose("toy", None, CPU, torch.float64) == "reference"


def test_what_is_registered_anew_is_asked_anew(toy):
    assert choose("toy", None, CPU, torch.float32) == choose("toy", None, CPU, torch.float32) == "fast"
    _dispatch.register("toy", {"broken": lambda device, dtype: "it never could"})
    assert choose("toy", None, CPU, torch.float32) == "reference"


def test_reasons_are_told(toy):
    assert explain("toy", "cpu", torch.float32) == {"broken": "it never could", "fast": None, "reference": None}
    assert explain("toy", CPU, torch.float64)["fast"] == "it takes float32, got torch.float64"


def test_a_request_is_honoured_or_refused_with_its_reason(toy):
    for name in ("fast", "reference"):
        assert choose("toy", name, CPU, torch.float32) == name
    with pytest.raises(NotImplementedError, match=r"^toy: implementation 'broken' cannot run: it never could$"):
        choose("toy", "broken", CPU, torch.float32)
    with pytest.raises(ValueError, match=r"^toy: implementation must be one of broken, fast, reference .* 'quick'$"):
        choose("toy", "quick", CPU, torch.float32)


def test_trace_tells_what_ran_and_why_not_the_others(toy):
    with trace() as outer:
        choose("toy", None, CPU, torch.float64)
        with trace() as inner:
            choose("toy", "fast", CPU, torch.float32)
        choose("toy", None, CPU, torch.float32)
    choose("toy", None, CPU, torch.float32)
    assert [choice.implementation for choice in outer] == ["reference", "fast", "fast"]
    assert [choice.implementation for choice in inner] == ["fast"]
    assert outer[0].op == "toy"
    assert outer[0].refused == {"broken": "it never could", "fast": "it takes float32, got torch.float64"}
    assert inner[0].refused == {}
    assert outer[2].refused == {"broken": "it never could"}


def test_what_a_trace_says_is_its_readers(toy):
    for _ in range(2):
        with trace() as ran:
            choose("toy", None, CPU, torch.float32)
        assert ran[0].refused == {"broken": "it never could"}
        ran[0].refused.clear()


def test_a_trace_ends_also_when_its_body_raises(toy):
    with pytest.raises(RuntimeError, match="on purpose"), trace() as ran:
        raise RuntimeError("on purpose")
    choose("toy", None, CPU, torch.float32)
    assert ran == []
    assert _dispatch._traces == []


def test_registered_operations():
    assert "similarity_lse" in operations()
    assert operations() == sorted(operations())
    for op in operations():
        reasons = explain(op)
        assert list(reasons)[-1] == "reference"
        assert reasons["reference"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_kernel_takes_what_training_uses(dtype):
    assert explain("similarity_lse", "cpu", dtype)["cpu"] is None
    q = torch.zeros(3, 2, dtype=dtype)
    with trace() as ran:
        similarity_lse(q, q)
        similarity_lse(q, q, implementation="cpu")
        similarity_lse(q, q, implementation="reference")
    assert [choice.implementation for choice in ran] == ["cpu", "cpu", "reference"]


def test_the_cpu_kernel_refuses_what_it_cannot_do():
    assert "float64" in explain("similarity_lse", "cpu", torch.float64)["cpu"]
    for device in ("cuda", "meta"):
        assert device in explain("similarity_lse", device, torch.float32)["cpu"]
    q = torch.zeros(3, 2, device="meta")
    with pytest.raises(NotImplementedError, match=r"^similarity_lse: .*'cpu' cannot run: .* these are on meta$"):
        similarity_lse(q, q, implementation="cpu")


def test_without_the_native_core_the_reference_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(_dispatch, "native_missing", "the C++ core is not built")
    monkeypatch.setattr(_dispatch, "_settled", {})
    q = torch.nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    with trace() as ran:
        r = similarity_lse(q, q, 3.0)
    assert ran[0].implementation == "reference"
    assert ran[0].refused["cpu"] == "the C++ core is not built"
    assert torch.allclose(r, torch.logsumexp(3.0 * q @ q.t(), 1))
    with pytest.raises(NotImplementedError, match="the C\\+\\+ core is not built"):
        similarity_lse(q, q, implementation="cpu")


def test_workspace_of_the_call_before_the_setting_before_the_default():
    assert workspace_bytes(None, CPU) == 64 * MIB
    assert workspace_bytes(None, torch.device("cuda")) == 512 * MIB
    try:
        set_workspace(5 * MIB)
        assert workspace_bytes(None, CPU) == workspace_bytes(None, torch.device("cuda")) == 5 * MIB
        assert workspace_bytes(0, CPU) == 0
        set_workspace(0)
        assert workspace_bytes(None, CPU) == 0
    finally:
        set_workspace(None)
    assert workspace_bytes(None, CPU) == 64 * MIB
    with pytest.raises(ValueError, match=r"^set_workspace: bytes must be at least 0, got -1$"):
        set_workspace(-1)


def test_buffers_in_use_are_never_shared_and_those_given_back_are_used_again():
    set_workspace(None)
    first, second = _workspace.buffer(MIB), _workspace.buffer(MIB)
    low, high = sorted((first.data_ptr(), second.data_ptr()))
    assert low + first.nbytes <= high
    part = first[10:20].view(2, 5)  # a view keeps the buffer in use
    del first
    third = _workspace.buffer(MIB)
    assert third.data_ptr() not in (low, high)
    given_back = low, high, third.data_ptr()
    del part, second, third
    assert _workspace.buffer(MIB - 5).data_ptr() in given_back
    set_workspace(None)
    assert _workspace._pool._free == []


def test_what_is_idle_stays_below_its_limit(monkeypatch):
    set_workspace(None)
    monkeypatch.setattr(_workspace._pool, "IDLE", 20 * MIB)

    def give_back(*sizes: int) -> list[int]:  # MiB
        buffers = [_workspace.buffer(size * MIB // 4) for size in sizes]
        while buffers:
            del buffers[0]
        return [block.nbytes // MIB for block in _workspace._pool._free]

    assert give_back(4, 12, 8) == [8, 12]  # last ones first
    assert give_back(24) == [8, 12]  # alone too large
    set_workspace(None)


def test_buffers_of_a_job_that_is_over_make_room():
    set_workspace(None)
    for size in (64, 64, 64, 64, 64, 64, 64, 64, 2):  # MiB
        held = [_workspace.buffer(size * MIB // 4) for _ in range(4)]
        held.clear()
    assert [block.nbytes // MIB for block in _workspace._pool._free] == [2] * 4 + [64] * 4
    set_workspace(None)


def test_a_buffer_may_come_back_while_another_is_taken():
    """Garbage collection starts at any allocation, also inside the pool's own lock."""
    set_workspace(None)
    buffer = _workspace.buffer(MIB)

    def come_back():
        nonlocal buffer
        with _workspace._pool._lock:
            del buffer

    thread = threading.Thread(target=come_back, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    set_workspace(None)
