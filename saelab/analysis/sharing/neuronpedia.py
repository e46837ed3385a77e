"""Latents of an SAE as Neuronpedia takes them: the files batch-{i}.json of SAEDashboard.

    {"model_id", "layer", "sae_set", "sae_id_suffix", "features": [
        {"feature_index", "frac_nonzero", "pos_str", "pos_values", "neg_str", "neg_values",
         "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
         "activations": [{"tokens", "values", "qualifying_token_index",
                          "bin_min", "bin_max", "bin_contains"}], ...}]}

The fields are those of SAEDashboard's NeuronpediaDashboardBatch (sae_dashboard/neuronpedia/
neuronpedia_dashboard.py), which its export and Neuronpedia's own convert into the tables of an
upload. The numbers are those of the report's feature browser: contexts, density and logit lens
on held-out text. Correlations with neurons and other latents, and histograms, are not measured
here; their fields are empty lists. In `bin_min` and `bin_contains`, -1 marks the strongest
contexts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab.analysis.latents import HeldOut, Latent, describe
from saelab.analysis.sharing.new_folder import new_folder
from saelab.analysis.sharing.public_names import public
from saelab.errors import MismatchError, SettingError
from saelab.evals import latent_examples
from saelab.launch.prepare import held_out
from saelab.sae import SAE
from saelab.storage.atomic import write_text
from saelab.study.plan import BaseConfig

#: Latents in a file, as SAEDashboard writes them.
PER_FILE = 128
#: Coordinates of the decoder row that are shown, as SAEDashboard shows them.
ALIGNED = 3
#: Fields of what is not measured here.
NOT_MEASURED = (
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist"),
)
_SET = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of an SAE on Neuronpedia: model / layer-set / latent.

    Args:
        model: Neuronpedia's name of the language model, such as 'gemma-2-2b'.
        layer: of the hook point.
        set_name: the SAE set's name, without the layer, such as 'res-16k'.
    """

    model: str
    layer: int
    set_name: str


def place_of(base: BaseConfig, set_name: str, model: str = "") -> Place:
    """Returns the place of an SAE.

    Args:
        base: the data that it belongs to.
        set_name: see `Place`.
        model: see `Place`; '' takes the last part of the model's name.

    Raises: SettingError for a name that no set can have, and a hook point outside the blocks.
    """
    if not _SET.fullmatch(set_name):
        raise SettingError("--set-name", set_name, "use letters, digits, '-', '_' and '.'")
    layer = re.search(r"\b(?:blocks|layers|h)\.(\d+)\b", base.hook_text)
    if layer is None:
        remedy = "names no block, and Neuronpedia orders SAEs by layer: use a hook point in a block"
        raise SettingError("hook_name", base.hook_text, remedy)
    name = model or Path(base.model.path).name
    return Place(model=name, layer=int(layer[1]), set_name=set_name)


def write(
    sae: SAE,
    base: BaseConfig,
    place: Place,
    out: Path,
    cache: Path,
    latents: int | None = None,
    examples: int = 8,
) -> list[Path]:
    """Writes the files of an upload to a new folder.

    Args:
        sae: in evaluation mode.
        base: model, hook and held-out text.
        place: on Neuronpedia.
        out: new or empty folder.
        cache: folder of harvested activations.
        latents: so many, picked as for the report; None for all.
        examples: contexts of each latent.

    Returns: the files.
    Raises: SettingError without texts, or for fewer than one latent or context; MismatchError for
        activations of another width; SourceError for a folder that is not empty.
    """
    for option, value in (("--latents", latents), ("--examples", examples)):
        if value is not None and value < 1:
            raise SettingError(option, value, "use at least 1")
    with new_folder(out) as fresh:
        data = HeldOut(*held_out(base, cache), "")
        if data.why_no_text:
            remedy = "Neuronpedia shows texts: name settings with a model and texts"
            raise SettingError("--config", str(base.activations), f"{data.why_no_text}; {remedy}")
        if data.source.d != sae.d_in:
            remedy = "name the settings that it was trained with"
            widths = f"the SAE has d_in = {sae.d_in}, the activations have {data.source.d}"
            raise MismatchError(f"{widths}: {remedy}")
        survey = latent_examples.survey(sae, data.source, examples)
        every = dict.fromkeys(range(sae.d_sae), "")
        picked = every if latents is None else latent_examples.pick(survey, latents, 0)
        described = describe(sae, data, survey, dict.fromkeys(sorted(picked), ""), {})
        features = list(_features(sae, base, data, described))
        names = []
        for i, start in enumerate(range(0, len(features), PER_FILE)):
            batch = {
                "model_id": place.model,
                "layer": place.layer,
                "sae_set": place.set_name,
                "sae_id_suffix": None,
                "features": features[start : start + PER_FILE],
            }
            names.append(f"batch-{i}.json")
            write_text(fresh / names[-1], json.dumps(batch, ensure_ascii=False, allow_nan=False))
    return [out / name for name in names]


def _features(
    sae: SAE, base: BaseConfig, data: HeldOut, latents: Sequence[Latent]
) -> Iterator[dict[str, Any]]:
    """Yields each latent as plain data."""
    text = base.eval_text
    shared = {
        "n_prompts_total": sum(len(data.source.shard(i).x) for i in range(data.source.n_shards)),
        "n_tokens_in_prompt": base.context,
        "dataset": public(str(text.path or text.kind)),
    }
    rows = (sae.W_dec * sae.out_scale).detach().float().cpu()
    for latent in latents:
        row = rows[latent.index]
        largest = row.abs().topk(min(ALIGNED, len(row))).indices
        lens = latent.lens
        yield {
            "feature_index": latent.index,
            "neuron_alignment_indices": largest.tolist(),
            "neuron_alignment_values": _rounded(row[largest].tolist()),
            "neuron_alignment_l1": _rounded((row[largest] / row.abs().sum()).nan_to_num().tolist()),
            "pos_str": [data.token(token) for token, _ in lens.raised] if lens else [],
            "pos_values": _rounded([value for _, value in lens.raised]) if lens else [],
            "neg_str": [data.token(token) for token, _ in lens.lowered] if lens else [],
            "neg_values": _rounded([value for _, value in lens.lowered]) if lens else [],
            "frac_nonzero": latent.density,
            **{name: [] for name in NOT_MEASURED},
            **shared,
            "activations": [_activation(data, latent, i) for i in range(len(latent.examples))],
        }


def _activation(data: HeldOut, latent: Latent, i: int) -> dict[str, Any]:
    example = latent.examples[i]
    stop = example.start + len(example.values)
    return {
        "bin_min": -1,
        "bin_max": _rounded([latent.largest])[0],
        "bin_contains": -1,
        "tokens": data.words(example.context)[example.start : stop],
        "values": _rounded(example.values),
        "qualifying_token_index": example.peak - example.start,
    }


def _rounded(values: Sequence[float]) -> list[float]:
    """Returns the numbers with six digits, which is what float32 holds."""
    return [float(f"{value:.6g}") for value in values]
