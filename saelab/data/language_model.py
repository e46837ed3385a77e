"""Language model with hook points: activations without logits, and losses with a splice.

    activations: ids -> x_hook [contexts, positions, d]; the forward pass ends at the last hook.
    losses:      loss[c, p] = -log softmax(logits[c, p])[ids[c, p + 1]], with x_hook replaced by
                 fn(x_hook) when a splice is given.

`hook_names` lists the names of hook points. `hook_attn_out` and `hook_mlp_out` sum up with the
input of the block to its output (in BERT, to the inputs of its norms). The modules that give them
are found when the model is loaded, see `model_trial`; where no module does, they are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from saelab.config import Frozen
from saelab.data.devices import check_device
from saelab.data.hook_names import (
    BLOCK_HOOKS,
    block_and_kind,
    blocks_before,
    blocks_run,
    module_and_side,
)
from saelab.data.hub import hide_progress_bars, silence_loggers
from saelab.data.model_files import (
    check_loaded_weights,
    check_stored_weights,
    fit_tokenizer,
    folder_digest,
    load_error,
    read_settings,
)
from saelab.data.model_hooks import (
    HookPoint,
    check_shape,
    keep_shape_and_dtype,
    run_hooks,
    skip_modules,
)
from saelab.data.model_location import locate_model
from saelab.data.model_structure import (
    embedding_rows,
    find_blocks,
    longest_context,
    path_of,
    token_settings,
)
from saelab.data.model_trial import POSITIONS, BlockRun, trial_ids, try_blocks
from saelab.errors import SaelabError, SettingError, SourceError, nearest
from saelab.runtime.panics import panics_as_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LanguageModel", "ModelConfig", "Size", "Splices", "Start", "blocks_run", "load", "size"]

#: Hook point -> the function that replaces its activation: float32 [contexts, positions, d] -> the
#: same shape.
Splices = Mapping[str, Callable[[Tensor], Tensor]]


class ModelConfig(Frozen):
    """Choice of a language model, and how it is run.

    Args:
        path: 'embedded', a local folder, a name on the hub, or 'package:name' for the model in an
            installed Python package.
        dtype: dtype of weights and activations while it runs.
        revision: branch, tag or commit on the hub.
        device: 'cpu', 'cuda', 'cuda:1' ... (nothing has run on a GPU yet).
    """

    always_shown: ClassVar[frozenset[str]] = frozenset({"path"})

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

    Raises: SourceError when it does not run on text alone, or predicts tokens from later ones.
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
        self.max_context = longest_context(model)
        self.vocabulary = embedding_rows(model)
        self.blocks = find_blocks(model, self.n_layers)
        self.block_runs = self._try()

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
        twin.blocks = find_blocks(twin.model, twin.n_layers)
        return twin

    def hook_point(self, name: str) -> HookPoint:
        """Returns the place that a hook name denotes.

        Raises: SettingError for an unknown name or a block that does not exist.
        """
        place = block_and_kind(name)
        if place is None:
            modules = dict(self.model.named_modules())
            path, side = (name, "output") if name in modules else module_and_side(name)
            if path and path in modules:
                return HookPoint(name, modules[path], side)
            names = [*modules, *self.block_hook_names()]
            remedy = f"no such hook point{nearest(name, names)}; use blocks.N.hook_resid_post with "
            raise SettingError("hook_name", name, f"{remedy}N from 0 to {self.n_layers - 1}")
        layer, kind = place
        if kind not in BLOCK_HOOKS:
            remedy = f"no {kind}{nearest(kind, BLOCK_HOOKS)}; use {', '.join(BLOCK_HOOKS)}"
            raise SettingError("hook_name", name, remedy)
        if layer >= self.n_layers:
            last = f"blocks.{self.n_layers - 1}.{kind}"
            remedy = f"the model has {self.n_layers} layers, counted from 0: the last is {last}"
            raise SettingError("hook_name", name, remedy)
        return self._block_point(name, layer, kind)

    def hook_identity(self, name: str) -> dict[str, str]:
        """Returns the module that gives the activations, if their name alone does not say it."""
        self.hook_point(name)
        place = block_and_kind(name)
        path = self.block_runs[place[0]].path(place[1]) if place else ""
        return {"hook_module": path} if path else {}

    def block_hook_names(self) -> list[str]:
        """Returns the names of all hook points that belong to a block."""
        return [f"blocks.{n}.{kind}" for n in range(self.n_layers) for kind in BLOCK_HOOKS]

    def _block_point(self, name: str, layer: int, kind: str) -> HookPoint:
        block = self.blocks[layer]
        if kind in ("hook_resid_pre", "hook_resid_post"):
            return HookPoint(name, block, "input" if kind == "hook_resid_pre" else "output")
        path, side = self.block_runs[layer].path(kind), "input" if "hook_in" in kind else "output"
        if path:
            return HookPoint(name, block.get_submodule(path), side)
        place = f"{path_of(self.model, self.blocks)}.{layer}"
        paths = ", ".join(f"{place}.{child}" for child, _ in block.named_children())
        gives = "has the MLP's input" if side == "input" else "gives what is added to the stream"
        remedy = f"no module of this block {gives}: name one of {paths}"
        raise SettingError("hook_name", name, remedy)

    @torch.inference_mode()
    def _try(self) -> list[BlockRun]:
        """Runs two short contexts; returns what each block did, raises as this class."""
        special = [*self.tokenizer.all_special_ids, *token_settings(self.model.config)]
        positions = min(POSITIONS, self.max_context or POSITIONS)
        ids = trial_ids(self.vocabulary, special, positions)
        title = f"model {self.config.path} ({type(self.model).__name__})"

        def run() -> None:
            self._body(**self._inputs(ids, None))

        return try_blocks(self.blocks, run, title, ids.shape, self.has_head)

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
                if point.name not in captured:
                    last = len(captured) + 1 == len(points)
                    captured[point.name] = x if last else x.clone()  # later code may change it
                if len(captured) == len(points):
                    raise _Stop

            return hook

        if points:
            with run_hooks({point: capture(point) for point in points}), suppress(_Stop):
                self._body(**self._inputs(ids, attention_mask))
        missed = [point.name for point in points if point.name not in captured]
        if missed:
            raise SettingError("hook_name", missed[0], "the model never runs it on text")
        return {name: check_shape(captured[name], ids, name) for name in dict.fromkeys(hooks)}

    @torch.inference_mode()
    def start(self, ids: Tensor, attention_mask: Tensor | None, hook_name: str) -> Start | None:
        """Computes the start of a pass with a splice at `hook_name`; None if it is the beginning.

        Memory: contexts x positions x d numbers in the model's dtype, on its device.
        Raises: SettingError for an unknown name.
        """
        self.hook_point(hook_name)
        blocks = blocks_before(hook_name)
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

    def logits(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        splice: Splices | None = None,
        start: Start | None = None,
        gradient: bool = False,
    ) -> Tensor:
        """Computes the next-token logits [contexts, positions, vocabulary] in the model's dtype.

        Args:
            ids: int64 [contexts, positions].
            attention_mask: bool [contexts, positions], False on padding; None for full contexts.
            splice: what replaces activations, at one or several hook points.
            start: result of `start` for the same contexts and the first of these hook points; the
                blocks before it are left out. See `starts_agree`.
            gradient: records the graph back to what spliced functions return.

        Raises: SourceError when the model has no head.
        """
        if not self.has_head:
            kind = type(self.model).__name__
            raise SourceError(
                f"model {self.config.path} is a {kind} without a language-model head, so it has "
                "no next-token loss: use a causal language model for loss recovered"
            )
        hooks = {
            self.hook_point(name): keep_shape_and_dtype(function, ids.shape)
            for name, function in (splice or {}).items()
        }
        skipped = [] if start is None else self.blocks[: start.blocks]
        output = start.output if start else None
        with (
            torch.inference_mode(not gradient),
            run_hooks(hooks),
            skip_modules(skipped, output),
        ):
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
        splice: Splices | None = None,
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
        """Checks that the model runs on contexts of so many positions, by a pass over one.

        Raises: SettingError when it does not.
        """
        self._check_length(positions)
        row = trial_ids(self.vocabulary, self.tokenizer.all_special_ids, POSITIONS)[0]
        ids = row.repeat(-(-positions // len(row)))[None, :positions]
        try:
            with torch.inference_mode():
                self._body(**self._inputs(ids, None))
        except (SaelabError, MemoryError):
            raise
        except Exception as error:  # an index beyond a table, a mask of another size ...
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            remedy = f"model {self.config.path} does not run on so many positions ({reason})"
            raise SettingError("context", positions, f"{remedy}: lower the context") from error

    def check_ids(self, ids: Tensor) -> None:
        """Raises: SourceError for a token id that the model has no embedding for."""
        most = int(ids.max()) if ids.numel() else 0
        if self.vocabulary is not None and most >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(most)
            raise SourceError(
                f"the text holds the token {token!r} (id {most}), but model {self.config.path} has "
                f"embeddings for {self.vocabulary} ids: take the tokenizer that it was trained "
                "with, or enlarge its embeddings"
            )

    def _check_length(self, positions: int) -> None:
        if self.max_context is not None and positions > self.max_context:
            limit = f"model {self.config.path} takes at most {self.max_context} positions"
            raise SettingError("context", positions, f"{limit}: lower the context")

    def _inputs(self, ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        self._check_length(ids.shape[1])
        self.check_ids(ids)
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask.to(self.device, torch.int64)
        if hasattr(self.model.config, "use_cache"):
            inputs["use_cache"] = False
        return inputs


def next_token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Computes `LanguageModel.losses` from logits [contexts, positions, vocabulary] and tokens."""
    target = ids.to(logits.device)[:, 1:]
    rows = [
        nn.functional.cross_entropy(row[:-1].float(), after, reduction="none")
        for row, after in zip(logits, target, strict=True)
    ]
    return torch.stack(rows)


# ---------------------------------------------------------------- loading


def load(config: ModelConfig) -> LanguageModel:
    """Loads model and tokenizer; weights from safetensors only, never code from the hub.

    Raises: SourceError when the folder is missing or incomplete, or the hub is not reached.
    """
    from transformers import AutoModel, AutoTokenizer

    with _load_errors_as_sentence(config) as path:
        settings, model_class, options = read_settings(config.path, path, config.revision)
        if Path(path).is_dir():
            check_stored_weights(model_class, settings, Path(path))
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model, info = model_class.from_pretrained(
            path,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused with the names and shapes below
            **options,
        )
    layers = int(settings.get_text_config().num_hidden_layers)
    blocks = path_of(model, find_blocks(model, layers))
    check_loaded_weights(config.path, info, blocks, layers)
    fit_tokenizer(tokenizer, embedding_rows(model), config.path)
    folder = Path(path)
    commit = getattr(settings, "_commit_hash", None) or str(config.revision)
    content = folder_digest(folder) if folder.is_dir() else commit
    has_head = model_class is not AutoModel
    model = model.eval().requires_grad_(False).to(config.device)
    return LanguageModel(model, tokenizer, config, content, has_head)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of a model, which is computed without its weights.

    Args:
        weights: bytes of all weights in the dtype in which it runs.
        d_model, inner: width of the residual stream and of the widest layer inside a block.
        vocabulary: number of tokens of the vocabulary.
        blocks: number of blocks.
        attention: width of all queries of a block together.
        has_head: whether it predicts tokens.
    """

    weights: int
    d_model: int
    inner: int
    vocabulary: int
    blocks: int
    attention: int
    has_head: bool = True


def size(config: ModelConfig) -> Size:
    """Computes the size of the model that `load` would load.

    Raises: SourceError when its folder is missing or incomplete, or the hub is not reached.
    """
    with _load_errors_as_sentence(config) as path:
        settings, model_class, _ = read_settings(config.path, path, config.revision)
        with torch.device("meta"):
            model = model_class.from_config(settings)
    text = settings.get_text_config()
    blocks = find_blocks(model, int(text.num_hidden_layers))
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
        has_head=model_class.__name__ != "AutoModel",
    )


@contextmanager
def _load_errors_as_sentence(config: ModelConfig) -> Iterator[str]:
    """Yields the model's folder or hub name; turns errors of loading into one sentence.

    Raises: SourceError in place of the errors of the libraries.
    """
    path = locate_model(config.path)
    check_device(config.device)
    try:
        with silence_loggers(), hide_progress_bars(), panics_as_errors():
            yield path
    except (SaelabError, MemoryError):
        raise
    except Exception as error:  # `transformers` raises any kind for a strange config.json
        raise load_error(config.path, path, error) from error
