"""Statistics, examples and logit lens of single latents of an SAE on held-out text.

    density       share of the counted tokens at which the latent fires
    loss share    share of the variance that is lost when only the latent is left out:
                  sum_t (|r_t + f_t d|^2 - |r_t|^2) / sum_t |x_t - mean(x)|^2
                  with the errors r = x - x_hat, the latent's code f and its decoder row d
    examples      the contexts in which it fires most strongly, each once, at their strongest token
    logit lens    what its decoder row, put after the model's last block, adds to each next-token
                  logit over an empty row: the final norm and the unembedding of d (nostalgebraist
                  2020), for any hook whose activation lives in the residual stream's basis
    neighbours    the other latents whose decoder rows have the largest cosines with its row

Everything is in raw activation space and counts the same tokens as the core metrics. Loss shares
do not add up to the explained variance, since latents that fire together share what they explain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saelab.data.activations.joined import JoinedShard, target_rows, widths
from saelab.data.activations.store import Source
from saelab.data.activations.stream import Batch
from saelab.data.language_model import LanguageModel
from saelab.errors import SettingError
from saelab.sae import SAE
from saelab.seeding import torch_stream

#: Contexts encoded at once. Our choice: bounds the dense maxima to that x d_sae floats.
CONTEXTS = 16
#: Groups of latents that are picked for a browser, in the order in which they are picked.
GROUPS = ("densest", "rarest", "largest loss share", "random")
#: Directions pushed through the head at once; bounds the logits to that x vocabulary.
AT_ONCE = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class Survey:
    """All latents of an SAE on held-out text.

    Args:
        tokens: number of counted tokens.
        density, loss_share: float64 [d_sae], as in the module's docstring.
        strongest: the largest activation in each of the best contexts, falling; float32
            [n, d_sae]; 0 where a latent fires in fewer contexts.
        contexts, peaks: index of the context in the source, and position in it; int64.
    """

    tokens: int
    density: Tensor
    loss_share: Tensor
    strongest: Tensor
    contexts: Tensor
    peaks: Tensor

    @property
    def d_sae(self) -> int:
        return len(self.density)


@dataclass(frozen=True)
class Example:
    """Activations of a latent in one context.

    Args:
        context: index in the source.
        start: position of the first token that is shown.
        peak: position of the strongest token.
        values: the latent's activation at every token shown; 0 at tokens that do not count.
    """

    context: int
    start: int
    peak: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Lens:
    """Tokens that a decoder row raises and lowers most: ids and what it adds to their logits."""

    raised: tuple[tuple[int, float], ...]
    lowered: tuple[tuple[int, float], ...]


@torch.no_grad()
def survey(sae: SAE, source: Source, examples: int = 8) -> Survey:
    """Surveys every latent.

    Args:
        sae: in evaluation mode.
        source: held-out activations.
        examples: number of contexts that are stored for each latent.

    Raises: SettingError for an SAE that normalises each row: a latent's share of its reconstruction
        differs from row to row.
    """
    if sae.row_norm != "none":
        remedy = "has no one decoder row per latent: survey an SAE without a norm of rows"
        raise SettingError("row_norm", sae.row_norm, remedy)
    mean, tokens = _mean(source)
    firings, gain = (torch.zeros(sae.d_sae, dtype=torch.float64) for _ in range(2))
    power = 0.0
    none = torch.zeros(0, sae.d_sae, dtype=torch.int64)
    best = [torch.zeros(0, sae.d_sae, dtype=torch.float32), none, none]
    rows = (sae.W_dec * sae.out_scale).cpu()
    norms = rows.square().sum(1)
    for block in _blocks(sae, source):
        f = block.code
        firings += (f != 0).sum(0).double()
        past = sae.complete(sae.b_dec * sae.out_scale, block.x.to(sae.W_dec.device))
        error = block.target - f @ rows - past.cpu()
        gain += (2 * (f * (error @ rows.T)).sum(0) + f.square().sum(0) * norms).double()
        power += float((block.target - mean).square().sum(dtype=torch.float64))
        best = _keep_largest(best, block.strongest(), examples)
    return Survey(
        tokens=tokens,
        density=firings / tokens,
        loss_share=gain / power,
        strongest=best[0],
        contexts=best[1],
        peaks=best[2],
    )


@dataclass(frozen=True, eq=False)
class _Block:
    """Consecutive contexts: x [n, d_in], target [n, d_out] and code [n, d_sae] of their counted
    rows; `first` is the index of the first context, mask bool [contexts, positions]."""

    first: int
    mask: Tensor
    x: Tensor
    target: Tensor
    code: Tensor

    def strongest(self) -> list[Tensor]:
        """Largest |code| in each context, its context and position; [contexts, d_sae] each."""
        values, peaks, d_sae = [], [], self.code.shape[1]
        parts = self.code.split(self.mask.sum(1).tolist())
        for mask, code in zip(self.mask, parts, strict=True):
            if len(code):
                value, row = code.abs().max(0)
            else:
                value = torch.zeros(d_sae, dtype=torch.float32)
                row = torch.zeros(d_sae, dtype=torch.int64)
            values.append(value)
            peaks.append(mask.nonzero()[:, 0][row] if len(code) else row)
        contexts = self.first + torch.arange(len(parts))
        return [torch.stack(values), contexts[:, None].expand(-1, d_sae), torch.stack(peaks)]


def _blocks(sae: SAE, source: Source) -> Iterator[_Block]:
    """Encodes the source in blocks of contexts, in order."""
    first, device = 0, sae.W_dec.device
    for i in range(source.n_shards):
        shard = source.shard(i)
        whole = shard.y if isinstance(shard, JoinedShard) and shard.y is not None else shard.x
        parts = (tensor.split(CONTEXTS) for tensor in (shard.x, shard.mask, whole))
        for x, mask, y in zip(*parts, strict=True):
            positions = torch.arange(mask.shape[1]).expand(mask.shape)
            batch = Batch(x, positions, mask, y=None if whole is shard.x else y).rows()
            if batch.n:
                rows = batch.x.float()
                target = rows if batch.y is None else batch.y.float()
                starts = (batch.starts,) if sae.needs_contexts else ()
                codes = [code.dense() for _, code in sae.codes(rows.to(device), *starts)]
                code = torch.cat(codes).cpu()
                yield _Block(first=first, mask=mask, x=rows, target=target, code=code)
            first += len(x)


def _keep_largest(best: Sequence[Tensor], new: Sequence[Tensor], n: int) -> list[Tensor]:
    """Returns the n largest of both along the first axis; the earlier one of equal values."""
    both = [torch.cat(pair) for pair in zip(best, new, strict=True)]
    order = both[0].sort(dim=0, descending=True, stable=True).indices[:n]
    return [part.gather(0, order) for part in both]


def _mean(source: Source) -> tuple[Tensor, int]:
    """Mean of what is reconstructed in the counted rows, and their number."""
    inputs, targets = widths(source)
    total, tokens = torch.zeros(sum(targets or inputs), dtype=torch.float64), 0
    for i in range(source.n_shards):
        shard = source.shard(i)
        y = target_rows(shard)
        x = shard.rows()[0] if y is None else y
        total += x.sum(0, dtype=torch.float64)
        tokens += len(x)
    return (total / tokens).float(), tokens


def pick(surveyed: Survey, n: int, seed: int) -> dict[int, str]:
    """Picks about a quarter of n latents for each of `GROUPS`, none twice.

    Args:
        n: number of latents; all where there are fewer.
        seed: of the named stream 'evaluation', for the random ones.

    Returns: latent -> group, in the order of the groups. The rarest are chosen among those that
        fire at all.
    """
    n = min(n, surveyed.d_sae)
    fires = surveyed.density > 0
    draw = torch.rand(
        surveyed.d_sae, generator=torch_stream(seed, "evaluation", "features"), dtype=torch.float32
    )
    rare = torch.where(fires, surveyed.density, torch.inf)
    keys = (-surveyed.density, rare, -surveyed.loss_share, draw.double())
    picked: dict[int, str] = {}
    for i, (group, key) in enumerate(zip(GROUPS, keys, strict=True)):
        wanted = n * (i + 1) // len(GROUPS)
        for latent in key.argsort(stable=True).tolist():
            if len(picked) >= wanted:
                break
            if latent not in picked and bool(key[latent] < torch.inf):
                picked[latent] = group
    return picked


@torch.no_grad()
def examples(
    sae: SAE, source: Source, surveyed: Survey, latents: Sequence[int], before: int, after: int
) -> dict[int, list[Example]]:
    """Collects the strongest contexts of latents, with activations around the strongest token.

    Args:
        before, after: tokens shown on each side of the strongest, where the context has them.

    Returns: latent -> examples, the strongest first.
    """
    wanted: dict[int, list[tuple[int, int, int]]] = {}
    for latent in latents:
        for i, value in enumerate(surveyed.strongest[:, latent].tolist()):
            if value > 0:
                context = int(surveyed.contexts[i, latent])
                peak = int(surveyed.peaks[i, latent])
                wanted.setdefault(context, []).append((latent, i, peak))
    ranked: dict[int, dict[int, Example]] = {latent: {} for latent in latents}
    for block in _blocks(sae, source):
        row = block.mask.flatten().cumsum(0).view_as(block.mask) - 1
        for j, mask in enumerate(block.mask):
            for latent, i, peak in wanted.get(block.first + j, ()):
                start, stop = max(0, peak - before), min(len(mask), peak + after + 1)
                values = block.code[row[j, start:stop].clamp_min(0), latent]
                shown = torch.where(mask[start:stop], values, 0.0).tolist()
                ranked[latent][i] = Example(block.first + j, start, peak, tuple(shown))
    return {latent: [of[i] for i in sorted(of)] for latent, of in ranked.items()}


def neighbours(sae: SAE, latents: Sequence[int], n: int = 5) -> list[list[tuple[int, float]]]:
    """Finds the n other latents with the largest cosines of decoder rows, in falling order."""
    rows = normalize(sae.W_dec.detach().cpu().float(), dim=1)
    index = torch.tensor(list(latents), dtype=torch.int64)
    cosines = rows[index] @ rows.T
    cosines[torch.arange(len(index)), index] = -torch.inf
    largest = cosines.topk(min(n, len(rows) - 1), dim=1)
    return [
        list(zip(indices, values, strict=True))
        for indices, values in zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
    ]


def why_no_lens(sae: SAE, model: LanguageModel | None) -> str:
    """Says why there is no logit lens; '' where there is one."""
    if model is None:
        return "the activations were made elsewhere, without a model"
    if not model.has_head:
        return "the model has no language-model head"
    width = sae.dims.target_blocks[-1]
    if width != model.d_model:
        return f"the hook has {width} dimensions, the residual stream {model.d_model}"
    return ""


@torch.no_grad()
def lenses(sae: SAE, latents: Sequence[int], model: LanguageModel, n: int = 8) -> list[Lens]:
    """Computes the logit lens of latents; call `why_no_lens` first.

    A row replaces the last block's output, so that exactly the model's final norm and head act on
    it; the empty row's logits are subtracted. Of several hook points the last one's rows are shown.
    """
    rows = (sae.W_dec.detach() * sae.out_scale)[list(latents), -sae.dims.target_blocks[-1] :]
    hook = f"blocks.{model.n_layers - 1}.hook_resid_post"

    def added(directions: Tensor) -> Tensor:
        shown = torch.cat([torch.zeros_like(directions[:1]), directions])[:, None]
        ids = torch.zeros(len(shown), 1, dtype=torch.int64)
        logits = model.logits(ids, splice={hook: lambda x: shown.to(x)})[:, 0].float().cpu()
        return logits[1:] - logits[:1]

    logits = torch.cat([added(part) for part in rows.split(AT_ONCE)])
    raised, lowered = logits.topk(n, dim=1), (-logits).topk(n, dim=1)
    return [
        Lens(
            tuple(zip(raised.indices[i].tolist(), raised.values[i].tolist(), strict=True)),
            tuple(zip(lowered.indices[i].tolist(), (-lowered.values[i]).tolist(), strict=True)),
        )
        for i in range(len(logits))
    ]
