"""The fields of SAELens' cfg.json: what is done with each of them.

A field is honoured, changes nothing, or is refused; docs/formats.md shows the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"

Kind = Literal["honoured", "nothing", "refused"]


@dataclass(frozen=True)
class Rule:
    """The treatment of a field.

    Args:
        kind: 'honoured'; 'nothing', if it does not change the function; or 'refused'.
        reason: what is done, or the reason for the refusal and the remedy.
        unused: values that a refused field may have, because they mean that it is not used.
    """

    kind: Kind
    reason: str
    unused: tuple[Any, ...] = (None, False)

    def accepts(self, value: Any) -> bool:
        """Returns whether an SAE with this value is read; head 0 is not the same as no head."""
        equal = (type(value) is type(other) and value == other for other in self.unused)
        return self.kind != "refused" or any(equal)


def _rules(kind: Kind, reason: str, *names: str, **options: Any) -> dict[str, Rule]:
    return {name: Rule(kind, reason, **options) for name in names}


RULES: dict[str, Rule] = {
    **_rules("honoured", "decides which tensors there are and what they compute", "architecture"),
    **_rules("honoured", "compared with the shapes of the weights", "d_in", "d_sae"),
    **_rules("honoured", "weights are rounded to it; arithmetic is float32 here", "dtype"),
    **_rules("honoured", "active latents per row of a topk SAE", "k"),
    **_rules(
        "honoured",
        "of a matching pursuit: its steps, and where it ends",
        *("max_iterations", "residual_threshold", "stop_on_duplicate_support"),
    ),
    **_rules("honoured", "whether b_dec is subtracted before the encoder", "apply_b_dec_to_input"),
    **_rules(
        "honoured",
        "'none' needs nothing; 'expected_average_only_in' and 'covariance_whitening' are folded "
        f"with the statistics in {SCALER} or {WHITENING} and refused without them; 'layer_norm' "
        "and 'constant_norm_rescale' normalise each row; its norm is given back at the end",
        "normalize_activations",
    ),
    **_rules(
        "honoured", "decoder norms are folded into the encoder", "rescale_acts_by_decoder_norm"
    ),
    **_rules(
        "refused",
        "belongs to an SAE on the concatenated outputs of attention heads: activations here have "
        "no heads",
        "reshape_activations",
        unused=("none", None),
    ),
    **_rules(
        "refused",
        "is not an activation of SAELens 6: only relu and topk are read",
        "activation_fn",
        unused=("relu", "topk", None),
    ),
    **_rules("honoured", "k of an old topk SAE; other entries are refused", "activation_fn_kwargs"),
    **_rules(
        "refused",
        "multiplies the code by a learned factor, which SAELens 6 can't load: fold it into W_dec",
        "finetuning_scaling_factor",
    ),
    **_rules(
        "refused",
        "adds the error of the reconstruction back, so that nothing could be measured: set it to "
        "false",
        "use_error_term",
    ),
    **_rules(
        "refused",
        "belongs to a transcoder, which reconstructs other activations than it reads: set the "
        "architecture to that of a transcoder, or leave it out",
        *("d_out", "hook_name_out", "hook_layer_out", "hook_head_index_out", "hf_hook_name_out"),
    ),
    **_rules(
        "refused",
        "selects one attention head, but activations here contain all heads",
        "hook_head_index",
    ),
    **_rules(
        "honoured",
        "'center_writing_weights' is refused: it subtracts the mean of every activation, so the "
        "SAE belongs to a processed model; settings that do not change activations at these hooks "
        "are read (fold_ln, fold_value_biases, center_unembed, refactor_factored_attn_matrices, "
        "dtypes and devices); other weights (revision, checkpoint_index) are reported as a "
        "difference; all else is refused",
        "model_from_pretrained_kwargs",
    ),
    **_rules("honoured", "compared with those of the data", "model_name", "hook_name"),
    **_rules("honoured", "compared: contexts here begin with BOS", "prepend_bos"),
    **_rules("honoured", "compared: all positions count here", "seqpos_slice"),
    **_rules(
        "nothing",
        "describes the training run",
        *("context_size", "dataset_path", "hook_layer", "model_class_name", "neuronpedia_id"),
        *("exclude_special_tokens", "sae_lens_version", "sae_lens_training_version"),
        *("training_architecture", "training_architecture_details", "hf_hook_name"),
    ),
    **_rules("nothing", "where it was computed", "device"),
    **_rules(
        "nothing",
        "is used only in training",
        *("l1_coefficient", "lp_norm", "l1_warm_up_steps", "decoder_init_norm"),
        *("use_sparse_activations", "aux_loss_coefficient", "topk_threshold_lr"),
        *("matryoshka_widths", "use_matryoshka_aux_loss", "jumprelu_init_threshold"),
        *("jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale"),
        *("jumprelu_ste_to_input", "l0_coefficient", "l0_warm_up_steps"),
        *("pre_act_loss_coefficient", "target_l0"),
    ),
}
#: Metadata that is preserved when such an SAE is written again.
DESCRIBES = {name for name, rule in RULES.items() if rule.kind != "refused"} | {"saelab"}
#: Options for loading a TransformerLens model that do not change activations at our hook points.
HARMLESS = {
    *("fold_ln", "fold_value_biases", "center_unembed", "refactor_factored_attn_matrices"),
    *("dtype", "torch_dtype", "device", "device_map", "n_devices", "n_ctx", "trust_remote_code"),
    *("first_n_layers", "default_padding_side", "local_files_only"),
}
#: Options that select other weights of the same model: reported as a difference.
OTHER_WEIGHTS = ("revision", "checkpoint_index", "checkpoint_value")
#: Old names of fields, before 6.0.
OLD_NAMES = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
OLD_NAMES |= {"activation_fn_str": "activation_fn", "hook_point_layer": "hook_layer"}
