"""An SAE inside a transformers model: reads its code, edits it, and puts the result in place of the
activation.

    error=False    y is replaced by x_hat(f'), f' the edited code: without an edit the splice of the
                   evaluation (`saelab.evals.splices`), bit for bit
    error=True     y is replaced by y + x_hat(f') - x_hat(f): without an edit y itself, bit for bit,
                   because the difference is computed as (f' - f) W_dec

y is the activation x that the SAE reads or, of a transcoder, that at its target's hook point.
Tokens that evaluations do not count (special ones and padding) stay as they are.

Gradients go through the SAE: to its code, and through it to what comes before in the model. The
error y - x_hat(f) is a constant in them, as in Marks et al. 2024 (sparse feature circuits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saelab import formats
from saelab.analysis.code_edits import (
    Edit,
    Positions,
    check_latent,
    check_value,
    parse_positions,
)
from saelab.analysis.code_gradient import (
    code_with_gradient,
    difference,
    frozen_twin,
    reconstruction,
    with_value,
)
from saelab.analysis.host_model import (
    NoTokenizer,
    as_language_model,
    check_origin,
    check_places,
    generate_text,
    modules_around,
    name_of,
    wrong_width,
)
from saelab.data.hook_names import split_hooks
from saelab.data.language_model import LanguageModel
from saelab.data.model_hooks import keep_shape_and_dtype, run_hooks
from saelab.data.text.tokens import counted_positions, decode_token, tokenize_texts
from saelab.errors import SettingError
from saelab.evals.core_data import reconstruct
from saelab.evals.splices import splice_counted
from saelab.runtime.counting import count
from saelab.sae import SAE

#: The longest text of a model that says no limit.
LONGEST = 1 << 16


@dataclass(frozen=True, eq=False)
class TextCode:
    """Code of one text.

    Args:
        tokens: its tokens as text, the first one being that which begins a context.
        ids: int64 [positions].
        code: float32 [positions, d_sae]; 0 at special tokens, which are not read.
    """

    tokens: list[str]
    ids: Tensor
    code: Tensor


@dataclass(eq=False)
class _Pass:
    """State of one forward pass.

    Args:
        mask: where a position counts, bool [contexts, positions], on the CPU.
        first: position in the text of its first column; above 0 where a cache holds the others.
        made: rows that replace those of each target, or are added to them; None before they are
            computed.
        ids: token ids, int64 [contexts, positions]; None for embeddings.
        code: before edits, [n, d_sae]; None where it is not recorded.
    """

    mask: Tensor
    first: int
    ids: Tensor | None
    made: tuple[_Replacement, ...] | None = None
    code: Tensor | None = None

    def goes_on(self, ids: Tensor | None, given: Tensor) -> bool:
        """Returns True where a part of the model that gets ids, or embeddings, belongs to this
        pass: the hook is not reached yet, and the ids are the same."""
        same = ids is None or ids is self.ids
        return self.made is None and same and given.shape[:2] == self.mask.shape

    def positions(self) -> Tensor:
        """Positions of the counted rows, int64 [n]."""
        columns = torch.arange(self.first, self.first + self.mask.shape[1])
        return columns.expand(self.mask.shape)[self.mask]


@dataclass(frozen=True, eq=False)
class _Replacement:
    """Rows [n, d]: `value` in place of the activation or, with the error, added to it; the
    gradient is that of `graph`, where there is one."""

    value: Tensor
    graph: Tensor | None
    added: bool

    def at(self, y: Tensor, starts: Tensor) -> Tensor:
        """Replaces the counted rows y [n, d]."""
        value = y + self.value if self.added else self.value
        return value if self.graph is None else with_value(value, self.graph)


class Attached:
    """An SAE in a model; see this module. Made by `attach`.

    Args:
        model: with hook points.
        sae: as given.
        hook: hook point that is read.
        targets: hook points that are replaced.
        error: whether the error of the reconstruction stays in the model.
    """

    def __init__(
        self, model: LanguageModel, sae: SAE, hook: str, targets: Sequence[str], error: bool
    ) -> None:
        self.model, self.sae, self.hook, self.targets = model, sae, hook, tuple(targets)
        self.error, self.record = error, False
        self.edits: list[Edit] = []
        self._twin = frozen_twin(sae, model.device)
        self._pass: _Pass | None = None
        self._inside = False

    def __repr__(self) -> str:
        place = " -> ".join(dict.fromkeys((self.hook, ", ".join(self.targets))))
        size, edits = count(self.sae.d_sae, "latent"), count(len(self.edits), "edit")
        return f"Attached({place}, {size}, {edits}, error={self.error})"

    # ---- edits -------------------------------------------------------------------------------

    def scale(self, latent: int, by: float, positions: Positions = None) -> Attached:
        """Multiplies a latent at positions (all by default); returns itself."""
        return self._edit("scale", latent, by, positions)

    def ablate(self, latent: int, positions: Positions = None) -> Attached:
        """Sets a latent to 0 at positions (all by default); returns itself."""
        return self._edit("set", latent, 0.0, positions)

    def set(self, latent: int, value: float, positions: Positions = None) -> Attached:
        """Sets a latent to a value, in the unit of the code; returns itself."""
        return self._edit("set", latent, value, positions)

    def add(self, latent: int, value: float, positions: Positions = None) -> Attached:
        """Adds a value to a latent, in the unit of the code, also where it is not active; returns
        itself."""
        return self._edit("add", latent, value, positions)

    def clear(self) -> Attached:
        """Removes all edits; returns itself."""
        self.edits.clear()
        return self

    def _edit(self, kind: Any, latent: int, value: float, positions: Positions) -> Attached:
        edit = Edit(
            latent=check_latent(latent, self.sae.d_sae),
            kind=kind,
            value=check_value(value),
            positions=parse_positions(positions),
        )
        self.edits.append(edit)
        return self

    # ---- text --------------------------------------------------------------------------------

    def encode_text(self, text: str) -> Tensor:
        """Returns the token ids of a text, int64 [1, positions], after the token that begins a
        context."""
        if not self._inside:
            remedy = "has ended, and the SAE is out of the model: use it inside its with block"
            raise SettingError("attach", self.hook, remedy)
        longest = (self.model.max_context or LONGEST) + 1
        ids, attention, _ = tokenize_texts([text], self._tokenizer, longest)
        return ids[:, : int(attention.sum())].to(self.model.device)

    def codes(self, text: str) -> TextCode:
        """Computes the code of a text, before edits of this SAE."""
        ids = self.encode_text(text)
        with torch.no_grad(), self._recording():
            self.model.model.base_model(input_ids=ids)
            code = self.code
        return self._of_text(ids, code)

    def attribution(self, text: str, metric: Callable[[Tensor], Tensor]) -> TextCode:
        """Attributes a metric of the logits to latents: f_i * d metric / d f_i, a first-order
        estimate of what the metric loses without the latent at that position.

        Args:
            text: one text.
            metric: logits [positions, vocabulary] -> 0-dim tensor.
        """
        ids = self.encode_text(text)
        with torch.enable_grad(), self._recording():
            value = metric(self.model.logits(ids, gradient=True)[0])
            if not self._state.mask.any():
                raise SettingError("text", text, "has no token that counts: give another")
            if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
                remedy = "return one number computed from the logits, such as logits[-1, 7]"
                raise SettingError("metric", type(value).__name__, remedy)
            state = self._state
            assert state.code is not None
            (gradient,) = torch.autograd.grad(value, state.code, allow_unused=True)
            gradient = torch.zeros_like(state.code) if gradient is None else gradient
            scores = self._at_positions(state, (state.code * gradient).detach())
        return self._of_text(ids, scores)

    def generate(self, prompt: str, tokens: int = 40, cache: bool = True) -> str:
        """Continues a prompt by the most likely tokens; returns the text with the prompt.

        Args:
            tokens: at most so many new ones.
            cache: stores keys and values, so that each step computes only the new position.
        """
        ids = self.encode_text(prompt)
        return generate_text(self.model, ids, tokens, cache and not self.sae.needs_contexts)

    @property
    def code(self) -> Tensor:
        """Code before edits of the last pass with `record` set, float32 [contexts, positions,
        d_sae]; 0 at positions that do not count."""
        state = self._state
        if state.code is None:
            raise SettingError("record", self.record, "set it to True before the model runs")
        return self._at_positions(state, state.code)

    @property
    def _tokenizer(self) -> Any:
        if isinstance(self.model.tokenizer, NoTokenizer):
            remedy = "a text needs one: give attach(..., tokenizer=...), or run the model on ids"
            raise SettingError("tokenizer", None, remedy)
        return self.model.tokenizer

    @property
    def _state(self) -> _Pass:
        if self._pass is None:
            raise SettingError("record", self.record, "run the model first, inside the with block")
        return self._pass

    def _of_text(self, ids: Tensor, code: Tensor) -> TextCode:
        row = ids[0].cpu()
        tokens = [decode_token(self._tokenizer, int(i)) for i in row]
        return TextCode(tokens, row, code[0].cpu())

    @staticmethod
    def _at_positions(state: _Pass, rows: Tensor) -> Tensor:
        """Returns rows [n, d] at their places, [contexts, positions, d]."""
        out = rows.new_zeros(*state.mask.shape, rows.shape[1])
        return out.index_put((state.mask.to(rows.device),), rows)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        before, self.record = self.record, True
        try:
            yield
        finally:
            self.record = before

    # ---- hooks -------------------------------------------------------------------------------

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Puts the SAE into the model within the block."""
        point = self.model.hook_point
        functions = {point(self.hook): self._at_hook}
        if self.sae.has_target:
            parts = enumerate(self.targets)
            functions |= {point(name): partial(self._at_target, i) for i, name in parts}
        begin = [
            module.register_forward_pre_hook(self._begin, with_kwargs=True)
            for module in modules_around(self.model)
        ]
        try:
            with run_hooks(functions):
                self._inside = True
                yield
        finally:
            self._inside = False
            for handle in begin:
                handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reads what the pass is about from the inputs of the model, or of a part of it that runs
        within that pass or by itself."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if ids is None else ids
        if given is None:
            return
        within = self._pass
        if within is not None and module is not self.model.model and within.goes_on(ids, given):
            return
        attended = kwargs.get("attention_mask")
        plain = isinstance(attended, Tensor) and attended.dim() == 2
        attention: Tensor | None = attended if plain else None
        length = getattr(kwargs.get("past_key_values"), "get_seq_length", None)
        first = int(length()) if length is not None else 0
        if (
            attention is not None
        ):  # of all positions, also of those that a cache of another kind holds
            first = max(first, attention.shape[1] - given.shape[1])
        if first and self.sae.needs_contexts:
            remedy = "the code depends on the tokens before, which a cache of keys leaves out: "
            raise SettingError("use_cache", True, f"{remedy}generate with use_cache=False")
        mask = torch.ones(given.shape[:2], dtype=torch.bool)
        if ids is not None and not isinstance(self.model.tokenizer, NoTokenizer):
            mask = counted_positions(ids, self.model.tokenizer)
        if attention is not None:
            mask = mask & attention[:, -mask.shape[1] :].bool().cpu()
        self._pass = _Pass(mask, first, ids)

    def _at_hook(self, x: Tensor) -> Tensor | None:
        """Computes the code of the activation; replaces it unless there is a target."""
        state = self._state
        with_gradient = torch.is_grad_enabled() and (x.requires_grad or self.record)
        idle = self.error and not (self.edits or self.record or with_gradient)
        if not state.mask.any() and self.record:
            state.code = x.new_zeros(0, self.sae.d_sae, dtype=torch.float32)
        if idle or not state.mask.any():
            state.made = ()
            return None

        def instead(rows: Tensor, starts: Tensor) -> Tensor:
            if rows.shape[1] != self.sae.d_in:
                raise wrong_width(self.hook, self.sae.d_in, rows.shape[1])
            state.made = self._made(state, rows, starts, with_gradient)
            return rows if self.sae.has_target else state.made[0].at(rows, starts)

        new = keep_shape_and_dtype(splice_counted(instead, state.mask), state.mask.shape)(x)
        return None if self.sae.has_target else new

    def _at_target(self, i: int, y: Tensor) -> Tensor | None:
        state = self._state
        if state.made is None:
            remedy = f"the model reaches it before {self.hook}: name a target after it"
            raise SettingError("target", self.targets[i], remedy)
        if not state.made:
            return None
        splice = splice_counted(state.made[i].at, state.mask)
        return keep_shape_and_dtype(splice, state.mask.shape)(y)

    def _made(
        self, state: _Pass, rows: Tensor, starts: Tensor, with_gradient: bool
    ) -> tuple[_Replacement, ...]:
        """Computes what happens to the rows of each target."""
        sae = self._twin
        parts = list(reconstruct(sae, rows.detach(), starts))
        codes = [(block, code) for block, _, code in parts]
        f: Tensor | None = None
        if with_gradient:
            f = code_with_gradient(sae, rows, codes, starts)
            f = f if f.requires_grad else f.requires_grad_()
        elif self.edits or self.record:
            f = torch.cat([code.dense() for _, code in codes])
        state.code = f if self.record else None
        changed = None if f is None else self._edited(f, state.positions().to(rows.device))
        with torch.no_grad():
            if not self.edits or f is None or changed is None:
                x_hat = torch.cat([x_hat for _, x_hat, _ in parts])
                value = torch.zeros_like(x_hat) if self.error else x_hat
            elif self.error:
                value = difference(sae, changed - f, rows)
            else:
                value = reconstruction(sae, changed, rows)
        widths = sae.dims.target_blocks
        graphs: Sequence[Tensor | None] = [None] * len(widths)
        if with_gradient and changed is not None:
            graphs = reconstruction(sae, changed, rows).split(widths, dim=1)
        made = zip(value.split(widths, dim=1), graphs, strict=True)
        return tuple(_Replacement(one, graph, self.error) for one, graph in made)

    def _edited(self, f: Tensor, positions: Tensor) -> Tensor:
        """Applies the edits to the code [n, d_sae] of rows at these positions."""
        for edit in self.edits:
            f = edit.apply(f, positions)
        return f


#: SAEs that are in a model now.
_ACTIVE: list[Attached] = []


@contextmanager
def attach(
    model: Any,
    sae: SAE | str | Path,
    hook: str | None = None,
    *,
    target: str | Sequence[str] | None = None,
    error: bool = True,
    tokenizer: Any = None,
    allow_mismatch: bool = False,
) -> Iterator[Attached]:
    """Puts an SAE into a language model within a `with` block, and removes it at its end.

    with saelab.attach(model, sae, "blocks.2.hook_resid_post", tokenizer=tokenizer) as inside:
        print(inside.codes("def add(a, b):").code.shape)
        inside.add(7, 4.0)               # or scale, ablate, set; positions=... for some
        print(inside.generate("def add("))    # or the model's own generate and forward

    Blocks may be nested, also on one hook point: the first one reads and replaces first.

    Args:
        model: a transformers model; or what `saelab.settings` has as model.path ('embedded', a
            folder, a name on the hub), which is then loaded.
        sae: an SAE, or the folder of one in any format that `saelab.load` recognises.
        hook: hook point that is read; by default that which the SAE was trained at, where it is
            known.
        target: of a transcoder, the hook point or points that it reconstructs.
        error: keeps the reconstruction's error in the model, so that only edits change anything;
            False replaces the activation by the reconstruction.
        tokenizer: of a transformers model: texts need it, and its special tokens are left alone.
        allow_mismatch: takes an SAE of another model or hook point.

    Raises: SettingError for an unknown hook point or block, and a target that is missing or in
        excess; MismatchError for an SAE of another width, model or hook point.
    """
    if isinstance(sae, (str, Path)):
        sae = formats.load(sae).sae
    inputs, outputs = split_hooks(sae.origin.hook_name)
    hook = hook if hook is not None else ", ".join(inputs) or None
    target = target if target is not None else outputs or None
    whole = as_language_model(model, tokenizer, [one.model for one in _ACTIVE])
    places = check_places(whole, sae, hook, target)
    if not allow_mismatch:
        check_origin(whole, name_of(model), sae, *places)
    attached = Attached(whole, sae, *places, error)
    with attached.hooked():
        _ACTIVE.append(attached)
        try:
            yield attached
        finally:
            _ACTIVE.remove(attached)
