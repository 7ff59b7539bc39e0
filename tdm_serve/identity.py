"""What a device is and holds, for the profile's file and the metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tdm_serve.device import Device
from tdm_serve.engine import Engine
from tdm_serve.machine import cpu_name
from tdm_serve.profile import Device as Identity


def identity_of(device: Device) -> Identity:
    """What timings depend on. A device that is no Engine is known by its class."""
    checkpoints = "+".join(info.checkpoint_hash for info in device.infos.values())
    if not isinstance(device, Engine):
        return Identity(type(device).__name__, 1, "", "", checkpoints)
    place = device.model.device
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else cpu_name()
    kind = "compiled" if compiles(device) else device.model.runtime
    backend = f"{kind}{_fitted(device)}, torch {torch.__version__}, strict {device.strict}"
    return Identity(name, torch.get_num_threads(), str(device.model.dtype), backend, checkpoints)


def _fitted(device: Engine) -> str:
    """What was done to make the model fit, where something was."""
    place = device.model.placement
    quantised = "" if place.quantise == "none" else f", {place.quantise}"
    return quantised + ("" if place.text == place.device else ", text offloaded")


def compiles(device: Device) -> bool:
    """Whether every batch size is slow once, because it is compiled then."""
    return isinstance(device, Engine) and not isinstance(device.denoise.denoise, nn.Module)


def memory_of(device: Device) -> dict[str, int]:
    """Bytes of a CUDA device that are allocated, and reserved by torch; empty for others."""
    if not isinstance(device, Engine) or device.model.device.type != "cuda":
        return {}
    place = device.model.device
    return {"allocated": torch.cuda.memory_allocated(place), "reserved": torch.cuda.memory_reserved(place)}


def versions_of(device: Device) -> dict[str, Any]:
    """What an engine's versions hold and have gone through, by the field names of `EngineStats`."""
    if not isinstance(device, Engine):
        return {}
    stats = device.versions.stats()
    held = {version: size for version, size in stats.held.items() if version in device.infos}
    return {"version_loads": stats.loads, "version_unloads": stats.unloads, "version_bytes": held}
