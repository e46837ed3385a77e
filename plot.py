"""Draws every picture of the study: `python plot.py` (it takes no arguments).

Draws each run_* folder here that holds a final_info.json and is in `labels`. Pictures go
to <run>_<picture>.png and .svg: loss, frontier, probing, probing_entries, density, scalars, verdict
and placement for every run; and, where a run has the data for them, spread, thresholds, positions,
sensitivity, regulariser, speed, temperature, stability, balance, similarity, latents, survival,
consistency and max_cosine.
"""

from saelab.report.figures.common import draw

# Run folder -> title of its pictures; "" takes the run's own title, as experiment.py gives it. A
# run that is not here is not drawn.
labels: dict[str, str] = {
    "run_0": "",  # ReLU with L1, TopK and JumpReLU over sparsity levels
    "run_1": "",  # two global scalars, other starts, and controls of the learning rate
    "run_2": "",  # tau 0.1, 0.5 and 1
    "run_3": "",  # the pull of the scalars to their priors: 1e-4, 1e-3 and 1e-2
    "run_4": "",  # fixed and learned tau; permuted and mean traces
    "run_5": "",  # no scaling, no scalars, per feature, centring, whitening
    "run_6": "",  # alpha 0, 0.5 and 1; running and other statistics
    "run_7": "",  # descent, uncertainty, minimax, gradnorm and controls
    "run_8": "",  # rounded k and resampling by age, and without each
    "run_9": "",  # A alone, B alone, both
    "run_10": "",  # the best valid arm, on seeds that no other run uses
}

if __name__ == "__main__":
    draw(labels)
