"""Language model with hook points: activations without logits, and losses with a splice.

    activations: ids -> x_hook [contexts, positions, d]; the forward pass ends at the last hook.
    losses:      loss[c, p] = -log softmax(logits[c, p])[ids[c, p + 1]], with x_hook replaced by
                 fn(x_hook) when a splice is given.

Hook points of block N, named as in TransformerLens:

    blocks.N.hook_resid_pre    input of the block
    blocks.N.hook_resid_post   output of the block; for the last block, before the final norm
    blocks.N.hook_mlp_out      output of the block's MLP module, before it is added
    blocks.N.hook_attn_out     output of the block's attention module, before it is added

The last two are the outputs of the modules. Gemma-2 norms them once more before they are added, and
TransformerLens takes them after that norm: name `model.layers.N.post_attention_layernorm` or
`...post_feedforward_layernorm` for it. In BERT they are taken before dropout, addition and norm.
Any other module is named by its path in `model.named_modules()`; its output is taken.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from saelab.config import Frozen
from saelab.data.hub import hide_progress_bars, silence_loggers
from saelab.data.model_files import (
    check_counts,
    check_stored_weights,
    folder_digest,
    load_error,
    locate_model,
)
from saelab.data.model_hooks import HookPoint, keep_shape_and_dtype, run_hooks, skip_modules
from saelab.errors import SaelabError, SettingError, SourceError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Endings of architecture names that have a next-token head.
HEADS = ("ForCausalLM", "LMHeadModel")
BLOCK_HOOKS = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out")
_BLOCK = re.compile(r"blocks\.(\d+)\.(hook_\w+)")
#: Names of a block's attention and MLP in the model families; the first that exists is used. The
#: dotted ones are BERT's, whose modules with the plain names add the residual themselves.
_ATTENTION = ("attention.output.dense", "self_attn", "attention", "attn", "self_attention")
_MLP = ("mlp", "output.dense", "feed_forward", "ffn", "block_sparse_moe")


class ModelConfig(Frozen):
    """Choice of a language model, and how it is run.

    Args:
        path: 'embedded', a local folder, a name on the hub, or 'package:name' for the model in an
            installed Python package.
        dtype: dtype of weights and activations while it runs.
        revision: branch, tag or commit on the hub.
        device: 'cpu', 'cuda', 'cuda:1' ... (nothing has run on a GPU yet).
    """

    path: str = "embedded"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Start:
    """Output of the first blocks for given contexts, at which another pass over them can start.

    Args:
        blocks: number of blocks that such a pass leaves out.
        output: output of the last of them, in the form that the model's code uses.
    """

    blocks: int
    output: Any


class _Stop(Exception):
    """Ends a forward pass when the last hooked place has been reached."""


class LanguageModel:
    """A transformers model with named hook points; built by `load`.

    Args:
        model: the model in evaluation mode.
        tokenizer: its tokenizer.
        config: settings from which it was loaded.
        digest: content hash of its files, or the commit on the hub.
        has_head: whether it predicts the next token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: ModelConfig,
        digest: str,
        has_head: bool,
    ) -> None:
        text = model.config.get_text_config()
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.digest, self.has_head = digest, has_head
        self.n_layers = int(text.num_hidden_layers)
        self.d_model = int(text.hidden_size)
        self.max_context: int | None = getattr(text, "max_position_embeddings", None)
        self.blocks = _find_blocks(model, self.n_layers)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def twin(self) -> LanguageModel:
        """Returns a model with the same weights, not copied, but its own hooks.

        Both may run at the same time.
        """
        weights = chain(self.model.parameters(), self.model.buffers())
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model, {id(weight): weight for weight in weights})
        twin.blocks = _find_blocks(twin.model, twin.n_layers)
        return twin

    def hook_point(self, name: str) -> HookPoint:
        """Returns the place that a hook name denotes.

        Raises: SettingError for an unknown name or a block that does not exist.
        """
        match = _BLOCK.fullmatch(name)
        if match is None:
            modules = dict(self.model.named_modules())
            if name and name in modules:
                return HookPoint(name, modules[name], "output")
            names = [*modules, *self.block_hook_names()]
            remedy = f"no such hook point{nearest(name, names)}; use blocks.N.hook_resid_post with "
            raise SettingError("hook_name", name, f"{remedy}N from 0 to {self.n_layers - 1}")
        layer, kind = int(match[1]), match[2]
        if kind not in BLOCK_HOOKS:
            remedy = f"no {kind}{nearest(kind, BLOCK_HOOKS)}; use {', '.join(BLOCK_HOOKS)}"
            raise SettingError("hook_name", name, remedy)
        if layer >= self.n_layers:
            last = f"blocks.{self.n_layers - 1}.{kind}"
            remedy = f"the model has {self.n_layers} layers, counted from 0: the last is {last}"
            raise SettingError("hook_name", name, remedy)
        return self._block_point(name, self.blocks[layer], kind)

    def block_hook_names(self) -> list[str]:
        """Returns the names of all hook points that belong to a block."""
        return [f"blocks.{n}.{kind}" for n in range(self.n_layers) for kind in BLOCK_HOOKS]

    def _block_point(self, name: str, block: nn.Module, kind: str) -> HookPoint:
        if kind in ("hook_resid_pre", "hook_resid_post"):
            return HookPoint(name, block, "input" if kind == "hook_resid_pre" else "output")
        inside = dict(block.named_modules())
        candidates = _ATTENTION if kind == "hook_attn_out" else _MLP
        for candidate in candidates:
            if candidate in inside:
                return HookPoint(name, inside[candidate], "output")
        children = ", ".join(n for n, _ in block.named_children())
        remedy = f"this model's blocks have {children}: name one by its module path"
        raise SettingError("hook_name", name, remedy)

    # ------------------------------------------------------------ running

    @torch.inference_mode()
    def activations(
        self, ids: Tensor, attention_mask: Tensor | None, hooks: Sequence[str]
    ) -> dict[str, Tensor]:
        """Computes the activations at the hook points; no layer after the last one runs, no head.

        Args:
            ids: int64 [contexts, positions].
            attention_mask: bool [contexts, positions], False on padding; None for full contexts.
            hooks: names of hook points; several share one pass.

        Returns: for each name [contexts, positions, d] in the model's dtype, on its device; they
            are inference tensors, so clone before recording a graph.
        Raises: SettingError for an unknown name or a place that the pass never reaches.
        """
        points = [self.hook_point(name) for name in dict.fromkeys(hooks)]
        captured: dict[str, Tensor] = {}

        def capture(point: HookPoint) -> Callable[[Tensor], None]:
            def hook(x: Tensor) -> None:
                captured.setdefault(point.name, x)
                if len(captured) == len(points):
                    raise _Stop

            return hook

        if points:
            with run_hooks({point: capture(point) for point in points}), suppress(_Stop):
                self._body(**self._inputs(ids, attention_mask))
        missed = [point.name for point in points if point.name not in captured]
        if missed:
            raise SettingError("hook_name", missed[0], "the model never runs it on text")
        return {name: _check_shape(captured[name], ids, name) for name in dict.fromkeys(hooks)}

    @torch.inference_mode()
    def start(self, ids: Tensor, attention_mask: Tensor | None, hook_name: str) -> Start | None:
        """Computes the start of a pass with a splice at `hook_name`; None if it is the beginning.

        Memory: contexts x positions x d numbers in the model's dtype, on its device.
        Raises: SettingError for an unknown name.
        """
        self.hook_point(hook_name)
        blocks = _blocks_before(hook_name)
        if blocks == 0:
            return None
        outputs: list[Any] = []

        def capture(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)
            raise _Stop

        handle = self.blocks[blocks - 1].register_forward_hook(capture)
        try:
            with suppress(_Stop):
                self._body(**self._inputs(ids, attention_mask))
        finally:
            handle.remove()
        return Start(blocks, outputs[0]) if outputs else None

    @torch.inference_mode()
    def logits(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        splice: tuple[str, Callable[[Tensor], Tensor]] | None = None,
        start: Start | None = None,
    ) -> Tensor:
        """Computes the next-token logits [contexts, positions, vocabulary] in the model's dtype.

        Args:
            ids: int64 [contexts, positions].
            attention_mask: bool [contexts, positions], False on padding; None for full contexts.
            splice: a hook point and the function that replaces its activation: float32
                [contexts, positions, d] -> the same shape.
            start: result of `start` for the same contexts and the splice's hook point; the blocks
                before it are left out. See `starts_agree`.

        Raises: SourceError when the model has no head.
        """
        if not self.has_head:
            kind = type(self.model).__name__
            raise SourceError(
                f"model {self.config.path} is a {kind} without a language-model head, so it has "
                "no next-token loss: use a causal language model for loss recovered"
            )
        hooks = {}
        if splice is not None:
            hooks[self.hook_point(splice[0])] = keep_shape_and_dtype(splice[1])
        skipped = [] if start is None else self.blocks[: start.blocks]
        with run_hooks(hooks), skip_modules(skipped, start.output if start else None):
            return self.model(**self._inputs(ids, attention_mask)).logits

    def starts_agree(self, ids: Tensor, attention_mask: Tensor | None, hook_name: str) -> bool:
        """Returns whether leaving out the blocks before a hook point gives the same bits.

        It does unless later blocks use more of them than their output, such as shared keys.
        """
        start = self.start(ids, attention_mask, hook_name)
        if start is None:
            return False
        shorter = self.logits(ids, attention_mask, start=start)
        return torch.equal(shorter, self.logits(ids, attention_mask))

    @torch.inference_mode()
    def losses(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        splice: tuple[str, Callable[[Tensor], Tensor]] | None = None,
        start: Start | None = None,
    ) -> Tensor:
        """Computes next-token losses in nats, float32 [contexts, positions - 1].

        Entry p is the loss of token p + 1. The arguments are those of `logits`. Losses of padding
        and special targets are included: remove them with `mask[:, 1:]`. Memory: contexts x
        positions x vocabulary numbers.
        """
        return next_token_losses(self.logits(ids, attention_mask, splice, start), ids)

    @property
    def _body(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model

    def check_context(self, positions: int) -> None:
        """Raises: SettingError when the model does not support so many positions."""
        if self.max_context is not None and positions > self.max_context:
            limit = f"model {self.config.path} takes at most {self.max_context} positions"
            raise SettingError("context", positions, f"{limit}: lower the context")

    def _inputs(self, ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        self.check_context(ids.shape[1])
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask.to(self.device, torch.int64)
        if hasattr(self.model.config, "use_cache"):
            inputs["use_cache"] = False
        return inputs


def blocks_run(hook_name: str, blocks: int) -> int:
    """Returns the number of blocks that a pass runs to reach the hook point.

    These are all blocks for any other module, because its name does not show its block.
    """
    match = _BLOCK.fullmatch(hook_name)
    return min(blocks, int(match[1]) + (match[2] != "hook_resid_pre")) if match else blocks


def next_token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Computes `LanguageModel.losses` from logits [contexts, positions, vocabulary] and tokens."""
    target = ids.to(logits.device)[:, 1:]
    rows = [
        nn.functional.cross_entropy(row[:-1].float(), after, reduction="none")
        for row, after in zip(logits, target, strict=True)
    ]
    return torch.stack(rows)


def _blocks_before(hook_name: str) -> int:
    """Returns the number of blocks that are finished when the hook point is reached."""
    match = _BLOCK.fullmatch(hook_name)
    return int(match[1]) + (match[2] == "hook_resid_post") if match else 0


def _check_shape(x: Tensor, ids: Tensor, name: str) -> Tensor:
    """Returns x; raises SettingError unless its shape is [contexts, positions, d]."""
    if x.dim() != 3 or x.shape[:2] != ids.shape:
        shape = f"its output has shape {list(x.shape)}, not [contexts, positions, d]"
        raise SettingError("hook_name", name, f"{shape}: name another module")
    return x


def _find_blocks(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """Returns the blocks: of the module lists with `n_layers` entries the one with most weights.

    Raises: SourceError when there is no such list.
    """
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not lists:
        raise SourceError(
            f"{type(model).__name__} has no list of {n_layers} blocks: only models with a plain "
            "list of layers can be hooked"
        )
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


# ---------------------------------------------------------------- loading


def load(config: ModelConfig) -> LanguageModel:
    """Loads model and tokenizer; weights from safetensors only, never code from the hub.

    Raises: SourceError when the folder is missing or incomplete, or the hub is not reached.
    """
    from transformers import AutoTokenizer

    with _load_errors_as_sentence(config) as path:
        settings, model_class, options = _read_settings(config, path)
        if Path(path).is_dir():
            check_stored_weights(model_class, settings, Path(path))
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model, info = model_class.from_pretrained(
            path,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise SourceError(
            f"model {config.path} lacks {len(missing)} weights (the first is {missing[0]!r}): "
            "complete its folder or download it again"
        )
    folder = Path(path)
    commit = getattr(settings, "_commit_hash", None) or str(config.revision)
    content = folder_digest(folder) if folder.is_dir() else commit
    has_head = _has_head(settings)
    return LanguageModel(model.eval().to(config.device), tokenizer, config, content, has_head)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of a model, which is computed without its weights.

    Args:
        weights: bytes of all weights in the dtype in which it runs.
        d_model, inner: width of the residual stream and of the widest layer inside a block.
        vocabulary: number of tokens of the vocabulary.
        blocks: number of blocks.
        attention: width of all queries of a block together.
    """

    weights: int
    d_model: int
    inner: int
    vocabulary: int
    blocks: int
    attention: int


def size(config: ModelConfig) -> Size:
    """Computes the size of the model that `load` would load.

    Raises: SourceError when its folder is missing or incomplete, or the hub is not reached.
    """
    with _load_errors_as_sentence(config) as path:
        settings, model_class, _ = _read_settings(config, path)
        with torch.device("meta"):
            model = model_class.from_config(settings)
    text = settings.get_text_config()
    blocks = _find_blocks(model, int(text.num_hidden_layers))
    heads = int(getattr(text, "num_attention_heads", 1))
    head = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return Size(
        weights=sum(weight.numel() for weight in model.parameters())
        * getattr(torch, config.dtype).itemsize,
        d_model=int(text.hidden_size),
        inner=max(max(weight.shape) for weight in blocks[0].parameters()),
        vocabulary=int(text.vocab_size),
        blocks=len(blocks),
        attention=heads * head,
    )


@contextmanager
def _load_errors_as_sentence(config: ModelConfig) -> Iterator[str]:
    """Yields the model's folder or hub name; turns errors of loading into one sentence.

    Raises: SourceError in place of the errors of the libraries.
    """
    path = locate_model(config.path)
    check_device(config.device)
    try:
        with silence_loggers(), hide_progress_bars():
            yield path
    except (SaelabError, MemoryError):
        raise
    except Exception as error:  # `transformers` raises any kind for a strange config.json
        raise load_error(config.path, path, error) from error


def _read_settings(config: ModelConfig, path: str) -> tuple[Any, Any, dict[str, Any]]:
    """Reads a model's settings; returns them, the model's class, and options for all readers."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": False}
    if config.revision is not None:
        options["revision"] = config.revision
    settings = AutoConfig.from_pretrained(path, **options)
    check_counts(settings)
    return settings, AutoModelForCausalLM if _has_head(settings) else AutoModel, options


def _has_head(settings: Any) -> bool:
    """Returns whether the model predicts the next token."""
    names = getattr(settings, "architectures", None) or []
    return any(name.endswith(HEADS) for name in names)


def check_device(name: str, setting: str = "model.device") -> None:
    """Raises: SettingError for a device that this machine does not have."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingError(setting, name, "no such device: use 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(setting, name, "this machine has no CUDA device: use 'cpu'")
