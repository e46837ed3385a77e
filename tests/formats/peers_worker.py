"""Runs with the peers' packages alone: reads what we wrote, and writes what we read.

    PYTHONPATH=tests/helpers python peers_worker.py FOLDER

FOLDER/ours/<name>/     an export of ours; its rows.safetensors holds x, and answer.safetensors gets
                        what `sae_lens.SAE.load_from_disk` makes of it: f and x_hat
FOLDER/theirs/<name>/   SAEs of SAELens, sparsify and dictionary_learning, with the same two files
FOLDER/published/<name>/    published SAEs by their own layout (published_saes.py), below them the
                            repository's name, with the same two files
FOLDER/fields.json      architecture -> fields of SAELens' configuration classes
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from published_saes import D_IN, D_SAE, LAYOUTS, QWEN_D_SAE, K, Layout, Tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SEED = 5


def main(folder: Path) -> None:
    torch.manual_seed(SEED)
    with torch.no_grad():
        for own in sorted((folder / "ours").iterdir()):
            answer(own, *saelens_functions(own))
        x = load_file(folder / "rows.safetensors")["x"]
        for make in (saelens, sparsify, dictionary_learning):
            make(folder / "theirs", x)
        for layout in LAYOUTS:
            published(layout, folder / "published" / layout.name, x)
    (folder / "fields.json").write_text(json.dumps(fields()))
    (folder / "loaders.json").write_text(json.dumps(loaders()))


def answer(folder: Path, encode: Any, decode: Any) -> None:
    f = encode(load_file(folder / "rows.safetensors")["x"])
    save_file({"f": f, "x_hat": decode(f)}, folder / "answer.safetensors")


def saelens_functions(folder: Path) -> tuple[Any, Any]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    return sae.encode, lambda f: sae.decode(f.to(sae.dtype)).float()


def told(folder: Path, x: torch.Tensor, encode: Any, decode: Any) -> None:
    save_file({"x": x}, folder / "rows.safetensors")
    answer(folder, lambda x: encode(x).float().contiguous(), decode)


# ---- SAELens ------------------------------------------------------------------------------------


def saelens(folder: Path, x: torch.Tensor) -> None:
    import sae_lens

    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    inference = {
        "standard": sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**sizes)),
        "standard-uncentred": sae_lens.StandardSAE(
            sae_lens.StandardSAEConfig(**sizes, apply_b_dec_to_input=False)
        ),
        "topk": sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**sizes, k=K)),
        "topk-rescaled": sae_lens.TopKSAE(
            sae_lens.TopKSAEConfig(**sizes, k=K, rescale_acts_by_decoder_norm=True)
        ),
        "abstopk": sae_lens.AbsTopKSAE(sae_lens.AbsTopKSAEConfig(**sizes, k=K)),
        "jumprelu": sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**sizes)),
        "gated": sae_lens.GatedSAE(sae_lens.GatedSAEConfig(**sizes)),
        "topk-layer_norm": sae_lens.TopKSAE(
            sae_lens.TopKSAEConfig(**sizes, k=K, normalize_activations="layer_norm")
        ),
        "standard-constant_norm": sae_lens.StandardSAE(
            sae_lens.StandardSAEConfig(**sizes, normalize_activations="constant_norm_rescale")
        ),
        "matching_pursuit": sae_lens.MatchingPursuitSAE(
            sae_lens.MatchingPursuitSAEConfig(**sizes, max_iterations=K)
        ),
    }
    training = {
        "topk-trained": sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**sizes, k=K)),
        "batchtopk": sae_lens.BatchTopKTrainingSAE(
            sae_lens.BatchTopKTrainingSAEConfig(**sizes, k=K)
        ),
        "jumprelu-trained": sae_lens.JumpReLUTrainingSAE(
            sae_lens.JumpReLUTrainingSAEConfig(**sizes)
        ),
        "gated-trained": sae_lens.GatedTrainingSAE(sae_lens.GatedTrainingSAEConfig(**sizes)),
    }
    whole = {}
    for name, sae in (inference | training).items():
        scatter(sae)
        if name == "matching_pursuit":  # with longer rows the residual grows
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "gpt2", "blocks.3.hook_resid_post"
        sae.save_model(folder / f"saelens-{name}")
        if name in training:
            sae.save_inference_model(folder / f"saelens-{name}-inference")
            whole[name] = folder / f"saelens-{name}-inference"
        elif name == "standard":
            normalised(folder, sae, x)
    for name in ("standard", "topk"):
        of_old(folder / f"saelens-{name}", folder / f"saelens-{name}-old")
    for name in (*inference, "standard-old", "topk-old"):
        place = folder / f"saelens-{name}"
        told(place, x, *saelens_functions(place))
    for name, place in whole.items():  # a checkpoint is the same function as what it is saved as
        told(place, x, *saelens_functions(place))
        told(folder / f"saelens-{name}", x, *saelens_functions(place))


def of_old(new: Path, old: Path) -> None:
    """The same weights as SAELens before 6.0 wrote them: one flat dictionary."""
    old.mkdir()
    (old / "sae_weights.safetensors").write_bytes((new / "sae_weights.safetensors").read_bytes())
    flat = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "lr": 4e-4}
    flat |= {"hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2-small"}
    if "topk" in new.name:
        flat |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    (old / "cfg.json").write_text(json.dumps(flat))


def normalised(folder: Path, sae: Any, x: torch.Tensor) -> None:
    """Checkpoints whose normalisation is not folded yet; SAELens' own folding answers."""
    import copy

    from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

    matrix = torch.linalg.qr(torch.randn(D_IN, D_IN))[0] * torch.linspace(0.5, 2, D_IN)
    white = ActivationWhitening(x.mean(0), matrix, torch.linalg.inv(matrix))
    scalers = {
        "expected_average_only_in": ActivationScaler(scaling_factor=0.4),
        "covariance_whitening": ActivationScaler(whitening=white),
    }
    for kind, scaler in scalers.items():
        place, raw = folder / f"saelens-{kind}", copy.deepcopy(sae)
        raw.cfg.normalize_activations = kind
        raw.save_model(place)
        scaler.save(str(place / "activation_scaler.json"))
        if kind == "covariance_whitening":
            raw.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
        else:
            raw.fold_activation_norm_scaling_factor(0.4)
        told(place, x, raw.encode, raw.decode)


def scatter(module: torch.nn.Module) -> None:
    """Random values, so that nothing is 0 or of norm 1 by chance."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape))
        if "threshold" in name and "log" not in name:
            tensor.abs_()


def fields() -> dict[str, list[str]]:
    from sae_lens.registry import get_sae_class, get_sae_training_class

    kinds = ("standard", "topk", "abstopk", "jumprelu", "gated", "matching_pursuit")
    found = {kind: get_sae_class(kind)[1] for kind in kinds}
    trained = (*kinds, "batchtopk", "matryoshka_batchtopk")
    found |= {f"{kind}-training": get_sae_training_class(kind)[1] for kind in trained}
    return {name: [f.name for f in dataclasses.fields(kind)] for name, kind in found.items()}


def loaders() -> list[str]:
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS

    return list(NAMED_PRETRAINED_SAE_LOADERS)


# ---- published SAEs, as SAELens' loaders read them -----------------------------------------------


def published(layout: Layout, folder: Path, x: torch.Tensor) -> None:
    """Writes an SAE by its own layout, and what SAELens makes of it."""
    folder.mkdir(parents=True)
    tensors = layout.make(folder, SEED)
    topk = "topk" in layout.name
    sae = of_layout(layout, folder) if layout.loader else of_openai(tensors, topk)
    if layout.heads:
        sae.turn_off_forward_pass_hook_z_reshaping()
    save_file({"x": x}, folder / "rows.safetensors")
    answers = {"f": sae.encode(x), "x_hat": sae(x)}
    if layout.transposed:
        answers["as_read"] = answers["x_hat"]
        sae.W_skip.copy_(sae.W_skip.T.clone())
        answers["x_hat"] = sae(x)
    save_file({name: t.contiguous() for name, t in answers.items()}, folder / "answer.safetensors")


def of_layout(layout: Layout, folder: Path) -> Any:
    """SAELens' SAE of a published layout."""
    overrides = dict(layout.overrides)
    if layout.format == "qwen_scope":
        overrides |= {"d_sae": QWEN_D_SAE, "activation_fn_kwargs": {"k": K}}
    place = (layout.repo, layout.place or layout.inner)
    return with_loader(layout.loader, folder, place, overrides, layout.factor)


def with_loader(
    loader: str,
    folder: Path,
    place: tuple[str, str],
    overrides: dict[str, Any],
    factor: float | None = None,
) -> Any:
    """The SAE at a repository and a path in it that SAELens loads from `folder` instead of the
    hub."""
    import sae_lens.saes.sae as sae_module
    from huggingface_hub.utils import EntryNotFoundError
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    class NotThere(EntryNotFoundError):
        def __init__(self, message: str) -> None:
            Exception.__init__(self, message)

    def local(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        file = folder / repo_id / (subfolder or "") / filename
        if not file.is_file():
            raise NotThere(str(file))
        return str(file)

    def shapes(repo: str, filename: str) -> dict[str, list[int]]:
        with safe_open(folder / repo / filename, "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    loaders.hf_hub_download = local
    loaders.get_safetensors_tensor_shapes = shapes  # asks the hub otherwise
    sae_module.get_norm_scaling_factor = lambda release, sae_id: factor
    load = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader]

    def tiny(**given: Any) -> Any:
        return load(**{**given, "cfg_overrides": {**given["cfg_overrides"], **overrides}})

    return SAE.from_pretrained(*place, converter=tiny)


def of_openai(tensors: Tensors, topk: bool) -> Any:
    """OpenAI's SAE as SAELens would hold it: it has no loader for the layout."""
    import sae_lens

    sizes: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE}
    if topk:
        cfg = sae_lens.TopKSAEConfig(**sizes, k=K, normalize_activations="layer_norm")
        sae = sae_lens.TopKSAE(cfg)
    else:
        sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**sizes))
    sae.W_enc.copy_(tensors["encoder.weight"].T)
    sae.W_dec.copy_(tensors["decoder.weight"].T)
    sae.b_enc.copy_(tensors["latent_bias"])
    sae.b_dec.copy_(tensors["pre_bias"])
    return sae


# ---- sparsify, dictionary_learning --------------------------------------------------------------


def sparsify(folder: Path, x: torch.Tensor) -> None:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    sae = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K))
    scatter(sae)
    place = folder / "sparsify-layers.3"
    sae.save_to_disk(place)
    sae = SparseCoder.load_from_disk(place)

    def encode(x: torch.Tensor) -> torch.Tensor:
        values, indices, _ = sae.encode(x)
        return torch.zeros(len(x), D_SAE).scatter(1, indices, values)

    told(place, x, encode, lambda f: f @ sae.W_dec + sae.b_dec)
    values, indices, _ = sae.encode(x)
    stored = load_file(place / "answer.safetensors")
    assert torch.allclose(stored["x_hat"], sae.decode(values, indices), rtol=1e-5, atol=1e-4)


def dictionary_learning(folder: Path, x: torch.Tensor) -> None:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    matryoshka = matryoshka_batch_top_k.MatryoshkaBatchTopKSAE
    made = [
        dictionary.AutoEncoder(D_IN, D_SAE),
        dictionary.AutoEncoderNew(D_IN, D_SAE),
        dictionary.GatedAutoEncoder(D_IN, D_SAE),
        dictionary.JumpReluAutoEncoder(D_IN, D_SAE),
        top_k.AutoEncoderTopK(D_IN, D_SAE, K),
        batch_top_k.BatchTopKSAE(D_IN, D_SAE, K),
        matryoshka(D_IN, D_SAE, K, [8, D_SAE - 8]),
    ]
    for own in made:
        name = type(own).__name__
        place = folder / f"dictionary_learning-{name}"
        place.mkdir(parents=True)
        scatter(own)
        torch.save(own.state_dict(), place / "ae.pt")
        trainer = {"dict_class": name, "k": K, "lm_name": "gpt2", "layer": 3}
        trainer |= {"activation_dim": D_IN, "dict_size": D_SAE}
        config = {"trainer": trainer, "buffer": {"ctx_len": 128}}
        (place / "config.json").write_text(json.dumps(config))
        given = {"k": K} if "TopK" in name else {}
        sae = type(own).from_pretrained(place / "ae.pt", **given)
        told(place, x, sae.encode, sae.decode)
        if name != "AutoEncoderNew":  # SAELens does not find its decoder.bias
            spot = (f"{folder.name}/{place.name}", ".")
            theirs = with_loader("dictionary_learning_1", folder.parent, spot, {})
            answers = {"f": theirs.encode(x), "x_hat": theirs(x)}
            save_file(answers, place / "saelens.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
