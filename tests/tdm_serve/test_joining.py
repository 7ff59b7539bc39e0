"""A version joins others while they are served: its own pixels, nobody else's changed; refusals change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tdm_serve import Pipeline
from tdm_serve.core import Request
from tdm_serve.engine import Engine
from tdm_serve.errors import CheckpointError, ConfigError
from tdm_serve.models.catalog import EMBEDDED
from tdm_serve.models.linked import linked_checkpoint
from tdm_serve.models.spec import MANIFEST

NEW = "online-1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of default-tdm as a version of a checkpoint that links to the embedded one."""
    versions = json.loads((EMBEDDED / MANIFEST).read_text())["versions"]
    adapter = EMBEDDED / versions["tdm"]["adapter"]
    return linked_checkpoint(EMBEDDED, tmp_path_factory.mktemp("linked") / NEW, NEW, versions["tdm"], adapter)


@pytest.fixture
def growing() -> Engine:
    return Engine.load("default", device="cpu", growing=True)


def request(model: str, seed: int = 3) -> Request:
    return Request("two red circles", seed, 128, 128, model=model)


def pixels(engine: Engine, *requests: Request) -> list[bytes]:
    return [one.image.tobytes() for one in engine.generate(requests)]


def test_a_linked_checkpoint_is_one_like_any_other(folder: Path) -> None:
    assert (folder / "transformer").is_symlink()
    ours, theirs = Pipeline.from_pretrained(folder), Pipeline.from_pretrained("default-tdm")
    assert ours.info.checkpoint_hash == theirs.info.checkpoint_hash
    assert ours.info.id == str(folder)


def test_a_version_joins_a_single_one(folder: Path, growing: Engine) -> None:
    alone = Engine.load(["default", "default-tdm"], device="cpu")
    before = growing.start([request("default")])
    growing.step(before)  # under way while the other one joins
    info = growing.add(growing.examine(folder))
    assert list(growing.infos) == ["default", info.id]
    assert info.checkpoint_hash == alone.infos["default-tdm"].checkpoint_hash
    while not before[0].done:
        growing.step(before)
    expected = pixels(alone, request("default"), request("default-tdm"))
    assert [growing.finish(before)[0].image.tobytes()] == expected[:1]
    assert pixels(growing, request("default"), request(info.id)) == expected
    with pytest.raises(ConfigError, match="served already"):
        growing.add(growing.examine(folder))


def test_what_cannot_join_changes_nothing(folder: Path, growing: Engine, tmp_path: Path) -> None:
    broken = linked_checkpoint(EMBEDDED, tmp_path / "broken", NEW, {}, EMBEDDED / "adapters" / "tdm.safetensors")
    with pytest.raises(CheckpointError, match="not usable"):
        growing.examine(broken)
    served = growing.examine(folder)
    growing.versions.limit_bytes = 1000
    with pytest.raises(ConfigError, match="alone needs"):
        growing.add(served)
    assert list(growing.infos) == ["default"]
    assert served.spec.id not in growing.versions.stats().loaded
    growing.versions.limit_bytes = None
    growing.add(served)
    assert pixels(growing, request("default"))


def test_an_engine_for_one_version_says_what_it_lacks(folder: Path, tmp_path: Path) -> None:
    engine = Engine.load("default", device="cpu")
    with pytest.raises(ConfigError, match="growing"):
        engine.add(engine.examine(folder))
    with pytest.raises(CheckpointError, match=MANIFEST):
        linked_checkpoint(tmp_path, tmp_path / "new", NEW, {}, folder / "adapters" / f"{NEW}.safetensors")
