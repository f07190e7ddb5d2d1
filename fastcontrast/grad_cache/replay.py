"""Encoding a chunk a second time exactly as the first: random generators and buffers as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

Slot = tuple[nn.Module, str]  # where a buffer lives: its module and name


class Replay:
    """What a chunk's first encoding depended on besides input and parameters: random generators, and buffers that it
    rewrites. Inside this context both are as they were then; afterwards both are as before entering."""

    def __init__(self, devices: Iterable[torch.device], buffers: dict[Slot, Tensor]) -> None:
        self.random = {d: _generator(d)[0]() for d in devices}
        self.buffers = buffers
        self.kept: Any = None  # representations with their graph, when this chunk is not to be encoded again
        self.once = False  # it was not, or will not be
        self.frozen = False
        self.rows: list[int] = []  # of each tensor of the representations

    def __enter__(self) -> None:
        self._present = {d: _generator(d)[0]() for d in self.random}, {(m, n): m._buffers[n] for m, n in self.buffers}
        self._set(self.random, {slot: b.clone() for slot, b in self.buffers.items()})  # what is written goes with them

    def __exit__(self, *_: object) -> None:
        self._set(*self._present)

    def rewind(self) -> None:
        """For good: this chunk's encoding failed half-way and starts again."""
        self._set(self.random, {})
        for (module, name), then in self.buffers.items():
            module._buffers[name].data.copy_(then)

    @staticmethod
    def _set(random: Mapping[torch.device, Tensor], buffers: Mapping[Slot, Tensor]) -> None:
        for device, state in random.items():
            _generator(device)[1](state)
        for (module, name), buffer in buffers.items():
            module._buffers[name] = buffer


class Buffers:
    """Finds which buffers of modules in train mode a forward rewrites, by comparing them over a model's first chunk."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        found = ((m, n, b) for root in modules for m in root.modules() if m.training for n, b in m._buffers.items())
        self.slots: dict[Slot, Any] = {(m, n): None for m, n, b in found if b is not None and not b.is_inference()}
        self.rewritten = False  # a floating-point one, in place; BatchNorm's kernel does it without autograd minding

    def snapshot(self) -> dict[Slot, Tensor]:
        self.slots = {(m, n): (m._buffers[n], m._buffers[n]._version) for m, n in self.slots}
        return {slot: buffer.clone() for slot, (buffer, _) in self.slots.items()}

    def learn(self, state: Replay) -> None:
        """After the first chunk: from now on only what it changed is copied."""
        for (m, n), (then, version) in list(self.slots.items()):
            now, bumped = m._buffers[n], m._buffers[n]._version != version
            if now is then and not bumped and torch.equal(now, state.buffers[m, n]):
                del self.slots[m, n], state.buffers[m, n]
            self.rewritten |= now is then and bumped and now.is_floating_point()


def random_devices(modules: Sequence[nn.Module], among: Iterable[Tensor]) -> list[torch.device]:
    """Every device whose random generator an encoding may use."""
    inside = (t for m in modules for t in chain(m.parameters(), m.buffers()))
    devices = {torch.device("cpu"), *(t.device for t in chain(inside, among) if t.device.type != "meta")}
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:  # a plain function may carry its input there
        in_use = getattr(torch.get_device_module(accelerator), "is_initialized", torch.accelerator.is_available)
        if in_use():
            devices.add(torch.device(accelerator.type, torch.accelerator.current_device_index()))
    return sorted(devices, key=str)


def _generator(device: torch.device) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    """How to read and set a device's random state."""
    if device.type == "cpu":
        return torch.get_rng_state, torch.set_rng_state
    module = torch.get_device_module(device)
    if device.type == "mps":  # one device, and functions without a place to name it
        return module.get_rng_state, module.set_rng_state
    return partial(module.get_rng_state, device), partial(module.set_rng_state, device=device)
