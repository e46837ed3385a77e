"""Tiny SAEs in the layouts of published ones, and the equation of each.

The peers' process writes and loads the same files, so this module imports nothing of saelab.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 6, 24, 3
#: Width of what transcoders write.
D_OUT = 5
#: A layer of a cross-layer transcoder, and the number of layers that it writes to.
CLT_LAYER, TARGETS = 2, 3
#: Qwen Scope's width is a multiple of 1024.
QWEN_D_SAE = 1024
#: Average norm of Llama Scope's activations, so that s = sqrt(D_IN) / NORM.
NORM = 4.1
FACTOR = math.sqrt(D_IN) / NORM
JUMP = 0.3

Tensors = dict[str, Tensor]
Function = Callable[[Tensor, Tensors], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layout:
    """A layout of published SAEs.

    Args:
        format: its name in saelab's table.
        repo: name of the repository.
        inner: path in it of the SAE's folder, or of its file.
        shapes: of random tensors; names that begin with 'threshold' are positive.
        write: writes tensors to the path of the SAE.
        function: the layout's equation: rows and the stored tensors -> code, reconstruction.
        model, hook: where the SAE was trained.
        loader: SAELens' name for the layout; '' where it has none.
        overrides: settings that SAELens' loader knows only of the published sizes.
        factor: the normalisation that SAELens takes from its list of releases.
        heads: whether SAELens reshapes the rows of attention heads.
        suffix: distinguishes layouts of one format.
        unit_rows: names of decoders [d_in, d_sae] that get columns of norm 1.
        place: SAELens' name of the path in the repository, where it has another.
        targets: number of targets, which SAELens adds up.
        transposed: whether SAELens multiplies with the transpose of the skip connection.
    """

    format: str
    repo: str
    inner: str
    shapes: Mapping[str, tuple[int, ...]]
    write: Callable[[Path, Tensors], None]
    function: Function
    model: str
    hook: str
    loader: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    factor: float | None = None
    heads: bool = False
    suffix: str = ""
    unit_rows: tuple[str, ...] = ()
    place: str = ""
    targets: int = 1
    transposed: bool = False

    @property
    def name(self) -> str:
        return f"{self.format}{self.suffix}"

    def path(self, root: Path) -> Path:
        """The SAE below the folder that holds repositories."""
        return root / self.repo / self.inner

    def draw(self, seed: int) -> Tensors:
        """Random tensors."""
        stream = torch.Generator().manual_seed(seed)
        tensors = {n: torch.randn(s, generator=stream) for n, s in self.shapes.items()}
        for name, tensor in tensors.items():
            if "threshold" in name and "log" not in name:
                tensor.abs_()
            if name in self.unit_rows:
                tensor.div_(tensor.norm(dim=0))
        return tensors

    def make(self, root: Path, seed: int, **changes: Tensor) -> Tensors:
        """Writes an SAE below `root`; returns its tensors as they are stored."""
        tensors = self.draw(seed) | changes
        if self.format == "llama_scope":
            tensors = {name: t.bfloat16() for name, t in tensors.items()}
        path = self.path(root)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write(path, tensors)
        return tensors


def json_file(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def safetensors(path: Path, tensors: Tensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def pickled(path: Path, tensors: Tensors) -> None:
    torch.save(tensors, path)


# ---- equations ----------------------------------------------------------------------------------


def relu(z: Tensor) -> Tensor:
    return torch.relu(z)


def topk(z: Tensor, k: int = K) -> Tensor:
    best = torch.relu(z).topk(k, dim=1)
    return torch.zeros_like(z).scatter(1, best.indices, best.values)


def jump(z: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.relu(z) * (z > threshold)


def linear(x: Tensor, t: Tensors, enc: str = "encoder", dec: str = "decoder") -> tuple[Any, ...]:
    """Pre-activations of two torch.nn.Linear layers, and the function from code to x_hat."""
    z = x @ t[f"{enc}.weight"].T + t[f"{enc}.bias"]
    return z, lambda f: f @ t[f"{dec}.weight"].T + t[f"{dec}.bias"]


# ---- Gemma Scope --------------------------------------------------------------------------------

GEMMA = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
GEMMA |= {"threshold": (D_SAE,)}
TRANSCODER = GEMMA | {"W_dec": (D_SAE, D_OUT), "b_dec": (D_OUT,)}
SIZES = {"d_in": D_IN, "d_sae": D_SAE}


def write_npz(path: Path, tensors: Tensors) -> None:
    path.mkdir(parents=True, exist_ok=True)
    np.savez(path / "params.npz", **{name: t.numpy() for name, t in tensors.items()})


def gemma(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    f = jump(x @ t["W_enc"] + t["b_enc"], t["threshold"])
    return f, f @ t["W_dec"] + t["b_dec"]


def gemma_embedding(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    f = jump(x @ t["W_enc"] / math.sqrt(D_IN) + t["b_enc"], t["threshold"])
    return f, f @ t["W_dec"] * math.sqrt(D_IN) + t["b_dec"]


def gemma_scope(suffix: str, repo: str, inner: str, hook: str, **more: Any) -> Layout:
    given = {"function": gemma, "overrides": SIZES, "loader": "gemma_2", **more}
    model = "google/gemma-2-9b-it" if "9b-it" in repo else "google/gemma-2-2b"
    return Layout(
        "gemma_scope",
        f"google/{repo}",
        inner,
        TRANSCODER if "transcoders" in repo else GEMMA,
        write_npz,
        model=model,
        hook=hook,
        suffix=suffix,
        **given,
    )


# ---- Gemma Scope 2 ------------------------------------------------------------------------------


def write_gemma_2(config: Mapping[str, Any] | None) -> Callable[[Path, Tensors], None]:
    def write(path: Path, tensors: Tensors) -> None:
        lower = {name.lower() if name in GEMMA else name: t for name, t in tensors.items()}
        safetensors(path / "params.safetensors", lower)
        if config is not None:
            json_file(path / "config.json", config)

    return write


def gemma_scope_2(suffix: str, inner: str, hook: str, config: Any = None, **more: Any) -> Layout:
    given = {"shapes": GEMMA, "function": gemma, **more}
    return Layout(
        "gemma_scope_2",
        "google/gemma-scope-2-270m-pt",
        inner,
        write=write_gemma_2(config),
        model="google/gemma-3-270m",
        hook=hook,
        loader="gemma_3",
        suffix=suffix,
        **given,
    )


def gemma_3_config(**fields: Any) -> dict[str, Any]:
    point = "model.layers.4.output"
    given = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "type": "sae"}
    given |= {"hf_hook_point_in": point, "hf_hook_point_out": point, "width": D_SAE, "l0": 20}
    return given | {"affine_connection": False, **fields}


def gemma_affine(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    f, y = gemma(x, t)
    return f, y + x @ t["affine_skip_connection"]


def gemma_3_transcoder(layer: int, **fields: Any) -> dict[str, Any]:
    """The config.json of a transcoder of an MLP, between the norms around it."""
    points = {"in": "pre_feedforward_layernorm", "out": "post_feedforward_layernorm"}
    names = {f"hf_hook_point_{k}": f"model.layers.{layer}.{v}.output" for k, v in points.items()}
    return gemma_3_config(**names, type="transcoder", **fields)


CLT = TRANSCODER | {"W_dec": (D_SAE, CLT_LAYER + TARGETS, D_OUT)}


def write_gemma_clt(path: Path, tensors: Tensors) -> None:
    """A layer's file has all layers as targets; those before it are 0."""
    given = dict(tensors)
    if "W_dec" in given:
        given["W_dec"] = given["W_dec"].clone()
        given["W_dec"][:, :CLT_LAYER] = 0
    safetensors(path, {name.lower() if name in GEMMA else name: t for name, t in given.items()})


def in_targets(f: Tensor, w_dec: Tensor, first: Tensor) -> Tensor:
    """Returns the layer's contribution to each of its targets, with `first` added to the first."""
    parts = torch.einsum("nf,fto->nto", f, w_dec)
    parts[:, 0] += first
    return parts.flatten(1)


def gemma_clt(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    f = jump(x @ t["W_enc"] + t["b_enc"], t["threshold"])
    return f, in_targets(f, t["W_dec"][:, CLT_LAYER:], t["b_dec"])


def gemma_clt_affine(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    f = jump(x @ t["W_enc"] + t["b_enc"], t["threshold"])
    skip = x @ t["affine_skip_connection"]
    return f, in_targets(f, t["W_dec"][:, CLT_LAYER:], t["b_dec"] + skip)


# ---- circuit-tracer: one file per layer, and cross-layer transcoders ----------------------------

PER_LAYER = {"W_enc": (D_SAE, D_IN), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_OUT), "b_dec": (D_OUT,)}
CROSS = {"W_enc_2": (D_SAE, D_IN), "b_enc_2": (D_SAE,), "b_dec_2": (D_OUT,)}
CROSS |= {"W_dec_2": (D_SAE, TARGETS, D_OUT)}


def write_per_layer(config: str) -> Callable[[Path, Tensors], None]:
    def write(path: Path, tensors: Tensors) -> None:
        safetensors(path, tensors)
        sizes = {"d_model": D_IN, "d_feature": D_SAE, "batch_size": 4096}
        lines = [f"{name}:\n  desc: null\n  value: {size}\n" for name, size in sizes.items()]
        path.with_name("wandb-config.yaml").write_text("wandb_version: 1\n" + "".join(lines))
        if config:
            path.with_name("config.yaml").write_text(config)

    return write


def per_layer(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    f = relu(x @ t["W_enc"].T + t["b_enc"])
    return f, f @ t["W_dec"] + t["b_dec"]


def write_cross_layer(path: Path, tensors: Tensors) -> None:
    decoder = {name: t for name, t in tensors.items() if name.startswith("W_dec")}
    safetensors(path, {name: t for name, t in tensors.items() if name not in decoder})
    safetensors(path.with_name("W_dec_2.safetensors"), decoder)
    hooks = "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    path.with_name("config.yaml").write_text(f"model_name: 'google/gemma-2-2b'  # a text\n{hooks}")


def cross_layer(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    f = relu(x @ t["W_enc_2"].T + t["b_enc_2"])
    return f, in_targets(f, t["W_dec_2"], t["b_dec_2"])


# ---- two linear layers --------------------------------------------------------------------------

LINEAR = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,)}
LINEAR |= {"decoder.weight": (D_IN, D_SAE), "decoder.bias": (D_IN,)}


def relu_layers(enc: str = "encoder", dec: str = "decoder") -> Function:
    def function(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
        z, decode = linear(x, t, enc, dec)
        return relu(z), decode(relu(z))

    return function


def llama_scope(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    z, decode = linear(FACTOR * x, {name: tensor.float() for name, tensor in t.items()})
    f = jump(z, JUMP * FACTOR)
    return f, decode(f) / FACTOR


def llama_scope_r1(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    z, decode = linear(FACTOR * x, t)
    f = jump(z, t["log_jumprelu_threshold"].exp())
    return f, decode(f) / FACTOR


def llama_config(**fields: Any) -> dict[str, Any]:
    given = {"d_model": D_IN, "d_sae": D_SAE, "jump_relu_threshold": JUMP, "act_fn": "jumprelu"}
    given |= {"hook_point_in": "blocks.7.hook_resid_post", "norm_activation": "dataset-wise"}
    given |= {"hook_point_out": "blocks.7.hook_resid_post", "use_decoder_bias": True}
    given |= {"sparsity_include_decoder_norm": True, "top_k": 50, "expansion_factor": 4}
    return given | {"dataset_average_activation_norm": {"in": NORM, "out": NORM}, **fields}


def write_llama(path: Path, tensors: Tensors) -> None:
    json_file(path / "hyperparams.json", llama_config())
    safetensors(path / "checkpoints" / "final.safetensors", tensors)


def write_r1(path: Path, tensors: Tensors) -> None:
    config = llama_config()
    for name in ("jump_relu_threshold", "d_sae", "dataset_average_activation_norm"):
        del config[name]
    json_file(path / "config.json", config)
    norms = {f"dataset_average_activation_norm.{n}": torch.tensor(NORM) for n in ("in", "out")}
    safetensors(path / "sae_weights.safetensors", tensors | norms)


def qwen_scope(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    f = topk(x @ t["W_enc"].T + t["b_enc"])
    return f, f @ t["W_dec"].T + t["b_dec"]


def centred(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    f = relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    return f, f @ t["W_dec"] + t["b_dec"]


def write_hook_z(path: Path, tensors: Tensors) -> None:
    pickled(path, tensors)
    config = {"act_size": D_IN, "dict_size": D_SAE, "act_name": "blocks.2.attn.hook_z", "seed": 49}
    json_file(path.with_name(f"{path.stem}_cfg.json"), config)


# ---- OpenAI -------------------------------------------------------------------------------------

OPENAI = {"encoder.weight": (D_SAE, D_IN), "decoder.weight": (D_IN, D_SAE)}
OPENAI |= {"latent_bias": (D_SAE,), "pre_bias": (D_IN,), "latents_mean_square": (D_SAE,)}


def write_openai(settings: Mapping[str, Any]) -> Callable[[Path, Tensors], None]:
    def write(path: Path, tensors: Tensors) -> None:
        counts = {"stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.int64)}
        counts |= {"latents_activation_frequency": torch.ones(D_SAE)}
        torch.save({**tensors, **counts, **settings}, path)

    return write


def openai_relu(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    f = relu((x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"])
    return f, f @ t["decoder.weight"].T + t["pre_bias"]


def openai_topk(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    mean, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    u = (x - mean) / (spread + 1e-5)
    f = topk((u - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"])
    return f, (f @ t["decoder.weight"].T + t["pre_bias"]) * spread + mean


TOPK = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}

MLP_4 = "blocks.4.mlp.hook_in -> blocks.4.hook_mlp_out"
GEMMA_CLT_HOOKS = (
    "blocks.2.mlp.hook_in -> blocks.2.hook_mlp_out, blocks.3.hook_mlp_out, blocks.4.hook_mlp_out"
)
_GPT2 = "sparse-autoencoder/gpt2-small"

LAYOUTS = [
    gemma_scope(
        "",
        "gemma-scope-2b-pt-res",
        "layer_3/width_16k/average_l0_105",
        "blocks.3.hook_resid_post",
    ),
    gemma_scope(
        "-mlp",
        "gemma-scope-9b-it-mlp",
        "layer_12/width_16k/average_l0_8",
        "blocks.12.hook_mlp_out",
    ),
    gemma_scope(
        "-att",
        "gemma-scope-2b-pt-att",
        "layer_3/width_16k/average_l0_9",
        "model.layers.3.self_attn.o_proj.input",
        heads=True,
    ),
    gemma_scope(
        "-embedding",
        "gemma-scope-2b-pt-res",
        "embedding/width_4k/average_l0_6",
        "hook_embed",
        function=gemma_embedding,
    ),
    gemma_scope_2(
        "", "resid_post/layer_4_width_16k_l0_big", "blocks.4.hook_resid_post", gemma_3_config()
    ),
    gemma_scope_2("-bare", "resid_post_all/layer_5_width_16k_l0_small", "blocks.5.hook_resid_post"),
    gemma_scope_2("-mlp", "mlp_out/layer_5_width_16k_l0_small", "blocks.5.hook_mlp_out"),
    gemma_scope_2(
        "-att",
        "attn_out_all/layer_5_width_16k_l0_small",
        "model.layers.5.self_attn.o_proj.input",
        gemma_3_config(
            hf_hook_point_in="model.layers.5.self_attn.o_proj.input", hf_hook_point_out=None
        ),
    ),
    gemma_scope(
        "-transcoder",
        "gemma-scope-2b-pt-transcoders",
        "layer_3/width_16k/average_l0_54",
        "blocks.3.ln2.hook_normalized -> blocks.3.hook_mlp_out",
        loader="gemma_2_transcoder",
        overrides=SIZES | {"d_out": D_OUT},
    ),
    gemma_scope_2(
        "-transcoder",
        "transcoder_all/layer_4_width_16k_l0_big",
        MLP_4,
        gemma_3_transcoder(4),
        shapes=TRANSCODER,
    ),
    gemma_scope_2(
        "-transcoder-bare", "transcoder/layer_4_width_16k_l0_small", MLP_4, shapes=TRANSCODER
    ),
    gemma_scope_2(
        "-affine",
        "transcoder_all/layer_4_width_16k_l0_big_affine",
        MLP_4,
        gemma_3_transcoder(4, affine_connection=True),
        shapes=GEMMA | {"affine_skip_connection": (D_IN, D_IN)},
        function=gemma_affine,
        transposed=True,
    ),
    gemma_scope_2(
        "-affine-bare",
        "transcoder/layer_4_width_16k_l0_small_affine",
        MLP_4,
        shapes=GEMMA | {"affine_skip_connection": (D_IN, D_IN)},
        function=gemma_affine,
        transposed=True,
    ),
    Layout(
        "gemma_scope_2_clt",
        "google/gemma-scope-2-270m-pt",
        f"clt/width_16k_l0_big/params_layer_{CLT_LAYER}.safetensors",
        CLT,
        write_gemma_clt,
        gemma_clt,
        model="google/gemma-3-270m",
        hook=GEMMA_CLT_HOOKS,
        loader="gemma_3",
        place=f"clt/width_16k_l0_big/params_layer_{CLT_LAYER}",
        targets=TARGETS,
    ),
    Layout(
        "gemma_scope_2_clt",
        "google/gemma-scope-2-270m-pt",
        f"clt/width_16k_l0_big_affine/params_layer_{CLT_LAYER}.safetensors",
        CLT
        | {
            "W_dec": (D_SAE, CLT_LAYER + TARGETS, D_IN),
            "b_dec": (D_IN,),
            "affine_skip_connection": (D_IN, D_IN),
        },
        write_gemma_clt,
        gemma_clt_affine,
        model="google/gemma-3-270m",
        hook=GEMMA_CLT_HOOKS,
        loader="gemma_3",
        suffix="-affine",
        place=f"clt/width_16k_l0_big_affine/params_layer_{CLT_LAYER}",
        targets=TARGETS,
        transposed=True,
    ),
    Layout(
        "layer_transcoder",
        "mwhanna/qwen3-4b-transcoders",
        "layer_7.safetensors",
        PER_LAYER,
        write_per_layer(
            'model_name: "Qwen/Qwen3-4B"\nmodel_kind: "transcoder_set"\n'
            'feature_input_hook: "mlp.hook_in"\nfeature_output_hook: "mlp.hook_out"\n'
        ),
        per_layer,
        model="Qwen/Qwen3-4B",
        hook="blocks.7.mlp.hook_in -> blocks.7.hook_mlp_out",
        loader="mwhanna_transcoder",
        overrides={"d_out": D_OUT},
    ),
    Layout(
        "layer_transcoder",
        "mwhanna/qwen3-14b-transcoders-lowl0",
        "layer_7.safetensors",
        PER_LAYER,
        write_per_layer(""),
        per_layer,
        model="Qwen/Qwen3-14B",
        hook="blocks.7.mlp.hook_in -> blocks.7.hook_mlp_out",
        loader="mwhanna_transcoder",
        overrides={"d_out": D_OUT},
        suffix="-bare",
    ),
    Layout(
        "cross_layer_transcoder",
        "mntss/clt-gemma-2-2b-426k",
        "W_enc_2.safetensors",
        CROSS,
        write_cross_layer,
        cross_layer,
        model="google/gemma-2-2b",
        hook="blocks.2.hook_resid_mid -> "
        "blocks.2.hook_mlp_out, blocks.3.hook_mlp_out, blocks.4.hook_mlp_out",
        loader="mntss_clt_layer_transcoder",
        overrides={"d_in": D_IN},
        place="2",
        targets=TARGETS,
    ),
    Layout(
        "llama_scope",
        "fnlp/Llama3_1-8B-Base-LXR-8x",
        "Llama3_1-8B-Base-L7R-8x",
        LINEAR,
        write_llama,
        llama_scope,
        model="meta-llama/Llama-3.1-8B",
        hook="blocks.7.hook_resid_post",
        loader="llama_scope",
        factor=FACTOR,
        unit_rows=("decoder.weight",),
    ),
    Layout(
        "llama_scope_r1",
        "fnlp/Llama-Scope-R1-Distill",
        "800M-Slimpajama-0-OpenR1-Math-220k/L7R",
        LINEAR | {"log_jumprelu_threshold": (D_SAE,)},
        write_r1,
        llama_scope_r1,
        model="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        hook="blocks.7.hook_resid_post",
        loader="llama_scope_r1_distill",
        factor=FACTOR,
        unit_rows=("decoder.weight",),
    ),
    Layout(
        "goodfire",
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        {name.replace("coder.", "coder_linear."): shape for name, shape in LINEAR.items()},
        pickled,
        relu_layers("encoder_linear", "decoder_linear"),
        model="meta-llama/Llama-3.1-8B-Instruct",
        hook="blocks.19.hook_resid_post",
        loader="goodfire",
        overrides=SIZES,
    ),
    Layout(
        "deepseek_r1",
        "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
        LINEAR,
        pickled,
        relu_layers(),
        model="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        hook="blocks.19.hook_resid_post",
        loader="deepseek_r1",
        overrides=SIZES,
    ),
    Layout(
        "qwen_scope",
        f"Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_{K}",
        "layer11.sae.pt",
        {
            "W_enc": (QWEN_D_SAE, D_IN),
            "W_dec": (D_IN, QWEN_D_SAE),
            "b_enc": (QWEN_D_SAE,),
            "b_dec": (D_IN,),
        },
        pickled,
        qwen_scope,
        model="Qwen/Qwen3-1.7B-Base",
        hook="blocks.11.hook_resid_post",
        loader="qwen_scope",
        overrides={"d_in": D_IN},
    ),
    Layout(
        "hook_z",
        "ckkissane/attn-saes-gpt2-small-all-layers",
        "gpt2-small_L2_Hcat_z_lr1.20e-03_l11.80e+00_ds24576_bs4096_v9.pt",
        {name: shape for name, shape in GEMMA.items() if name != "threshold"},
        write_hook_z,
        centred,
        model="openai-community/gpt2",
        hook="transformer.h.2.attn.c_proj.input",
        loader="connor_rob_hook_z",
        heads=True,
    ),
    Layout(
        "openai",
        f"{_GPT2}/resid_delta_mlp_v4",
        "autoencoders/8.pt",
        OPENAI,
        write_openai({"activation": "ReLU", "activation_state_dict": {}}),
        openai_relu,
        model="openai-community/gpt2",
        hook="blocks.8.hook_mlp_out",
    ),
    Layout(
        "openai",
        f"{_GPT2}/resid_post_mlp_v5_32k",
        "autoencoders/8.pt",
        OPENAI,
        write_openai({**TOPK, "activation.k": K, "activation.postact_fn": "ReLU"}),
        openai_topk,
        model="openai-community/gpt2",
        hook="blocks.8.hook_resid_post",
        suffix="-topk",
    ),
]
BY_NAME = {layout.name: layout for layout in LAYOUTS}
