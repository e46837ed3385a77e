"""Runs a function in several processes that know each other as torchrun's would."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from saelab.distributed.ranks import Ranks, join_ranks

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "saelab.training.loop", "saelab.checkpoint"])
#: Seconds after which ranks that wait for each other are given up.
LONGEST = 300


def in_ranks(data: int, latents: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What work(ranks, *arguments) returns on each of data x latents processes, in their order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, workers = [], []
    for rank in range(data * latents):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        split = (rank, data, latents, port)
        worker = CONTEXT.Process(target=_work, args=(theirs, split, work, arguments), daemon=True)
        worker.start()
        theirs.close()
        pipes.append(ours)
        workers.append(worker)
    try:
        found = [_received(pipe) for pipe in pipes]
    finally:
        for worker in workers:
            worker.join(5)
            worker.kill()
    failures = [text for ok, text in found if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in found]


def _received(pipe: Any) -> tuple[bool, Any]:
    if not pipe.poll(LONGEST):
        return False, f"nothing came in {LONGEST} s"
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, "the process ended without a word"


def _work(pipe: Any, split: tuple[int, ...], work: Callable[..., Any], arguments: Any) -> None:
    rank, data, latents, port = split
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(data * latents), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        with join_ranks(data, latents, "cpu") as ranks:
            found = True, work(ranks, *arguments)
    except BaseException:
        found = False, f"rank {rank}: {traceback.format_exc()}"
    pipe.send_bytes(pickle.dumps(found))  # tensors by value: the sender ends


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """The same in this process."""
    return work(Ranks(), *arguments)
