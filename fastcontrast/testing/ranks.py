"""Processes that form a gloo group: `run(world, fn, *args)` calls `fn(*args)` on every rank, and returns all results.

A server process imports torch and fastcontrast once, before any thread runs in it; ranks are forked from there, in some
20 ms instead of some seconds. `fn` must be a function at the top of a module.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import wait
from typing import Any

TIMEOUT = 60  # seconds without news from any rank


class RankError(AssertionError):
    """What the first rank that failed said."""


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    torch = ["torch.nn.parallel", "torch.optim", "torch._dynamo", "torch.distributed.tensor"]
    context.set_forkserver_preload([*torch, "fastcontrast"])
    return context


def _rank(rank: int, world: int, folder: str, collective_timeout: float, pipe: Any, fn: Callable, args: tuple) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
            timeout=timedelta(seconds=collective_timeout),
        )  # fmt: skip
        pipe.send_bytes(pickle.dumps((True, fn(*args))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        os._exit(0)  # a group with a dead rank would not be destroyed in order


def run(
    world: int, fn: Callable, *args: Any, collective_timeout: float = 30.0, dead: tuple[int, ...] = ()
) -> list[Any]:
    """`fn(*args)` of every rank, in order. Raises RankError with the traceback of the first rank that failed; ranks
    named in `dead` are expected to die without a word, and give None."""
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        ranks, pipes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(rank, world, folder, collective_timeout, theirs, fn, args), daemon=True
            )
            process.start()
            theirs.close()
            ranks.append(process)
            pipes.append(ours)
        results: dict[int, Any] = {}
        try:
            while len(results) < world:
                ready = wait([pipe for i, pipe in enumerate(pipes) if i not in results], timeout=TIMEOUT)
                if not ready:
                    raise RankError(f"no rank said anything for {TIMEOUT} s")
                for pipe in ready:
                    rank = pipes.index(pipe)
                    try:
                        fine, results[rank] = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        ranks[rank].join(5)
                        if rank in dead:
                            results[rank] = None
                            continue
                        fine, results[rank] = False, f"it died with exit code {ranks[rank].exitcode}"
                    if not fine:
                        raise RankError(f"rank {rank} of {world}: {results[rank]}")
        finally:
            for process in ranks:
                process.join(0 if len(results) < world else 5)
                if process.is_alive():
                    process.kill()
                process.join()
        return [results[rank] for rank in range(world)]
