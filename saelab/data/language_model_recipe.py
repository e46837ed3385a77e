"""Training of the embedded language model: `saelab lm train`.

A GPT-NeoX of four layers, trained on the training split of the standard library's source. One
file, to be read from top to bottom: tokeniser, model, batches, loop, card. Training can be resumed:
the folder `<out>/.resume` holds the last checkpoint (safetensors and JSON), removed at the end.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from saelab.data.devices import check_device
from saelab.data.hub import hide_progress_bars
from saelab.data.text import stdlib
from saelab.errors import SettingError
from saelab.progress import progress
from saelab.runtime.allocator import keep_freed_memory
from saelab.storage.atomic import explain_write_errors, write_atomically, write_json, write_text

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights.

    Sizes are our choice: the largest model that 20 M tokens and 2 cores can train within the hour
    and that stays under 12 MB as float16.
    """

    tokens: int = 20_000_000
    vocab_size: int = 4096
    d_model: int = 192
    n_layers: int = 4
    n_heads: int = 6
    context: int = 128
    batch: int = 32  # contexts
    lr: float = 2e-3
    warmup: float = 0.02  # share of the steps
    weight_decay: float = 0.1
    dropout: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return max(1, self.tokens // (self.batch * self.context))

    def lr_at(self, step: int) -> float:
        """Returns the learning rate of a step: linear warm-up, then a cosine down to a tenth."""
        warm = max(1, int(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        u = (step - warm) / max(1, self.steps - warm)
        return self.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * u)))


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE, which can encode every byte, so no text is out of vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int)
    return number


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Returns all texts as one uint16 stream [tokens], each text followed by EOS."""
    eos = tokenizer.eos_token_id
    pieces = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.asarray([*ids, eos], dtype=np.uint16) for ids in pieces])


def batch_at(stream: np.ndarray, recipe: Recipe, step: int, bos: int) -> torch.Tensor:
    """Returns the batch of a step, int64 [batch, context], BOS first.

    It depends only on the seed and the step.
    """
    rng = np.random.default_rng([recipe.seed, step])
    starts = rng.integers(0, len(stream) - recipe.context, size=recipe.batch)
    rows = stream[starts[:, None] + np.arange(recipe.context - 1)]
    first = np.full((recipe.batch, 1), bos)
    return torch.from_numpy(np.concatenate([first, rows], 1).astype(np.int64))


def windows(stream: np.ndarray, context: int, bos: int) -> torch.Tensor:
    """Cuts the stream into contexts that begin with BOS; returns int64 [contexts, context]."""
    n = len(stream) // (context - 1)
    rows = stream[: n * (context - 1)].reshape(n, context - 1)
    return torch.from_numpy(np.concatenate([np.full((n, 1), bos), rows], 1).astype(np.int64))


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Returns the mean next-token loss in nats of tokens [contexts, context].

    BOS is never predicted.
    """
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    device = next(model.parameters()).device
    for rows in tokens.to(device).split(64):
        logits = model(rows).logits[:, :-1].float()
        target = rows[:, 1:]
        total += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), target.flatten(), reduction="sum"
            )
        )
        count += target.numel()
    model.train(was_training)
    return total / count


def ngram_losses(train: np.ndarray, tokens: torch.Tensor, vocab: int) -> dict[str, float]:
    """Returns the held-out loss in nats of a unigram and of an interpolated bigram model.

    Counts are add-one. The bigram model is mixed with the unigram model, with the weight that is
    best on the held-out tokens themselves, which favours it as a baseline.
    """
    counts = np.bincount(train, minlength=vocab) + 1.0
    unigram = counts / counts.sum()
    pairs = np.zeros((vocab, vocab), dtype=np.float32)
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    before, after = tokens[:, :-1].flatten().numpy(), tokens[:, 1:].flatten().numpy()
    row = pairs.sum(1)
    conditional = np.where(row[before] > 0, pairs[before, after] / np.maximum(row[before], 1), 0)
    mixtures = [
        -np.log(w * conditional + (1 - w) * unigram[after]).mean() for w in np.arange(0.5, 1, 0.05)
    ]
    return {"unigram": float(-np.log(unigram[after]).mean()), "bigram": float(min(mixtures))}


def train(
    out: Path, recipe: Recipe, threads: int | None = None, device: str = "cpu"
) -> dict[str, float]:
    """Trains the model (or goes on from `out/.resume`) and writes the finished folder `out`.

    Args:
        out: the folder.
        recipe: settings.
        threads: threads of torch; None leaves them unchanged.
        device: device on which the model is trained.

    Returns: the held-out losses in nats per token: 'model' (of the stored float16 weights),
        'unigram', 'bigram'.
    Raises: SettingError for settings that can't be used, or a folder that holds a finished model.
    """
    _check_settings(out, recipe, device)
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    with explain_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(stdlib.texts("train"), recipe.vocab_size)
    bos = _token_id(tokenizer, BOS)
    train_tokens = token_stream(tokenizer, stdlib.texts("train"))
    held_out = windows(token_stream(tokenizer, stdlib.texts("held_out")), recipe.context, bos)
    model, optimizer, first = _build_or_resume(out, recipe, tokenizer, device)
    curve: list[dict[str, float]] = []
    every = max(1, recipe.steps // 25)
    title = f"language model, {len(train_tokens):,} training tokens"
    per_step = recipe.batch * recipe.context
    with progress(title, recipe.steps * per_step, "tokens") as bar:
        bar.done = first * per_step
        for step in range(first, recipe.steps):
            loss = _step(model, optimizer, batch_at(train_tokens, recipe, step, bos), recipe, step)
            bar.advance(per_step, note=f"loss {loss:.3f}")
            if (step + 1) % every == 0:
                estimate = held_out_loss(model, held_out[:: max(1, len(held_out) // 128)])
                curve.append({"step": step + 1, "train": loss, "held_out": estimate})
                write_json(out / "curve.json", curve)
                _save_resume(out, model, optimizer, recipe, step + 1)
    _write_model(out, model, tokenizer)
    with hide_progress_bars():
        stored = GPTNeoXForCausalLM.from_pretrained(out).float()
    losses = {"model": held_out_loss(stored, held_out)} | ngram_losses(
        train_tokens, held_out, recipe.vocab_size
    )
    _write_card(out, recipe, stored, tokenizer, len(train_tokens), held_out, losses)
    shutil.rmtree(out / ".resume", ignore_errors=True)
    return losses


def _check_settings(out: Path, recipe: Recipe, device: str) -> None:
    """Raises: SettingError for settings that can't be used."""
    check_device(device)
    least = recipe.batch * recipe.context
    if recipe.tokens < least:
        raise SettingError("tokens", recipe.tokens, f"one step takes {least:,}: ask for more")
    if (out / "model.safetensors").is_file() and not (out / ".resume").is_dir():
        remedy = "holds a finished model: name another folder, or delete it to train again"
        raise SettingError("out", str(out), remedy)


def _build_or_resume(out: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, device: str):
    """Returns model, optimiser and first step, from a checkpoint of the same recipe if any."""
    torch.manual_seed(recipe.seed)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.d_model,
            num_hidden_layers=recipe.n_layers,
            num_attention_heads=recipe.n_heads,
            intermediate_size=4 * recipe.d_model,
            max_position_embeddings=recipe.context,
            hidden_dropout=recipe.dropout,
            bos_token_id=_token_id(tokenizer, BOS),
            eos_token_id=_token_id(tokenizer, EOS),
            pad_token_id=_token_id(tokenizer, PAD),
            tie_word_embeddings=False,
        )
    )
    model.to(torch.device(device)).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.lr,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    checkpoint = out / ".resume" / "state.safetensors"
    if not checkpoint.exists():
        return model, optimizer, 0
    with safe_open(checkpoint, "pt") as file:
        state = json.loads(file.metadata()["state"])
    if state["recipe"] != asdict(recipe):
        return model, optimizer, 0
    tensors = load_file(checkpoint)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    names = [n for n, _ in model.named_parameters()]
    optimizer.load_state_dict(
        {
            "state": {
                i: {
                    "step": torch.tensor(float(state["step"]), dtype=torch.float32),
                    "exp_avg": tensors[f"mean.{n}"],
                    "exp_avg_sq": tensors[f"square.{n}"],
                }
                for i, n in enumerate(names)
            },
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
    return model, optimizer, state["step"]


def _step(model, optimizer, tokens: torch.Tensor, recipe: Recipe, step: int) -> float:
    """Trains on one batch; returns its loss."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr_at(step)
    torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout of this step, for an exact resume
    tokens = tokens.to(model.device)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
    optimizer.step()
    return float(loss.detach())


def _save_resume(out: Path, model, optimizer, recipe: Recipe, step: int) -> None:
    file = out / ".resume" / "state.safetensors"
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors[f"mean.{name}"] = optimizer.state[parameter]["exp_avg"]
        tensors[f"square.{name}"] = optimizer.state[parameter]["exp_avg_sq"]
    state = json.dumps({"recipe": asdict(recipe), "step": step})
    metadata = {"state": state}
    write_atomically(file, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def _write_model(out: Path, model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    new = out / ".resume" / "finished"
    with explain_write_errors(out), hide_progress_bars():
        model.half().cpu().save_pretrained(new)
        tokenizer.save_pretrained(new)
        for file in sorted(new.iterdir()):
            file.replace(out / file.name)


@torch.no_grad()
def sample(model, tokenizer, prompt: str, length: int, seed: int, temperature: float = 0.7) -> str:
    """Returns the prompt and `length` sampled tokens, which depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    for _ in range(length):
        logits = model(torch.tensor([ids], dtype=torch.int64)).logits[0, -1] / temperature
        ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    return tokenizer.decode(ids[1:])


def _write_card(out, recipe, model, tokenizer, train_tokens, held_out, losses) -> None:
    model.eval()
    text = sample(model, tokenizer, "def read_header(self, ", 90, seed=0)
    corpus = stdlib.manifest()
    facts = {"recipe": asdict(recipe), "corpus": corpus, "losses_nats_per_token": losses}
    write_json(out / "recipe.json", facts)
    predicted = held_out[:, 1:].numel()
    write_text(
        out / "README.md",
        f"""# {out.name}

A causal language model of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters
(GPT-NeoX, {recipe.n_layers} layers, d_model {recipe.d_model}, context {recipe.context}, byte-level
BPE vocabulary of {recipe.vocab_size}), stored as float16 safetensors. It exists so that sparse
autoencoders can be trained and judged on real activations without a network.

Made by `saelab lm train` (`saelab/data/language_model_recipe.py`; every setting is in
`recipe.json`).

- **Text**: the source of the standard library of Python {corpus["python"]}, without tests,
  character tables and generated literals: {corpus["files"]} files, {corpus["bytes"]:,} bytes,
  sha256 `{corpus["sha256"]}`.
- **Split**: {corpus["held_out_files"]} files are held out by a hash of their path and were never
  trained on; {train_tokens:,} training tokens.
- **Training**: {recipe.tokens:,} tokens ({recipe.tokens / train_tokens:.1f} passes), AdamW,
  bfloat16 autocast.

| held-out loss of | nats per token |
|---|---|
| the stored weights | {losses["model"]:.4f} |
| bigram model (interpolated, best weight on the held-out text) | {losses["bigram"]:.4f} |
| unigram model | {losses["unigram"]:.4f} |

Measured on all {predicted:,} predicted held-out tokens, in contexts of {recipe.context} that begin
with BOS.

A sample (temperature 0.7, seed 0):

```python
{text.strip()}
```

The training text is under the Python Software Foundation licence; the weights are released under
the licence of this project.
""",
    )
