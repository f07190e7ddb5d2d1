"""Changes to a model that last as long as a generation, also where several threads generate with it at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_borrowers: dict[int, int] = {}  # by id of what is changed


@contextmanager
def lent(
    things: Callable[[], Iterable[Any]], change: Callable[[Any], None], restore: Callable[[Any], None]
) -> Iterator:
    """The first to enter changes what `things()` gives, the last to leave restores it, also after an error."""
    with _lock:
        taken = list(things())
        for thing in taken:
            if not _borrowers.get(id(thing)):
                change(thing)
            _borrowers[id(thing)] = _borrowers.get(id(thing), 0) + 1
    try:
        yield
    finally:
        with _lock:
            for thing in taken:
                _borrowers[id(thing)] -= 1
                if not _borrowers[id(thing)]:
                    del _borrowers[id(thing)]
                    restore(thing)
