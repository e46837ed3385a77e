"""Progress of jobs: bars for any long work, and one journal of a launch that all views read.

bar.py        a bar on a terminal or in a notebook, plain lines elsewhere
journal.py    metrics.jsonl: written line by line, read while it grows (docs/progress.md)
state.py      lines -> state of a run
view.py       state of a run -> table on the terminal
run.py        sends every line of a launch to the journal, the view and the tracker
watch.py      shows the same view of a launch in another process
trackers.py   TensorBoard, Weights & Biases, Trackio
"""

from saelab.progress.bar import Progress, clock, progress

__all__ = ["Progress", "clock", "progress"]
