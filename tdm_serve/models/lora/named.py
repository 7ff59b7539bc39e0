"""Readers of files whose keys name modules: diffusers and PEFT with dots, kohya with underscores."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdm_serve.errors import CheckpointError
from tdm_serve.models.lora.base import Base
from tdm_serve.models.lora.core import Delta, Lora
from tdm_serve.models.lora.settings import Settings

PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "unet.")
KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_")
TEXT_PREFIXES = ("text_encoder", "lora_te")
OTHER_KINDS = {
    r"\.(dora_scale|lora_magnitude_vector)": "DoRA", r"\.hada_": "LoHa", r"\.lokr_": "LoKr", r"\.b?oft_": "OFT",
    r"\.lora_mid": "LoCon with a core tensor", r"\.lora_B\..*bias$": "LoRA with biases", r"\.vera_": "VeRA",
    r"\.diff(_b)?$": "full difference", r"\.ia3_": "IA3",
}  # fmt: skip
SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}
KEYS = (
    re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B)(\.(?P<name>(?!weight$)[^.]+))?\.weight"),
    re.compile(r"(?P<module>.+)\.lora[._](?P<side>down|up)\.weight"),
    re.compile(r"(?P<module>.+)\.lora_linear_layer\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<module>.+\.processor\.to_(q|k|v|out))_lora\.(?P<side>down|up)\.weight"),
)
ALPHA = re.compile(r"(?P<module>.+)\.alpha")


@dataclass(slots=True)
class Parts:
    """What a file holds for one module."""

    factors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    alpha: float | None = None


def is_kohya(keys: Mapping[str, Tensor]) -> bool:
    """Whether module names are written with underscores, behind one of kohya's prefixes."""
    return any(key.startswith((*KOHYA_PREFIXES, "lora_te")) for key in keys)


def read_dotted(tensors: Mapping[str, Tensor], settings: Settings) -> Lora:
    """diffusers' and PEFT's keys, with or without a prefix and the adapter's name; also diffusers' older spellings."""
    return _read(tensors, settings, _dotted)


def read_kohya(tensors: Mapping[str, Tensor], settings: Settings, base: Base) -> Lora:
    """Kohya's keys; the base's module list tells which underscores are dots."""
    names = {name.replace(".", "_"): name for name in base.layers}

    def module(flat: str) -> str:
        bare = next((flat.removeprefix(one) for one in KOHYA_PREFIXES if flat.startswith(one)), flat)
        return names.get(bare, bare)

    return _read(tensors, settings, module)


def _dotted(module: str) -> str:
    for prefix in PREFIXES:
        module = module.removeprefix(prefix)
    module, legacy = re.subn(r"\.processor\.(to_\w+)$", r".\1", module)
    return f"{module}.0" if legacy and module.endswith(".to_out") else module


def _read(tensors: Mapping[str, Tensor], settings: Settings, module: Callable[[str], str]) -> Lora:
    source = settings.source
    text = [key for key in tensors if key.startswith(TEXT_PREFIXES)]
    parts: dict[str, Parts] = {}
    for key, tensor in tensors.items():
        if key not in text:
            _sort_in(parts, key, tensor, module, source)
    if not parts:
        raise CheckpointError(f"adapter {source} holds no LoRA weights of a denoiser")
    modules = {name: _delta(name, parts[name], settings) for name in parts}
    warnings = [f"{len(text)} tensors of adapter {source} are for a text encoder and are left out"] if text else []
    if settings.alpha is None and all(part.alpha is None for part in parts.values()):
        warnings.append(f"adapter {source} says no alpha; it is taken as the rank, as stock diffusers does")
    return Lora(modules, source, tuple(warnings))


def check_kind(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises CheckpointError for relatives of LoRA, which would be misread or lose a part."""
    for key in tensors:
        kind = next((kind for mark, kind in OTHER_KINDS.items() if re.search(mark, key)), None)
        if kind is not None:
            raise CheckpointError(
                f"adapter {source} is a {kind} (it holds {key!r}), and plain LoRA is read; merge it into its base with "
                "the library that made it, and use the merged model"
            )


def _sort_in(parts: dict[str, Parts], key: str, tensor: Tensor, module: Callable[[str], str], source: str) -> None:
    found = next((match for pattern in KEYS if (match := pattern.fullmatch(key))), None)
    if found is None and (alpha := ALPHA.fullmatch(key)) is not None and tensor.numel() == 1:
        parts.setdefault(module(alpha["module"]), Parts()).alpha = float(tensor)
        return
    if found is None:
        raise CheckpointError(
            f"adapter {source} holds {key!r}, which is no lora_A, lora_B, lora_down or lora_up weight"
        )
    factors, side = parts.setdefault(module(found["module"]), Parts()).factors, SIDES[found["side"]]
    if side in factors:
        raise CheckpointError(
            f"adapter {source} holds {key!r} beside another for the same place; keep one adapter a file"
        )
    factors[side] = tensor


def _delta(name: str, parts: Parts, settings: Settings) -> Delta:
    missing = [f"lora_{side}" for side in "AB" if side not in parts.factors]
    if missing:
        raise CheckpointError(
            f"adapter {settings.source} lacks {' and '.join(missing)} of {name}; the file is incomplete, so "
            "fetch or save it again"
        )
    return delta_of(name, parts.factors["A"], parts.factors["B"], settings, parts.alpha)


def delta_of(name: str, a: Tensor, b: Tensor, settings: Settings, alpha: float | None = None) -> Delta:
    """A checked pair. Raises CheckpointError for ranks that differ, and dimensions, types or values of no LoRA."""
    if a.ndim < 2 or a.ndim != b.ndim or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"adapter {settings.source} has A {tuple(a.shape)} and B {tuple(b.shape)} at {name}; a LoRA has "
            "A (r, in) and B (out, r)"
        )
    for factor in (a, b):
        if not factor.is_floating_point() or not bool(torch.isfinite(factor.float()).all()):
            raise CheckpointError(
                f"adapter {settings.source} holds {factor.dtype} values at {name} that are no finite floating-point "
                "numbers; use an unquantised and whole file"
            )
    return Delta(a, b, settings.scale(name, a.shape[0], alpha))
