"""SAEBench's `core`: its formulas on a tiny model, and the file that its own classes read."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import peers_python
from tiny_models import tiny_neox

from saelab.errors import SettingError
from saelab.evals.saebench.core import (
    CoreAbout,
    CoreResult,
    CoreTokens,
    build_core_result,
    measure_core,
)
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream

HOOK = "blocks.1.hook_resid_post"
D, LATENTS = 8, 12
ABOUT = CoreAbout(
    model_name="tiny", dtype="float32", dataset="words", sae={"architecture": "standard",
    "d_in": D, "d_sae": LATENTS, "hook_name": HOOK}, release="saelab", sae_id="mine",
    millis=1_700_000_000_000, version="0",
)  # fmt: skip


def model() -> Any:
    return tiny_neox(D, 16, 0.5)


def sae() -> SAE:
    made = SAEConfig(d_sae=LATENTS).build(D)
    made.W_enc.data.normal_(generator=torch_stream(0, "test encoder"))
    made.W_dec.data.normal_(generator=torch_stream(0, "test decoder"))
    made.requires_grad_(False).eval()
    return made


def batches(count: int = 2) -> list[torch.Tensor]:
    """Batches of 3 contexts of 10 words, of which the first is BOS (0) and some are EOS (1)."""
    ids = torch.randint(0, 20, (count, 3, 10), generator=torch_stream(0, "test tokens"))
    ids[:, :, 0] = 0
    return list(ids)


def tokens() -> CoreTokens:
    return CoreTokens(loss_batches=batches(), row_batches=batches(), special=frozenset({0, 1}))


def measured() -> tuple[CoreResult, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the result, the counted rows, their codes and their reconstructions."""
    subject, network = sae(), model()
    result = measure_core(subject, subject.fold(), network, HOOK, tokens())
    ids = torch.cat(batches())
    x = network.activations(ids, None, [HOOK])[HOOK][(ids > 1)].float()
    f = subject.encode(x)
    return result, x, f, subject.decode(f)


def test_rows_are_those_that_are_not_special() -> None:
    result, x, f, x_hat = measured()
    sparsity, shrinkage = result.metrics["sparsity"], result.metrics["shrinkage"]
    assert sparsity["l0"] == pytest.approx(float((f != 0).sum(1).float().mean()))
    assert shrinkage["l2_norm_in"] == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-5)
    cosine = torch.cosine_similarity(x, x_hat).mean()
    assert result.metrics["reconstruction_quality"]["cossim"] == pytest.approx(
        float(cosine), rel=1e-4
    )
    density = [one["feature_density"] for one in result.latents]
    assert density == pytest.approx((f > 0).float().mean(0).tolist())


def test_its_explained_variance_has_its_own_fault() -> None:
    result, x, _, x_hat = measured()
    parts = [int((ids > 1).sum()) for ids in batches()]
    error = [part.square().sum(1).mean() for part in (x - x_hat).split(parts)]
    power = [part.square().sum(1).mean() for part in x.split(parts)]
    squares = [part.square().mean() for part in x.split(parts)]
    below = torch.stack(power).mean() - torch.stack(squares).mean() ** 2
    wanted = 1 - float(torch.stack(error).mean() / below)
    quality = result.metrics["reconstruction_quality"]
    assert quality["explained_variance"] == pytest.approx(wanted, rel=1e-4)
    right = 1 - float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    assert abs(wanted - right) > 1e-3


def test_losses_are_of_predictions_made_at_tokens_that_are_not_special() -> None:
    network, subject = model(), sae()
    result = measure_core(subject, subject.fold(), network, HOOK, tokens())
    ids = torch.cat(batches())
    at = (ids > 1)[:, :-1]

    def loss(splice: Any) -> float:
        after = network.logits(ids, None, splice).log_softmax(-1)[:, :-1]
        return float(-after.gather(2, ids[:, 1:, None])[..., 0][at].mean())

    found = result.metrics["model_performance_preservation"]
    clean, zero = loss(None), loss({HOOK: torch.zeros_like})
    spliced = loss({HOOK: lambda x: subject.decode(subject.encode(x.flatten(0, 1))).view(x.shape)})
    assert found["ce_loss_without_sae"] == pytest.approx(clean, rel=1e-5)
    assert found["ce_loss_with_ablation"] == pytest.approx(zero, rel=1e-5)
    assert found["ce_loss_with_sae"] == pytest.approx(spliced, rel=1e-5)
    assert found["ce_loss_score"] == pytest.approx((zero - spliced) / (zero - clean), rel=1e-3)
    kept = result.metrics["model_behavior_preservation"]
    assert kept["kl_div_with_sae"] > 0 and kept["kl_div_score"] < 1


def test_a_latent_that_never_fires_is_not_alive_and_has_minus_one() -> None:
    class Silent:
        d_in, d_sae = D, LATENTS

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), LATENTS)

        def decode(self, f: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(f), D)

    silent: Any = Silent()
    result = measure_core(silent, sae().fold(), model(), HOOK, tokens())
    assert result.metrics["misc_metrics"]["frac_alive"] == 0
    assert result.metrics["misc_metrics"]["normalized_freq_over_1_percent"] == 0
    assert {one["consistent_activation_heuristic"] for one in result.latents} == {-1}
    json.dumps(build_core_result(result, ABOUT), allow_nan=False)


def test_no_batch_is_refused() -> None:
    with pytest.raises(SettingError, match="at least one batch"):
        CoreTokens(loss_batches=batches(), row_batches=[], special=frozenset())


@pytest.mark.peers
def test_saebenchs_own_readers_read_the_file(tmp_path: Path) -> None:
    result = measured()[0]
    file = tmp_path / "core" / "mine_eval_results.json"
    file.parent.mkdir()
    file.write_text(json.dumps(build_core_result(result, ABOUT)))
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[2])\n"
        "import peer_worker\n"
        "print('read:' + json.dumps(peer_worker.read_results({'core': sys.argv[1]})))"
    )
    folder = Path(__file__).parents[2] / "benchmarks"
    runner = "import runpy, sys; exec(sys.argv.pop(1))"
    command = [str(peers_python()), "-c", runner, code, str(file), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-800:]
    read = json.loads(ended.stdout.split("read:")[1])["core"]
    assert read["class"] == "CoreEvalOutput"
    assert read["core"]["l0"] == result.metrics["sparsity"]["l0"]
    for group in result.metrics.values():
        assert group.items() <= read["metrics"].items()
