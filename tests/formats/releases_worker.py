"""Runs in the peers' environment: writes SAELens' list of releases as JSON."""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path

import yaml

data = yaml.safe_load((files("sae_lens") / "pretrained_saes.yaml").read_text())
table = {
    name: {
        "repo": release["repo_id"],
        "model": release["model"],
        "loader": release.get("conversion_func"),
        "saes": {sae["id"]: str(sae["path"]) for sae in release["saes"]},
    }
    for name, release in data.items()
}
Path(sys.argv[1]).write_text(json.dumps(table))
