"""SAEBench's `core` on given tokens, with its formulas, and its result file.

`measure_core` repeats SAEBench 0.6.0, for comparison with published numbers; `saelab.evals.core`
has our definition. Where the two differ:

    replaced positions   SAEBench: all, BOS included (zero ablation too). Ours: counted ones.
    averaged losses      SAEBench: predictions made *at* tokens that are not special. Ours:
                         predictions *of* counted tokens, the first of a text (made at BOS)
                         included.
    explained variance   SAEBench: 1 - mean |x - x_hat|^2 / (mean |x|^2 - q^2), q the mean of the
                         squared numbers x_j^2; q is not the mean row. Ours: 1 - FVU.
    its legacy formula   the mean over rows of 1 - |x - x_hat|^2 / |x - mean|^2, where a row near
                         the mean row weighs most.
    mse                  SAEBench: mean |x - x_hat|^2 / rows of the batch, so that it falls with
                         the size of the batch. Ours: mean |x - x_hat|^2 / d.
    frac_alive           latents that fire in the few batches measured.

A number that is not finite is -1, as SAEBench writes it.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saelab.config import digest
from saelab.data.language_model import LanguageModel, Splices, next_token_losses
from saelab.errors import SettingError
from saelab.evals.base import Subject

TYPE = "core"
#: Definition id of the numbers.
DEFINITION = "core/saebench/1"
#: Columns of a cosine matrix at once.
BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class CoreTokens:
    """Tokens of a measurement of `core`.

    Args:
        loss_batches: for losses and divergences; each int64 [contexts, positions].
        row_batches: for everything about rows of activations; likewise.
        special: ids of pad, EOS and BOS, which are left out of the means.
    """

    loss_batches: Sequence[Tensor]
    row_batches: Sequence[Tensor]
    special: frozenset[int]

    def __post_init__(self) -> None:
        for name in ("loss_batches", "row_batches"):
            if not getattr(self, name):
                raise SettingError(name, "none", "`core` needs at least one batch of tokens")

    def counted(self, ids: Tensor) -> Tensor:
        """Returns where ids are not special, bool of the same shape."""
        return ~torch.isin(ids, torch.tensor(sorted(self.special), dtype=ids.dtype))


@dataclass(frozen=True, kw_only=True)
class CoreResult:
    """Numbers of `core`.

    Args:
        metrics: category -> metric -> value, by SAEBench's names.
        latents: one object for each latent, by SAEBench's names.
        tokens: of the measurement.
    """

    metrics: Mapping[str, Mapping[str, float]]
    latents: Sequence[Mapping[str, float]]
    tokens: CoreTokens


@dataclass(frozen=True, kw_only=True)
class CoreAbout:
    """Content of a `core` file besides its numbers.

    Args:
        model_name: of the language model.
        dtype: it ran in.
        dataset: name of the texts.
        sae: the SAE's configuration; architecture, d_in, d_sae, hook_name, hook_layer by SAELens'
            names.
        release, sae_id: names of the SAE.
        millis: time of the measurement, milliseconds since 1970.
        version: of the package.
    """

    model_name: str
    dtype: str
    dataset: str
    sae: Mapping[str, Any]
    release: str
    sae_id: str
    millis: int
    version: str


def measure_core(
    subject: Subject, weights: Mapping[str, Tensor], model: LanguageModel, hook: str,
    tokens: CoreTokens,
) -> CoreResult:  # fmt: skip
    """Computes SAEBench's `core` with its formulas.

    Args:
        weights: W_enc [d_sae, d_in], b_enc [d_sae], W_dec [d_sae, d_in] of the same subject, as
            `SAE.fold` gives them.
        hook: name of the hook point.
    """
    losses = _losses(subject, model, hook, tokens)
    rows = _Rows(subject.d_sae)
    for ids in tokens.row_batches:
        x = model.activations(ids, None, [hook])[hook].float()
        rows.add(subject, x, tokens.counted(ids))
    latents = _latents(weights) | rows.latents()
    one_each = [dict(zip(latents, values, strict=True)) for values in zip(*latents.values())]  # noqa: B905
    sizes = {
        "total_tokens_eval_reconstruction": sum(ids.numel() for ids in tokens.loss_batches),
        "total_tokens_eval_sparsity_variance": sum(ids.numel() for ids in tokens.row_batches),
    }
    metrics = losses | rows.metrics() | {"token_stats": sizes, "misc_metrics": _misc(latents)}
    clean = {name: {key: _finite(v) for key, v in group.items()} for name, group in metrics.items()}
    details = [
        {"index": i} | {k: _finite(v) for k, v in one.items()} for i, one in enumerate(one_each)
    ]
    return CoreResult(metrics=clean, latents=details, tokens=tokens)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -1


def _losses(
    subject: Subject, model: LanguageModel, hook: str, tokens: CoreTokens
) -> dict[str, dict[str, float]]:
    def reconstruction(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1).float()
        return subject.decode(subject.encode(flat)).view(x.shape).to(x)

    splices: dict[str, Splices | None] = {
        "without_sae": None,
        "with_sae": {hook: reconstruction},
        "with_ablation": {hook: torch.zeros_like},
    }
    ce: dict[str, list[Tensor]] = {name: [] for name in splices}
    kl: dict[str, list[Tensor]] = {name: [] for name in splices}
    for ids in tokens.loss_batches:
        counted, clean = tokens.counted(ids), None
        for name, splice in splices.items():
            logits = model.logits(ids, None, splice)
            ce[name].append(next_token_losses(logits, ids).cpu()[counted[:, :-1]])
            after = logits.float().log_softmax(-1)
            clean = after if clean is None else clean
            kl[name].append((clean.exp() * (clean - after)).sum(-1).cpu()[counted])
    mean = {name: float(torch.cat(parts).mean()) for name, parts in ce.items()}
    apart = {name: float(torch.cat(parts).mean()) for name, parts in kl.items()}
    ablated, spliced = apart["with_ablation"], apart["with_sae"]
    gap = mean["with_ablation"] - mean["without_sae"]
    return {
        "model_behavior_preservation": {
            "kl_div_score": _ratio(ablated - spliced, ablated),
            "kl_div_with_ablation": ablated,
            "kl_div_with_sae": spliced,
        },
        "model_performance_preservation": {
            "ce_loss_score": _ratio(mean["with_ablation"] - mean["with_sae"], gap),
            **{f"ce_loss_{name}": value for name, value in mean.items()},
        },
    }


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


@dataclass
class _Rows:
    """Sums over the rows of all batches.

    Args:
        d_sae: number of latents.
        of_rows: metric -> numbers of each row.
        of_batches: metric -> one number for each batch.
        firings, contexts: rows and contexts in which each latent is above zero, float32 [d_sae].
        rows: counted ones.
    """

    d_sae: int
    of_rows: dict[str, list[Tensor]] = field(default_factory=dict)
    of_batches: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: int = 0

    def __post_init__(self) -> None:
        self.firings = torch.zeros(self.d_sae, dtype=torch.float32)
        self.contexts = torch.zeros(self.d_sae, dtype=torch.float32)

    def add(self, subject: Subject, x: Tensor, counted: Tensor) -> None:
        """Adds a batch: x float32 [contexts, positions, d], counted bool [contexts, positions]."""
        f = subject.encode(x.flatten(0, 1))
        active = ((f > 0).view(*counted.shape, -1) & counted[..., None]).float()
        self.firings += active.sum((0, 1)).cpu()
        self.contexts += (active.sum(1) > 0).sum(0).cpu()
        self.rows += int(counted.sum())
        x_hat = subject.decode(f)[counted.flatten()].cpu()
        rows, f = x[counted].cpu(), f[counted.flatten()].cpu()
        error = (rows - x_hat).square().sum(1)
        norm, norm_hat = rows.norm(dim=1), x_hat.norm(dim=1)
        variance = (rows - rows.mean(0)).square().sum(1)
        for name, values in {
            "l2_norm_in": norm,
            "l2_norm_out": norm_hat,
            "l2_ratio": norm_hat / torch.where(norm < 1e-4, torch.ones_like(norm), norm),
            "l0": (f != 0).sum(1).float(),
            "l1": f.sum(1),
            "explained_variance_legacy": 1 - error / variance,
            "mse": error / len(rows),
            "cossim": (rows / norm[:, None] * (x_hat / norm_hat[:, None])).sum(1),
        }.items():
            self.of_rows.setdefault(name, []).append(values)
        for name, values in {
            "relative_reconstruction_bias": norm_hat.square().mean() / (rows * x_hat).sum(1).mean(),
            "power": rows.square().sum(1).mean(),
            "squares": rows.square().mean(0).mean(),
            "error": error.mean(),
        }.items():
            self.of_batches.setdefault(name, []).append(values)

    def metrics(self) -> dict[str, dict[str, float]]:
        """Returns categories of metrics."""
        rows = {name: float(torch.cat(parts).mean()) for name, parts in self.of_rows.items()}
        batches = {name: float(torch.stack(v).mean()) for name, v in self.of_batches.items()}
        rows["relative_reconstruction_bias"] = batches["relative_reconstruction_bias"]
        below = batches["power"] - batches["squares"] ** 2
        rows["explained_variance"] = 1 - _ratio(batches["error"], below)
        names = {
            "reconstruction_quality": (
                "explained_variance", "explained_variance_legacy", "mse", "cossim",
            ),
            "shrinkage": (
                "l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias",
            ),
            "sparsity": ("l0", "l1"),
        }  # fmt: skip
        return {group: {name: rows[name] for name in of} for group, of in names.items()}

    def latents(self) -> dict[str, list[float]]:
        """Returns metric -> value of each latent."""
        return {
            "feature_density": (self.firings / self.rows).tolist(),
            "consistent_activation_heuristic": (self.firings / self.contexts).tolist(),
        }


def _latents(weights: Mapping[str, Tensor]) -> dict[str, list[float]]:
    encoder, decoder = (weights[name].detach().float().cpu() for name in ("W_enc", "W_dec"))
    return {
        "encoder_bias": weights["b_enc"].detach().float().cpu().tolist(),
        "encoder_norm": encoder.norm(dim=1).tolist(),
        "encoder_decoder_cosine_sim": torch.cosine_similarity(decoder, encoder, dim=1).tolist(),
        "max_decoder_cosine_sim": _nearest(decoder).tolist(),
        "max_encoder_cosine_sim": _nearest(encoder).tolist(),
    }


def _nearest(vectors: Tensor) -> Tensor:
    """Returns the largest cosine of each row with any other; [n, d] -> [n]."""
    unit = torch.nn.functional.normalize(vectors, dim=1)
    largest = []
    for start in range(0, len(unit), BLOCK):
        cosines = unit[start : start + BLOCK] @ unit.T
        here = torch.arange(len(cosines))
        cosines[here, here + start] = -math.inf
        largest.append(cosines.max(1).values)
    return torch.cat(largest)


def _misc(latents: Mapping[str, Sequence[float]]) -> dict[str, float]:
    density = torch.tensor(latents["feature_density"], dtype=torch.float32)
    total = float(density.sum())
    found = {
        "average_max_encoder_cosine_sim": _mean(latents["max_encoder_cosine_sim"]),
        "average_max_decoder_cosine_sim": _mean(latents["max_decoder_cosine_sim"]),
        "frac_alive": float((density > 0).float().mean()),
    }
    for percent in (1, 10):
        above = density > percent / 100
        share = float(density[above].sum()) / total if total > 0 else 0.0
        found[f"freq_over_{percent}_percent"] = float(above.float().mean())
        found[f"normalized_freq_over_{percent}_percent"] = share
    return found


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float32).mean())


def build_core_result(result: CoreResult, about: CoreAbout) -> dict[str, Any]:
    """Builds the content of SAEBench's `core` file; "saelab" holds the definition and version."""
    tokens = result.tokens
    contexts, positions = tokens.loss_batches[0].shape
    switches = (
        "compute_kl", "compute_ce_loss", "compute_l2_norms", "compute_sparsity_metrics",
        "compute_variance_metrics", "compute_featurewise_density_statistics",
        "compute_featurewise_weight_based_metrics",
    )  # fmt: skip
    metrics = {name: dict(group) for name, group in result.metrics.items()}
    return {
        "eval_type_id": TYPE,
        "eval_config": {
            "model_name": about.model_name,
            "llm_dtype": about.dtype,
            "batch_size_prompts": contexts,
            "n_eval_reconstruction_batches": len(tokens.loss_batches),
            "n_eval_sparsity_variance_batches": len(tokens.row_batches),
            "dataset": about.dataset,
            "context_size": positions,
            **dict.fromkeys(switches, True),
            "exclude_special_tokens_from_reconstruction": False,
            "verbose": False,
        },
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, digest([metrics, about.sae_id]))),
        "datetime_epoch_millis": about.millis,
        "eval_result_metrics": metrics,
        "eval_result_details": [dict(one) for one in result.latents],
        "sae_bench_commit_hash": f"none: saelab {about.version}",
        "sae_lens_id": about.sae_id,
        "sae_lens_release_id": about.release,
        "sae_lens_version": None,
        "sae_cfg_dict": dict(about.sae),
        "eval_result_unstructured": {
            "saelab": {"definition": DEFINITION, "version": about.version}
        },
    }
