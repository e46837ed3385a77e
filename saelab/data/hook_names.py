"""Names of hook points: which block they belong to, and how far a pass must run to reach them.

    blocks.N.hook_resid_pre    input of the block
    blocks.N.hook_resid_post   output of the block; for the last block, before the final norm
    blocks.N.hook_attn_out     what attention adds to the stream
    blocks.N.hook_mlp_out      what the MLP adds to the stream
    blocks.N.mlp.hook_in       input of the MLP, after the norm before it
    PATH, PATH.output          output of the module with this path in `model.named_modules()`
    PATH.input                 input of that module

The names of a block are those of TransformerLens; `mlp.hook_in` is that of its bridge, because
`hook_mlp_in` means the stream before the norm there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

BLOCK_HOOKS = (
    "hook_resid_pre",
    "hook_resid_post",
    "hook_mlp_out",
    "hook_attn_out",
    "mlp.hook_in",
)
_BLOCK = re.compile(r"blocks\.(\d+)\.((?:mlp\.|attn\.)?hook_\w+)")


def block_and_kind(hook_name: str) -> tuple[int, str] | None:
    """Returns the block's number and the kind of the place in it; None for another module."""
    match = _BLOCK.fullmatch(hook_name)
    return (int(match[1]), match[2]) if match else None


def module_and_side(hook_name: str) -> tuple[str, Literal["input", "output"]]:
    """Returns the path of a module and the side that a name with a suffix denotes."""
    if hook_name.endswith(".input"):
        return hook_name.removesuffix(".input"), "input"
    return hook_name.removesuffix(".output"), "output"


def blocks_run(hook_name: str, blocks: int) -> int:
    """Returns the number of blocks that a pass runs to reach the hook point.

    These are all blocks for any other module, because its name does not show its block.
    """
    place = block_and_kind(hook_name)
    return min(blocks, place[0] + (place[1] != "hook_resid_pre")) if place else blocks


def blocks_before(hook_name: str) -> int:
    """Returns the number of blocks that are finished when the hook point is reached."""
    place = block_and_kind(hook_name)
    return place[0] + (place[1] == "hook_resid_post") if place else 0


#: Words between the hook points of one side, and between input and target, in `describe_hooks`.
_AND, _TO = ", ", " -> "


def describe_hooks(inputs: Sequence[str], targets: Sequence[str] = ()) -> str:
    """Returns 'a', 'a, b' or 'a -> b': the hook points that are read, and those of a target."""
    return _TO.join(_AND.join(group) for group in (inputs, targets) if group)


def split_hooks(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the hook points that are read and those of a target from `describe_hooks`."""
    read, _, written = text.partition(_TO)
    inputs, targets = (tuple(side.split(_AND)) if side else () for side in (read, written))
    return inputs, targets
