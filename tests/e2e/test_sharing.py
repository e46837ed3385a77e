"""`saelab push`, `pull` and `eval hub:...`, against a hub on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from local_hub import Hub, forbid_network, serve_to_this_process
from projects import BASE, BASELINE, SMALLEST, TWO_SEEDS, Ended, Project, cli, run

from saelab import checkpoint, formats
from saelab.analysis.sharing.public_names import check_folder, public, public_data
from saelab.errors import SourceError
from saelab.sae import SAEConfig
from saelab.verdict.review import review

SCALED = (
    'Arm("scaled", {"sae.scaling": {"kind": "variance", "beta": 1.5, "theta": 0.1}}, "A1", '
    "primary=True)"
)
#: The name of a user, in the folder that everything lies in.
USER = "zebedee"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One finished run in the home of a user, with texts by their absolute paths."""
    folder = tmp_path_factory.mktemp("home") / USER / "project"
    base = BASE
    for old, new in SMALLEST.items():
        base = base.replace(old, new)
    for name in ("train.txt", "held_out.txt"):
        assert f'"{name}"' in base
        base = base.replace(f'"{name}"', f'"{folder / name}"')
    made = Project.make(folder, (BASELINE, SCALED), plan=TWO_SEEDS, base=base)
    ended = made.call()
    assert ended.code == 0, ended.err
    return made


@pytest.fixture
def hub(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, USER)
    monkeypatch.setenv("HOME", str(project.folder.parent))
    with serve_to_this_process(tmp_path / "cache", monkeypatch) as running:
        monkeypatch.setenv("HF_TOKEN", running.token)
        yield running


def succeeded(ended: Ended) -> str:
    assert ended.code == 0, ended.err
    return ended.out


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2, (ended.out, ended.err)
    assert "Traceback" not in ended.err and len(ended.err.strip().splitlines()) == 1, ended.err
    for word in words:
        assert word in ended.last, ended.last


def files_on(hub: Hub, repo: str = "me/saes") -> dict[str, bytes]:
    one = hub.repos[repo]
    return {n: b for n, b in one.commits[one.refs["main"]].items() if n != ".gitattributes"}


def in_folder(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


# ---- push ---------------------------------------------------------------------------------------


def test_a_dry_run_writes_what_a_push_sends(hub: Hub, project: Project, tmp_path: Path) -> None:
    out = tmp_path / "dry"
    to = ("push", "run_1", "hub:me/saes", "--arm", "scaled")
    shown = succeeded(cli(project.folder, *to, "--dry-run", "--out", str(out)))
    assert not hub.requests
    dry = in_folder(out)
    seeds = [
        f"scaled/{folder.name}"
        for folder in sorted((project.folder / "run_1/cells/scaled").iterdir())
    ]
    expected = {
        f"{seed}/{name}" for seed in seeds for name in ("cfg.json", "sae_weights.safetensors")
    }
    assert set(dry) == expected | {"README.md", "verdict.json"} and len(seeds) == 2
    assert all(name in shown for name in dry) and "not sent to hub:me/saes" in shown
    sent = succeeded(cli(project.folder, *to))
    assert files_on(hub) == dry
    assert f"{hub.url}/me/saes/commit/" in sent and "6 files" in sent
    assert not hub.repos["me/saes"].private


def test_a_push_goes_through_large_files_too(hub: Hub, project: Project) -> None:
    hub.lfs_from = 10_000
    succeeded(cli(project.folder, "push", "run_1", "hub:me/saes", "--private"))
    assert hub.objects and hub.repos["me/saes"].private
    weights = [content for name, content in files_on(hub).items() if name.endswith(".safetensors")]
    assert sorted(weights) == sorted(hub.objects.values())


def test_nothing_of_this_disk_is_sent(hub: Hub, project: Project) -> None:
    succeeded(cli(project.folder, "push", "run_1", "hub:me/saes", "--arm", "scaled"))
    everything = [*files_on(hub).values(), *hub.sent]
    everything += [json.dumps(hub.requests).encode()]
    private = [
        USER,
        str(project.folder),
        str(project.folder.parent.parent),
        "/home/",
        "/root/",
        "/tmp/",
    ]
    for content in everything:
        assert not [word for word in private if word.encode() in content]
    absolute = re.compile(r"(?<![\w.:/])/[\w.-]+/")
    for name, content in files_on(hub).items():
        if not name.endswith(".safetensors"):
            assert not absolute.search(content.decode()), name
    assert "train.txt" in files_on(hub)["README.md"].decode()  # the name alone


def test_what_still_names_a_place_stops_the_push(
    hub: Hub, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = "# Title\n\nmade in /scratch/zebedee/project\n"
    monkeypatch.setattr("saelab.analysis.sharing.push.card", lambda *_: card)
    ended = cli(project.folder, "push", "run_1", "hub:me/saes", "--arm", "scaled")
    refused(ended, "README.md names a place of this disk", "nothing is sent")
    assert not hub.requests


def test_an_export_names_no_place_either(project: Project, tmp_path: Path) -> None:
    succeeded(cli(project.folder, "export", "run_1", "--out", str(tmp_path / "out")))
    for name, content in in_folder(tmp_path / "out").items():
        assert USER.encode() not in content, name
    metadata = json.loads(next((tmp_path / "out").rglob("cfg.json")).read_text())["metadata"]
    assert (metadata["dataset_path"], metadata["saelab"]["text"]) == ("train.txt", "held_out.txt")


def test_the_card_carries_the_verdict(hub: Hub, project: Project) -> None:
    succeeded(cli(project.folder, "push", "run_1", "hub:me/saes", "--arm", "scaled"))
    card = files_on(hub)["README.md"].decode()
    judged = review(project.folder / "run_1")
    (c,) = judged.comparisons
    assert c.mean_diff is not None and c.low is not None and c.high is not None
    first = f"scaled: **{c.word}**, difference {c.mean_diff:+.4f} ({c.low:+.4f} to {c.high:+.4f}"
    assert first in card
    summary = (project.folder / "run_1" / "summary.md").read_text()
    body = summary.partition("\n")[2].partition("\n**What to try next")[0].strip()
    assert body in card and "**Controls.**" in body and "**Gate.**" in body
    assert "What to try next" not in card
    for fact in (judged.plan_hash, judged.definition, str(judged.provenance["text_digest"])):
        assert f"{fact}" in card
    assert "    saelab run run_1\n    saelab push run_1 hub:me/saes --arm scaled\n" in card
    assert card.startswith("---\nlibrary_name: saelab\n")
    (twin,) = [line for line in card.splitlines() if line.startswith("| scaled/")][:1]
    assert re.search(r"\| scaled \| \d+ \| 192 \| 64 \| 0\.\d+ \| 16 \|", twin)
    assert json.loads(files_on(hub)["verdict.json"])["comparisons"][0]["word"] == c.word


def test_a_second_push_keeps_the_repository(hub: Hub, project: Project) -> None:
    succeeded(cli(project.folder, "push", "run_1", "hub:me/saes", "--arm", "scaled"))
    succeeded(cli(project.folder, "push", "run_1", "hub:me/saes", "--arm", "baseline"))
    arms = {name.split("/")[0] for name in files_on(hub) if "/" in name}
    assert arms == {"baseline", "scaled"}
    assert "--arm baseline" in files_on(hub)["README.md"].decode()


def test_one_cell_is_the_repository_itself(hub: Hub, project: Project, tmp_path: Path) -> None:
    cell = min((project.folder / "run_1/cells/scaled").iterdir())
    out = tmp_path / "one"
    succeeded(cli(project.folder, "push", str(cell), str(out)))
    assert set(in_folder(out)) == {
        "README.md",
        "verdict.json",
        "cfg.json",
        "sae_weights.safetensors",
    }
    assert not hub.requests
    card = (out / "README.md").read_text()
    assert f"saelab push run_1/cells/scaled/{cell.name} one" in card and USER not in card
    assert 'saelab.load("one")' in card and "hub:" not in card
    assert "| (this repository) | scaled |" in card


def test_a_single_training_is_named_by_its_command(project: Project, tmp_path: Path) -> None:
    trained = cli(
        project.folder, "train", "configs/small.toml", "--out_dir", "alone", "--seeds", "2"
    )
    assert trained.code == 0, trained.err
    succeeded(cli(project.folder, "push", "alone", str(tmp_path / "shared")))
    card = (tmp_path / "shared" / "README.md").read_text()
    assert (
        "    saelab train small.toml --out_dir alone --seeds 2\n    saelab push alone shared"
        in card
    )
    place = card.partition('saelab.load("')[2].partition('")')[0]
    assert place.startswith("shared/baseline/") and (tmp_path / place / "cfg.json").is_file()


def test_an_sae_without_a_run_has_no_verdict(hub: Hub, tmp_path: Path) -> None:
    sae = SAEConfig(d_sae=8).build(4).eval()
    checkpoint.save(
        sae,
        tmp_path / "lone",
        {"model": "google/gemma-2-2b", "hook_name": "blocks.1.hook_resid_post"},
    )
    succeeded(cli(tmp_path, "push", "lone", "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "no verdict" in card and "base_model:\n- google/gemma-2-2b\n" in card
    assert not (tmp_path / "out" / "verdict.json").exists()


def test_pushes_that_are_refused(
    hub: Hub, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = ("push", "run_1", "hub:me/saes")
    refused(cli(project.folder, *push, "--arm", "scald"), "did you mean 'scaled'")
    refused(cli(project.folder, "push", "run_1", "hub:me"), "not the name of a repository")
    refused(cli(project.folder, "push", "run_1", "hub:me/saes@v1"), "without revision and path")
    refused(cli(project.folder, "push", "run_9", "hub:me/saes"), "run_9 does not exist")
    refused(cli(project.folder, *push, "--out", "x"), "--out", "leave it out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    refused(cli(project.folder, "push", "run_1", str(tmp_path / "full")), "not empty")
    sae = SAEConfig.parse({"d_sae": 8, "activation": {"kind": "ista"}}).build(4).eval()
    checkpoint.save(sae, tmp_path / "ista", {})
    refused(cli(tmp_path, "push", "ista", "hub:me/saes"), "nothing is pushed")
    assert not hub.requests
    monkeypatch.setenv("HF_TOKEN", "wrong")
    refused(cli(project.folder, *push), "status 401", "log in with `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.status = 503
    ended = cli(project.folder, *push)
    refused(ended, "status 503", "try again later")
    assert "cache" not in ended.last  # which is no way out for a push
    hub.status = 0
    forbid_network(monkeypatch)
    refused(cli(project.folder, *push), "HF_HUB_OFFLINE forbids to push", "--dry-run")
    assert "me/saes" not in hub.repos
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_changed_summary_is_not_pushed(hub: Hub, project: Project, tmp_path: Path) -> None:
    copy = project.copied(tmp_path / "copy")
    summary = copy.folder / "run_1" / "summary.md"
    text = summary.read_text()
    summary.write_text(text.replace("cannot tell yet", "helps"))
    ended = cli(copy.folder, "push", "run_1", "hub:me/saes")
    assert ended.code == 1 and "summary.md was changed after the run wrote it" in ended.err
    summary.unlink()
    ended = cli(copy.folder, "push", "run_1", "hub:me/saes")
    assert ended.code in (1, 2) and "summary.md" in ended.last and "Traceback" not in ended.err
    assert "me/saes" not in hub.repos


def test_variables_of_the_hub_in_a_process_of_its_own(
    hub: Hub, project: Project, tmp_path: Path
) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as a shell sets them."""
    hub.lfs_from = 10_000
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": hub.token}
    variables["HF_HUB_DISABLE_XET"] = "1"
    cell = str(min((project.folder / "run_1/cells/scaled").iterdir()))
    ended = process(project, variables, "push", cell, "hub:me/one")
    assert ended.code == 0 and not ended.err, ended.err  # bars are for terminals
    assert set(files_on(hub, "me/one")) >= {"README.md", "cfg.json"}
    closed = variables | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    refused(process(project, closed, "pull", "hub:me/one"), "can't be reached", "check the network")
    offline = closed | {"HF_HUB_OFFLINE": "1"}
    refused(process(project, offline, "pull", "hub:me/one"), "not in the cache", "HF_HUB_OFFLINE")


def process(project: Project, variables: dict[str, str], *arguments: str) -> Ended:
    return run(project.folder, "-m", "saelab", *arguments, variables=variables, timeout=120)


# ---- and back -----------------------------------------------------------------------------------


def test_a_pushed_sae_gives_the_same_numbers(
    hub: Hub, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeeded(cli(project.folder, "push", "run_1", "hub:me/saes", "--arm", "scaled"))
    seed = min((project.folder / "run_1/cells/scaled").iterdir()).name
    options = ("--config", "run_1", "--evals", "core", "--json")
    rows = {}
    name = f"hub:me/saes:scaled/{seed}"
    rows["hub"] = rows_of(cli(project.folder, "eval", name, *options))
    commit = hub.repos["me/saes"].refs["main"]
    assert {row["subject"] for row in rows["hub"]} == {f"hub:me/saes@{commit}:scaled/{seed}"}
    assert {(row["format"], row["mismatch"]) for row in rows["hub"]} == {("saelens", "")}
    succeeded(
        cli(project.folder, "export", "run_1", "--arm", "scaled", "--out", str(tmp_path / "x"))
    )
    rows["disk"] = rows_of(cli(project.folder, "eval", str(tmp_path / "x/scaled" / seed), *options))
    hub.requests.clear()
    forbid_network(monkeypatch)
    rows["offline"] = rows_of(cli(project.folder, "eval", name, *options))
    assert not hub.requests
    values = {
        where: [(r["metric"], r["slice"], r["value"]) for r in each] for where, each in rows.items()
    }
    assert values["hub"] == values["disk"] == values["offline"] and len(values["hub"]) > 10


def rows_of(ended: Ended) -> list[dict[str, Any]]:
    return json.loads(succeeded(ended))


def test_every_command_that_takes_an_sae_takes_one_on_the_hub(
    hub: Hub, project: Project, tmp_path: Path
) -> None:
    succeeded(cli(project.folder, "push", "run_1", "hub:me/saes", "--arm", "scaled"))
    seed = min((project.folder / "run_1/cells/scaled").iterdir()).name
    name, config = f"hub:me/saes@main:scaled/{seed}", ("--config", "run_1")
    shown = succeeded(cli(project.folder, "latent", name, "3", *config))
    assert shown.startswith("latent 3 of 64")
    prompt = ("--latent", "3", "--by", "1", "--prompt", "def f(", "--tokens", "2")
    assert "def f(" in succeeded(cli(project.folder, "steer", name, *prompt, *config))
    out = tmp_path / "again"
    succeeded(cli(project.folder, "export", name, "--out", str(out)))
    metadata = json.loads((out / "cfg.json").read_text())["metadata"]
    commit = hub.repos["me/saes"].refs["main"]
    assert metadata["saelab"]["hub"] == f"hub:me/saes@{commit}:scaled/{seed}"
    other = project.folder / "configs/other.toml"
    text = (project.folder / "configs/small.toml").read_text()
    other.write_text(text.replace("blocks.2.", "blocks.1."))
    ended = cli(project.folder, "eval", name, "--config", "configs/other.toml")
    refused(
        ended,
        "was trained at blocks.2.hook_resid_post, but hook_name = blocks.1",
        "--allow-mismatch",
    )
    refused(cli(project.folder, "eval", "hub:me/saes"), "--config")
    refused(cli(project.folder, "eval", "hub:me/saes", "--arm", "scaled", *config), "arm")
    refused(cli(project.folder, "eval", "hub:me/sae", *config), "me/sae does not exist on the hub")


def test_pull_copies_open_files_alone(hub: Hub, project: Project, tmp_path: Path) -> None:
    succeeded(cli(project.folder, "push", "run_1", "hub:me/saes", "--arm", "scaled"))
    repo = hub.repos["me/saes"]
    sent = files_on(hub)
    repo.commit({**sent, "scaled/ae.pt": b"pickle", "run.py": b"import os", ".gitattributes": b""})
    hub.extra_names = ["../outside.json"]
    shown = succeeded(cli(tmp_path, "pull", "hub:me/saes"))
    assert in_folder(tmp_path / "saes") == sent and "6 files" in shown
    seed = min((project.folder / "run_1/cells/scaled").iterdir()).name
    succeeded(cli(tmp_path, "pull", f"hub:me/saes:scaled/{seed}", "--out", "one"))
    assert set(in_folder(tmp_path / "one")) == {"cfg.json", "sae_weights.safetensors"}
    first = formats.load(tmp_path / "one").sae
    assert torch.equal(first.W_dec, formats.load(tmp_path / "saes/scaled" / seed).sae.W_dec)
    refused(cli(tmp_path, "pull", "hub:me/saes"), "saes exists and is not empty")
    refused(cli(tmp_path, "pull", "somewhere"), "hub:owner/name")
    refused(
        cli(tmp_path, "pull", "hub:me/saes:scaled/ae.pt", "--out", "x"), "no file that is pulled"
    )
    refused(cli(tmp_path, "pull", "hub:me/saes:../x", "--out", "x"), "inside the repository")
    assert not (tmp_path / "x").exists() and not (tmp_path.parent / "outside.json").exists()


def test_the_report_is_a_folder_for_a_static_host(project: Project, tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ("--latents", "4", "--cells", "1")
    shown = succeeded(cli(project.folder, "report", "run_1", "--folder", str(site), *options))
    assert list(in_folder(site)) == ["index.html"] and "index.html" in shown
    page = (site / "index.html").read_text()
    assert "scaled" in page and USER not in page and str(project.folder.parent.parent) not in page
    linked = re.findall(r"""(?:src|href)=["']?([^"'>\s]+)""", page)
    assert all(link.startswith(("#", "data:")) for link in linked), linked


# ---- names of places ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/zebedee/texts/train.txt", "train.txt"),
        ("text /scratch/me/a.txt, and (/data/b)", "text a.txt, and (b)"),
        ("~/models/mine", "mine"),
        ("~zebedee/mine", "mine"),
        (r"C:\Users\zebedee\x.txt", "x.txt"),
        ("https://huggingface.co/me/saes", "https://huggingface.co/me/saes"),
        ("hub:me/saes:scaled/seed7", "hub:me/saes:scaled/seed7"),
        ("baseline/seed 7/L0 32, 2/2 cells, 1/2", "baseline/seed 7/L0 32, 2/2 cells, 1/2"),
        ("monology/pile-uncopyrighted", "monology/pile-uncopyrighted"),
        ("a -> b, ratio: -1 / 2", "a -> b, ratio: -1 / 2"),
    ],
)
def test_public_texts(text: str, clean: str) -> None:
    assert public(text) == clean and public(clean) == clean
    assert public_data({"a": [text, 1, None]}) == {"a": [clean, 1, None]}


@pytest.mark.parametrize("name", ["README.md", "a/cfg.json", "sae_weights.safetensors"])
def test_a_folder_that_names_a_place_is_caught(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    for text, bad in (("pile", False), ("/data/zebedee/pile", True)):
        if name.endswith(".safetensors"):
            save_file({"W": torch.zeros(2)}, file, metadata={"text": text})
        else:
            file.write_text(json.dumps({"text": text}))
        if bad:
            with pytest.raises(SourceError, match=f"{name} names a place of this disk"):
                check_folder(tmp_path)
        else:
            check_folder(tmp_path)
