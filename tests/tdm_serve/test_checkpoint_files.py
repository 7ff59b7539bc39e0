"""Folders that are no checkpoint, and checkpoints with broken files: refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tdm_serve.convert import convert
from tdm_serve.errors import BackendUnavailable, CheckpointError, ConfigError
from tdm_serve.models.catalog import EMBEDDED, resolve
from tdm_serve.models.inspect import checkpoint_hash, weight_files
from tdm_serve.models.load import load
from tdm_serve.models.spec import MANIFEST


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED, tmp_path / "checkpoint"))


def test_the_embedded_checkpoint_is_small_and_whole() -> None:
    total = sum(path.stat().st_size for path in EMBEDDED.parent.rglob("*") if path.is_file())
    assert total <= 24 * 2**20
    assert not [path for path in EMBEDDED.rglob("*") if path.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]
    for name in ("default", "default-tdm", "default-teacher"):
        assert weight_files(resolve(name))


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=MANIFEST):
        load(tmp_path, "cpu", "auto")


def test_a_missing_weight_file(copy: Path) -> None:
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vae.*is missing"):
        load(copy, "cpu", "auto")


def test_a_truncated_weight_file(copy: Path) -> None:
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="its header promises"):
        load(copy, "cpu", "auto")


def safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        b"not a weight file at all",
        safetensors(b"[1]"),
        safetensors(b'{"weight": {"shape": [1]}}'),
        safetensors(b'{"weight": {"data_offsets": [0]}}'),
        safetensors(b'{"weight": {"data_offsets": [0, "4"]}}'),
    ],
)
def test_a_file_that_is_no_safetensors(copy: Path, content: bytes) -> None:
    (copy / "text_encoder" / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="no safetensors file or is cut short"):
        load(copy, "cpu", "auto")


def test_a_pickled_weight_file_is_refused(copy: Path) -> None:
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, copy / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a pickle"):
        load(copy, "cpu", "auto")


def test_a_manifest_with_another_format_or_a_broken_table(copy: Path) -> None:
    path = copy / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["versions"]["teacher"]["sigmas"] = [0.5, 0.9]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not usable"):
        load(f"{copy}@teacher", "cpu", "auto")
    path.write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        load(copy, "cpu", "auto")
    path.write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 1"):
        load(copy, "cpu", "auto")


@pytest.mark.parametrize(
    "changed",
    [{"versions": None}, {"versions": {"tdm": 4}}, {"versions": {"tdm": []}}, {"limits": 128}, {"limits": {}}],
)
def test_a_manifest_of_the_wrong_shape(copy: Path, changed: dict[str, object]) -> None:
    path = copy / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"default": "tdm"} | changed))
    with pytest.raises(CheckpointError, match="not usable"):
        load(copy, "cpu", "auto")


def test_an_unknown_family_is_neither_loaded_nor_converted(copy: Path, tmp_path: Path) -> None:
    path = copy / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"family": "watercolour"}))
    with pytest.raises(CheckpointError, match="'watercolour'; known families are zimage"):
        load(copy, "cpu", "auto")
    with pytest.raises(CheckpointError, match="'watercolour'"):
        convert(copy, tmp_path / "out")


@pytest.mark.parametrize("name", ["model_index.json", "tokenizer", "text_encoder"])
def test_a_missing_part(copy: Path, tmp_path: Path, name: str) -> None:
    part = copy / name
    part.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"is no checkpoint: {name}.* is missing"):
        load(copy, "cpu", "auto")
    with pytest.raises(CheckpointError, match=rf"is no checkpoint: {name}.* is missing"):
        convert(copy, tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 5}'])
def test_a_broken_index_of_shards(copy: Path, text: str) -> None:
    (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="no index of weight files"):
        load(copy, "cpu", "auto")


def test_a_missing_shard(copy: Path) -> None:
    index = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"one\.safetensors is missing"):
        load(copy, "cpu", "auto")


@pytest.mark.parametrize(
    ("device", "error", "sentence"),
    [
        ("abacus", ConfigError, "'abacus' is unknown"),
        ("cpu:one", ConfigError, "'cpu:one' is unknown"),
        ("cuda:", ConfigError, "'cuda:' is unknown"),
        ("cuda:9999", BackendUnavailable, "'cuda:9999' was asked for"),
    ],
)
def test_devices_that_are_not_there(device: str, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        load("default", device, "auto")


def test_an_unknown_version_lists_the_known(copy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no version 'x'.*teacher"):
        load(f"{copy}@x", "cpu", "auto")


def test_the_hash_follows_weights_and_table(copy: Path) -> None:
    def digest(version: str) -> str:
        spec = resolve(f"{copy}@{version}")
        return checkpoint_hash(spec, weight_files(spec))

    before = digest("teacher")
    assert before != digest("tdm")
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    changed = digest("teacher")
    assert changed != before
    template = copy / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert digest("teacher") != changed
