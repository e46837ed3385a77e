"""Makes the environment of the peers: one command, about five minutes and 3 GB.

    python benchmarks/peers.py [--venv benchmarks/.peers]

torch is installed first and stays pinned to the version in saelab's constraints.txt, so that both
sides compute with the same kernels and nothing pulls in CUDA packages. torchvision, which one peer
requires and none of the measured code uses, is uninstalled again: its build must match torch's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).parent
#: Installed without what it requires: torchvision, timm and OpenCV, none of which its SAEs need.
ALONE = "overcomplete==0.3.0"
#: The environment that it belongs to.
PEERS = "peers.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the peers' environment.")
    parser.add_argument("--venv", type=Path, default=HERE / ".peers")
    parser.add_argument("--requirements", default=PEERS, help="a file of this folder")
    options = parser.parse_args()
    folder, pin = options.venv, torch_pin()
    print(f"{folder}: {pin}, then the peers of {options.requirements}", flush=True)
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write(pin + "\n")
        constraints.flush()
        install = [python, "-m", "pip", "install", "--quiet", "-c", constraints.name]
        wanted = [["torch"], ["-r", str(HERE / options.requirements)]]
        wanted += [["--no-deps", ALONE]] if options.requirements == PEERS else []
        for what in wanted:
            subprocess.run([*install, *what], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "-y", "torchvision"], check=True)


def torch_pin() -> str:
    """Returns the line of constraints.txt for torch."""
    lines = (HERE.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"pip ended with code {error.returncode}: see its message above")
