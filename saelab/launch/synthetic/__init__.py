"""Studies on synthetic activations, where the truth is known: no language model, no texts.

training    trains arms at seeds and levels, on the same batches
matched     metrics at the target L0, and their differences from the baseline
study       the settings of a study, from a file; tuning
table       what a study says, as data and as lines

    python -m saelab synthetic configs/synthetic/baselines.toml
"""
