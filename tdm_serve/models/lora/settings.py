"""Rank and alpha of every module, from what the file says and what its user states beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from tdm_serve.errors import CheckpointError, ConfigError

# PEFT settings that make a LoRA compute something else than scale * B A on the untouched base
OTHER_MATHS = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "target_parameters", "layer_replication", "arrow_config",
    "alora_invocation_tokens", "trainable_token_indices", "modules_to_save", "corda_config", "loftq_config",
)  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that move a part of the base


@dataclass(frozen=True, slots=True)
class Stated:
    """What the user or the catalogue knows of an adapter that its file may not say. None is: as the file says."""

    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()  # of an unnamed list

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; it must be at least 1")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ConfigError(f"alpha is {self.alpha}; it must be a positive number")


@dataclass(frozen=True, slots=True)
class Settings:
    """A LoRA's configuration as PEFT means it; patterns are regular expressions for the ends of module names."""

    source: str
    rank: int | None = None
    alpha: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])
    alphas: Mapping[str, float] = field(default_factory=dict[str, float])
    rslora: bool = False
    targets: Sequence[str] | str = ()

    def scale(self, name: str, rank: int, own: float | None = None) -> float:
        """alpha / r of one module (alpha / sqrt(r) of an rsLoRA); `own` is an alpha that the file holds for it alone.

        Where nobody says an alpha it is r, as in stock diffusers. Raises CheckpointError for another rank than said.
        """
        said = _matching(self.ranks, name, self.rank)
        if said is not None and said != rank:
            raise CheckpointError(
                f"adapter {self.source} has rank {rank} at {name}, but rank {said:g} was stated; state the file's"
            )
        alpha = own if own is not None else _matching(self.alphas, name, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (rank**0.5 if self.rslora else rank)


def _matching(patterns: Mapping[str, float], name: str, default: float | None) -> float | None:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def settings_of(config: Mapping[str, Any], source: str, stated: Stated) -> Settings:
    """From a PEFT configuration, which may be empty. Raises CheckpointError for kinds of LoRA that are not read."""
    _check_kind(config, source)
    try:
        found = Settings(
            source,
            rank=int(config["r"]) if config.get("r") is not None else None,
            alpha=float(config["lora_alpha"]) if config.get("lora_alpha") is not None else None,
            ranks={str(key): int(value) for key, value in dict(config.get("rank_pattern") or {}).items()},
            alphas={str(key): float(value) for key, value in dict(config.get("alpha_pattern") or {}).items()},
            rslora=bool(config.get("use_rslora")),
            targets=_targets(config),
        )
        for pattern in (*found.ranks, *found.alphas):
            re.compile(pattern)
    except (TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"adapter {source} has unusable metadata: {error!r}") from error
    return _with_stated(found, stated)


def _targets(config: Mapping[str, Any]) -> Sequence[str] | str:
    """What the adapter must be complete for; nothing where the configuration takes some of it back again."""
    targets = config.get("target_modules") or ()
    if targets == "all-linear" or config.get("exclude_modules") or config.get("layers_to_transform") is not None:
        return ()
    return targets if isinstance(targets, str) else [str(one) for one in cast(Sequence[Any], targets)]


def _with_stated(found: Settings, stated: Stated) -> Settings:
    for what, said, file in (("rank", stated.rank, found.rank), ("alpha", stated.alpha, found.alpha)):
        if said is not None and file is not None and said != file:
            raise ConfigError(f"{what} {said:g} was stated, but adapter {found.source} says {file:g}; leave it out")
    rank = stated.rank if found.rank is None else found.rank
    alpha = stated.alpha if found.alpha is None else found.alpha
    return Settings(found.source, rank, alpha, found.ranks, found.alphas, found.rslora, found.targets)


def _check_kind(config: Mapping[str, Any], source: str) -> None:
    kind, start = str(config.get("peft_type") or "LORA"), config.get("init_lora_weights")
    odd = [key for key in OTHER_MATHS if config.get(key)]
    if kind.removeprefix("PeftType.") != "LORA":
        odd = [f"peft_type {kind}"]
    elif isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        odd = [f"init_lora_weights {start}, which changes the base as well"]
    if odd:
        raise CheckpointError(
            f"adapter {source} is no plain LoRA ({odd[0]}); merge it into its base with the library that made it, and "
            "use the merged model"
        )
