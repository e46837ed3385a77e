"""Many processes ("ranks") for one SAE: what each of them has, and how they add up.

    rank = part of the rows * latents + part of the latents

Of `data` x `latents` ranks each trains on one part of a batch's rows and owns one part of the
latents: rows of W_enc and W_dec, their biases, statistics and optimiser moments. Whatever belongs
to no latent (b_dec, scalars, controllers) is the same on every rank, bit by bit, because every rank
computes it from the same sums. Ranks that share their rows are `over_latents` of each other, ranks
that share their latents `over_rows`.

On one rank every method returns what it was given.
"""

from __future__ import annotations

import os
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
#: How long a rank waits for another, which may be harvesting all activations. Our choice.
PATIENCE = timedelta(days=2)


@dataclass(eq=False)
class Ranks:
    """One rank's place among all.

    Args:
        data, latents: into how many parts the rows of a batch and the latents are split.
        rank: this process, counted from 0.
        device: where its tensors are.
        same_rows, same_latents: the process groups; None for all ranks or for one alone.
        payload: bytes that this rank has handed to collectives so far, whatever the algorithm
            behind them makes of these.
    """

    data: int = 1
    latents: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    same_rows: Any = None
    same_latents: Any = None
    payload: int = 0

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self  # process groups have no copies

    @property
    def size(self) -> int:
        return self.data * self.latents

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0

    @property
    def part_of_latents(self) -> int:
        return self.rank % self.latents

    def rows(self, n: int) -> slice:
        """Which of a batch's n rows this rank has."""
        return _part(n, self.rank // self.latents, self.data)

    def own(self, d_sae: int, part: int | None = None) -> slice:
        """Which of d_sae latents this rank has, or the ranks with that part of the latents."""
        return _part(d_sae, self.part_of_latents if part is None else part, self.latents)

    # ---- sums --------------------------------------------------------------------------------

    def over_latents(self, x: Tensor) -> Tensor:
        """Sum over the ranks with the same rows. Each of them goes on with the same loss, so the
        gradient of the sum is the gradient of each term."""
        return x if self.latents == 1 else _Sum.apply(x, self)  # type: ignore[return-value]

    def spread(self, x: Tensor) -> Tensor:
        """x, the same on all ranks with the same rows, about to be used by each with its own
        latents: its gradient is the sum of theirs."""
        return x if self.latents == 1 else _Spread.apply(x, self)  # type: ignore[return-value]

    def over_rows(self, x: Tensor) -> Tensor:
        """Sum over the ranks with the same latents, without gradient."""
        return x if self.data == 1 else self._reduced(x.detach().clone(), self.same_latents)

    def add_gradients(self, gradients: list[Tensor]) -> None:
        """Sums each gradient over the ranks with the same latents, in place."""
        for gradient in gradients if self.data > 1 else ():
            self._reduced(gradient, self.same_latents)

    def total(self, *values: float) -> list[float]:
        """Sum of each number over all ranks."""
        return list(values) if self.alone else self._numbers(values, None)

    def total_over_latents(self, *values: float) -> list[float]:
        """Sum of each number over the ranks with the same rows."""
        return list(values) if self.latents == 1 else self._numbers(values, self.same_rows)

    def total_over_rows(self, *values: float) -> list[float]:
        """Sum of each number over the ranks with the same latents."""
        return list(values) if self.data == 1 else self._numbers(values, self.same_latents)

    def mean_over_latents(self, x: Tensor) -> Tensor:
        """Mean over all latents; x [own latents], without gradient; 0-dim."""
        if self.latents == 1:
            return x.detach().mean()
        total, count = self.total_over_latents(float(x.detach().sum()), x.numel())
        return x.new_tensor(total / count)

    def before(self, count: int) -> tuple[int, int]:
        """Sum of a whole number over the ranks with the same rows and earlier latents, and over
        all with the same rows."""
        if self.latents == 1:
            return 0, count
        counts = torch.zeros(self.latents, dtype=torch.int64, device=self.device)
        counts[self.part_of_latents] = count
        self._reduced(counts, self.same_rows)
        return int(counts[: self.part_of_latents].sum()), int(counts.sum())

    # ---- values of other ranks ---------------------------------------------------------------

    def smallest(self, x: Tensor) -> Tensor:
        """Over all ranks, entry by entry."""
        return x if self.alone else self._reduced(x.clone(), None, dist.ReduceOp.MIN)

    def gather(self, x: Tensor, everywhere: bool = False) -> Tensor:
        """The tensors of the ranks with the same rows (or of all ranks), of one shape, in their
        order along the last dimension."""
        count = self.size if everywhere else self.latents
        if count == 1:
            return x
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(count)]
        self.payload += x.nbytes
        dist.all_gather(found, x.contiguous(), group=None if everywhere else self.same_rows)
        return torch.cat(found, dim=-1)

    def kth_largest(self, values: Tensor, k: int, everywhere: bool = False) -> Tensor:
        """The k-th largest value of the ranks with the same rows (or of all ranks), -inf where
        they have fewer; values [n], n may differ; 0-dim."""
        n = values.numel()
        if (self.size if everywhere else self.latents) == 1 and n >= k:
            return torch.kthvalue(values, n - k + 1).values
        candidates = values.new_full((k,), -torch.inf)
        if n:
            cut = torch.kthvalue(values, max(0, n - k) + 1).values
            above = values[values > cut]
            candidates[:n] = cut
            candidates[: len(above)] = above
        found = self.gather(candidates, everywhere)
        return torch.kthvalue(found, found.numel() - k + 1).values

    def send_to_first(self, x: Tensor, shapes: list[torch.Size]) -> Iterator[Tensor]:
        """On the first rank, one after the other, the tensors of the ranks with its rows.

        Args:
            x: this rank's.
            shapes: of all of them, by part of the latents.
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
        """Does the work on the first rank while the others wait; its result, small data, on all.

        Raises: on every rank the SaelabError that it raises on the first.
        """
        if self.alone:
            return work()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = work()
            except SaelabError as error:
                found[1] = error
        dist.broadcast_object_list(found, src=0, device=self.device)
        if found[1] is not None:
            raise found[1]
        return found[0]

    # ---- inside ------------------------------------------------------------------------------

    def _numbers(self, values: tuple[float, ...], group: Any) -> list[float]:
        return self._reduced(
            torch.tensor(values, dtype=torch.float64, device=self.device), group
        ).tolist()

    def _reduced(self, x: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
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
        return ranks._reduced(x.clone(memory_format=torch.contiguous_format), ranks.same_rows)

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
        return ctx.ranks._reduced(g, ctx.ranks.same_rows), None


def processes() -> int:
    """How many processes torchrun has started for this job; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def check_split(data: int | None, latents: int) -> int:
    """Into how many parts rows are split, from the settings and the number of processes.

    Raises: SettingError when there are more or fewer processes than parts.
    """
    started = processes()
    wanted = latents * (data or max(1, started // latents))
    if wanted != started:
        value = f"{data or 'auto'} x {latents}"
        remedy = (
            f"is no split of {started} process{'es' * (started > 1)}: start {wanted} with "
            f"torchrun --nproc-per-node {wanted} -m saelab train ..., or change the split"
        )
        raise SettingError("parallel.data x parallel.latents", value, remedy)
    return wanted // latents


@contextmanager
def join_ranks(data: int, latents: int, device: str) -> Iterator[Ranks]:
    """This process among the data x latents that torchrun has started.

    Args:
        device: 'cpu' (over gloo) or 'cuda' (over NCCL, each rank its own GPU of the machine).
    """
    if data * latents == 1:
        yield Ranks(device=torch.device(device))
        return
    cuda = torch.device(device).type == "cuda"
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else None
    if where is not None:
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE, device_id=where)
    try:
        rank = dist.get_rank()
        rows = [[d * latents + i for i in range(latents)] for d in range(data)]
        groups = {
            "same_rows": rows,
            "same_latents": [list(some) for some in zip(*rows, strict=True)],
        }
        own = {}
        for name, members in groups.items():
            for some in members:  # every rank makes every group, in one order
                group = dist.new_group(some, timeout=PATIENCE)
                own |= {name: group} if rank in some else {}
        yield Ranks(data, latents, rank, where or torch.device("cpu"), **own)
    finally:
        dist.destroy_process_group()
