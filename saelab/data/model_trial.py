"""Runs a language model on two short contexts when it is loaded, to learn what its modules give.

The modules whose outputs are added to the residual stream are found by their values, since names
say little: Gemma-2 norms the outputs of attention and MLP before they are added, Bloom's and MPT's
MLP modules add the stream themselves. With the input `pre` and the output `post` of a block

    post = pre + attention + mlp                          in sequence or in parallel
    post = norm_2(norm_1(pre + attention) + mlp)          BERT: the stream is normed after each sum

The two contexts differ in their last token only, so a model that predicts the next token from later
ones is seen too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from saelab.data.model_hooks import with_contexts
from saelab.errors import SaelabError, SourceError

#: Positions of the two contexts.
POSITIONS = 6
#: Names of a block's attention and MLP in the model families, in order of preference where several
#: modules give the same tensor.
ATTENTION = ("attention.output.dense", "self_attn", "attention", "attn", "self_attention")
MLP = ("mlp", "output.dense", "feed_forward", "ffn", "block_sparse_moe")
#: The last layer of BERT's MLP, whose input is not that of the MLP.
LAST_LAYER = "output.dense"
#: The most that rounding can make of each summand's size, in units of the dtype's precision: three
#: roundings of sums, and one of a factor.
ROUNDING = 4


@dataclass
class BlockRun:
    """Findings about one block in the trial.

    Args:
        attention, mlp: paths in the block of the modules whose outputs are added; "" if none is.
        mlp_in: path of the module whose input is that of the MLP; "" if there is none.
        output: of the block, [2, positions, d]; None before it has run, or for another shape.
        shape: of the block's output.
    """

    attention: str = ""
    mlp: str = ""
    mlp_in: str = ""
    output: Tensor | None = None
    shape: list[int] = field(default_factory=list)

    def path(self, kind: str) -> str:
        """Returns the path for 'hook_attn_out', 'hook_mlp_out' or 'mlp.hook_in', "" for any other
        kind."""
        paths = {"hook_attn_out": self.attention, "hook_mlp_out": self.mlp}
        return (paths | {"mlp.hook_in": self.mlp_in}).get(kind, "")


def trial_ids(rows: int | None, excluded: Sequence[int], positions: int) -> Tensor:
    """Returns two contexts of ordinary ids that differ in the last, int64 [2, positions].

    Args:
        rows: number of ids that the model has embeddings for.
        excluded: special ids; they may stand for padding or an image.
    """
    most, special = rows or 256, set(excluded)
    ordinary = [i for i in range(most) if i not in special] or list(range(most))
    step = max(1, len(ordinary) // (positions + 1))
    ids = [ordinary[(i * step) % len(ordinary)] for i in range(positions + 1)]
    return torch.tensor([ids[:-1], [*ids[:-2], ids[-1]]], dtype=torch.int64)


def try_blocks(
    blocks: Iterable[nn.Module],
    run: Callable[[], None],
    title: str,
    shape: Sequence[int],
    head: bool,
) -> list[BlockRun]:
    """Returns what each block does in a pass over two contexts that differ in their last token.

    Args:
        run: runs the pass.
        title: of the model, for messages.
        shape: number of contexts and positions.
        head: whether the model predicts the next token.

    Raises: SourceError when the model does not run on text alone, has blocks of another kind, or
        predicts tokens from later ones.
    """
    with watch_blocks(blocks) as runs:
        try:
            run()
        except (SaelabError, MemoryError):
            raise
        except Exception as error:  # a model of another kind raises anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            problem = f"{title} does not run on text alone ({reason})"
            remedy = "name a causal language model or a text encoder"
            raise SourceError(f"{problem}: {remedy}") from error
    for i, block in enumerate(runs):
        if len(block.shape) != 3 or block.shape[:2] != list(shape):
            output = f"an output of shape {block.shape}" if block.shape else "no output"
            problem = f"{title}: block {i} has {output}, not [contexts, positions, d]"
            raise SourceError(f"{problem}: name a model with a plain list of layers")
    if head and _sees_later_tokens(runs[-1]):
        problem = f"{title} predicts the next token, but its positions see later ones"
        remedy = "set is_decoder to true in its config.json, or name a causal language model"
        raise SourceError(f"{problem}: {remedy}")
    return [replace(block, output=None) for block in runs]


def _sees_later_tokens(last: BlockRun) -> bool:
    """Returns whether the last token changed what the positions before it give."""
    if last.output is None:
        return False
    one, other = last.output[:, :-1].double()
    tolerance = torch.finfo(last.output.dtype).eps ** 0.5
    return float((one - other).norm()) > tolerance * float(one.norm())


@contextmanager
def watch_blocks(blocks: Iterable[nn.Module]) -> Iterator[list[BlockRun]]:
    """Fills a `BlockRun` for each block that a pass within the context runs."""
    runs: list[BlockRun] = []
    handles: list[Any] = []
    try:
        for block in blocks:
            runs.append(BlockRun())
            handles += _watch(block, runs[-1])
        yield runs
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Call:
    """One call of a module: copies of its first input and output, which later code may change."""

    path: str
    input: Tensor | None
    output: Tensor


def _watch(block: nn.Module, run: BlockRun) -> list[Any]:
    """Registers the hooks of one block; returns their handles."""
    pre: list[Tensor] = []
    calls: list[_Call] = []

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor) and not pre:
            pre.append(x.clone())

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            y = first_tensor(output)
            y = None if y is None or not pre else with_contexts(y, pre[0].shape[:2])
            if y is not None and y.shape == pre[0].shape:
                x = first_tensor(args)
                x = None if x is None or x.shape != y.shape else x.clone()
                calls.append(_Call(path, x, y.clone()))

        return hook

    def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        post = first_tensor(output)
        if post is None or run.shape:
            return
        run.shape = list(post.shape)
        if pre and post.shape == pre[0].shape:
            run.output = post.clone()
            run.attention, run.mlp = _find_branches(pre[0], calls, run.output)
            run.mlp_in = _find_mlp(calls, run.mlp)
        calls.clear()

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True)]
    for path, module in block.named_modules():
        if path:
            handles.append(module.register_forward_hook(note(path), with_kwargs=True))
    return [*handles, block.register_forward_hook(leave, with_kwargs=True)]


def first_tensor(output: Any) -> Tensor | None:
    """Returns a module's output, or its first entry; None if that is not a tensor."""
    x = output[0] if isinstance(output, (tuple, list)) and output else output
    return x if isinstance(x, Tensor) else None


def _find_branches(pre: Tensor, calls: list[_Call], post: Tensor) -> tuple[str, str]:
    """Returns the paths of the modules that give the attention's and the MLP's summand; "" where
    none does."""
    attention = _ranked([call for call in calls if _is_attention(call.path)], ATTENTION)
    others = _ranked([call for call in calls if not _is_attention(call.path)], MLP)
    for mlp in others:
        for one in attention:
            if _close([pre, one.output, mlp.output], post) or _normed(pre, one, mlp, calls, post):
                return one.path, mlp.path
    for mlp in others:  # a layer of another kind in place of attention
        if mlp.path in MLP and any(_close([pre, o.output, mlp.output], post) for o in others):
            return "", mlp.path
    return "", ""


def _find_mlp(calls: list[_Call], summand: str) -> str:
    """Returns the path of the MLP as a whole, "" where no module is it.

    It gives the summand itself, or the input of the norm that gives it (Gemma 2), or contains the
    module that gives it (Bloom, whose MLP adds the stream).

    Args:
        summand: path of the module that gives what the MLP adds; "" if none does.
    """
    normed = [call.input for call in calls if call.path == summand and call.input is not None]
    for call in _ranked([call for call in calls if call.path in MLP], MLP):
        if call.path == LAST_LAYER or call.input is None or not summand:
            continue
        inside = summand.startswith(f"{call.path}.")
        if call.path == summand or inside or any(torch.equal(call.output, x) for x in normed):
            return call.path
    return ""


def _is_attention(path: str) -> bool:
    return "attn" in path or "attention" in path


def _ranked(calls: list[_Call], names: Sequence[str]) -> list[_Call]:
    """Sorts calls: the usual names first, then by depth."""

    def rank(call: _Call) -> tuple[int, int]:
        usual = names.index(call.path) if call.path in names else len(names)
        return usual, call.path.count(".")

    return sorted(calls, key=rank)


def _normed(pre: Tensor, attention: _Call, mlp: _Call, calls: list[_Call], post: Tensor) -> bool:
    """Returns whether a norm follows each sum, as in this module's second equation."""
    last = [c.input for c in calls if torch.equal(c.output, post)]
    firsts = [c for c in calls if c.input is not None and _close([pre, attention.output], c.input)]
    return any(
        end is not None and _close([first.output, mlp.output], end)
        for first in firsts
        for end in last
    )


def _close(summands: list[Tensor], total: Tensor) -> bool:
    """Returns whether the summands make up the total, up to rounding in its dtype."""
    wide = [x.double() for x in summands]
    size = sum((x.abs() for x in wide), total.double().abs())
    gap = (sum(wide[1:], wide[0]) - total.double()).abs()
    return bool((gap <= ROUNDING * torch.finfo(total.dtype).eps * size).all())
