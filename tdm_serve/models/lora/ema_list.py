"""The unnamed list of the published TDM-R1 (Z-Image) and SD3.5 TDM files.

Its trainer saves `{"decay": ..., "ema_parameters": [...]}`: the trainable parameters in the order in which PEFT names
them, A before B of each adapted module, modules in the order of the class. Nothing in the file says names, alpha or
which modules; the order can only be checked by count and shapes, so both are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tdm_serve.errors import CheckpointError, ConfigError
from tdm_serve.models.lora.base import Base
from tdm_serve.models.lora.core import Delta, Lora
from tdm_serve.models.lora.named import delta_of
from tdm_serve.models.lora.settings import Settings, Stated

# What the published files adapt. Z-Image's usage example also lists add_k_proj and add_v_proj, which match nothing.
PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "ZImageTransformer2DModel": ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"),
    "SD3Transformer2DModel": (
        "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v",
    ),
}  # fmt: skip


def read_list(tensors: Sequence[Tensor], base: Base, source: str, stated: Stated) -> Lora:
    """The adapter of a list. `stated` must say alpha, and may say rank and targets."""
    targets = stated.targets or PUBLISHED.get(base.class_name, ())
    if not targets:
        raise ConfigError(f"adapter {source} is an unnamed list; state which modules of {base.class_name} it is for")
    if stated.alpha is None:
        raise ConfigError(
            f"adapter {source} is an unnamed list, which says no alpha; state it (TDM-R1 published rank 32, alpha 64)"
        )
    names = base.targeted(targets)
    _check_count(tensors, names, base, source, targets)
    settings = Settings(source, rank=stated.rank or tensors[0].shape[0], alpha=stated.alpha)
    modules = {
        name: _checked(name, tensors[2 * i], tensors[2 * i + 1], 2 * i, base, settings) for i, name in enumerate(names)
    }
    return Lora(modules, source, _warnings(modules, source))


def _check_count(
    tensors: Sequence[Tensor], names: Sequence[str], base: Base, source: str, targets: Sequence[str]
) -> None:
    if len(tensors) != 2 * len(names):
        raise CheckpointError(
            f"adapter {source} is a list of {len(tensors)} tensors, but {2 * len(names)} are expected: A and B of the "
            f"{len(names)} modules of {base.name} that match {', '.join(targets)}; use the base and "
            "targets that it was made for"
        )


def _checked(name: str, a: Tensor, b: Tensor, place: int, base: Base, settings: Settings) -> Delta:
    out, into = base.layers[name][:2]
    rank = settings.rank
    if a.shape != (rank, into) or b.shape != (out, rank):
        raise CheckpointError(
            f"adapter {settings.source} has shapes {tuple(a.shape)} and {tuple(b.shape)} at places {place} and "
            f"{place + 1}, where {name} needs A {(rank, into)} and B {(out, rank)}; its rank, order or base is another"
        )
    return delta_of(name, a, b, settings)


def _warnings(modules: Mapping[str, Delta], source: str) -> tuple[str, ...]:
    """Zero B matrices here and there are right where a model discards an output, such as SD3's last text queries."""
    zero = [name for name, delta in modules.items() if not bool(delta.b.any())]
    if not zero or len(zero) == len(modules):  # all is an error of its own
        return ()
    return (f"adapter {source} changes {len(zero)} of its {len(modules)} modules by nothing, such as {zero[0]}",)
