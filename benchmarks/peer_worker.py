"""The peers' side of the benchmarks: runs in their environment, one JSON line per call.

Every peer runs through its own trainer or evaluation code, as its documentation does; only the
weights are written into it, so that all sides compute the same function on the same batches.
Nothing from saelab is imported here.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import rss

del sys.path[0]  # the benchmarks' own names must not hide those of a package
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

PACKAGES = ("sae-lens", "dictionary-learning", "eai-sparsify", "sae-bench", "transformer-lens")
#: So small that weights, and with them the sparsity, stay what they were set to.
RATE = 1e-6

Step = Callable[[torch.Tensor, int], Any]


class Trainer:
    """A trainer of a peer.

    Args:
        step: one optimiser step on a batch, with the number of the step.
        l0: batch -> mean number of active latents.
    """

    def __init__(self, step: Step, l0: Callable[[torch.Tensor], float]) -> None:
        self.step, self.l0, self.count = step, l0, 0


class State:
    """State that calls keep for later calls."""

    inputs: dict[str, torch.Tensor]
    batches: list[torch.Tensor]
    trainers: dict[str, Trainer]
    harvests: dict[str, tuple[Any, int]]
    sae: Any
    texts: dict[str, dict[str, dict[str, torch.Tensor]]]
    pooled: dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]
    sampling: Callable[..., Any]

    def __init__(self) -> None:
        self.trainers, self.harvests, self.texts, self.pooled = {}, {}, {}, {}


STATE = State()


def threads(n: int) -> None:
    torch.set_num_threads(n)


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", *PACKAGES)}


# ---------------------------------------------------------------- training


def inputs(file: str) -> None:
    """Reads batches [n, N, d], rows [F, d], mean [d] and quantile [F] for the next trainers."""
    STATE.inputs = {key: value.clone() for key, value in load_file(file).items()}  # not mapped
    STATE.batches = list(STATE.inputs["batches"])


def build(name: str, peer: str, variant: str, k: int, options: dict[str, Any]) -> None:
    """Builds a trainer under a name; `peer` and `variant` choose its class."""
    makers = {
        "saelens": _saelens,
        "dictionary_learning": _dictionary_learning,
        "sparsify": _sparsify,
    }
    STATE.trainers[name] = makers[peer](variant, k, **options)


def steps(name: str, n: int) -> list[float]:
    """Returns the seconds of each of n steps."""
    trainer = STATE.trainers[name]
    found = []
    for _ in range(n):
        batch = STATE.batches[trainer.count % len(STATE.batches)]
        trainer.count += 1
        start = time.perf_counter()
        trainer.step(batch, trainer.count)
        found.append(time.perf_counter() - start)
    return found


def l0(name: str) -> float:
    with torch.no_grad():
        return STATE.trainers[name].l0(STATE.batches[0])


def drop() -> None:
    """Frees all trainers."""
    STATE.trainers.clear()
    gc.collect()


def training_peak(
    peer: str, variant: str, k: int, options: dict[str, Any], n: int
) -> dict[str, int]:
    """Returns the resident bytes before a trainer is built, and their peak over n of its steps."""
    small = STATE.batches, STATE.inputs
    corners = {"batches": (4, 64, 32), "rows": (64, 32), "quantile": (64,), "mean": (32,)}
    STATE.inputs = {key: _corner(value, corners[key]) for key, value in STATE.inputs.items()}
    STATE.batches = [_corner(batch, (64, 32)) for batch in STATE.batches]
    build("warm", peer, variant, 4, options)
    steps("warm", 3)  # code and thread pools are loaded before the count begins
    STATE.batches, STATE.inputs = small
    drop()
    rss.reset_peak()
    before = rss.resident()
    build("measured", peer, variant, k, options)
    steps("measured", n)
    return {"before": before, "peak": rss.peak()}


def _corner(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return value[tuple(map(slice, shape))].contiguous()


def _bias(threshold: float, mean_is_subtracted: bool) -> torch.Tensor:
    """Returns the encoder bias with which each latent fires above its quantile."""
    given = STATE.inputs
    shift = 0 if mean_is_subtracted else given["rows"] @ given["mean"]
    return threshold - given["quantile"] - shift


def _saelens(
    variant: str, k: int, autocast: bool = False, sparse_activations: bool = False
) -> Trainer:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    rows, mean = STATE.inputs["rows"], STATE.inputs["mean"]
    size: dict[str, Any] = {"d_in": rows.shape[1], "d_sae": rows.shape[0]}
    sae: Any
    if variant == "topk":
        # Its norm rescaling has no backward pass for sparse activations on a CPU.
        sparse: dict[str, Any] = {
            "use_sparse_activations": sparse_activations,
            "rescale_acts_by_decoder_norm": not sparse_activations,
        }
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**size, k=k, **sparse))
    elif variant == "batchtopk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**size, k=k))
    elif variant == "relu":
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**size))
    elif variant == "gated":
        sae = GatedTrainingSAE(GatedTrainingSAEConfig(**size))
    elif variant == "matryoshka":
        widths = [size["d_sae"] // share for share in (16, 8, 4, 2)]
        config_of = MatryoshkaBatchTopKTrainingSAEConfig
        sae = MatryoshkaBatchTopKTrainingSAE(config_of(**size, k=k, matryoshka_widths=widths))
    else:
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**size))
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_dec.copy_(mean)
        if variant in ("relu", "jumprelu"):
            threshold = float(sae.threshold[0]) if variant == "jumprelu" else 0.0
            sae.b_enc.copy_(_bias(threshold, bool(sae.cfg.apply_b_dec_to_input)))
        elif variant == "gated":
            sae.b_gate.copy_(_bias(0.0, bool(sae.cfg.apply_b_dec_to_input)))
            sae.b_mag.copy_(sae.b_gate)
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=STATE.batches[0].shape[0],
        autocast=autocast,
        lr=RATE,
        lr_end=RATE,
    )
    trainer = SAETrainer(config, sae, iter(()))

    def step(batch: torch.Tensor, number: int) -> None:
        trainer.step(batch)
        trainer.n_training_steps += 1

    def active(batch: torch.Tensor) -> float:
        code = sae.encode_with_hidden_pre(batch)[0]
        code = code.to_dense() if code.is_sparse else code
        return float((code > 0).sum()) / len(batch)

    return Trainer(step, active)


def _dictionary_learning(variant: str, k: int) -> Trainer:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    rows, mean = STATE.inputs["rows"], STATE.inputs["mean"]
    common: dict[str, Any] = {
        "steps": 10**6,
        "activation_dim": rows.shape[1],
        "dict_size": rows.shape[0],
        "layer": 0,
        "lm_name": "",
        "device": "cpu",
        "lr": RATE,
    }
    classes: dict[str, Any] = {
        "topk": TopKTrainer,
        "batchtopk": BatchTopKTrainer,
        "relu": StandardTrainer,
        "jumprelu": JumpReluTrainer,
        "gated": GatedSAETrainer,
    }
    sparsity = {"k": k} if variant in ("topk", "batchtopk") else {}
    sparsity = {"target_l0": float(k)} if variant == "jumprelu" else sparsity
    trainer = classes[variant](**common, **sparsity)
    ae = trainer.ae
    with torch.no_grad():
        if variant == "jumprelu":
            ae.W_dec.copy_(rows)
            ae.W_enc.copy_(rows.T)
            ae.b_enc.copy_(_bias(float(ae.threshold[0]), ae.apply_b_dec_to_input))
        else:
            ae.decoder.weight.copy_(rows.T)
            ae.encoder.weight.copy_(rows)
            if variant == "relu":
                ae.encoder.bias.copy_(_bias(0.0, True))
            elif variant == "gated":
                ae.gate_bias.copy_(_bias(0.0, True))
                ae.mag_bias.copy_(ae.gate_bias)
        bias = {"relu": "bias", "gated": "decoder_bias"}.get(variant, "b_dec")
        getattr(ae, bias).copy_(mean)

    def active(batch: torch.Tensor) -> float:
        code = ae.encode(batch, use_threshold=False) if "top" in variant else ae.encode(batch)
        return float((code > 0).sum()) / len(batch)

    return Trainer(lambda batch, number: trainer.update(number, batch), active)


def _sparsify(variant: str, k: int, optimiser: str = "adam") -> Trainer:
    """The step of its Trainer.fit without the language model; it has only TopK."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    rows, mean = STATE.inputs["rows"], STATE.inputs["mean"]
    coder = SparseCoder(rows.shape[1], SparseCoderConfig(num_latents=rows.shape[0], k=k))
    with torch.no_grad():
        coder.encoder.weight.copy_(rows)
        coder.W_dec.copy_(rows)
        coder.b_dec.copy_(mean)
    adam: Any
    if optimiser == "adam":
        adam = torch.optim.Adam(coder.parameters(), lr=RATE)
    else:  # its default
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        adam = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=RATE), momentum=0.95)
        adam.train()
    silent = torch.zeros(rows.shape[0], dtype=torch.long)

    def step(batch: torch.Tensor, number: int) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(batch)
        fired = torch.zeros(len(silent), dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        silent.add_(len(batch))
        silent[fired] = 0

    def active(batch: torch.Tensor) -> float:
        return float((coder.encode(batch).top_acts > 0).sum()) / len(batch)

    return Trainer(step, active)


# ---------------------------------------------------------------- activations


def store(name: str, kind: str, model: str, layer: int, file: str, batch: int) -> None:
    """SAELens' ActivationsStore on a local model.

    Args:
        kind: 'HookedTransformer' (TransformerLens) or 'AutoModelForCausalLM' (Hugging Face).
        model: its folder; a GPT-NeoX model.
        layer: the one whose output is taken.
        file: holds ids [contexts, positions].
        batch: contexts in one pass.
    """
    import datasets
    import transformer_lens.loading_from_pretrained as known
    from sae_lens.load_model import load_model
    from sae_lens.training.activations_store import ActivationsStore

    if kind == "HookedTransformer":
        known.OFFICIAL_MODEL_NAMES.append(model)
        known.MODEL_ALIASES[model] = [model]
        loaded, hook = load_model(kind, model, device="cpu"), f"blocks.{layer}.hook_resid_post"
        d_in = int(loaded.cfg.d_model)
    else:
        hook = f"gpt_neox.layers.{layer}"
        loaded = load_model(kind, model, "cpu", {"dtype": torch.float32}, hook_names=[hook])
        d_in = int(loaded.model.config.hidden_size)
    ids = load_file(file)["ids"]
    made = ActivationsStore(
        model=loaded,
        dataset=datasets.Dataset.from_dict({"input_ids": ids.tolist()}),
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=ids.shape[1],
        d_in=d_in,
        n_batches_in_buffer=8,
        total_training_tokens=ids.numel(),
        store_batch_size_prompts=batch,
        train_batch_size_tokens=4096,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )

    STATE.harvests[name] = (made, len(ids) // batch)


def harvests(name: str, n: int) -> list[float]:
    """Returns the seconds of each of n passes over all tokens."""
    made, parts = STATE.harvests[name]
    found = []
    for _ in range(n):
        start = time.perf_counter()
        for _ in range(parts):
            made.get_raw_llm_batch()
        found.append(time.perf_counter() - start)
    return found


def mean_activation(name: str) -> float:
    """Returns the mean absolute activation over a pass, to check that all sides run one model."""
    made, parts = STATE.harvests[name]
    return sum(float(made.get_raw_llm_batch()[0].abs().mean()) for _ in range(parts)) / parts


# ---------------------------------------------------------------- probing


def probing_open(weights: str, files: dict[str, str]) -> None:
    """Reads the SAE and, per entry, the activations by side and class: [texts, positions, d]."""
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    tensors = load_file(weights)
    d_sae, d_in = tensors["W_enc"].shape
    STATE.sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae, dtype="float32"))
    with torch.no_grad():
        STATE.sae.W_enc.copy_(tensors["W_enc"].T)
        for name in ("b_enc", "W_dec", "b_dec"):
            getattr(STATE.sae, name).copy_(tensors[name])
    STATE.texts = {}
    for entry, file in files.items():
        sides: dict[str, dict[str, torch.Tensor]] = {"train": {}, "test": {}}
        for key, value in load_file(file).items():
            side, name = key.split("/", 1)
            sides[side][name] = value
        STATE.texts[entry] = sides


def probing_pool(batch: int) -> float:
    """Returns the seconds to encode and average all texts of all entries."""
    from sae_bench.sae_bench_utils.activation_collection import get_sae_meaned_activations

    start = time.perf_counter()
    for entry, sides in STATE.texts.items():
        train, test = (
            get_sae_meaned_activations(sides[side], STATE.sae, batch) for side in ("train", "test")
        )
        STATE.pooled[entry] = train, test
    return time.perf_counter() - start


def probing_probes(k: int | None) -> dict[str, Any]:
    """Returns the seconds and mean test accuracy of all classes' probes; k None: all columns."""
    from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations

    torch.manual_seed(42)
    options = {} if k else {"use_sklearn": False, "batch_size": 250, "epochs": 100, "lr": 1e-2}
    found: list[float] = []
    start = time.perf_counter()
    for train, test in STATE.pooled.values():
        _, accuracies = train_probe_on_activations(train, test, select_top_k=k, **options)
        found += accuracies.values()
    return {"seconds": time.perf_counter() - start, "accuracy": sum(found) / len(found)}


# ---------------------------------------------------------------- the whole of SAEBench


def saebench_run(
    model: str,
    hook: str,
    layer: int,
    weights: str,
    rows: dict[str, str],
    given: str,
    out: str,
    k_values: list[int],
    again: bool,
) -> dict[str, Any]:
    """Runs SAEBench's sparse probing from texts to its result file.

    Args:
        model: its folder.
        hook: TransformerLens' name of the hook.
        layer: of the hook.
        weights: W_enc [d_sae, d_in], b_enc, W_dec, b_dec of a ReLU SAE.
        rows: entry -> JSON with the rows that the hub would give, by split.
        given: JSON of entry -> side -> class -> texts, for entries that its sampling refuses.
        out: folder for its results and caches.
        k_values: numbers of columns.
        again: whether the language model's activations are in its cache already.

    Returns: seconds on the clock and of the processor, the result, the texts of each entry as a
        digest, and the entries whose sampling refused.
    """
    # Its type checks bind one size for all classes of an entry, so that a class that is short by a
    # few texts stops it; the probes themselves do not mind.
    os.environ["JAXTYPING_DISABLE"] = "1"
    from sae_bench.evals.sparse_probing import main as sparse_probing
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    from sae_bench.sae_bench_utils import dataset_utils

    model = _named_model(model, out)
    digests: dict[str, str] = {}
    refused: dict[str, str] = {}
    texts = json.loads(Path(given).read_text())
    own = STATE.sampling = getattr(STATE, "sampling", dataset_utils.get_multi_label_train_test_data)

    def sampled(name: str, *sizes: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        try:
            train, test = own(name, *sizes)
        except (AssertionError, KeyError, ValueError) as error:
            refused[name] = str(error) or "its assertion of the number of texts failed"
            train, test = texts[name]["train"], texts[name]["test"]
        chosen = {name: [train[name], test[name]] for name in texts[name]["train"]}
        digests[name] = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16]
        return train, test

    dataset_utils.get_multi_label_train_test_data = sampled
    dataset_utils.load_dataset = lambda name, *args, **options: _rows_of_hub(
        json.loads(Path(rows[name]).read_text()),
        *args,
        **options,
    )
    config = SparseProbingEvalConfig(
        model_name=model, dataset_names=list(rows), k_values=k_values, llm_batch_size=32,
        llm_dtype="float32", context_length=128,
    )  # fmt: skip
    sae = _standard_sae(weights, model, hook, layer)
    start, cpu = time.perf_counter(), time.process_time()
    found = sparse_probing.run_eval(
        config, [("ours", sae)], "cpu", out, force_rerun=again, artifacts_path="artifacts"
    )
    seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    (result,) = found.values()
    file = f"{out}/ours_custom_sae_eval_results.json"
    return {"seconds": seconds, "result": file, "texts": digests, "refused": refused} | {
        "by_class": result["eval_result_unstructured"]
    }


def _named_model(model: str, out: str) -> str:
    """Makes a local folder known to TransformerLens as a model; returns its name there.

    SAEBench's cache is os.path.join(artifacts_path, model name, ...): a model named by an absolute
    path would get it into its own folder. `out` becomes the current folder.
    """
    import transformer_lens.loading_from_pretrained as known

    Path(out).mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    name = Path(model).name
    if not Path(name).is_symlink():
        Path(name).symlink_to(model)
    if name not in known.OFFICIAL_MODEL_NAMES:
        known.OFFICIAL_MODEL_NAMES.append(name)
        known.MODEL_ALIASES[name] = [name]
    return name


def saebench_core(
    model: str,
    hook: str,
    layer: int,
    weights: str,
    tokens: str,
    batches: int,
    batch: int,
    positions: int,
    out: str,
) -> dict[str, Any]:
    """Runs SAEBench's core from a table of tokens to its result file.

    Args:
        model, hook, layer, weights: as in `saebench_run`.
        tokens: folder with train.parquet, a table of the one column `tokens`.
        batches: of the losses, and of the rows.
        batch: contexts in each.
        positions: in a context.
        out: folder for its results.

    Returns: seconds on the clock and of the processor, its result file, and the file of the batches
        that it took in their order, with the logits of the first context.
    """
    from safetensors.torch import save_file

    os.environ["JAXTYPING_DISABLE"] = "1"
    from sae_bench.evals.core import main as core
    from sae_lens.training.activations_store import ActivationsStore
    from transformer_lens import HookedTransformer

    model = _named_model(model, out)
    given: list[torch.Tensor] = []
    own = ActivationsStore.get_batch_tokens

    def recorded(store: Any, *sizes: Any, **options: Any) -> torch.Tensor:
        given.append(own(store, *sizes, **options).cpu())
        return given[-1]

    # Asked of the hub only: the tokens' table has no record of its tokenizer.
    from sae_lens.training import activations_store

    activations_store.validate_pretokenized_dataset_tokenizer = lambda **_: None
    ActivationsStore.get_batch_tokens = recorded
    sae = _standard_sae(weights, model, hook, layer)
    sae.cfg.metadata.prepend_bos = True
    start, cpu = time.perf_counter(), time.process_time()
    try:
        found = core.multiple_evals(
            [("ours", sae)], batches, batches, batch, dataset=tokens, context_size=positions,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            output_folder=out, device="cpu", force_rerun=True,
        )  # fmt: skip
    finally:
        ActivationsStore.get_batch_tokens = own
    seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    if len(found) != 1:
        raise RuntimeError("SAEBench's core gave no result; its reason is in the log above")
    first = HookedTransformer.from_pretrained_no_processing(model, device="cpu")
    with torch.no_grad():
        logits = first(given[0][:1])
    file = f"{out}/batches.safetensors"
    save_file(
        {f"{i:04d}": ids.contiguous() for i, ids in enumerate(given)} | {"logits": logits}, file
    )
    return {"seconds": seconds, "result": f"{out}/ours_custom_sae_eval_results.json"} | {
        "batches": file
    }


def read_results(files: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Reads result files with SAEBench's classes and with the readers of its graphs.

    Args:
        files: type -> file, whose path contains the type, by which its reader chooses.

    Returns: type -> class, the metrics that `get_eval_results` reads and, for core, those of
        `get_core_results`.
    """
    from pydantic import TypeAdapter
    from sae_bench.evals.core.eval_output import CoreEvalOutput
    from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput
    from sae_bench.sae_bench_utils import graphing_utils

    classes = {"core": CoreEvalOutput, "sparse_probing": SparseProbingEvalOutput}
    read: dict[str, dict[str, Any]] = {}
    for kind, file in files.items():
        found = TypeAdapter(classes[kind]).validate_json(Path(file).read_text())
        (metrics,) = graphing_utils.get_eval_results([file]).values()
        read[kind] = {"class": type(found).__name__, "metrics": metrics}
        if kind == "core":
            (read[kind]["core"],) = graphing_utils.get_core_results([file]).values()
    return read


def _rows_of_hub(tables: dict[str, list[Any]], name: str = "", **options: Any) -> Any:
    """Returns what `load_dataset` would: rows by split, or the rows of one split."""
    if name:  # a pair of languages, of which SAEBench reads the first
        return [row for row in tables["train"] if name.split("-")[0] in row["translation"]]
    return tables[options["split"]] if "split" in options else tables


def _standard_sae(weights: str, model: str, hook: str, layer: int) -> Any:
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    tensors = load_file(weights)
    d_sae, d_in = tensors["W_enc"].shape
    about = SAEMetadata(hook_name=hook, hook_layer=layer, model_name=model, context_size=128)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae, dtype="float32", metadata=about))
    with torch.no_grad():
        sae.W_enc.copy_(tensors["W_enc"].T)
        for name in ("b_enc", "W_dec", "b_dec"):
            getattr(sae, name).copy_(tensors[name])
    return sae


# ---------------------------------------------------------------- synthetic


def synthetic_draw(settings: dict[str, Any], rows: int, out: str) -> None:
    """Draws rows of SAELens' synthetic model; writes them and their origins as safetensors."""
    from sae_lens.synthetic import (
        FoldedNormalMagnitudeConfig,
        HierarchyConfig,
        LinearMagnitudeConfig,
        LowRankCorrelationConfig,
        OrthogonalizationConfig,
        SyntheticModel,
        SyntheticModelConfig,
        ZipfianFiringProbabilityConfig,
    )
    from safetensors.torch import save_file

    s = settings
    firing = ZipfianFiringProbabilityConfig(s["exponent"], s["highest"], s["lowest"])
    model = SyntheticModel(SyntheticModelConfig(
        num_features=s["features"], hidden_dim=s["d"], firing_probability=firing,
        hierarchy=HierarchyConfig(
            total_root_nodes=s["roots"], branching_factor=s["children"], max_depth=s["depth"],
            mutually_exclusive_portion=1.0, compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=OrthogonalizationConfig(s["apart_steps"], s["apart_lr"]),
        correlation=LowRankCorrelationConfig(s["rank"], s["strength"]),
        mean_firing_magnitudes=LinearMagnitudeConfig(s["first"], s["last"]),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(s["sd_mean"], s["sd_sd"]),
        bias=s["bias"], seed=42,
    ))  # fmt: skip
    torch.manual_seed(7)
    parts = [model.sample_with_features(min(4096, rows - i)) for i in range(0, rows, 4096)]
    generator, correlation = model.activation_generator, model.correlation_matrix
    assert correlation is not None
    tensors = {
        "x": torch.cat([x for x, _ in parts]),
        "codes": torch.cat([codes for _, codes in parts]),
        "directions": model.feature_dict.feature_vectors.detach(),
        "bias": model.feature_dict.bias.detach(),
        "loadings": correlation.correlation_factor,
        "deviations": generator.std_firing_magnitudes,
        "probabilities": firing.generate(s["features"]),
        "own_probabilities": generator.firing_probabilities,
    }
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, out)


def synthetic_scores(drawn: str, weights: str) -> dict[str, float]:
    """Returns SAELens' scores of a ReLU SAE on drawn rows, whose codes its generator replays."""
    from sae_lens.synthetic import FeatureDictionary, eval_sae_on_synthetic_data

    given = load_file(drawn)
    codes = given["codes"]
    features = FeatureDictionary(codes.shape[1], given["x"].shape[1], initializer=None)
    features.feature_vectors.data, features.bias.data = given["directions"], given["bias"]

    class Replay:
        at = 0

        def sample(self, n: int) -> torch.Tensor:
            self.at += n
            return codes[self.at - n : self.at]

    sae = _standard_sae(weights, "synthetic", "synthetic", 0)
    generator: Any = Replay()
    found = eval_sae_on_synthetic_data(sae, features, generator, len(codes), 4096).to_dict()
    own = found.pop("classification")
    return found | {f"classification.{name}": value for name, value in own.items()}


def check_schema(file: str) -> str:
    """Returns the name of SAEBench's schema, after the file has passed it."""
    from pydantic import TypeAdapter
    from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput

    found = TypeAdapter(SparseProbingEvalOutput).validate_json(Path(file).read_text())
    return type(found).__name__


# ---------------------------------------------------------------- the loop


CALLS = {
    function.__name__: function
    for function in (
        threads,
        versions,
        inputs,
        build,
        steps,
        l0,
        drop,
        training_peak,
        store,
        harvests,
        mean_activation,
        probing_open,
        probing_pool,
        probing_probes,
        saebench_run,
        saebench_core,
        read_results,
        synthetic_draw,
        synthetic_scores,
        check_schema,
    )
}


def main() -> None:
    """Answers calls until stdin ends; the output of packages goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            reply = {"result": CALLS[name](**arguments)}
        except Exception as error:
            import traceback

            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
