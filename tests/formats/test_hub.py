"""SAEs on the hub by name, against a hub on loopback (tests/helpers/local_hub.py)."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from local_hub import Hub, Repository, forbid_network, serve_to_this_process, use
from published_saes import BY_NAME, LAYOUTS, Layout
from test_published import equal

from saelab import api, formats
from saelab.errors import MismatchError, SettingError, SourceError, UnreachableError, UsageError
from saelab.formats.hub import client, reference, releases
from saelab.formats.hub.reference import Reference, parse
from saelab.sae import SAE, SAEConfig

ON_HUB = [layout.name for layout in LAYOUTS if layout.repo.count("/") == 1]
OPEN = [name for name in ON_HUB if not formats.TABLE[BY_NAME[name].format].by_name]
GEMMA = BY_NAME["gemma_scope"]
RES = "google/gemma-scope-2b-pt-res"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_to_this_process(tmp_path / "cache", monkeypatch) as running:
        yield running


def put(hub: Hub, layout: Layout, root: Path, seed: int = 0, branch: str = "main") -> str:
    """Publishes an SAE of a layout, next to a large file that nobody needs; returns the commit."""
    folder = root / layout.repo
    layout.make(root, seed)
    (folder / "unrelated").mkdir(exist_ok=True)
    (folder / "unrelated/params.npz.bak").write_bytes(b"large")
    (folder / "README.md").write_text("# Title")
    return hub.put(layout.repo, folder, branch)


def named(layout: Layout) -> str:
    return layout.format if formats.TABLE[layout.format].by_name else ""


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_HUB)
def test_every_layout_is_read_from_the_hub(hub: Hub, name: str, tmp_path: Path) -> None:
    layout = BY_NAME[name]
    commit = put(hub, layout, tmp_path / "site")
    tensors = layout.draw(0)
    if layout.format == "llama_scope":
        tensors = {n: t.bfloat16() for n, t in tensors.items()}
    loaded = formats.load(f"hub:{layout.repo}:{layout.inner}", named(layout))
    equal(loaded.sae, layout, tensors, 0)
    assert (loaded.origin.model, loaded.origin.hook_name) == (layout.model, layout.hook)
    assert loaded.format == layout.format
    assert loaded.about["hub"] == f"hub:{layout.repo}@{commit}:{layout.inner}"
    on_disk = formats.load(layout.path(tmp_path / "site"), named(layout))
    assert loaded.origin == on_disk.origin  # and so nothing contradicts the table of releases
    downloads = set(hub.downloads())
    needless = {"README.md", "unrelated/params.npz.bak", "wandb-config.yaml"}
    assert downloads == set(hub.repos[layout.repo].commits[commit]) - needless


@pytest.mark.parametrize("name", [name for name in ON_HUB if name not in OPEN])
def test_a_pickle_is_neither_read_nor_downloaded_unnamed(
    hub: Hub, name: str, tmp_path: Path
) -> None:
    layout = BY_NAME[name]
    put(hub, layout, tmp_path / "site")
    for path in (layout.inner, layout.inner.rpartition("/")[0]):
        with pytest.raises(SourceError, match=f"use --format {layout.format} to read its pickle"):
            formats.load(f"hub:{layout.repo}:{path}".rstrip(":"))
    assert not hub.downloads()


def test_from_pretrained_by_release_and_id(hub: Hub, tmp_path: Path) -> None:
    put(hub, GEMMA, tmp_path / "site")
    sae = api.from_pretrained("gemma-scope-2b-pt-res", GEMMA.inner)
    equal(sae, GEMMA, GEMMA.draw(0), 0)
    again = api.load(f"hub:gemma-scope-2b-pt-res:{GEMMA.inner}")
    assert torch.equal(sae.W_dec, again.W_dec)
    straight = api.from_pretrained(GEMMA.repo, GEMMA.inner)
    assert torch.equal(sae.W_dec, straight.W_dec)


@pytest.mark.parametrize("id", ["layer_20/width_16k/canonical"])
@pytest.mark.parametrize("release", [RES.split("/")[1], f"{RES.split('/')[1]}-canonical"])
def test_canonical_is_the_l0_nearest_to_100(
    hub: Hub, release: str, id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site" / RES
    for number, l0 in enumerate((9, 64, 136, 408)):  # 64 and 136 are as near
        folder = site / f"layer_20/width_16k/average_l0_{l0}"
        GEMMA.write(folder, GEMMA.draw(number))
    commit = hub.put(RES, site)
    loaded = formats.load(f"hub:{release}:{id}")
    assert loaded.about["hub"] == f"hub:{RES}@{commit}:layer_20/width_16k/average_l0_64"
    assert torch.equal(loaded.sae.W_dec, GEMMA.draw(1)["W_dec"])
    forbid_network(monkeypatch)
    with pytest.raises(SourceError, match="name its path"):  # the cache does not have the others
        formats.load(f"hub:{release}:{id}")


def test_one_sae_in_a_repository_needs_no_path(hub: Hub, tmp_path: Path) -> None:
    ours = SAEConfig(d_sae=8).build(4).eval()
    formats.saver("saelens")(ours, tmp_path / "site/A1/seed7", {})
    commit = hub.put("me/saes", tmp_path / "site")
    loaded = formats.load("hub:me/saes")
    assert loaded.about["hub"] == f"hub:me/saes@{commit}:A1/seed7"
    formats.saver("saelens")(ours, tmp_path / "site/A2/seed7", {})
    hub.put("me/saes", tmp_path / "site")
    with pytest.raises(SourceError, match=r"holds several SAEs \(A1/seed7, A2/seed7\): name one"):
        formats.load("hub:me/saes")


def test_a_folder_of_several_files_asks_for_one(hub: Hub, tmp_path: Path) -> None:
    layout = BY_NAME["layer_transcoder"]
    layout.make(tmp_path / "site", 0)
    folder = tmp_path / "site" / layout.repo
    shutil.copy(folder / "layer_7.safetensors", folder / "layer_8.safetensors")
    hub.put(layout.repo, folder)
    with pytest.raises(SourceError, match=r"several SAEs \(layer_7.safetensors, layer_8"):
        formats.load(f"hub:{layout.repo}")
    assert not hub.downloads()


# ---- versions and the cache ---------------------------------------------------------------------


def test_a_changed_file_is_read_anew_and_a_revision_stays(hub: Hub, tmp_path: Path) -> None:
    name = f"hub:{GEMMA.repo}:{GEMMA.inner}"
    first = put(hub, GEMMA, tmp_path / "site", seed=0)
    hub.repos[GEMMA.repo].refs["v1"] = first
    old = formats.load(name).sae
    second = put(hub, GEMMA, tmp_path / "site", seed=1)
    new = formats.load(name)
    assert new.about["hub"] == f"hub:{GEMMA.repo}@{second}:{GEMMA.inner}"
    assert not torch.equal(old.W_dec, new.sae.W_dec)
    for revision in ("v1", first):
        again = formats.load(f"hub:{GEMMA.repo}@{revision}:{GEMMA.inner}").sae
        assert torch.equal(again.W_dec, old.W_dec)


def test_a_commit_in_the_cache_asks_nobody(hub: Hub, tmp_path: Path) -> None:
    put(hub, GEMMA, tmp_path / "site")
    pinned = formats.pinned(Path(f"hub:{GEMMA.repo}:{GEMMA.inner}"))
    assert hub.downloads()
    hub.requests.clear()
    formats.load(pinned)
    assert not hub.requests
    assert formats.pinned(pinned) == pinned


def test_offline_reads_what_is_cached(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(hub, GEMMA, tmp_path / "site")
    name = f"hub:{GEMMA.repo}:{GEMMA.inner}"
    sae = formats.load(name).sae
    hub.requests.clear()
    forbid_network(monkeypatch)
    assert torch.equal(formats.load(name).sae.W_dec, sae.W_dec)
    assert not hub.requests
    for missing in (
        f"hub:{GEMMA.repo}:layer_0/width_16k/average_l0_1",
        f"hub:{GEMMA.repo}@v2:{GEMMA.inner}",
        "hub:some/other",
    ):
        with pytest.raises(SourceError, match="not in the cache of the hub, and HF_HUB_OFFLINE"):
            formats.load(missing)


def test_weights_without_the_files_next_to_them_are_never_in_the_cache(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files without which there is no SAE come last, so a broken download is seen offline."""
    layout = BY_NAME["gemma_scope_2-transcoder"]
    put(hub, layout, tmp_path / "site")
    name = f"hub:{layout.repo}:{layout.inner}"
    real = client.__dict__["hub_errors"]
    calls: list[str] = []

    def stop(repo: str, revision: str = "", path: str = "") -> object:
        calls.append(path)
        if path.endswith("params.safetensors"):
            raise KeyboardInterrupt
        return real(repo, revision, path)

    monkeypatch.setattr(client, "hub_errors", stop)
    with pytest.raises(KeyboardInterrupt):
        formats.load(name)
    assert [Path(path).name for path in calls] == ["", "config.json", "params.safetensors"]
    monkeypatch.setattr(client, "hub_errors", real)
    forbid_network(monkeypatch)
    with pytest.raises(SourceError, match="not in the cache"):
        formats.load(name)


def test_a_change_while_it_is_read_is_an_error(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(hub, GEMMA, tmp_path / "site", seed=0)
    real = client.list_files

    def list_then_change(repo: str, revision: str) -> client.Listing:
        listing = real(repo, revision)
        put(hub, GEMMA, tmp_path / "site", seed=1)
        return listing

    monkeypatch.setattr(client, "list_files", list_then_change)
    with pytest.raises(SourceError, match="changed while it was read"):
        formats.load(f"hub:{GEMMA.repo}:{GEMMA.inner}")


# ---- what is refused, each in one sentence ------------------------------------------------------


def refused(name: str, match: str, error: type[UsageError] = SourceError) -> None:
    with pytest.raises(error, match=match) as raised:
        formats.load(name)
    assert "\n" not in str(raised.value) and raised.value.exit_code == 2
    assert ": " in str(raised.value)


def test_missing_things_are_named(hub: Hub, tmp_path: Path) -> None:
    put(hub, GEMMA, tmp_path / "site")
    refused("hub:nobody/nothing", "nobody/nothing does not exist on the hub: check owner")
    refused(f"hub:{GEMMA.repo}@v9:{GEMMA.inner}", "has no revision 'v9'")
    close = GEMMA.inner[:-1] + "9"
    refused(f"hub:{GEMMA.repo}:{close}", rf"did you mean '{GEMMA.inner}'")
    refused(f"hub:{GEMMA.repo}:layer_99", "does not exist in its repository")
    refused(f"hub:{GEMMA.repo}:unrelated", r"holds no SAE that can be read \(unrelated/params")
    with pytest.raises(SettingError, match="did you mean 'saelens'"):
        formats.load(f"hub:{GEMMA.repo}:{GEMMA.inner}", "saelen")
    with pytest.raises(SourceError, match="holds no SAE of the format saelens"):
        formats.load(f"hub:{GEMMA.repo}:{GEMMA.inner}", "saelens")


def test_names_of_releases_have_a_suggestion(hub: Hub) -> None:
    refused("hub:gemma-scope-2b-pt-ress:x", "did you mean 'gemma-scope-2b-pt-res'", SettingError)
    refused(
        "hub:gemma-scope-2b-pt-res:layer_twelve",
        "are named layer_{layer}/width_{width}/canonical or layer_{layer}/width_{width}/average",
        SettingError,
    )
    assert not hub.requests


@pytest.mark.parametrize("status", [401, 403])
def test_gated(hub: Hub, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(hub, GEMMA, tmp_path / "site")
    hub.repos[GEMMA.repo].gated = True
    if status == 403:  # there is a token, and no access
        monkeypatch.setenv("HF_TOKEN", "wrong")
    name = f"hub:{GEMMA.repo}:{GEMMA.inner}"
    refused(name, rf"open only to those with access: ask for access at {hub.url}/{GEMMA.repo}")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    equal(formats.load(name).sae, GEMMA, GEMMA.draw(0), 0)


def test_private(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put(hub, GEMMA, tmp_path / "site")
    hub.repos[GEMMA.repo].private = True
    name = f"hub:{GEMMA.repo}:{GEMMA.inner}"
    refused(name, "does not exist on the hub: check owner and name; if it is private, log in")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    equal(formats.load(name).sae, GEMMA, GEMMA.draw(0), 0)


def test_a_hub_that_does_not_answer(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(hub, GEMMA, tmp_path / "site")
    name = f"hub:{GEMMA.repo}:{GEMMA.inner}"
    formats.load(name)  # which does not make an older copy the answer
    hub.status = 503
    refused(name, r"could not answer .*status 503.*HF_HUB_OFFLINE=1", UnreachableError)
    hub.status = 418
    refused(name, "status 418")
    hub.status, hub.html = 0, True
    refused(name, "does not answer as a hub does")
    with socket.socket() as unused:  # a port on which nobody listens
        unused.bind(("127.0.0.1", 0))
        use(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path / "cache", monkeypatch)
    refused(
        name,
        "can't be reached for .*: check the network, or set HF_HUB_OFFLINE=1",
        UnreachableError,
    )


@pytest.mark.parametrize(
    "name",
    [
        "hub:",
        "hub:owner",
        "hub:owner/",
        "hub:/name",
        "hub:owner/name/more",
        "hub:../name",
        "hub:owner/..",
        "hub:owner/name@",
        "hub:owner/name@../../x",
        "hub:owner/name@a b",
        "hub:owner/name:../secret",
        "hub:owner/name:a/../../secret",
        "hub:owner/name:/etc",
        "hub:owner/name:a\\b",
        "hub:owner/name:C:/x",
        "hub:owner/name:*",
        "hub:gemma-scope-2b-pt-res:../../x",
        "hub:gemma-scope-2b-pt-res:layer_1/width_16k/average_l0_*",
    ],
)
def test_names_of_another_form_ask_nobody(hub: Hub, name: str) -> None:
    refused(name, " = ", SettingError)
    assert not hub.requests


def test_names_that_leave_the_repository_are_not_listed(hub: Hub, tmp_path: Path) -> None:
    """A hub that lists names outside can't have them written."""
    put(hub, GEMMA, tmp_path / "site")
    outside = ["../config.json", "/etc/params.npz", "a/../../params.npz"]
    hub.extra_names = outside
    listing = client.list_files(GEMMA.repo, "")
    assert not set(outside) & listing.names and f"{GEMMA.inner}/params.npz" in listing.names


def test_references_are_read_back() -> None:
    commit = "0" * 40
    one = Reference(repo="a/b", revision=commit, path="c/d:e")
    assert parse(str(one)) == one and parse(Path(str(one))) == one and one.is_pinned
    assert parse("hub:a/b@feature/x:c/") == Reference(repo="a/b", revision="feature/x", path="c")
    assert not reference.is_reference("hubs") and reference.is_reference(Path("hub:a/b"))


# ---- releases -----------------------------------------------------------------------------------


def test_every_release_is_complete() -> None:
    for name, release in releases.releases().items():
        for entry in release.saes:
            texts = (release.repo, release.model, entry.path, entry.hook)
            open_fields = {field for text in texts for field in re.findall(r"{(\w+)}", text)}
            assert open_fields <= set(re.findall(r"{(\w+)}", entry.id)), name
            assert (entry.l0 is None) == ("*" not in entry.path)
        assert release.format in formats.TABLE and release.repo.count("/") == 1
        assert name == release.name


@pytest.mark.parametrize("name", ON_HUB)
def test_releases_state_what_the_readers_say(name: str) -> None:
    """Model and hook point of each release are those of the layout that the readers are held to."""
    layout = BY_NAME[name]
    if (stated := releases.at(layout.repo, layout.inner)) is not None:
        assert (stated.model, stated.hook) == (layout.model, layout.hook)
        assert stated.format == layout.format


def test_a_contradiction_between_release_and_files_is_refused_where_it_is_evaluated(
    hub: Hub, tmp_path: Path
) -> None:
    sae = SAEConfig(d_sae=8).build(4).eval()
    repo, about = "jbloom/GPT2-Small-SAEs-Reformatted", {"model": "gpt2-small"}
    for layer, hook in ((3, "blocks.3.hook_resid_pre"), (4, "blocks.9.hook_resid_pre")):
        folder = tmp_path / "site" / f"blocks.{layer}.hook_resid_pre"
        formats.saver("saelens")(sae, folder, {**about, "hook_name": hook})
    hub.put(repo, tmp_path / "site")
    good = formats.load("hub:gpt2-small-res-jb:blocks.3.hook_resid_pre").origin
    good.check("openai-community/gpt2", "blocks.3.hook_resid_pre")  # SAELens says gpt2-small
    odd = formats.load("hub:gpt2-small-res-jb:blocks.4.hook_resid_pre").origin
    with pytest.raises(MismatchError, match="by its release gpt2-small-res-jb, and on .*blocks.9"):
        odd.check("openai-community/gpt2", "blocks.9.hook_resid_pre")


def test_from_pretrained_checks_the_base(hub: Hub, tmp_path: Path) -> None:
    put(hub, GEMMA, tmp_path / "site")
    base = {"model": {"path": "google/gemma-2-2b"}, "hook_name": "blocks.1.hook_resid_post"}
    with pytest.raises(MismatchError, match="blocks.3.hook_resid_post, but hook_name = blocks.1"):
        api.from_pretrained("gemma-scope-2b-pt-res", GEMMA.inner, base=base)
    right = base | {"hook_name": GEMMA.hook}
    assert isinstance(api.from_pretrained("gemma-scope-2b-pt-res", GEMMA.inner, base=right), SAE)


def test_the_documented_calls_work(hub: Hub, tmp_path: Path) -> None:
    """The block of Python in docs/sharing.md, on a hub that has these SAEs."""
    GEMMA.write(tmp_path / "gemma/layer_12/width_16k/average_l0_82", GEMMA.draw(0))
    hub.put(RES, tmp_path / "gemma")
    ours = SAEConfig(d_sae=8).build(4).eval()
    formats.saver("saelens")(ours, tmp_path / "mine/A1/seed7-l0_32", {})
    hub.put("me/my-saes", tmp_path / "mine")
    page = (Path(__file__).parents[2] / "docs" / "sharing.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    names: dict[str, object] = {}
    exec(block, names)
    assert isinstance(names["sae"], SAE) and names["sae"].d_sae == 8
    read = {name.rpartition("/")[0] for name in hub.downloads()}
    assert read == {"layer_12/width_16k/average_l0_82", "A1/seed7-l0_32"}


def test_a_repository_without_files(hub: Hub) -> None:
    hub.repos["me/empty"] = Repository()
    hub.repos["me/empty"].commit({})
    refused("hub:me/empty", "holds no SAE that can be read")
