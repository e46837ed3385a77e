"""Processes ("ranks") that train one SAE together: their shares, and sums over them.

    rank = part of the rows * latents + part of the latents

Each of `data` x `latents` ranks trains on one part of a batch's rows and owns one part of the
latents: rows of W_enc and W_dec, their biases, statistics and optimiser moments. Everything that
belongs to no latent (b_dec, scalars, controllers) is the same on every rank, bit by bit, because
every rank computes it from the same sums. Sums over ranks that share their rows are named
`over_latents`, sums over ranks that share their latents `over_rows`.

On one rank every method returns its argument.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from saelab.errors import SaelabError, SettingError

T = TypeVar("T")
#: Longest time that a rank waits for another, which may be harvesting all activations. Our choice.
PATIENCE = timedelta(days=2)


@dataclass(eq=False)
class Ranks:
    """Position of this rank among all.

    Args:
        data, latents: number of parts into which the rows of a batch and the latents are split.
        rank: number of this process, counted from 0.
        device: device of its tensors.
        same_rows, same_latents: the process groups; None for all ranks or for a single one.
        payload: bytes that this rank has passed to collectives so far, whatever their algorithm
            sends.
    """

    data: int = 1
    latents: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    same_rows: Any = None
    same_latents: Any = None
    payload: int = 0

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self  # process groups can't be copied

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.data * self.latents

    @property
    def alone(self) -> bool:
        """True for a single rank."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    @property
    def part_of_latents(self) -> int:
        """Number of this rank's part of the latents, counted from 0."""
        return self.rank % self.latents

    def rows(self, n: int) -> slice:
        """Returns the slice of a batch's n rows that this rank has."""
        return _part(n, self.rank // self.latents, self.data)

    def own(self, d_sae: int, part: int | None = None) -> slice:
        """Returns the slice of d_sae latents of this rank, or of the ranks with the given part."""
        return _part(d_sae, self.part_of_latents if part is None else part, self.latents)

    # ---- sums --------------------------------------------------------------------------------

    def over_latents(self, x: Tensor) -> Tensor:
        """Sums over the ranks with the same rows.

        Each of them continues with the same loss, so the gradient of the sum is the gradient of
        each term.
        """
        return x if self.latents == 1 else _Sum.apply(x, self)  # type: ignore[return-value]

    def spread(self, x: Tensor) -> Tensor:
        """Returns x unchanged; its gradient is summed over the ranks with the same rows.

        x is the same on all of these ranks, and each uses it with its own latents.
        """
        return x if self.latents == 1 else _Spread.apply(x, self)  # type: ignore[return-value]

    def over_rows(self, x: Tensor) -> Tensor:
        """Sums over the ranks with the same latents, without gradient."""
        return x if self.data == 1 else self._reduce(x.detach().clone(), self.same_latents)

    def add_gradients(self, gradients: list[Tensor]) -> None:
        """Sums each gradient over the ranks with the same latents, in place."""
        for gradient in gradients if self.data > 1 else ():
            self._reduce(gradient, self.same_latents)

    def total(self, *values: float) -> list[float]:
        """Sums each number over all ranks."""
        return list(values) if self.alone else self._sum_numbers(values, None)

    def total_over_latents(self, *values: float) -> list[float]:
        """Sums each number over the ranks with the same rows."""
        return list(values) if self.latents == 1 else self._sum_numbers(values, self.same_rows)

    def total_over_rows(self, *values: float) -> list[float]:
        """Sums each number over the ranks with the same latents."""
        return list(values) if self.data == 1 else self._sum_numbers(values, self.same_latents)

    def mean_over_latents(self, x: Tensor) -> Tensor:
        """Returns the mean over all latents of x [own latents], 0-dim, without gradient."""
        if self.latents == 1:
            return x.detach().mean()
        total, count = self.total_over_latents(float(x.detach().sum()), x.numel())
        return x.new_tensor(total / count)

    def before(self, count: int) -> tuple[int, int]:
        """Sums an integer over the ranks with the same rows: over those before this rank, over all.

        The ranks are in the order of their latents.
        """
        if self.latents == 1:
            return 0, count
        counts = torch.zeros(self.latents, dtype=torch.int64, device=self.device)
        counts[self.part_of_latents] = count
        self._reduce(counts, self.same_rows)
        return int(counts[: self.part_of_latents].sum()), int(counts.sum())

    # ---- values of other ranks ---------------------------------------------------------------

    def smallest(self, x: Tensor) -> Tensor:
        """Returns the minimum over all ranks, entry by entry."""
        return x if self.alone else self._reduce(x.clone(), None, dist.ReduceOp.MIN)

    def gather(self, x: Tensor, everywhere: bool = False) -> Tensor:
        """Concatenates the tensors of the ranks with the same rows along the last dimension.

        Args:
            x: this rank's tensor; all have one shape.
            everywhere: gathers from all ranks instead.
        """
        count = self.size if everywhere else self.latents
        if count == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(count)]
        self.payload += x.nbytes
        dist.all_gather(parts, x.contiguous(), group=None if everywhere else self.same_rows)
        return torch.cat(parts, dim=-1)

    def kth_largest(self, values: Tensor, k: int, everywhere: bool = False) -> Tensor:
        """Returns the k-th largest value of the ranks with the same rows, 0-dim.

        Args:
            values: this rank's values [n]; n may differ between ranks.
            k: rank of the value; -inf is returned if there are fewer values.
            everywhere: takes the values of all ranks instead.
        """
        n = values.numel()
        if (self.size if everywhere else self.latents) == 1 and n >= k:
            return torch.kthvalue(values, n - k + 1).values
        candidates = values.new_full((k,), -torch.inf)
        if n:
            cut = torch.kthvalue(values, max(0, n - k) + 1).values
            above = values[values > cut]
            candidates[:n] = cut
            candidates[: len(above)] = above
        gathered = self.gather(candidates, everywhere)
        return torch.kthvalue(gathered, gathered.numel() - k + 1).values

    def send_to_first(self, x: Tensor, shapes: list[torch.Size]) -> Iterator[Tensor]:
        """Sends each rank's tensor to the first rank, which yields them one after the other.

        Only the ranks that share the first rank's rows take part.

        Args:
            x: this rank's tensor.
            shapes: shapes of all tensors, by part of the latents.
        """
        if self.first:
            yield x
            for part, shape in enumerate(shapes[1:], 1):
                received = torch.empty(shape, dtype=x.dtype, device=self.device)
                dist.recv(received, src=part)
                yield received
        elif self.rank < self.latents:
            dist.send(x.contiguous(), dst=0)

    def on_first(self, work: Callable[[], T]) -> T:
        """Does the work on the first rank while the others wait; returns its result on all ranks.

        The result must be small.

        Raises: on every rank the SaelabError that the work raises on the first.
        """
        if self.alone:
            return work()
        outcome: list[Any] = [None, None]  # result, error
        if self.first:
            try:
                outcome[0] = work()
            except SaelabError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    # ---- inside ------------------------------------------------------------------------------

    def _sum_numbers(self, values: tuple[float, ...], group: Any) -> list[float]:
        return self._reduce(
            torch.tensor(values, dtype=torch.float64, device=self.device), group
        ).tolist()

    def _reduce(self, x: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduces a contiguous tensor in place."""
        self.payload += x.nbytes
        dist.all_reduce(x, op=op, group=group)
        return x


#: One process: nothing is split.
ALONE = Ranks()


def _part(n: int, part: int, parts: int) -> slice:
    return slice(n * part // parts, n * (part + 1) // parts)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return ranks._reduce(x.clone(memory_format=torch.contiguous_format), ranks.same_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return grads[0], None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        g = grads[0].clone(memory_format=torch.contiguous_format)
        return ctx.ranks._reduce(g, ctx.ranks.same_rows), None


def started_by_torchrun() -> bool:
    """Returns True in a process that torchrun has started, alone or with others."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def process_count() -> int:
    """Returns the number of processes that torchrun has started for this job; 1 without it.

    Raises: SettingError when WORLD_SIZE is not a number.
    """
    if not started_by_torchrun():
        return 1
    count = os.environ["WORLD_SIZE"]
    if not re.fullmatch("[1-9][0-9]{0,5}", count):
        raise SettingError("WORLD_SIZE", count, "is set by torchrun to a number: leave it out")
    return int(count)


def check_split(data: int | None, latents: int) -> int:
    """Returns the number of parts of the rows, from the settings and the number of processes.

    Raises: SettingError when there are more or fewer processes than parts.
    """
    started = process_count()
    parts = latents * (data or max(1, started // latents))
    if parts != started:
        value = f"{data or 'auto'} x {latents}"
        remedy = (
            f"does not split {started} process{'es' * (started > 1)}: start {parts} with "
            f"torchrun --nproc-per-node {parts} -m saelab train ..., or change the split"
        )
        raise SettingError("parallel.data x parallel.latents", value, remedy)
    return parts // latents


@contextmanager
def join_ranks(data: int, latents: int, device: str) -> Iterator[Ranks]:
    """Joins this process to the data x latents ranks that torchrun has started.

    Args:
        data, latents: number of parts of the rows and of the latents.
        device: 'cpu' (over gloo) or 'cuda' (over NCCL, each rank with its own GPU of the machine).
    """
    if data * latents == 1:
        yield Ranks(device=torch.device(device))
        return
    cuda = torch.device(device).type == "cuda"
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE, device_id=gpu)
    try:
        rank = dist.get_rank()
        rows = [[d * latents + i for i in range(latents)] for d in range(data)]
        groups = {
            "same_rows": rows,
            "same_latents": [list(column) for column in zip(*rows, strict=True)],
        }
        joined = {}
        for name, groups_of_ranks in groups.items():
            for members in groups_of_ranks:  # every rank makes every group, in one order
                group = dist.new_group(members, timeout=PATIENCE)
                joined |= {name: group} if rank in members else {}
        yield Ranks(data, latents, rank, gpu or torch.device("cpu"), **joined)
    finally:
        dist.destroy_process_group()
