"""Every published model of the catalogue by its name, from a hub: fetched, checked, and sampled as its card does it.

The repositories have the real names, commits and file names, and tiny weights. The references are the examples of the
model cards, with stock diffusers and PEFT.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from peft import get_peft_model
from PIL import Image

from tdm_serve import Pipeline
from tdm_serve.convert import convert_adapter
from tdm_serve.engine import Engine
from tdm_serve.errors import CheckpointError, DownloadError, InvalidRequest
from tdm_serve.models.catalog import Reference, resolve
from tdm_serve.models.entries import catalogue
from tdm_serve.models.listing import entries
from tdm_serve.models.load import load
from tdm_serve.models.lora import Stated
from tests.conftest import Cli
from tests.tdm_serve import hub_server, published

pytestmark = pytest.mark.filterwarnings("ignore:.*requires torchvision.*")

PUBLISHED = [name for name, entry in catalogue().items() if entry.base is not None]
PROMPT, SIDE, SEED = "a red star", 256, 3


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "converted"))
    with hub_server.running() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def listed_adapter(pipe: Any, name: str, file: Path) -> None:
    """As the card of TDM-R1 loads its unnamed list."""
    pipe.transformer = get_peft_model(pipe.transformer, published.adapter_config(catalogue()[name]), adapter_name="x")
    wanted = [p for n, p in pipe.transformer.named_parameters() if "x" in n and p.requires_grad]
    found = torch.load(file, weights_only=True)["ema_parameters"]
    for parameter, value in zip(wanted, found, strict=True):
        parameter.data.copy_(value)


def zimage_tdm_r1(base: Path, file: Path | None) -> Any:
    pipe = diffusers.ZImagePipeline.from_pretrained(base)
    assert file is not None
    listed_adapter(pipe, "zimage-tdm-r1", file)
    return pipe(PROMPT, num_inference_steps=4, guidance_scale=0.0, **common())


def zimage_turbo(base: Path, _file: Path | None) -> Any:
    pipe = diffusers.ZImagePipeline.from_pretrained(base)
    return pipe(PROMPT, num_inference_steps=8, guidance_scale=0.0, **common())


def sd3_medium(base: Path, file: Path | None) -> Any:
    pipe: Any = diffusers.StableDiffusion3Pipeline.from_pretrained(base)
    pipe.load_lora_weights(str(file), adapter_name="tdm")
    pipe.set_adapters(["tdm"], [0.125])
    return sd3_sampled(pipe)


def sd35_medium(base: Path, file: Path | None) -> Any:
    pipe: Any = diffusers.StableDiffusion3Pipeline.from_pretrained(base)
    assert file is not None
    listed_adapter(pipe, "sd35-medium-tdm", file)
    return sd3_sampled(pipe)


def sd3_sampled(pipe: Any) -> Any:
    config: Any = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "final_sigmas_type": "zero"}
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(flow_shift=3.0, **config)  # 256 pixels are nearer to 512
    return pipe(PROMPT, num_inference_steps=4, guidance_scale=1.0, **common())


def dreamshaper(base: Path, file: Path | None) -> Any:
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(torch.load(str(file), weights_only=True))
    return pipe(PROMPT, num_inference_steps=4, guidance_scale=1.0, **common())


def pixart(base: Path, _file: Path | None) -> Any:
    pipe: Any = diffusers.PixArtAlphaPipeline.from_pretrained(base)
    more: Any = {"use_resolution_binning": False, "clean_caption": False}
    return pipe(PROMPT, num_inference_steps=20, guidance_scale=4.5, **more, **common())


def common() -> dict[str, Any]:
    return {"width": SIDE, "height": SIDE, "generator": torch.Generator().manual_seed(SEED), "output_type": "np"}


CARDS: dict[str, Callable[[Path, Path | None], Any]] = {
    "zimage-tdm-r1": zimage_tdm_r1,
    "zimage-turbo": zimage_turbo,
    "sd3-medium-tdm": sd3_medium,
    "sd35-medium-tdm": sd35_medium,
    "dreamshaper7-tdm": dreamshaper,
    "pixart-alpha-512": pixart,
}


def picture(reference: Reference) -> Any:
    image = Pipeline(Engine.load(reference, device="cpu"))(PROMPT, seed=SEED, size=(SIDE, SIDE))[0].image
    return np.asarray(image, dtype=np.float32)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_gives_what_its_card_gives(hub: hub_server.Hub, name: str, tmp_path: Path) -> None:
    base, file = published.publish(hub, name, tmp_path)
    made = picture(name)
    apart = np.abs(made - 255.0 * CARDS[name](base, file).images[0])
    assert apart.mean() <= 0.5 and (apart > 2).mean() <= 0.001, "a few pixels at edges show that sums were rounded"
    if file is not None:  # else an adapter that nobody reads would pass
        assert np.abs(made - picture(replace(resolve(name), adapters=()))).mean() > 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zimage-tdm-r1", "sd35-medium-tdm", "dreamshaper7-tdm"])
def test_the_command_line_fetches_and_generates(
    cli: Cli, name: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    with hub_server.running() as hub:
        published.publish(hub, name, tmp_path)
        switches = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        before = dict(environment)
        environment.update(switches)  # what `cli` starts its processes with
        try:
            command = ("generate", PROMPT, "--model", name, "--size", f"{SIDE}x{SIDE}", "-o", "picture.png", "--json")
            done = cli(*command, "--device", "cpu", "--seed", "1", cwd=tmp_path)
        finally:
            environment.clear()
            environment.update(before)
    assert done.returncode == 0, done.stderr
    assert "Fetching" in done.stderr, "a download shows its progress"
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (SIDE, SIDE)
    assert json.loads(done.stdout)["images"][0]["nfe"] == 4


def test_the_listing_tells_what_is_at_hand(hub: hub_server.Hub, tmp_path: Path) -> None:
    def states() -> dict[str, str]:
        return {entry.id: entry.state for entry in entries()}

    assert states() == {name: "needs download" if name in PUBLISHED else "embedded" for name in catalogue()}
    published.publish(hub, "zimage-tdm-r1", tmp_path)
    resolve("zimage-turbo")  # its base is the same; the adapter is not there yet
    assert states()["zimage-turbo"] == "downloaded" and states()["zimage-tdm-r1"] == "needs download"
    resolve("zimage-tdm-r1")
    asked = len(hub.requests)
    assert states()["zimage-tdm-r1"] == "downloaded"
    assert len(hub.requests) == asked, "a listing asks nobody"


def test_local_parts_in_place_of_published_ones(hub: hub_server.Hub, tmp_path: Path) -> None:
    base, file = published.publish(hub, "sd35-medium-tdm", tmp_path)
    spec = resolve(f"sd35-medium-tdm+base={base}+adapter={file}+name=mine")
    assert (spec.id, spec.base) == ("mine", base)
    assert spec.adapters[0].path == file and spec.adapters[0].rank == 32 and spec.adapters[0].alpha == 64.0
    assert not hub.requests
    assert load(spec, "cpu").served[0].spec == spec


def test_another_repository_as_the_base(hub: hub_server.Hub, tmp_path: Path) -> None:
    base, _ = published.publish(hub, "zimage-turbo", tmp_path)
    commit = hub.add("someone/finetune", base).commit
    spec = resolve(f"zimage-turbo+base=hub:someone/finetune@{commit}")
    assert commit in str(spec.base) and spec.rows() == resolve("zimage-turbo").rows()


def test_a_single_file_spares_the_network_of_the_base(hub: hub_server.Hub, tmp_path: Path) -> None:
    base, _ = published.publish(hub, "zimage-turbo", tmp_path)
    file = tmp_path / "network.safetensors"
    shutil.copy(base / "transformer" / "diffusion_pytorch_model.safetensors", file)
    spec = resolve(f"zimage-turbo+file={file}")
    assert not hub.gets("transformer/diffusion_pytorch_model.safetensors")
    assert hub.gets("vae/diffusion_pytorch_model.safetensors")
    assert load(spec, "cpu").served


def test_an_adapter_is_converted_against_the_configuration_alone(hub: hub_server.Hub, tmp_path: Path) -> None:
    _, file = published.publish(hub, "sd35-medium-tdm", tmp_path)
    assert file is not None
    out = convert_adapter(file, "sd35-medium-tdm", tmp_path / "named.safetensors", stated=Stated(32, 64.0))
    assert out.is_file() and hub.gets("transformer/config.json")
    assert not [one for one in hub.requests if one.path.endswith(".safetensors")]
    spec = resolve(f"sd35-medium-tdm+base={tmp_path / 'base'}+adapter={out}")  # which says its own rank and alpha
    assert np.abs(picture(spec) - picture("sd35-medium-tdm")).max() <= 2


def test_a_base_of_another_family(hub: hub_server.Hub, tmp_path: Path) -> None:
    published.publish(hub, "zimage-tdm-r1", tmp_path)
    base = published.base_folder(catalogue()["dreamshaper7-tdm"], tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"said to be of family 'zimage', but its model_index\.json is of 'sd15'"):
        load(f"zimage-tdm-r1+base={base}", "cpu")


def test_an_adapter_of_another_base(hub: hub_server.Hub, tmp_path: Path) -> None:
    _, file = published.publish(hub, "sd35-medium-tdm", tmp_path / "sd35")
    published.publish(hub, "zimage-tdm-r1", tmp_path / "zimage")
    with pytest.raises(CheckpointError, match=r"is a list of \d+ tensors, but \d+ are expected"):
        load(f"zimage-tdm-r1+adapter={file}", "cpu")


def test_a_gated_base_says_how_to_get_in(hub: hub_server.Hub, tmp_path: Path) -> None:
    entry = catalogue()["sd3-medium-tdm"]
    assert entry.base is not None and entry.gated
    hub.add(entry.base.repo, published.base_folder(entry, tmp_path / "base"), entry.base.revision, gated=403)
    with pytest.raises(DownloadError, match="stable-diffusion-3-medium-diffusers is gated: accept its terms"):
        resolve("sd3-medium-tdm")


def test_a_size_beyond_the_entry_is_refused(hub: hub_server.Hub, tmp_path: Path) -> None:
    published.publish(hub, "dreamshaper7-tdm", tmp_path)
    pipeline = Pipeline.from_pretrained("dreamshaper7-tdm", device="cpu")
    with pytest.raises(InvalidRequest, match="a multiple of 8 between 256 and 768"):
        pipeline(PROMPT, size=(1024, 512))
