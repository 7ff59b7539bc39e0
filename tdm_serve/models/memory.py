"""Whether a model fits, before any of it is loaded: what it needs, what is free, and where its parts go.

Counted are the weights of every part in the type that they will have, the memory in which a picture of the model's own
size is decoded, and on the host what passes through it on the way to a GPU. Not counted are further versions of a base
(`memory_mb` bounds those), a CUDA context, and what larger pictures or batches take: the engine halves a batch that
does not fit. GB are 2^30 bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from tdm_serve.errors import ConfigError
from tdm_serve.models.autoencoder import TILE_PX
from tdm_serve.models.placement import Offload, Placement, Quantise
from tdm_serve.models.sizes import Sizes

logger = logging.getLogger(__name__)

GB = 2**30
UNLIMITED = 1 << 62  # cgroups say "no limit" with numbers beyond any machine


@dataclass(frozen=True, slots=True)
class Wish:
    """How a model is to be loaded."""

    device: torch.device
    dtype: torch.dtype
    offload: Offload = "none"
    quantise: Quantise = "none"
    random: bool = False
    adapters: bool = False  # to be added to the weights of a network from a file, exactly
    pixels: int = TILE_PX**2  # of the model's own size

    @property
    def apart(self) -> bool:
        """Whether device and host have a memory each."""
        return self.device.type != "cpu"

    def fine(self, sizes: Sizes) -> torch.dtype:
        """The type in which a network from a file waits for its adapters."""
        return torch.promote_types(sizes.network.stored, self.dtype) if self.adapters else self.dtype

    def placement(self, sizes: Sizes) -> Placement:
        text = torch.device("cpu") if self.offload == "text" else self.device
        return Placement(self.device, self.dtype, text, self.fine(sizes), self.quantise, self.random)


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on the device and, where that is another memory, on the host; `parts` are those on the device."""

    device: int
    host: int
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Free:
    """Bytes that are free on the device and on the host; None where nobody can tell."""

    device: int | None
    host: int | None


def need(sizes: Sizes, wish: Wish) -> Need:
    """What loading and then making one picture takes at its most."""
    on_host = wish.apart and wish.offload == "text"
    held = [part for part in sizes.parts if not (on_host and part.is_text)]
    fp8 = wish.quantise == "fp8"
    weights = {part.name: part.bytes(wish.dtype, fp8=fp8 and part is sizes.network) for part in held}
    work = min(wish.pixels, TILE_PX**2) * sizes.per_pixel * wish.dtype.itemsize
    after, while_loading = sum(weights.values()) + work, _while_loading(sizes, wish, sum(weights.values()))
    parts = (*weights.items(), ("work", max(after, while_loading) - sum(weights.values())))
    text = sum(part.bytes(wish.dtype) for part in sizes.parts if part.is_text) if on_host else 0
    return Need(max(after, while_loading), text + _passing(sizes, wish) if wish.apart else 0, parts)


def _while_loading(sizes: Sizes, wish: Wish, weights: int) -> int:
    """The device's peak before the first picture, with all other parts there."""
    network, fp8 = sizes.network, wish.quantise == "fp8"
    there = weights - network.bytes(wish.dtype, fp8=fp8)
    if wish.random or not wish.apart:  # the network is whole there, and then changes tensor by tensor
        held = wish.dtype if wish.random else wish.fine(sizes)
        return there + network.bytes(held) + network.largest * wish.dtype.itemsize
    return there + network.bytes(wish.dtype, fp8=fp8) + network.largest * wish.dtype.itemsize


def _passing(sizes: Sizes, wish: Wish) -> int:
    """The host's peak of parts on their way to a GPU, one after the other."""
    if wish.random:
        return 0
    network, others = sizes.network, sizes.parts[1:]
    moving = [part.bytes(wish.dtype) for part in others if not (part.is_text and wish.offload == "text")]
    held = network.bytes(wish.fine(sizes)) + network.largest * wish.dtype.itemsize
    return max(held, *moving) if moving else held


def place(name: str, sizes: Sizes, wish: Wish, free: Free, max_memory_gb: float | None = None) -> Placement:
    """Where the parts of a model go. Raises ConfigError, with needed, free and what would help, where they do not fit.

    `max_memory_gb` bounds what the model may take on its device; text encoders move to the host where that is what it
    takes to stay below.
    """
    budget = _budget(free, max_memory_gb)
    if _fits(need(sizes, wish), budget):
        return wish.placement(sizes)
    offloaded = replace(wish, offload="text")
    if max_memory_gb is not None and wish.apart and _fits(need(sizes, offloaded), budget):
        logger.warning("the text encoders of %s stay on the host, so that the rest fits %.1f GB", name, max_memory_gb)
        return offloaded.placement(sizes)
    raise ConfigError(_too_little(name, sizes, wish, budget))


def _budget(free: Free, max_memory_gb: float | None) -> Free:
    if max_memory_gb is None:
        return free
    if not 0 < max_memory_gb < float("inf"):
        raise ConfigError(f"max_memory is {max_memory_gb} GB; it must be a positive number")
    allowed = int(max_memory_gb * GB)
    return replace(free, device=allowed if free.device is None else min(free.device, allowed))


def _fits(needed: Need, free: Free) -> bool:
    on_device = free.device is None or needed.device <= free.device
    return on_device and (free.host is None or needed.host <= free.host)


def _too_little(name: str, sizes: Sizes, wish: Wish, free: Free) -> str:
    """The sentence with needed, free, and the settings with the fewest changes that would fit."""
    needed = need(sizes, wish)
    if free.device is not None and needed.device > free.device:
        parts = ", ".join(f"{part} {_amount(size)}" for part, size in needed.parts)
        what = f"{_amount(needed.device)} on {wish.device} ({parts}), and {_amount(free.device)} may be taken"
    else:
        what = f"{_amount(needed.host)} of the host's memory, and {_amount(free.host or 0)} may be taken"
    helping = [text for text, other in _others(wish) if _fits(need(sizes, other), free)]
    advice = f"what helps: {', or '.join(helping[:3])}" if helping else "no setting makes it fit this machine"
    return f"{name} needs {what}; {advice}"


def _amount(size: int) -> str:
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 2**20:.1f} MB"


def _others(wish: Wish) -> Iterable[tuple[str, Wish]]:
    """Every way to load with less, fewest changes first, in the words of the command line."""
    offloads = [("", wish), ("--offload text", replace(wish, offload="text"))] if wish.apart else [("", wish)]
    dtypes = [("", wish.dtype)]
    if wish.dtype == torch.float32:
        dtypes.append(("--dtype bfloat16", torch.bfloat16))
    kinds: list[tuple[str, Quantise]] = [("", wish.quantise)]
    if wish.quantise == "none" and wish.dtype != torch.float16:
        kinds.append(("--quantise fp8", "fp8"))
    found: list[tuple[str, Wish]] = []
    for (one, other), (two, dtype), (three, kind) in product(offloads, dtypes, kinds):
        if kind == "fp8" and wish.apart and dtype != torch.bfloat16:
            continue
        words = " ".join(word for word in (one, two, three) if word)
        if words:
            found.append((words, replace(other, dtype=dtype, quantise=kind)))
    return sorted(found, key=lambda pair: pair[0].count("--"))


def free_on(device: torch.device) -> Free:
    """What is free now. On a CPU the device's memory is the host's."""
    host = _host_free()
    if device.type != "cuda":
        return Free(host, host)
    return Free(torch.cuda.mem_get_info(device)[0], host)


def _host_free(proc: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The least of what the machine has and what this process's container may still take."""
    found = [_available(proc), _left(groups / "memory.max", groups / "memory.current", groups / "memory.stat")]
    old = groups / "memory"
    found.append(_left(old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", old / "memory.stat"))
    return min((one for one in found if one is not None), default=None)


def _available(proc: Path) -> int | None:
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left(limit: Path, used: Path, stat: Path) -> int | None:
    """A control group's limit less its use; file pages that can be dropped count as free."""
    try:
        most = limit.read_text().strip()
        if most == "max" or int(most) > UNLIMITED:
            return None
        numbers = dict(line.split() for line in stat.read_text().splitlines())
        droppable = int(numbers.get("total_inactive_file", numbers.get("inactive_file", 0)))
        return max(0, int(most) - int(used.read_text()) + droppable)
    except (OSError, ValueError):
        return None


def bound(device: torch.device, max_memory_gb: float | None) -> None:
    """Has torch refuse what would take more than that on a GPU; a batch that does not fit is then halved."""
    if max_memory_gb is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max_memory_gb * GB / total), device)
