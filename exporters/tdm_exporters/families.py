"""The families that can be exported: where each one's parts are described. Only the chosen one is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tdm_exporters.parts import Limits, Part
from tdm_serve.models.families.base import Family


@dataclass(frozen=True, slots=True)
class Exportable:
    """A family's description. `shortens`: whether its pictures are the same with less padding behind the prompt."""

    place: str  # module of the exporters, with `parts_of(model, limits)`
    shortens: bool = True

    def parts_of(self, model: Family, limits: Limits) -> list[Part]:
        """The graphs of a loaded checkpoint, smallest first. Raises InvalidRequest for sizes that no graph takes."""
        create: Callable[[Any, Limits], list[Part]] = import_module(self.place).parts_of
        return create(model, limits)


EXPORTABLE = {
    "zimage": Exportable("tdm_exporters.zimage"),
    "sd3": Exportable("tdm_exporters.sd3", shortens=False),
}
