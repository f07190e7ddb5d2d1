"""The demo on several processes: torchrun starts them, and each trains on its share of every batch."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def launch(args: argparse.Namespace) -> int:
    """Runs this command line again, on `args.nproc` processes of this machine. Returns torchrun's exit status."""
    options = [f"--{name}={value}" for name, value in vars(args).items() if name != "nproc" and value is not None]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.nproc}"]
    # torchrun gives each process one thread unless told otherwise.
    threads = max(1, torch.get_num_threads() // args.nproc)
    where = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([*torchrun, "-m", "fastcontrast.cli", "demo", *options], env=where).returncode


@contextmanager
def joined() -> Iterator[int]:
    """Inside, this process is a rank of those that torchrun started, if it did. Gives its number, else 0."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_rank():
        os.environ["TQDM_DISABLE"] = "1"  # one bar is enough
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


@contextmanager
def first_rank_first() -> Iterator[None]:
    """What the first rank puts into a cache in here, the others find there."""
    world = dist.is_initialized()
    if world and dist.get_rank():
        dist.barrier()
    yield
    if world and not dist.get_rank():
        dist.barrier()
