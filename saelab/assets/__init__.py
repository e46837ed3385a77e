"""The embedded language model: its folder, and the recipe that made it (`recipe.py`)."""

from __future__ import annotations

from pathlib import Path

#: Folder with config.json, model.safetensors, tokenizer.json and the model card.
EMBEDDED_MODEL = Path(__file__).parent / "stdlib-neox-4l"
