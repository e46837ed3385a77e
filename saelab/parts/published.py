"""The table of presets: published SAEs by name, as the parts that each consists of.

A number that is not given here is the default of its part. Docstrings of the parts have the terms
one by one; docs/zoo.md says what each was held against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNIT_NORM: tuple[str, ...] = ("unit_norm",)
#: Controllers of an SAE whose penalty follows the L0.
L0_TARGET: tuple[str, ...] = ("l0_target",)


@dataclass(frozen=True)
class Preset:
    """A published SAE.

    Args:
        source: authors, year and number of the paper.
        equation: code and loss, short.
        activation: its settings, or the kind alone.
        losses: next to the reconstruction, whose settings may stand among them.
        controllers, constraints, observers: settings, or kinds.
        weights: `encoder_bias`, `centre` and `tied` of the SAE, where they are not its defaults.
        deviations: sentences about what differs from the source.
        open: names of further settings of its parts that stand next to the preset.
    """

    source: str
    equation: str
    activation: str | Mapping[str, Any]
    losses: tuple[str | Mapping[str, Any], ...] = ()
    controllers: tuple[str, ...] = ()
    constraints: tuple[str, ...] = UNIT_NORM
    observers: tuple[str, ...] = ()
    weights: Mapping[str, bool] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()
    open: frozenset[str] = field(default_factory=frozenset)


#: Weights of a pursuit: the dictionary is all there is.
PURSUIT: dict[str, bool] = {"tied": True, "encoder_bias": False}
DEAD_AFTER = (
    "AuxK counts 50,000 rows until a latent is dead; the paper's 10 million tokens are `dead_after`"
)
ADAM = "the optimiser is that of the run, not the paper's"
LOG_THRESHOLD = "the logarithm of the threshold is trained, with a learning rate of its own"
FACTOR = (
    "the factor that keeps the penalty comes from one batch, not from the mean of the last 10",
    "s = 0.001 bounds the gradient at 0",
)
ABSTRACT = "only the paper's abstract could be read, so this is no reproduction"
SHARES = frozenset({"shares", "widths", "weights"})

PRESETS: dict[str, Preset] = {
    "standard": Preset(
        source="Conerly et al. 2024 (Circuits Updates, April)",
        equation="f = max(z, 0);   |x - x_hat|^2 / d + c sum f_i |W_dec_i| / sqrt(d)",
        activation="relu",
        losses=("l1",),
        controllers=L0_TARGET,
        constraints=(),
        deviations=(ADAM,),
    ),
    "bricken": Preset(
        source="Bricken et al. 2023 (Towards Monosemanticity)",
        equation="f = max(z, 0);   |x - x_hat|^2 / d + c sum f_i / sqrt(d),   |W_dec_i| = 1",
        activation="relu",
        losses=({"kind": "l1", "decoder_norms": False},),
        controllers=L0_TARGET,
        observers=("resampling",),
        deviations=("times of resampling are shares of the run instead of numbers of steps", ADAM),
    ),
    "p_annealing": Preset(
        source="Karvonen et al. 2024 (2408.00113), section 3",
        equation="f = max(z, 0);   |x - x_hat|^2 / d + c sum f_i^p / sqrt(d)^p,   p from 1 to 0.2",
        activation="relu",
        losses=({"kind": "lp", "decoder_norms": False, "updates": 10},),
        controllers=L0_TARGET,
        deviations=(*FACTOR, ADAM),
    ),
    "gated": Preset(
        source="Rajamanoharan et al. 2024a (2404.16014), eq. 6-8",
        equation=(
            "pi = z + b_gate;   f = 1[pi > 0] max(z e^r + b_mag, 0);   "
            "|x - x_hat|^2 / d + c sum max(pi_i, 0) / sqrt(d) + "
            "|x - x_hat(max(pi, 0))|^2 / d with the decoder held;   |W_dec_i| = 1"
        ),
        activation="gated",
        losses=("gate_l1", "gate_reconstruction"),
        controllers=L0_TARGET,
        deviations=(
            "b_enc is a third bias that moves both paths",
            "latents are not resampled: add the observer 'resampling'",
            ADAM,
        ),
        open=frozenset({"start_l0"}),
    ),
    "gated_p_annealing": Preset(
        source="Karvonen et al. 2024 (2408.00113); GatedAnneal of dictionary_learning",
        equation="as gated, with c sum max(pi_i, 0)^p / sqrt(d)^p,   p from 1 to 0.2",
        activation="gated",
        losses=(
            {"kind": "lp", "of": "gate", "decoder_norms": False, "updates": 10},
            "gate_reconstruction",
        ),
        controllers=L0_TARGET,
        deviations=("b_enc is a third bias that moves both paths", *FACTOR, ADAM),
        open=frozenset({"start_l0"}),
    ),
    "topk": Preset(
        source="Gao et al. 2024 (2406.04093), eq. 5 and appendix A.2",
        equation=(
            "f = max(z, 0) at the k largest z of a row;   |x - x_hat|^2 / d + |e - e_hat|^2 / "
            "(32 |e|^2), e_hat by dead latents"
        ),
        activation="topk",
        losses=("auxk",),
        deviations=(DEAD_AFTER, ADAM),
    ),
    "batchtopk": Preset(
        source="Bussmann et al. 2024 (2412.06410), eq. 1",
        equation="f = z at the k N largest positive z of a batch of N rows;   loss as topk",
        activation="batchtopk",
        losses=("auxk",),
        deviations=(DEAD_AFTER, ADAM),
    ),
    "multi_topk": Preset(
        source="Gao et al. 2024 (2406.04093), progressive codes",
        equation="topk + |x - x_hat(4 k)|^2 / (8 d), x_hat(4 k) by the 4 k largest z",
        activation="topk",
        losses=("auxk", "multi_topk"),
        deviations=(DEAD_AFTER, ADAM),
    ),
    "groupmax": Preset(
        source="sparsify (EleutherAI), `groupmax`",
        equation="f = max(z, 0) at the largest z of each of k groups;   |x - x_hat|^2 / d",
        activation="groupmax",
        deviations=("AuxK, which sparsify leaves off by default, is not part of it", ADAM),
    ),
    "abs_topk": Preset(
        source="Zhu et al. 2025 (2510.00404), eq. 10",
        equation="f = z at the k largest |z| of a row;   loss as topk",
        activation="abs_topk",
        losses=("auxk",),
        deviations=("AuxK is SAELens', by |z|; its use in the paper is unchecked", ADAM),
    ),
    "jumprelu": Preset(
        source="Rajamanoharan et al. 2024b (2407.14435), eq. 9-12",
        equation="f = z 1[z > t];   |x - x_hat|^2 / d + c sum 1[z_i > t_i],   |W_dec_i| = 1",
        activation="jumprelu",
        losses=("l0",),
        controllers=L0_TARGET,
        deviations=(
            LOG_THRESHOLD,
            "bandwidth and start of the thresholds are 0.5, for rows of mean square d",
            ADAM,
        ),
    ),
    "jumprelu_tanh": Preset(
        source="Anthropic 2025 (Circuits Updates, January)",
        equation=(
            "f = z 1[z > t];   |x - x_hat|^2 / d + c sum tanh(4 f_i |W_dec_i|) + "
            "3e-6 sum max(t_i - z_i, 0) |W_dec_i| / d"
        ),
        activation={"kind": "jumprelu", "bandwidth": 2.0, "threshold": 0.1, "to_input": True},
        losses=("tanh", "preactivation"),
        controllers=L0_TARGET,
        constraints=(),
        deviations=(
            "start of weights and biases, the rise of c over the whole run and the schedule of the "
            "rate are those of the run",
            LOG_THRESHOLD,
        ),
    ),
    "jumprelu_quadratic": Preset(
        source="Gemma Scope 2 (2025), read in SAELens",
        equation="f = z 1[z > t];   |x - x_hat|^2 / d + mean over rows of (2 / L) (L0 - L)^2 / d",
        activation="jumprelu",
        losses=("quadratic_l0",),
        constraints=(),
        deviations=("its frequency penalty is left out: no equation was reachable", ADAM),
    ),
    "matryoshka": Preset(
        source="Bussmann et al. 2025 (2503.17547), eq. 4",
        equation="batchtopk + sum over prefixes m of |x - (f_1..m W_1..m + b_dec)|^2 / d",
        activation="batchtopk",
        losses=("matryoshka", "auxk"),
        deviations=(
            "prefixes are 1/16, 1/8, 1/4 and 1/2 of the latents unless `shares` or `widths` of the "
            "loss say others",
            DEAD_AFTER,
            ADAM,
        ),
        open=SHARES,
    ),
    "matryoshka_drawn": Preset(
        source="Nabeshima 2024 (repository noanabeshima/matryoshka-saes)",
        equation=(
            "standard + sum over 10 prefixes, drawn at each step with P(width > w) falling with "
            "the root of w, of |x - (f_1..m W_1..m + b_dec)|^2 / d; latents counted by energy"
        ),
        activation="relu",
        losses=("l1", {"kind": "matryoshka", "sampled": 10, "order": "energy"}),
        controllers=L0_TARGET,
        constraints=(),
        deviations=(
            "errors of prefixes are summed instead of averaged, which the penalty's coefficient "
            "takes up",
            "the mean of the L1 over prefixes is left out",
            "latents stay where they are and the order is held next to them",
            ADAM,
        ),
    ),
    "matryoshka_detached": Preset(
        source="Chanin 2026 (repository chanind/claude-auto-research-synthsaebench)",
        equation="matryoshka, where each ring of latents fits what the prefix within it leaves",
        activation="batchtopk",
        losses=({"kind": "matryoshka", "detached": True}, "auxk"),
        deviations=(
            "its order by frequency, decreasing k, tilted errors and refined code are parts of "
            "their own and not in the preset",
            ADAM,
        ),
        open=SHARES,
    ),
    "tilted": Preset(
        source="Muhamed et al. 2024 (2411.00743); Li et al. 2021",
        equation="standard, with (1 / t) log mean exp(t l_n) of the rows' errors l_n;   t = 1",
        activation="relu",
        losses=({"kind": "reconstruction", "tilt": 1.0}, "l1"),
        controllers=L0_TARGET,
        constraints=(),
        deviations=(
            "in the paper l_n has the row's L1 in it, here the penalty stays outside",
            "t = 1 is our choice",
            ADAM,
        ),
    ),
    "orthogonality": Preset(
        source="after OrtSAE, Korznikov et al. 2025 (2509.22033)",
        equation="batchtopk + mean over i of max(0, max_j cos(W_dec_i, W_dec_j))^2 / 4 in chunks",
        activation="batchtopk",
        losses=("auxk", "orthogonality"),
        deviations=(ABSTRACT, DEAD_AFTER),
        open=frozenset({"chunk", "every"}),
    ),
    "feature_choice": Preset(
        source="Ayonrinde 2024 (2411.02124)",
        equation="f = z at the k N / d_sae largest positive z of each latent;   |x - x_hat|^2 / d",
        activation="feature_choice",
        deviations=(ABSTRACT, "aux_zipf_loss is left out: no equation was reachable"),
    ),
    "t_sae": Preset(
        source="Bhalla et al. 2025 (2511.05541) and its code",
        equation=(
            "batchtopk + the error of the first 20% of the latents + 0.1 times the cross entropy "
            "between their codes of adjacent tokens;   layout 'contexts'"
        ),
        activation="batchtopk",
        losses=({"kind": "matryoshka", "shares": (0.2,)}, "auxk", "temporal_contrast"),
        deviations=(
            "both tokens of a pair are of one batch, over which BatchTopK selects",
            "rows have the mean square d_in, which is the temperature, instead of raw products",
            "negatives are of other contexts, one for each segment",
            DEAD_AFTER,
            ADAM,
        ),
    ),
    "matching_pursuit": Preset(
        source="Costa et al. 2025 (2506.03093)",
        equation=("k times: i = argmax <r, d_i>, v = max(<r, d_i>, 0), f_i += v, r -= v d_i"),
        activation="matching_pursuit",
        weights=PURSUIT,
        deviations=(ADAM,),
        open=frozenset({"repeats", "residual_threshold"}),
    ),
    "orthogonal_matching_pursuit": Preset(
        source="Pati et al. 1993",
        equation="k times: i = argmax |<r, d_i>|, f = least squares of x - b_dec on all chosen d",
        activation="orthogonal_matching_pursuit",
        weights=PURSUIT,
        deviations=("codes have signs", ADAM),
    ),
    "ista": Preset(
        source="after Gregor and LeCun 2010",
        equation="f_0 = max(z, 0);   f = max(f + eta (W_enc (x - b_dec - f W_dec) + b_enc), 0)",
        activation="ista",
        losses=("l1",),
        controllers=L0_TARGET,
        constraints=(),
        deviations=("starts at the SAE's own code instead of 0",),
        open=frozenset({"steps", "step_size"}),
    ),
}
