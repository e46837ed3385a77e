"""How far a job is: bars for any long work, and of a launch one record that all views are made of.

bar.py        a bar on a terminal, plain lines elsewhere
journal.py    metrics.jsonl: written line by line, read while it grows (docs/progress.md)
state.py      lines -> where a run is
view.py       where a run is -> a table on the terminal
run.py        of a launch: every line to the journal, the view and the tracker
watch.py      the same view of a launch in another process
trackers.py   TensorBoard, Weights & Biases, Trackio
"""

from saelab.progress.bar import Progress, clock, progress

__all__ = ["Progress", "clock", "progress"]
