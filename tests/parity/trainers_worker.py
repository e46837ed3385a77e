"""Runs with the peers' packages alone: trains each of their trainers from given weights.

    python trainers_worker.py FOLDER

FOLDER/batches.safetensors      x [steps, N, d_in], and y of the same shape for transcoders
FOLDER/<run>/start.safetensors  the weights that a run starts from, by our names and shapes
FOLDER/<run>/record.safetensors gets `loss` [steps], in the peer's units, and each weight after
                                every step [steps, ...], by our names and shapes
FOLDER/faults.json              gets what other functions of theirs do: name -> what happened

Settings that only one side has are off: warm-up and decay of rates and coefficients, resampling,
the start of b_dec at a median or mean, and the clipping of gradients, which SAELens and
dictionary_learning can't turn off and which is replaced here.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: Adam adds this to the root of the second moment; times d_in where the loss is d_in times ours.
EPSILON = 1e-8
LR, K, WIDTHS = 3e-3, 4, (4, 12)
L1, L0, THRESHOLD, BANDWIDTH, TARGET = 0.3, 0.05, 0.4, 0.4, 5.0
PREACTIVATION = 0.1
#: Of the language model of sparsify's runs.
VOCABULARY = 20
#: Steps of silence after which a latent is dead.
WINDOW = 3
#: Steps of training at which p moves, and its last value.
ANNEALING, LAST_P, QUEUE = (10, 50, 5), 0.2, 1

Start = dict[str, Tensor]


class Record:
    """Record of a run: the loss of each step, and the weights after it."""

    def __init__(self, weights: Callable[[], Start]) -> None:
        self.weights, self.losses, self.path = weights, list[float](), list[Start]()

    def loss(self, value: Tensor) -> None:
        self.losses.append(float(value.detach()))

    def step(self, *_: object) -> None:
        self.path.append({name: w.detach().clone() for name, w in self.weights().items()})

    def write(self, file: Path) -> None:
        assert len(self.losses) == len(self.path)
        path = {name: torch.stack([w[name] for w in self.path]) for name in self.path[0]}
        save_file({"loss": torch.tensor(self.losses, dtype=torch.float64)} | path, file)


Run = Callable[[Start, Tensor, Tensor], Record]


def main(folder: Path) -> None:
    def unclipped(*_: Any, **__: Any) -> None: ...

    torch.nn.utils.clip_grad_norm_ = unclipped
    torch.set_float32_matmul_precision = unclipped  # sparsify asks for less than float32
    batches = load_file(folder / "batches.safetensors")
    for start in sorted(folder.glob("*/start.safetensors")):
        record = RUNS[start.parent.name](load_file(start), batches["x"], batches["y"])
        record.write(start.with_name("record.safetensors"))
    (folder / "faults.json").write_text(json.dumps(faults(batches["x"])))


def fill(pairs: dict[str, tuple[Tensor, bool]], start: Start) -> Callable[[], Start]:
    """Copies the start into weights, and returns a function that reads them.

    Args:
        pairs: our name -> the peer's tensor, and whether it is the transpose of ours.
    """
    with torch.no_grad():
        for name, (tensor, transposed) in pairs.items():
            tensor.copy_(start[name].T if transposed else start[name])
    return lambda: {n: (w.T if turned else w).contiguous() for n, (w, turned) in pairs.items()}


def scale_epsilon(optimiser: torch.optim.Optimizer, by: float) -> None:
    for group in optimiser.param_groups:
        group["eps"] = EPSILON * by


# ---- SAELens ------------------------------------------------------------------------------------


def saelens(architecture: str, window: int = 10**6, **settings: Any) -> Run:
    """A run whose latents are dead after `window` steps of silence."""

    def run(start: Start, x: Tensor, y: Tensor) -> Record:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.registry import get_sae_training_class
        from sae_lens.training.sae_trainer import SAETrainer

        kind, config = get_sae_training_class(architecture)
        sae = kind(config(d_in=x.shape[2], d_sae=len(start["W_enc"]), **settings))
        names = [name for name, _ in sae.named_parameters()]
        pairs = {n: (getattr(sae, n), n == "W_enc") for n in names}
        record = Record(fill(pairs, start))
        steps, rows, d_in = x.shape
        trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=steps * rows,
                train_batch_size_samples=rows,
                lr=LR,
                lr_end=LR,
                dead_feature_window=window,
            ),
            sae,
            iter(x),
        )
        scale_epsilon(trainer.optimizer, d_in)
        forward = sae.training_forward_pass

        def watched(step_input: Any) -> Any:
            output = forward(step_input)
            record.loss(output.loss)
            return output

        sae.training_forward_pass = watched
        trainer.optimizer.register_step_post_hook(record.step)
        trainer.fit()
        return record

    return run


# ---- dictionary_learning ------------------------------------------------------------------------

#: The attribute of each weight in the classes of dictionaries; `.weight` of nn.Linear holds the
#: decoder as [d_in, d_sae].
NAMES = {
    "AutoEncoder": {
        "W_enc": "encoder.weight",
        "b_enc": "encoder.bias",
        "W_dec": "decoder.weight",
        "b_dec": "bias",
    },
    "GatedAutoEncoder": {
        "W_enc": "encoder.weight",
        "W_dec": "decoder.weight",
        "b_dec": "decoder_bias",
        "b_gate": "gate_bias",
        "b_mag": "mag_bias",
        "r_mag": "r_mag",
    },
    "AutoEncoderTopK": {
        "W_enc": "encoder.weight",
        "b_enc": "encoder.bias",
        "W_dec": "decoder.weight",
        "b_dec": "b_dec",
    },
    "MatryoshkaBatchTopKSAE": {n: n for n in ("W_enc", "b_enc", "W_dec", "b_dec")},
    "JumpReluAutoEncoder": {n: n for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")},
}
NAMES["BatchTopKSAE"] = NAMES["AutoEncoderTopK"]


def dictionary_learning(
    module: str, trainer_name: str, dead_after: int | None = None, **settings: Any
) -> Run:
    def run(start: Start, x: Tensor, y: Tensor) -> Record:
        made = importlib.import_module(f"dictionary_learning.trainers.{module}")
        given = {"steps": 10**6, "lr": LR, "warmup_steps": 0, "device": "cpu"} | settings
        sizes = {"activation_dim": x.shape[2], "dict_size": len(start["W_enc"])}
        trainer = getattr(made, trainer_name)(layer=0, lm_name="none", **sizes, **given)
        if dead_after is not None:
            trainer.dead_feature_threshold = dead_after
        pairs = {}
        for ours, theirs in NAMES[type(trainer.ae).__name__].items():
            tensor = trainer.ae.get_parameter(theirs)
            turned = tensor.ndim == 2 and tensor.shape != start[ours].shape
            pairs[ours] = (tensor, turned)
        record = Record(fill(pairs, start))
        scale_epsilon(trainer.optimizer, x.shape[2])
        loss = trainer.loss

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            value = loss(*args, **kwargs)
            record.loss(value)
            return value

        trainer.loss = watched
        for step, batch in enumerate(x, 1):  # at step 0 they overwrite b_dec
            trainer.update(step, batch)
            record.step()
        return record

    return run


def faults(x: Tensor) -> dict[str, str]:
    """Runs dictionary_learning's annealing with its default values of p, and its resampling."""
    found = {}
    sizes = {"activation_dim": x.shape[2], "dict_size": 32, "steps": 10**6, "warmup_steps": 0}
    annealing = {"anneal_start": 1, "anneal_end": 10, "sparsity_warmup_steps": None}
    for module, name in (("p_anneal", "PAnnealTrainer"), ("gated_anneal", "GatedAnnealTrainer")):
        made = importlib.import_module(f"dictionary_learning.trainers.{module}")
        kind, given = getattr(made, name), sizes | annealing | {"layer": 0, "lm_name": "none"}
        trainer = kind(device="cpu", **given)
        found[f"{module}: defaults of p"] = outcome(
            lambda trainer=trainer: [trainer.update(i, rows) for i, rows in enumerate(x[:12])]
        )
        trainer = kind(device="cpu", sparsity_function="Lp^p", p_end=0.2, **given)
        for i, rows in enumerate(x[:3]):
            trainer.update(i, rows)
        before = {n: p.detach().clone() for n, p in trainer.ae.named_parameters()}
        dead = torch.arange(32) < 8
        text = outcome(lambda trainer=trainer, dead=dead: trainer.resample_neurons(dead, x[3]))
        moved = any(bool((p != before[n]).any()) for n, p in trainer.ae.named_parameters())
        found[f"{module}: resampling"] = text or ("weights moved" if moved else "nothing moved")
    return found


def outcome(call: Callable[[], object]) -> str:
    """The kind of exception that a call ends with, '' if it ends with none."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return ""


# ---- sparsify -----------------------------------------------------------------------------------


class Head(nn.Module):
    """Logits of the next token from the activations so far, [contexts, positions, d_in]."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        stream = torch.Generator().manual_seed(1)
        self.inner = nn.Parameter(torch.randn(d_in, 16, generator=stream))
        self.outer = nn.Parameter(torch.randn(16, VOCABULARY, generator=stream))

    def forward(self, x: Tensor) -> Tensor:
        earlier = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return torch.tanh((x + earlier) @ self.inner) @ self.outer


def tokens(ids: Tensor) -> Tensor:
    return 7 * ids % VOCABULARY


class Model(nn.Module):
    """A language model of one layer, whose activations are the rows of the batches.

    Id i of the text has the i-th row; the layer maps each row of x to that of y. `outputs` are the
    logits of all calls.
    """

    class Layer(nn.Module):
        def __init__(self, outputs: Tensor) -> None:
            super().__init__()
            self.outputs, self.ids = outputs, torch.zeros(1, 1, dtype=torch.int64)

        def forward(self, x: Tensor) -> Tensor:
            return self.outputs[self.ids]

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.x, self.layers = x.flatten(0, 1), nn.ModuleList([self.Layer(y.flatten(0, 1))])
        self.config = types.SimpleNamespace(num_hidden_layers=1)
        self.head, self.outputs = Head(x.shape[2]), list[Tensor]()
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    @property
    def base_model(self) -> Model:
        return self

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        self.layers[0].ids = input_ids
        logits = self.head(self.layers[0](self.x[input_ids]))
        self.outputs.append(logits)
        return types.SimpleNamespace(logits=logits, loss=self.next_token(input_ids, logits))

    def next_token(self, ids: Tensor, logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens(ids)[0, 1:])

    def loss(self, kind: str) -> Tensor:
        """The last step's loss; sparsify's `kl` without the entropy of the clean logits."""
        clean, spliced = (logits.log_softmax(-1) for logits in self.outputs[-2:])
        if kind == "kl":
            return (clean.exp() * (clean - spliced)).sum(-1).mean()
        return self.next_token(self.layers[0].ids, self.outputs[-1])


def sparsify(auxk: float = 0.0, loss: str = "fvu", **settings: Any) -> Run:
    def run(start: Start, x: Tensor, y: Tensor) -> Record:
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        from sparsify.config import SparseCoderConfig, TrainConfig
        from sparsify.trainer import Trainer

        transcodes = settings.get("transcode", False)
        steps, rows, _ = x.shape
        ids = torch.arange(steps * rows).view(steps, rows)
        with tempfile.TemporaryDirectory() as folder:
            coder = SparseCoderConfig(num_latents=len(start["W_enc"]), k=K, **settings)
            config = TrainConfig(
                coder,
                batch_size=1,
                optimizer="adam",
                lr=LR,
                lr_warmup_steps=0,
                auxk_alpha=auxk,
                loss_fn=loss,  # type: ignore
                dead_feature_threshold=WINDOW * rows,
                finetune="given weights",  # leaves the biases as they are at the first step
                log_to_wandb=False,
                save_dir=folder,
            )
            texts: Any = [{"input_ids": row} for row in ids]
            model = Model(x, y if transcodes else x)
            trainer = Trainer(config, texts, model)  # type: ignore
            (sae,) = trainer.saes.values()
            pairs = {"W_enc": (sae.encoder.weight, False), "b_enc": (sae.encoder.bias, False)}
            pairs |= {"W_dec": (sae.W_dec, False), "b_dec": (sae.b_dec, False)}
            if sae.W_skip is not None:
                pairs["W_skip"] = (sae.W_skip, False)
            read = fill(pairs, start)

            def weights() -> Start:
                """Rows are only brought to norm 1 at the next forward pass: here they are now."""
                found = read()
                unit = found["W_dec"] / found["W_dec"].norm(dim=1, keepdim=True)
                return found if transcodes else found | {"W_dec": unit}

            record = Record(weights)

            def watch(module: object, inputs: object, out: Any) -> None:
                if loss == "fvu":
                    record.loss(out.fvu + auxk * out.auxk_loss + out.multi_topk_fvu / 8)

            def after(*_: object) -> None:
                if loss != "fvu":
                    record.loss(model.loss(loss))
                record.step()

            sae.register_forward_hook(watch)
            scale_epsilon(trainer.optimizers[0], 1)
            trainer.optimizers[0].register_step_post_hook(after)
            trainer.fit()
        return record

    return run


# ---- overcomplete -------------------------------------------------------------------------------


def import_overcomplete() -> None:
    """Lets its trainer be imported without its package, which imports torchvision and timm."""
    if "overcomplete" in sys.modules:
        return
    spec = importlib.util.find_spec("overcomplete")
    assert spec is not None and spec.submodule_search_locations is not None
    package = types.ModuleType("overcomplete")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = importlib.machinery.ModuleSpec("overcomplete", None, is_package=True)
    sys.modules["overcomplete"] = package


def overcomplete(kind: str, normalization: str, **settings: Any) -> Run:
    def run(start: Start, x: Tensor, y: Tensor) -> Record:
        import_overcomplete()
        sae_module = importlib.import_module("overcomplete.sae")
        train = importlib.import_module("overcomplete.sae.train")
        losses = importlib.import_module("overcomplete.sae.losses")
        dictionary = {"normalization": normalization}
        made = getattr(sae_module, kind)
        model = made(x.shape[2], len(start["W_enc"]), dictionary_params=dictionary, **settings)
        pairs = {"W_dec": (model.dictionary._weights, False)}
        if hasattr(model.encoder, "final_block"):
            linear = model.encoder.final_block[0]
            pairs |= {"W_enc": (linear.weight, False), "b_enc": (linear.bias, False)}
        read = fill(pairs, start)

        def weights() -> Start:
            """Rows are only normalised at the next forward pass: here they are now."""
            found = read()
            return found | {"W_dec": model.dictionary.normalization(found["W_dec"])}

        record = Record(weights)

        def criterion(*args: Tensor) -> Tensor:
            value = losses.mse_l1(*args, penalty=0.0)
            record.loss(value)
            return value

        optimiser = torch.optim.Adam(model.parameters(), lr=LR, eps=EPSILON)
        optimiser.register_step_post_hook(record.step)
        batches = [(batch,) for batch in x]
        train.train_sae(
            model, batches, criterion, optimiser, nb_epochs=1, clip_grad=0, monitoring=0
        )
        return record

    return run


TOPK = {"k": K, "rescale_acts_by_decoder_norm": False}
JUMP = {"jumprelu_init_threshold": THRESHOLD, "jumprelu_bandwidth": BANDWIDTH}
ANNEAL = {
    "anneal_start": ANNEALING[0],
    "anneal_end": ANNEALING[1],
    "n_sparsity_updates": ANNEALING[2],
    "p_end": LAST_P,
    "sparsity_function": "Lp^p",
    "sparsity_warmup_steps": None,
    "initial_sparsity_penalty": L1,
}
GROUPS = [WIDTHS[0] / 32, (WIDTHS[1] - WIDTHS[0]) / 32, 1 - WIDTHS[1] / 32]

RUNS: dict[str, Run] = {
    "saelens-standard": saelens("standard", l1_coefficient=L1),
    "saelens-topk": saelens("topk", aux_loss_coefficient=0.0, **TOPK),
    "saelens-topk-rescaled": saelens("topk", aux_loss_coefficient=0.0, k=K),
    "saelens-topk-auxk": saelens("topk", WINDOW, aux_loss_coefficient=1.0, **TOPK),
    "saelens-abstopk": saelens("abstopk", aux_loss_coefficient=0.0, **TOPK),
    "saelens-batchtopk": saelens("batchtopk", aux_loss_coefficient=0.0, **TOPK),
    "saelens-gated": saelens("gated", l1_coefficient=L1),
    "saelens-jumprelu-step": saelens("jumprelu", l0_coefficient=L0, **JUMP),
    "saelens-jumprelu-tanh": saelens(
        "jumprelu",
        l0_coefficient=L0,
        jumprelu_sparsity_loss_mode="tanh",
        jumprelu_ste_to_input=True,
        **JUMP,
    ),
    "saelens-jumprelu-quadratic": saelens(
        "jumprelu",
        l0_coefficient=L0,
        jumprelu_sparsity_loss_mode="quadratic",
        target_l0=TARGET,
        **JUMP,
    ),
    "saelens-jumprelu-preactivation": saelens(
        "jumprelu",
        WINDOW,
        l0_coefficient=L0,
        pre_act_loss_coefficient=PREACTIVATION,
        **JUMP,
    ),
    "saelens-matryoshka": saelens(
        "matryoshka_batchtopk",
        aux_loss_coefficient=0.0,
        matryoshka_widths=[*WIDTHS, 32],
        **TOPK,
    ),
    "dictionary_learning-standard": dictionary_learning(
        "standard", "StandardTrainer", l1_penalty=L1, sparsity_warmup_steps=None
    ),
    "dictionary_learning-april": dictionary_learning(
        "standard", "StandardTrainerAprilUpdate", l1_penalty=L1, sparsity_warmup_steps=None
    ),
    "dictionary_learning-gated": dictionary_learning(
        "gdm", "GatedSAETrainer", l1_penalty=L1, sparsity_warmup_steps=None
    ),
    "dictionary_learning-p_anneal": dictionary_learning(
        "p_anneal", "PAnnealTrainer", sparsity_queue_length=1, **ANNEAL
    ),
    "dictionary_learning-p_anneal-queue": dictionary_learning(
        "p_anneal", "PAnnealTrainer", **ANNEAL
    ),
    "dictionary_learning-gated_anneal": dictionary_learning(
        "gated_anneal", "GatedAnnealTrainer", sparsity_queue_length=1, **ANNEAL
    ),
    "dictionary_learning-topk": dictionary_learning("top_k", "TopKTrainer", k=K, auxk_alpha=0),
    "dictionary_learning-topk-auxk": dictionary_learning(
        "top_k", "TopKTrainer", dead_after=WINDOW * 64, k=K
    ),
    "dictionary_learning-batchtopk": dictionary_learning(
        "batch_top_k", "BatchTopKTrainer", k=K, auxk_alpha=0
    ),
    "dictionary_learning-matryoshka": dictionary_learning(
        "matryoshka_batch_top_k",
        "MatryoshkaBatchTopKTrainer",
        k=K,
        auxk_alpha=0,
        group_fractions=GROUPS,
        group_weights=[3.0] * 3,
    ),
    "dictionary_learning-matryoshka-weights": dictionary_learning(
        "matryoshka_batch_top_k",
        "MatryoshkaBatchTopKTrainer",
        k=K,
        auxk_alpha=0,
        group_fractions=GROUPS,
    ),
    "dictionary_learning-jumprelu": dictionary_learning(
        "jumprelu",
        "JumpReluTrainer",
        bandwidth=BANDWIDTH,
        sparsity_penalty=L0,
        target_l0=TARGET,
        sparsity_warmup_steps=None,
    ),
    "sparsify-topk": sparsify(),
    "sparsify-groupmax": sparsify(activation="groupmax"),
    "sparsify-multi_topk": sparsify(multi_topk=True),
    "sparsify-topk-auxk": sparsify(auxk=1 / 32),
    "sparsify-kl": sparsify(loss="kl"),
    "sparsify-ce": sparsify(loss="ce"),
    "sparsify-transcode": sparsify(transcode=True),
    "sparsify-transcode-skip": sparsify(transcode=True, skip_connection=True),
    "overcomplete-topk-free": overcomplete("TopKSAE", "identity", top_k=K),
    "overcomplete-topk": overcomplete("TopKSAE", "l2", top_k=K),
    "overcomplete-batchtopk-free": overcomplete("BatchTopKSAE", "identity", top_k=K * 64),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
