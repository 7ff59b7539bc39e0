"""Hugging Face's own client against a real HTTP server: what is fetched, resumed, refused, and used offline."""

from __future__ import annotations

import errno
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError

from tdm_serve.errors import ConfigError, DownloadError
from tdm_serve.models.catalog import EMBEDDED, resolve
from tdm_serve.models.families.table import FAMILIES
from tdm_serve.models.folders import base_files
from tdm_serve.models.hub_errors import sentence
from tdm_serve.models.sources import Hub, at_hand, fetch, fetch_file, hub_of, wanted
from tests.tdm_serve import hub_server

NAME = "someone/some-model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return folder


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    with hub_server.running() as hub:
        use(hub, monkeypatch)
        yield hub


def use(hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does where it is set before the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with an adapter among other files."""
    files = tmp_path / "files"
    (files / "sub").mkdir(parents=True)
    (files / "adapter.ckpt").write_bytes(bytes(range(256)) * 2000)
    (files / "sub" / "note.txt").write_text("a note")
    (files / "README.md").write_text("words")
    return files


def at_once(_seconds: float) -> None:
    """In place of the client's waits between its tries."""


def test_one_file_is_fetched_and_nothing_else(hub: hub_server.Hub, folder: Path) -> None:
    commit = hub.add(NAME, folder).commit
    path = fetch_file(Hub(NAME, commit), "adapter.ckpt")
    assert path.read_bytes() == (folder / "adapter.ckpt").read_bytes()
    assert len(hub.gets("adapter.ckpt")) == 1
    assert not hub.gets("README.md") and not hub.gets("note.txt")


def test_a_pinned_revision_that_is_at_hand_asks_nobody(hub: hub_server.Hub, folder: Path) -> None:
    pinned = Hub(NAME, hub.add(NAME, folder).commit)
    first = fetch(pinned, ["adapter.ckpt"])
    hub.requests.clear()
    assert fetch(pinned, ["adapter.ckpt"]) == first == at_hand(pinned, ["adapter.ckpt"])
    assert not hub.requests


def test_without_a_revision_the_newest_is_taken_with_a_warning(
    hub: hub_server.Hub, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add(NAME, folder, commit="1" * 40)
    with caplog.at_level(logging.WARNING):
        first = fetch_file(Hub(NAME), "adapter.ckpt")
    assert "hub:someone/some-model is not pinned" in caplog.text
    (folder / "adapter.ckpt").write_bytes(b"a newer one")
    hub.add(NAME, folder, commit="2" * 40)
    assert fetch_file(Hub(NAME), "adapter.ckpt").read_bytes() == b"a newer one"
    assert first.read_bytes() != b"a newer one"


def test_a_broken_connection_is_resumed_at_once(
    hub: hub_server.Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # else this file is smaller than one
    pinned = Hub(NAME, hub.add(NAME, folder).commit)
    hub.breaks["adapter.ckpt"] = [100_000]
    path = fetch_file(pinned, "adapter.ckpt")
    assert path.read_bytes() == (folder / "adapter.ckpt").read_bytes()
    assert [one.range for one in hub.gets("adapter.ckpt")] == [None, "bytes=100000-"]


def test_a_download_that_broke_off_is_not_used_and_its_whole_files_are_kept(
    hub: hub_server.Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", at_once)
    pinned, both = Hub(NAME, hub.add(NAME, folder).commit), ["adapter.ckpt", "README.md"]
    hub.breaks["adapter.ckpt"] = [100_000, *[0] * 20]  # more answers without a byte than the client tries
    with pytest.raises(DownloadError, match=r"broke off .*run the command again, what is whole is kept"):
        fetch(pinned, both)
    while not hub.gets("README.md"):  # the other file is fetched beside it
        fetch(pinned, ["README.md"])
    assert at_hand(pinned, both) is None
    hub.breaks.clear()
    hub.requests.clear()
    assert (fetch(pinned, both) / "adapter.ckpt").read_bytes() == (folder / "adapter.ckpt").read_bytes()
    assert len(hub.gets("adapter.ckpt")) == 1 and not hub.gets("README.md")


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_says_how_to_get_in(hub: hub_server.Hub, folder: Path, status: int) -> None:
    commit = hub.add(NAME, folder, gated=status).commit
    with pytest.raises(DownloadError, match=r"some-model is gated: accept its terms .*HF_TOKEN"):
        fetch(Hub(NAME, commit), ["adapter.ckpt"])


def test_a_repository_that_is_not_there(hub: hub_server.Hub) -> None:
    with pytest.raises(DownloadError, match="no model someone/other, or it is private"):
        fetch(Hub("someone/other", "1" * 40), ["adapter.ckpt"])


def test_a_revision_that_is_not_there(hub: hub_server.Hub, folder: Path) -> None:
    hub.add(NAME, folder)
    for revision in ("v9", "9" * 40):
        with pytest.raises(DownloadError, match=f"some-model has no revision '{revision}'"):
            fetch(Hub(NAME, revision), ["adapter.ckpt"])


def test_a_file_that_is_not_there_or_there_twice(hub: hub_server.Hub, folder: Path) -> None:
    pinned = Hub(NAME, hub.add(NAME, folder).commit)
    with pytest.raises(DownloadError, match=r"has none for the file \*\.safetensors"):
        fetch_file(pinned, "*.safetensors")
    (folder / "a.safetensors").write_bytes(b"a")
    (folder / "b.safetensors").write_bytes(b"b")
    pinned = Hub(NAME, hub.add(NAME, folder, commit="3" * 40).commit)
    with pytest.raises(DownloadError, match=r"has a\.safetensors, b\.safetensors for the file \*\.safetensors"):
        fetch_file(pinned, "*.safetensors")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"c")
    pinned = Hub(NAME, hub.add(NAME, folder, commit="4" * 40).commit)
    assert fetch_file(pinned, "*.safetensors").read_bytes() == b"c"


def test_offline_uses_what_is_whole_and_refuses_the_rest(
    hub: hub_server.Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = Hub(NAME)
    hub.add(NAME, folder)
    path = fetch_file(newest, "adapter.ckpt")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert fetch_file(newest, "adapter.ckpt") == path
    with pytest.raises(DownloadError, match=r"not, or not whole, in the cache .*HF_HUB_OFFLINE forbids"):
        fetch(newest, ["adapter.ckpt", "README.md"])
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE forbids"):
        fetch(Hub("someone/other"), ["adapter.ckpt"])
    assert not hub.requests


def test_no_network_uses_what_is_at_hand_and_says_what_else_is_missing(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = Hub(NAME)
    with hub_server.running() as hub:
        use(hub, monkeypatch)
        hub.add(NAME, folder)
        path = fetch_file(newest, "adapter.ckpt")
    monkeypatch.setattr("time.sleep", at_once)
    assert fetch_file(newest, "adapter.ckpt") == path
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:\d+ cannot be reached .*check the network"):
        fetch(Hub("someone/other"), ["adapter.ckpt"])


def test_too_little_room_is_said_before_the_first_byte(
    hub: hub_server.Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    def nearly_full(_path: Path) -> Usage:
        return Usage(10**9, 10**9, 1000)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    with pytest.raises(DownloadError, match=r"needs 0\.0 GB more, .* has 0\.0 GB free; make room, or set HF_HOME"):
        fetch(Hub(NAME, hub.add(NAME, folder).commit), ["adapter.ckpt"])
    assert not hub.gets("adapter.ckpt")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full under the download of hub:a/b; make room"),
        (OSError(errno.EACCES, "Permission denied"), r"hub:a/b could not be fetched \(.*Permission denied\)"),
        (HFValidationError("too long"), "hub:a/b is no name that a hub knows: too long"),
        (ZeroDivisionError(), None),
    ],
)
def test_errors_that_no_server_gives(error: Exception, said: str | None) -> None:
    words = sentence(Hub("a/b"), error)
    assert words is None if said is None else re.search(said, words or "")


def test_a_server_that_fails_is_told_apart(hub: hub_server.Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", at_once)
    commit = hub.add(NAME, folder, gated=500).commit
    with pytest.raises(DownloadError, match=r"the hub could not give .*500.*run the command again"):
        fetch(Hub(NAME, commit), ["adapter.ckpt"])


@pytest.mark.parametrize("text", ["hub:", "hub:name", "hub:a/b/c", "hub:a/b@", "hub:a b/c", "hub:../x@main@y"])
def test_names_that_are_no_repository(text: str) -> None:
    with pytest.raises(ConfigError, match="write hub:OWNER/NAME or hub:OWNER/NAME@REVISION"):
        hub_of(text)


def test_names_of_repositories() -> None:
    assert hub_of("hub:a/b.c-d") == Hub("a/b.c-d", None)
    assert hub_of("hub:a/b@refs/pr/1") == Hub("a/b", "refs/pr/1")
    assert str(hub_of("hub:a/b@v1")) == "hub:a/b@v1"


def test_only_what_a_family_reads_is_fetched(hub: hub_server.Hub, tmp_path: Path) -> None:
    """Other precisions, pickles and pictures stay where they are."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "model"))
    extra = [
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
    ]
    extra += ["vae/diffusion_pytorch_model.bin", "assets/teaser.png", "model.safetensors"]
    for place in extra:
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes(b"not wanted")
    pinned = Hub(NAME, hub.add(NAME, folder).commit)
    got = fetch(pinned, wanted("zimage"))
    assert base_files(got, "zimage")
    assert not [place for place in extra if (got / place).exists()]
    assert not (got / "adapters").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_network_everything_else_is_wanted(family: str) -> None:
    with_it, without = wanted(family), wanted(family, network=False)
    network = FAMILIES[family].components[0]
    assert set(with_it) - set(without) == {
        f"{network}/diffusion_pytorch_model.safetensors",
        f"{network}/diffusion_pytorch_model-?????-of-?????.safetensors",
        f"{network}/diffusion_pytorch_model.safetensors.index.json",
    }


def test_a_repository_with_a_manifest_of_ours(hub: hub_server.Hub) -> None:
    """It is a checkpoint like a local one, adapters and versions included."""
    commit = hub.add(NAME, EMBEDDED).commit
    spec = resolve(f"hub:{NAME}@{commit}+version=tdm+name=mine")
    assert (spec.id, spec.version, spec.family) == ("mine", "tdm", "zimage")
    assert spec.adapters[0].path.is_file()
    assert spec.base != EMBEDDED and base_files(spec.base, "zimage")


def test_without_a_revision_all_files_are_of_one_commit(hub: hub_server.Hub, caplog: pytest.LogCaptureFixture) -> None:
    commit = hub.add(NAME, EMBEDDED).commit
    with caplog.at_level(logging.WARNING):
        assert resolve(f"hub:{NAME}").base.name == commit
    assert caplog.text.count("is not pinned") == 1
    assert {one.path.split("/resolve/")[1].split("/")[0] for one in hub.requests if "/resolve/" in one.path} == {commit}


def test_a_repository_that_is_no_pipeline(hub: hub_server.Hub, folder: Path) -> None:
    commit = hub.add(NAME, folder).commit
    with pytest.raises(Exception, match=r"holds no model_index\.json, so it is no diffusers pipeline"):
        resolve(f"hub:{NAME}@{commit}")
