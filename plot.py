"""Draws every picture of the study: `python plot.py`, no argument.

From all run_* folders here that hold a final_info.json and are named in `labels`, pictures go to
<run>_<picture>.png and .svg: loss, frontier, probing, probing_entries, density, scalars, verdict,
placement, and where a run has the data spread, thresholds, positions, sensitivity, regulariser,
speed, temperature, stability, balance, similarity, latents, survival, consistency and max_cosine.
"""

from saelab.report.figures.common import draw

# Run folder -> title of its pictures. A run that is not named here is not drawn.
labels: dict[str, str] = {
    "run_0": "Baselines",  # ReLU + L1, TopK and JumpReLU over sparsity levels
    "run_1": "Idea A: core",  # one pair of global scalars, its starts, and learning-rate controls
    "run_2": "Idea A: temperature",  # tau 0.1, 0.5 and 1
    "run_3": "Idea A: regulariser",  # pull of the scalars to their priors: 1e-4, 1e-3, 1e-2
    "run_4": "Idea A: schedules and time",  # static to learned tau; permuted and mean traces
    "run_5": "Idea A: ablations",  # no scaling, no scalars, per feature, centring, whitening
    "run_6": "Idea B: similarity balance",  # alpha 0 to 1, EMA against other statistics
    "run_7": "Idea B: learned balance",  # descent, uncertainty, minimax, gradnorm and controls
    "run_8": "Idea B: k and resampling",  # rounded k and age-driven resampling, taken apart
    "run_9": "Ideas A and B together",  # A, B, both
    "run_10": "Confirmation",  # the best valid arm, on seeds used nowhere else
}

if __name__ == "__main__":
    draw(labels)
