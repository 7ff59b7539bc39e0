"""What a model needs is known from headers and configurations, compared with what is free, and told in one sentence."""

from __future__ import annotations

import json
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet, finalize

import pytest
import torch
from diffusers import AutoencoderKL
from torch import UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdm_serve import Pipeline
from tdm_serve.engine import Engine
from tdm_serve.errors import ConfigError
from tdm_serve.models.architectures import parts
from tdm_serve.models.autoencoder import TILE_PX, decode, laid_out
from tdm_serve.models.entries import EMBEDDED
from tdm_serve.models.families.table import FAMILIES
from tdm_serve.models.load import load, pick_dtype
from tdm_serve.models.memory import GB, Free, Wish, _host_free, need, place
from tdm_serve.models.placement import placement_on
from tdm_serve.models.random_weights import random_specs
from tdm_serve.models.sizes import Sizes, _per_pixel, sizes_of

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
PLENTY = Free(1024 * GB, 1024 * GB)


@pytest.fixture(scope="module")
def zimage() -> Sizes:
    """Of the full size."""
    with random_specs(["zimage-tdm-r1"]) as [spec]:
        return sizes_of(spec.base, spec.family, random=True)


@pytest.fixture
def wish() -> Wish:
    """On a GPU, as `load` asks for it by default."""
    return Wish(CUDA, torch.bfloat16)


def test_headers_say_what_is_loaded(pipeline: Pipeline) -> None:
    model, found = pipeline.engine.model, sizes_of(EMBEDDED, "zimage")
    sizes = {part.name: part for part in found.parts}
    assert list(sizes) == ["transformer", "vae", "text_encoder"] and found.network is sizes["transformer"]
    assert sizes["transformer"].elements == sum(one.numel() for one in model.denoiser.parameters())
    assert sizes["vae"].elements == sum(one.numel() for one in model.vae.parameters())
    assert sizes["transformer"].stored == torch.bfloat16
    assert sizes["transformer"].bytes(torch.float32) == sum(one.nbytes for one in model.denoiser.parameters())


def test_configurations_say_what_headers_do() -> None:
    built, held = sizes_of(EMBEDDED, "zimage", random=True), sizes_of(EMBEDDED, "zimage")
    for one, other in zip(built.parts, held.parts, strict=True):
        of_rotary = 64 if one.is_text else 0  # frequencies that are computed, not stored
        assert abs(one.elements - other.elements) <= of_rotary
        assert (one.fp8_elements, one.fp8_rows, one.largest) == (other.fp8_elements, other.fp8_rows, other.largest)


def test_needs_of_the_full_size(zimage: Sizes, wish: Wish) -> None:
    """6.15 and 4.02 billion parameters in two bytes are 11.5 and 7.5 GB, whatever else is counted."""
    weights = dict(need(zimage, wish).parts)
    assert round(weights["transformer"] / GB, 1) == 11.5 and round(weights["text_encoder"] / GB, 1) == 7.5
    assert need(zimage, wish).device > 19 * GB


def test_every_option_lowers_what_it_should(zimage: Sizes, wish: Wish) -> None:
    plain = need(zimage, wish)
    offloaded, fp8 = need(zimage, replace(wish, offload="text")), need(zimage, replace(wish, quantise="fp8"))
    assert plain.device - offloaded.device == offloaded.host - plain.host > 7 * GB
    assert 5 * GB < plain.device - fp8.device < 6 * GB
    assert need(zimage, replace(wish, dtype=torch.float32)).device > 1.9 * plain.device
    assert need(zimage, replace(wish, random=True)).host == 0
    assert need(zimage, replace(wish, device=CPU, offload="text")) == need(zimage, replace(wish, device=CPU))


def test_adapters_wait_in_the_type_of_the_file(zimage: Sizes, wish: Wish) -> None:
    network, *rest = zimage.parts
    half = replace(zimage, parts=(replace(network, stored=torch.bfloat16), *rest))
    assert replace(wish, adapters=True).fine(half) == torch.bfloat16
    assert replace(wish, adapters=True).fine(zimage) == torch.float32
    assert wish.fine(zimage) == torch.bfloat16
    assert need(zimage, replace(wish, adapters=True)).host > need(half, replace(wish, adapters=True)).host


def test_what_fits_goes_where_it_was_asked_to(zimage: Sizes, wish: Wish) -> None:
    assert place("z", zimage, wish, PLENTY).text == CUDA
    placed = place("z", zimage, replace(wish, offload="text"), PLENTY)
    assert (placed.device, placed.text) == (CUDA, CPU)
    assert place("z", zimage, wish, Free(None, None)).text == CUDA  # nobody can tell, so nothing is refused


def test_a_bound_moves_the_text_encoders_first(zimage: Sizes, wish: Wish) -> None:
    assert place("z", zimage, wish, PLENTY, max_memory_gb=24).text == CUDA
    placed = place("z", zimage, wish, PLENTY, max_memory_gb=16)
    assert (placed.device, placed.text, placed.quantise) == (CUDA, CPU, "none")
    with pytest.raises(ConfigError, match="max_memory is 0 GB; it must be a positive number"):
        place("z", zimage, wish, PLENTY, max_memory_gb=0)


@pytest.mark.parametrize("free_gb", [18, 16, 10, 9])
def test_what_is_said_to_help_helps(zimage: Sizes, wish: Wish, free_gb: int) -> None:
    free = Free(free_gb * GB, 64 * GB)
    with pytest.raises(ConfigError, match=r"z needs 21\.1 GB on cuda") as refused:
        place("z", zimage, wish, free)
    sentence = str(refused.value)
    assert f"and {free_gb}.0 GB may be taken; what helps: " in sentence and "transformer 11.5 GB" in sentence
    for words in sentence.partition("what helps: ")[2].split(", or "):
        changed = replace(
            wish,
            offload="text" if "--offload text" in words else "none",
            quantise="fp8" if "--quantise fp8" in words else "none",
        )
        assert need(zimage, changed).device <= free.device < need(zimage, wish).device


def test_what_cannot_fit_is_told_so(zimage: Sizes, wish: Wish) -> None:
    with pytest.raises(ConfigError, match="no setting makes it fit this machine"):
        place("z", zimage, wish, Free(4 * GB, 64 * GB))
    with pytest.raises(ConfigError, match=r"needs \d+\.\d GB of the host's memory, and 2.0 GB may be taken"):
        place("z", zimage, wish, Free(80 * GB, 2 * GB))
    with pytest.raises(ConfigError, match="what helps: --dtype bfloat16"):
        place("z", zimage, Wish(CPU, torch.float32), Free(30 * GB, 30 * GB))


def test_nothing_is_read_of_weights_that_do_not_fit(tmp_path: Path) -> None:
    """A file as large as its header says, of which the disk holds the header alone."""
    folder = tmp_path / "huge"
    shutil.copytree(EMBEDDED, folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    size = 2 * 10**12
    header = json.dumps(
        {"layers.0.weight": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with path.open("r+b") as file:
        file.truncate(8 + len(header) + size)
    with pytest.raises(ConfigError, match=re.escape(f"{folder} needs ")) as refused:
        load(folder, device="cpu")
    assert re.search(r"transformer 3725\.\d GB", str(refused.value))


def test_a_bound_holds_for_a_cpu_too() -> None:
    with pytest.raises(ConfigError, match=r"default needs \d+\.\d MB on cpu .* and 10.2 MB may be taken"):
        load("default", device="cpu", max_memory_gb=0.01)
    assert load("default", device="cpu", max_memory_gb=1).model.device == CPU


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="offload is 'vae'; it must be none or text"):
        load("default", offload="vae")
    with pytest.raises(ConfigError, match="quantise is 'int4'; it must be none or fp8"):
        load("default", quantise="int4")


def test_an_exported_engine_has_no_such_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="offload, random_weights cannot be chosen here: an exported engine has"):
        Engine.load("default", engine=tmp_path, offload="text", quantise="none", random_weights=True)


def test_text_encoders_that_stay_on_the_host_give_the_same_picture(pipeline: Pipeline) -> None:
    """On a CPU both are the same memory; what is tested is the way that features take."""
    offloaded = Pipeline.from_pretrained("default", offload="text")
    assert offloaded.engine.model.placement.text == CPU
    one, other = (made("two red circles", seed=5)[0].image.tobytes() for made in (pipeline, offloaded))
    assert one == other


@pytest.mark.gpu
def test_text_encoders_stay_on_the_host_of_a_gpu() -> None:
    made = [Pipeline.from_pretrained("default", device="cuda", offload=offload) for offload in ("none", "text")]
    model = made[1].engine.model
    assert {one.device.type for one in model.text_encoder.parameters()} == {"cpu"}
    assert {one.device.type for one in model.denoiser.parameters()} == {"cuda"}
    first, second = (one.engine.model.encode([one.engine.model.tokens("a red star")])[0] for one in made)
    assert first.device == second.device and torch.allclose(first, second, rtol=0.05, atol=0.05)


@pytest.mark.gpu
def test_a_bound_is_kept_on_a_gpu() -> None:
    load("default", device="cuda", max_memory_gb=1)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * GB, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_free_memory_is_the_least_of_machine_and_container(tmp_path: Path) -> None:
    proc, group = tmp_path / "meminfo", tmp_path / "group"
    proc.write_text("MemTotal:  9000 kB\nMemAvailable:  8000 kB\n")
    assert _host_free(proc, group) == 8000 * 1024
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    assert _host_free(proc, group) == 8000 * 1024
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("4000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    assert _host_free(proc, group) == 1_500_000
    assert _host_free(tmp_path / "none", tmp_path / "none") is None


def test_types_by_device() -> None:
    assert (pick_dtype("auto", CUDA), pick_dtype("auto", CPU)) == (torch.bfloat16, torch.float32)


def test_adapters_are_added_as_exactly_as_in_float32() -> None:
    """The default's file is bfloat16, so its adapter is added there, in float32, and rounded once either way."""
    light = load("default", device="cpu", dtype="bfloat16")
    assert light.model.placement.fine == torch.bfloat16
    spec = light.served[0].spec
    heavy = FAMILIES[spec.family].create()([spec], placement_on(CPU, torch.bfloat16))
    assert heavy.placement.fine == torch.float32
    for one, other in zip(light.model.denoiser.parameters(), heavy.denoiser.parameters(), strict=True):
        assert torch.equal(one, other)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once; of meta tensors, so nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = WeakSet[UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (held := tensor.untyped_storage()) not in self._known:
                self._known.add(held)
                self.now += held.nbytes()
                self.most = max(self.most, self.now)
                finalize(held, self._gone, held.nbytes())
        return made

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("side", [512, TILE_PX])
def test_decoding_takes_what_is_reckoned(side: int, tmp_path: Path) -> None:
    """Three tensors of the widest channels at full size; the fourth that is reckoned is for convolutions."""
    parts()["flux-vae"].write(tmp_path / "vae", tiny=False)
    with torch.device("meta"):
        vae = laid_out(AutoencoderKL.from_config(AutoencoderKL.load_config(tmp_path / "vae")).bfloat16())
        latents = torch.empty(1, 16, side // 8, side // 8, dtype=torch.bfloat16)
    with torch.inference_mode(), Live() as live:
        decode(vae, latents)
    assert live.most == side**2 * 2 * 3 * 256
    assert _per_pixel(tmp_path / "vae") == 4 * 256


CHOICES = ("", "offload", "fp8", "both")
IN_DOCS = ("zimage-tdm-r1", "sd3-medium-tdm", "sd35-medium-tdm", "sd35-medium-tdm:no-t5", "dreamshaper7-tdm")


def row_of(name: str) -> str:
    """GB on a GPU in bfloat16, by choice, and on the host with the text encoders there, of files in bfloat16."""
    with random_specs([name]) as [spec]:
        sizes = sizes_of(spec.base, spec.family, random=True)
    network, *rest = sizes.parts
    sizes = replace(sizes, parts=(replace(network, stored=torch.bfloat16), *rest))
    needs = [
        need(
            sizes,
            Wish(
                CUDA,
                torch.bfloat16,
                "text" if choice in ("offload", "both") else "none",
                "fp8" if choice in ("fp8", "both") else "none",
                adapters=True,
                pixels=spec.width * spec.height,
            ),
        )
        for choice in CHOICES
    ]
    cells = [f"{one.device / GB:.1f}" for one in needs] + [f"{needs[1].host / GB:.1f}"]
    return f"| `{name}` | {spec.width} | {' | '.join(cells)} |"


@pytest.mark.slow
def test_the_documents_say_what_is_reckoned(root: Path) -> None:
    text = (root / "docs" / "models.md").read_text()
    for name in IN_DOCS:
        assert row_of(name) in text, row_of(name)
