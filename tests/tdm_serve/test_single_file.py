"""Networks in one safetensors file: read by diffusers' own converters, kept once, checked against the base."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from tdm_serve import Pipeline
from tdm_serve.engine import Engine
from tdm_serve.errors import CheckpointError
from tdm_serve.models.catalog import Reference, resolve
from tests.tdm_serve import original_names, published, tiny_folders

pytestmark = pytest.mark.filterwarnings("ignore:.*requires torchvision.*")

WEIGHTS = "diffusion_pytorch_model.safetensors"
LIKE = {"zimage": "zimage-turbo", "sd3": "sd3-medium-tdm", "sd15": "dreamshaper7-tdm"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tdm-serve" / "single-files"


def picture(reference: Reference) -> Any:
    spec = replace(resolve(reference), adapters=(), min_side=64)
    return np.asarray(Pipeline(Engine.load(spec, device="cpu"))("a red star", seed=2, size=(64, 64))[0].image)


def spoiled(network: Path) -> Path:
    """A base whose own network is another one, so that a picture tells which was used."""
    state = load_file(network / WEIGHTS)
    save_file({key: value * 0.5 for key, value in state.items()}, network / WEIGHTS)
    return network.parent


def sd3(folder: Path) -> Path:
    return spoiled(tiny_folders.sd3(folder, dual=False) / "transformer")


def sd15(folder: Path) -> Path:
    return spoiled(tiny_folders.sd15(folder) / "unet")


def bases(family: str, folder: Path) -> tuple[Path, Path]:
    """A whole folder, and one of the same configuration whose network's weights are others."""
    if family == "zimage":
        return published.zimage(folder / "whole"), spoiled(published.zimage(folder / "base") / "transformer")
    if family == "sd3":
        return tiny_folders.sd3(folder / "whole", dual=False), sd3(folder / "base")
    return tiny_folders.sd15(folder / "whole"), sd15(folder / "base")


def network_folder(family: str) -> str:
    return "unet" if family == "sd15" else "transformer"


@pytest.mark.parametrize("family", ["zimage", "sd3", "sd15"])
def test_a_network_with_diffusers_names(family: str, tmp_path: Path, cache: Path) -> None:
    whole, base = bases(family, tmp_path)
    file = tmp_path / "network.safetensors"
    shutil.copy(whole / network_folder(family) / WEIGHTS, file)
    like = f"{LIKE[family]}+base={base}" + ("" if family == "zimage" else f"+adapter={file}")  # not read here
    expected = picture(f"{LIKE[family]}+base={whole}" + ("" if family == "zimage" else f"+adapter={file}"))
    assert (picture(f"{like}+file={file}") == expected).all()
    assert (picture(like) != expected).any()
    (kept,) = cache.iterdir()
    assert (kept / "vae").is_symlink() and not (kept / network_folder(family)).is_symlink()


def test_a_published_z_image_file_with_its_own_names(tmp_path: Path) -> None:
    whole, base = bases("zimage", tmp_path)
    state = ZImageTransformer2DModel.from_pretrained(whole / "transformer").state_dict()
    file = tmp_path / "z_image_turbo.safetensors"
    save_file(original_names.zimage(state), file)
    made = picture(f"zimage-turbo+base={base}+file={file}")
    assert (made == picture(f"zimage-turbo+base={whole}")).all()


def test_a_whole_sd15_checkpoint_brings_its_other_parts(tmp_path: Path) -> None:
    """Network, autoencoder and text encoder under the names that such checkpoints have."""
    whole, base = bases("sd15", tmp_path)
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(whole / "unet"),
        "vae": tiny_folders.randomised(AutoencoderKL.from_pretrained(whole / "vae"), 8),
        "text_encoder": tiny_folders.clip_encoder(16, 9, CLIPTextModel),
    }
    for name, part in parts.items():
        part.save_pretrained(whole / name)
    file = tmp_path / "checkpoint.safetensors"
    state = original_names.unet(parts["unet"].state_dict(), layers=1)
    state |= original_names.vae(parts["vae"].state_dict(), blocks=4)
    state |= original_names.clip(parts["text_encoder"].state_dict())
    save_file(state, file)
    spec = resolve(f"dreamshaper7-tdm+base={base}+file={file}+adapter={file}")
    assert not any((spec.base / name).is_symlink() for name in parts)
    assert (spec.base / "tokenizer").is_symlink(), "what the file does not hold is the base's"
    expected = picture(f"dreamshaper7-tdm+base={whole}+adapter={file}")
    assert (picture(f"dreamshaper7-tdm+base={base}+file={file}+adapter={file}") == expected).all()


def test_it_is_converted_once_and_again_when_the_file_changes(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, base = bases("sd15", tmp_path)
    file = tmp_path / "network.safetensors"
    shutil.copy(whole / "unet" / WEIGHTS, file)
    reference = f"dreamshaper7-tdm+base={base}+file={file}+adapter={file}"
    with caplog.at_level(logging.WARNING):
        first = resolve(reference).base
        assert resolve(reference).base == first
    assert caplog.text.count("is converted once, into") == 1
    facts = file.stat()
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert resolve(reference).base != first
    assert len(list(cache.iterdir())) == 2


def test_the_type_of_the_file_is_kept(tmp_path: Path) -> None:
    whole, base = bases("sd15", tmp_path)
    file = tmp_path / "network.safetensors"
    save_file({key: value.half() for key, value in load_file(whole / "unet" / WEIGHTS).items()}, file)
    spec = resolve(f"dreamshaper7-tdm+base={base}+file={file}+adapter={file}")
    assert {value.dtype for value in load_file(spec.base / "unet" / WEIGHTS).values()} == {torch.float16}


def test_files_that_are_not_read(tmp_path: Path, cache: Path) -> None:
    whole, base = bases("sd15", tmp_path)
    prefix = f"dreamshaper7-tdm+base={base}+adapter={base}"
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors is no safetensors file"):
        resolve(f"{prefix}+file={tmp_path / 'nothing.safetensors'}")
    short = tmp_path / "short.safetensors"
    short.write_bytes((whole / "unet" / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="its header promises"):
        resolve(f"{prefix}+file={short}")
    odd = tmp_path / "odd.safetensors"
    save_file({"weight": torch.zeros(4, dtype=torch.float8_e4m3fn)}, odd)
    with pytest.raises(CheckpointError, match=r"weights of type F8_E4M3; float32, float16 and bfloat16 are read"):
        resolve(f"{prefix}+file={odd}")
    with pytest.raises(CheckpointError, match="single files are read for zimage, sd3, sd15, not for family 'pixart'"):
        resolve(f"pixart-alpha-512+base={base}+file={odd}")
    assert not cache.exists() or not list(cache.iterdir()), "nothing half made is left"


def test_a_network_of_another_base_or_with_missing_weights(tmp_path: Path, cache: Path) -> None:
    whole, base = bases("sd15", tmp_path)
    prefix = f"dreamshaper7-tdm+base={base}+adapter={base}"
    state = load_file(whole / "unet" / WEIGHTS)
    cut = tmp_path / "cut.safetensors"
    save_file({key: value for key, value in state.items() if "conv_out" not in key}, cut)
    with pytest.raises(CheckpointError, match=r"cut\.safetensors .*(conv_out|unet)"):
        resolve(f"{prefix}+file={cut}")
    other = tmp_path / "other.safetensors"
    save_file({key: value[:1].clone() for key, value in state.items()}, other)
    with pytest.raises(CheckpointError, match=r"other\.safetensors does not hold the unet of"):
        resolve(f"{prefix}+file={other}")
    assert not list(cache.iterdir())


def test_links_are_followed_and_modes_of_the_base_left_alone(tmp_path: Path) -> None:
    whole, base = bases("sd15", tmp_path)
    (base / "vae").chmod(0o700)
    file = tmp_path / "network.safetensors"
    shutil.copy(whole / "unet" / WEIGHTS, file)
    folder = resolve(f"dreamshaper7-tdm+base={base}+file={file}+adapter={file}").base
    assert (base / "vae").stat().st_mode & 0o777 == 0o700
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
