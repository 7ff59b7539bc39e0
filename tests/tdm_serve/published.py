"""The catalogue's repositories in small: the real names, commits and file names, with tiny weights behind them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from tdm_serve.models.entries import EMBEDDED, Entry, catalogue
from tests.tdm_serve import tiny_folders
from tests.tdm_serve.hub_server import Hub

NETWORKS: dict[str, tuple[Any, str]] = {
    "zimage": (ZImageTransformer2DModel, "transformer"),
    "sd3": (SD3Transformer2DModel, "transformer"),
    "sd15": (UNet2DConditionModel, "unet"),
}
STRENGTHS = {"zimage-tdm-r1": 1.0, "sd3-medium-tdm": 1.5, "sd35-medium-tdm": 0.3, "dreamshaper7-tdm": 2.0}
NAMED_TARGETS = {"sd3": ["attn.to_q", "attn.to_v", "attn.add_k_proj", "ff.net.2"], "sd15": ["to_q", "to_k", "to_out.0"]}


def zimage(folder: Path) -> Path:
    """The pipeline in the package, which is small and real, with places for as many tokens as published ones have."""
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("training", "adapters"))
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"axes_lens": [1024, 64, 64]}))
    return folder


def base_folder(entry: Entry, folder: Path) -> Path:
    """A tiny pipeline of the entry's family."""
    if entry.fields["family"] == "zimage":
        return zimage(folder)
    return getattr(tiny_folders, str(entry.fields["family"]))(folder)


def adapter_config(entry: Entry) -> LoraConfig:
    """What the entry says of its adapter; where it says nothing, rank and alpha are alike."""
    stated, family = entry.adapters[0].stated, str(entry.fields["family"])
    rank = stated.rank or 8
    return LoraConfig(
        r=rank,
        lora_alpha=int(stated.alpha or rank),
        target_modules=list(stated.targets or NAMED_TARGETS[family]),
        init_lora_weights=False,
    )


def network_of(entry: Entry, base: Path) -> Any:
    kind, subfolder = NETWORKS[str(entry.fields["family"])]
    return kind.from_pretrained(base / subfolder)


def adapter_folder(entry: Entry, base: Path, folder: Path) -> Path:
    """A random adapter in the form that the entry's file has."""
    torch.manual_seed(5)
    model: Any = get_peft_model(network_of(entry, base), adapter_config(entry), adapter_name="tdm")
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data *= STRENGTHS[entry.id]
    folder.mkdir(parents=True)
    name = entry.adapters[0].file
    if entry.adapters[0].stated.format == "ema-list":
        listed = [p.clone().detach() for n, p in model.named_parameters() if "tdm" in n and p.requires_grad]
        torch.save({"decay": 0.9, "ema_parameters": listed}, folder / name)
        return folder
    state = get_peft_model_state_dict(model, adapter_name="tdm")
    component = NETWORKS[str(entry.fields["family"])][1]
    named = {key.replace("base_model.model", component): value.contiguous() for key, value in state.items()}
    if name.endswith(".pt"):
        torch.save(named, folder / name)
    else:
        save_file(named, folder / name.replace("*", "pytorch_lora_weights"))
    return folder


def publish(hub: Hub, name: str, folder: Path) -> tuple[Path, Path | None]:
    """Puts what an entry names on a hub. Returns its base's folder, and its adapter's file if it has one."""
    entry = catalogue()[name]
    assert entry.base is not None
    base = base_folder(entry, folder / "base")
    hub.add(entry.base.repo, base, entry.base.revision)
    if not entry.adapters:
        return base, None
    adapter = adapter_folder(entry, base, folder / "adapter")
    hub.add(entry.adapters[0].hub.repo, adapter)
    return base, next(adapter.iterdir())
