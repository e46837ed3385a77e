"""Where things are kept: the cache beside plan.toml, and the folder of a run.

.saelab/activations/<key>/     harvested activations            (SAELAB_CACHE names another cache)
.saelab/probing/<key>/         activations of the probing texts
.saelab/cells/<key>/           finished cells, by content hash
.saelab/resume/<key>/          checkpoints of cells in training, gone when the cell is finished
.saelab/logs/                  what workers wrote to stderr
run_i/                         final_info.json, manifest.json, metrics.parquet, curves.parquet,
                               summary.md, cells/<arm>/seed<s>-l0_<level>/
run_i/metrics.jsonl            written while the launch is going on; alone, it is no complete run
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from pathlib import Path

#: Parts of the package whose change never alters a number.
NO_NUMBERS = ("report", "formats", "__main__.py", "progress")


def cache_folder(root: Path) -> Path:
    """The cache of the study in `root`."""
    named = os.environ.get("SAELAB_CACHE")
    return Path(named) if named else root / ".saelab"


@functools.cache
def package_digest() -> str:
    """A hash of the installed package's source, so that changed code never reuses old cells."""
    root = Path(__file__).parent
    content = hashlib.sha256()
    for file in sorted([*root.rglob("*.py"), *root.rglob("*.cpp")]):
        relative = file.relative_to(root)
        if relative.parts[0] not in NO_NUMBERS:
            content.update(relative.as_posix().encode() + b"\0" + file.read_bytes())
    return content.hexdigest()[:16]


def place(source: Path, target: Path) -> None:
    """Puts a file of the cache into a run folder: a hard link where possible, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
