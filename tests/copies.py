"""What plain torch copies: tensors that are rearranged, repeated or joined."""

import math

from torch.utils._python_dispatch import TorchDispatchMode

COPIES = {"clone", "copy_", "cat", "index", "repeat", "index_select"}


class Copies(TorchDispatchMode):
    """Names of the operations that copied at least `least` numbers, in the order they ran."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.names = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in COPIES and math.prod(out.shape) >= self.least:
            self.names.append(name)
        return out
