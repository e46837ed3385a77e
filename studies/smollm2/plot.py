"""Draws the pictures of this study: `python plot.py` in this folder."""

from saelab.report.figures.common import draw

labels = {"run_1": ""}

if __name__ == "__main__":
    draw(labels)
